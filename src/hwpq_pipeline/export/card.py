"""The model card (`README.md`) of an export: what it is, what it was made from, how to load it and make it again.

The same variant gives the same card, byte for byte: no times, no durations, no paths of the machine that made it.
Measured quality is not in it, because an export is evaluated after it is written. `measured` puts it into a copy of the
card.

Hubs read the metadata block on top. `huggingface_hub`'s own classes build it and parse it back. The hub's full
validation is a web service, so the rules that can be checked without it are checked here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hwpq_pipeline.checkpoints.writer import write_text
from hwpq_pipeline.compression.grids import GRIDS
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.inert import markdown

_LICENSE = re.compile(r"^[a-z0-9][a-z0-9.\-]*$")
_ZEROS = " Zeros are stored like other weights; engines run the model as a dense one."
_STRUCTURES = {
    "2of4": "two of every four consecutive inputs are zero (2:4)",
    "unstructured": "weights are zero wherever they contribute least (no pattern)",
    "dense": "no weight was removed",
}


@dataclass(frozen=True)
class CardInfo:
    """What the card says.

    Attributes:
        variant: the variant's name.
        description: one sentence on it.
        base_model: the dense model's name or hub id.
        license: the base model's licence id as hubs write it (`apache-2.0`); None when it is not known.
        grid: a name in `compression.grids.GRIDS`, or None.
        structure: `2of4`, `unstructured` or `dense`.
        parameters: the variant's parameters, nested mappings allowed.
        calibration: what the statistics were taken from (text, samples, length, seed); empty if none was used.
        command: the command that makes this export again.
        embeddings: the grid of the embedding and the head, or None.
        others: the other grids of its layers; then `parameters` say which layer has which.
        partly: whether some layers are treated otherwise than the rest.
        healed_tokens: how many tokens it was healed on at most; None if it was not.
    """

    variant: str
    description: str
    base_model: str
    license: str | None
    grid: str | None
    structure: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    embeddings: str | None = None
    others: tuple[str, ...] = ()
    partly: bool = False
    healed_tokens: int | None = None


@dataclass(frozen=True)
class Storage:
    """What the card says of a format.

    Attributes:
        tag: the hub's tag for the format.
        library: the hub's name of the library that loads it.
        how_to_load: gives the section on loading, Markdown, from what the card says.
        plain_without_grid: whether a variant without a grid is a plain checkpoint, which gets no tag.
        stores_zeros: whether pruned weights are stored as zeros.
    """

    tag: str
    library: str
    how_to_load: Callable[[CardInfo], str]
    plain_without_grid: bool = False
    stores_zeros: bool = True


def write_card(directory: Path, info: CardInfo | None, storage: Storage) -> None:
    """Write an export's card; without `info` it gets none.

    Raises:
        HwpqError: as `render_card`.
    """
    if info is not None:
        write_text(directory / "README.md", render_card(info, storage))


def render_card(info: CardInfo, storage: Storage) -> str:
    """The card's text: a YAML block and Markdown, checked.

    Args:
        info: of the variant.
        storage: of the format.

    Raises:
        HwpqError: the licence is no licence id, or the text is not a card.
    """
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=info.base_model if _is_repo_id(info.base_model) else None,
        library_name=storage.library,
        license=info.license or "other",
        license_name=None if info.license else "unknown",
        pipeline_tag="text-generation",
        tags=_tags(info, storage),
        base_model_relation=_relation(info),
    )
    metadata = {key: data.to_dict()[key] for key in sorted(data.to_dict())}
    text = f"---\n{_yaml(metadata)}---\n\n{_body(info, storage)}"
    check_card(text, where=f"model card of {info.variant}")
    return text


def check_card(text: str, where: str = "README.md") -> None:
    """Check a card as far as that is possible without the hub.

    Raises:
        HwpqError: no metadata block, metadata that is not YAML, or a field that hubs refuse.
    """
    from huggingface_hub import ModelCard

    remedy = "Mend the model's name, licence or description in the parameters."
    try:
        card = ModelCard(text)
    except ValueError as error:
        raise HwpqError(f"not a model card ({error})", where=where, remedy=remedy) from error
    data = card.data.to_dict()
    if not data:
        raise HwpqError("no metadata block at the top", where=where, remedy=remedy)
    if not _LICENSE.match(str(data.get("license", ""))):
        raise HwpqError(
            f"{data.get('license')!r} is no licence id",
            where=where,
            remedy="Write it as hubs do, in lower case: apache-2.0, mit, other.",
        )
    if data["license"] == "other" and not data.get("license_name"):
        raise HwpqError("license other wants a license_name", where=where, remedy=remedy)
    if "base_model" in data and not _is_repo_id(data["base_model"]):
        raise HwpqError(f"{data['base_model']!r} is no repository id", where=where, remedy=remedy)
    if not card.text.strip():
        raise HwpqError("no text below the metadata", where=where, remedy=remedy)


def _is_repo_id(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _relation(info: CardInfo) -> str | None:
    """Hubs know `quantized` and `finetune` (weights moved); a copy is neither."""
    if info.grid:
        return "quantized"
    return None if info.structure == "dense" else "finetune"


def _tags(info: CardInfo, storage: Storage) -> list[str]:
    tags = ["hwpq"]
    if info.grid or not storage.plain_without_grid:
        tags.append(storage.tag)
    if info.grid:
        tags.append(info.grid.partition("_")[0])
    if info.structure != "dense":
        tags += ["pruned", "2:4" if info.structure == "2of4" else "unstructured-sparsity"]
    return tags


def _yaml(value: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(_plain(value), sort_keys=False, allow_unicode=True, width=100)


def _plain(value: Any) -> Any:
    """Mappings and sequences as YAML knows them."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value


def _body(info: CardInfo, storage: Storage) -> str:
    parts = [
        f"# {markdown(info.base_model)}, compressed: {markdown(info.variant)}",
        markdown(info.description),
        "## What was done",
        _method(info),
        f"Licence of the base model: {markdown(info.license or 'not known; ask its publisher')}.",
    ]
    if info.structure != "dense":
        parts.append(
            "Pruned and, where the parameters say so, recovered by masked least squares on the layers' "
            "inputs (HWPQ, arXiv 2501.16376)." + (_ZEROS if storage.stores_zeros else "")
        )
    if info.parameters:
        parts += ["## Parameters", f"```yaml\n{_yaml(info.parameters)}```"]
    parts += ["## Calibration data", _table(info.calibration) if info.calibration else "None was used."]
    parts += ["## How to load", storage.how_to_load(info)]
    if info.command:
        parts += ["## How to make it again", f"```bash\n{info.command.strip()}\n```"]
    return "\n\n".join(parts) + "\n"


def _method(info: CardInfo) -> str:
    changed = bool(info.grid) or info.structure != "dense"
    some = " (in the layers that *Parameters* names)" if info.partly else ""
    pruned, rounded = info.structure != "dense", [_grid(grid) for grid in (info.grid, *info.others) if grid]
    return "\n".join(
        [
            (
                f"From {markdown(info.base_model)}, in the linear layers of its decoder blocks "
                f"({_elsewhere(info) if changed or info.embeddings else 'here unchanged'}):\n"
            ),
            f"- {_STRUCTURES.get(info.structure, info.structure)}{some if pruned else ''}",
            *(f"- {words}{some}" for words in rounded or ["weights keep their number format"]),
            *([_healed(info.healed_tokens)] if info.healed_tokens else []),
        ]
    )


def _elsewhere(info: CardInfo) -> str:
    found = []
    if info.healed_tokens:
        found.append("the norms of these blocks learnt as well")
    if info.embeddings is not None:
        found.append(f"the embedding and the head: {GRIDS[info.embeddings].words}, a row being a channel")
    return f"besides, {'; '.join(found)}" if found else "nothing else is changed"


def _healed(tokens: int) -> str:
    return (
        "- healed: with the mask fixed, the weights that are left learnt the dense model's next-token "
        f"distributions, on at most {tokens:,} tokens of the calibration text"
    )


def _grid(name: str) -> str:
    grid = GRIDS[name]
    activations = (
        f"activations are rounded to {grid.activations} per token while the model runs"
        if grid.activations
        else "activations are not quantized"
    )
    return f"{grid.words}; {activations}"


def _table(values: Mapping[str, Any]) -> str:
    rows = "\n".join(f"| {markdown(key)} | {markdown(value)} |" for key, value in values.items())
    return f"| | |\n|---|---|\n{rows}"
