"""The model card (`README.md`) of an export: what it is, what it was made from, how to load and remake it.

The same variant gives the same card, byte for byte: no times, no durations, no paths of the machine it was
made on. Measured quality is not in it, because an export is evaluated after it is written; `with_quality` puts
it into a copy of the card.

The metadata block on top is what hubs read. It is built and parsed back by `huggingface_hub`'s own classes;
the hub's full validation is a web service, so the rules that can be checked without it are checked here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hwpq_pipeline.errors import HwpqError

_LICENSE = re.compile(r"^[a-z0-9][a-z0-9.\-]*$")
_GRIDS = {
    "fp8_e4m3": "8-bit floating point (E4M3) weights, one scale per output channel; activations are "
    "rounded to FP8 per token while the model runs",
    "fp8_e5m2": "8-bit floating point (E5M2) weights with a power-of-two scale per output channel, stored as "
    "E4M3, which holds them exactly; activations are rounded to FP8 per token while the model runs",
    "int8": "8-bit integer weights, one scale per output channel; activations are rounded to INT8 per token "
    "while the model runs",
    "int4": "4-bit integer weights, packed, one scale per group of columns; activations are not quantized",
}
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
        grid: `fp8_e4m3`, `fp8_e5m2`, `int8`, `int4`, or None.
        structure: `2of4`, `unstructured` or `dense`.
        parameters: the variant's parameters, nested mappings allowed.
        calibration: what the statistics were taken from (text, samples, length, seed); empty if none was
            used.
        command: the command that makes this export again.
        format: what it is stored as: a key of `LOADING`.
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
    format: str = "compressed-tensors"


def render_card(info: CardInfo) -> str:
    """The card's text: a YAML block and Markdown, checked.

    Raises:
        HwpqError: the licence is no licence id, or the text is not a card.
    """
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=info.base_model if _is_repo_id(info.base_model) else None,
        library_name=LIBRARIES[info.format],
        license=info.license or "other",
        license_name=None if info.license else "unknown",
        pipeline_tag="text-generation",
        tags=_tags(info),
        base_model_relation=_relation(info),
    )
    metadata = {key: data.to_dict()[key] for key in sorted(data.to_dict())}
    text = f"---\n{_yaml(metadata)}---\n\n{_body(info)}"
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


def with_quality(card: str, metrics: Mapping[str, Any]) -> str:
    """A card with the table of what was measured, before the section on loading.

    Args:
        card: as `render_card` gave it.
        metrics: `perplexity`, `dense_perplexity`, `kl_divergence` (nats), `top1_agreement` and `sparsity` (0 to 1),
            `size_bytes`, `dense_bytes`, `evaluation_samples` and `evaluation_length`.

    Raises:
        HwpqError: a card without a section on loading, or metrics that are not whole.
    """
    before, heading, after = card.partition("\n## How to load\n")
    try:
        figures = [
            ("perplexity", f"{metrics['dense_perplexity']:.2f}", f"{metrics['perplexity']:.2f}"),
            ("KL divergence from the dense model, nats a token", "0", f"{metrics['kl_divergence']:.4f}"),
            ("same likeliest token as the dense model", "100 %", f"{metrics['top1_agreement']:.1%}".replace("%", " %")),
            ("zero weights in the linear layers", "", f"{metrics['sparsity']:.1%}".replace("%", " %")),
            ("megabytes of weights", f"{metrics['dense_bytes'] / 1e6:.1f}", f"{metrics['size_bytes'] / 1e6:.1f}"),
        ]
        tokens = f"{metrics['evaluation_samples']} × {metrics['evaluation_length']} tokens"
    except KeyError as error:
        raise HwpqError(f"no metric {error}", where="model card", remedy="Run the evaluate pipeline again.") from error
    if not heading:
        raise HwpqError("no section on loading", where="model card", remedy="Run the export pipeline again.")
    rows = "\n".join(f"| {' | '.join(row)} |" for row in figures)
    note = (
        f"Measured on {tokens} of text not used for calibration, from the compressed-tensors export of these weights."
    )
    return f"{before}\n## Quality\n\n{note}\n\n| | dense | this |\n|---|---|---|\n{rows}\n{heading}{after}"


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


def _tags(info: CardInfo) -> list[str]:
    tags = ["hwpq"]
    if info.grid or info.format != "compressed-tensors":  # without a grid that is a plain checkpoint
        tags.append(info.format)
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


def _body(info: CardInfo) -> str:
    parts = [
        f"# {info.base_model}, compressed: {info.variant}",
        info.description.strip(),
        "## What was done",
        _method(info),
        f"Licence of the base model: {info.license or 'not known; ask its publisher'}.",
    ]
    if info.structure != "dense":
        parts.append(
            "Pruned and, where the parameters say so, recovered by masked least squares on the layers' "
            "inputs (HWPQ, arXiv 2501.16376)." + _zeros(info)
        )
    if info.parameters:
        parts += ["## Parameters", f"```yaml\n{_yaml(info.parameters)}```"]
    parts += ["## Calibration data", _table(info.calibration) if info.calibration else "None was used."]
    parts += ["## How to load", LOADING[info.format](info)]
    if info.command:
        parts += ["## How to make it again", f"```bash\n{info.command.strip()}\n```"]
    return "\n\n".join(parts) + "\n"


def _zeros(info: CardInfo) -> str:
    if info.format == "semi-structured":
        return ""
    return " Zeros are stored like other weights; engines run the model as a dense one."


def _method(info: CardInfo) -> str:
    changed = bool(info.grid) or info.structure != "dense"
    return (
        f"From `{info.base_model}`, in the linear layers of its decoder blocks "
        f"({'nothing else is changed' if changed else 'here unchanged'}):\n\n"
        f"- {_STRUCTURES.get(info.structure, info.structure)}\n"
        f"- {_GRIDS[info.grid] if info.grid else 'weights keep their number format'}"
    )


def _table(values: Mapping[str, Any]) -> str:
    rows = "\n".join(f"| {key} | {value} |" for key, value in values.items())
    return f"| | |\n|---|---|\n{rows}"


def _load_checkpoint(info: CardInfo) -> str:
    needs = "pip install transformers compressed-tensors" if info.grid else "pip install transformers"
    return (
        f"```bash\n{needs}\n```\n\n```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")\n```\n\n'
        "The layout is the one that vLLM reads too: `vllm serve path/to/this/directory`."
    )


def _load_gguf(info: CardInfo) -> str:
    rounded = (
        "\n\nGGUF has no 8-bit floats: the weights are those of the FP8 variant rounded once more to Q8_0 (steps of "
        "1/127 of the largest of 32), or kept as F16; the file's name says which."
        if str(info.grid).startswith("fp8")
        else ""
    )
    return (
        "```bash\nllama-cli -m path/to/this/directory/model-*.gguf            # llama.cpp\n"
        'echo "FROM ./path/to/this/directory/model-<type>.gguf" > Modelfile  # Ollama\n'
        "ollama create my-model -f Modelfile && ollama run my-model\n```\n\n"
        "Tokenizer and chat template are in the file. llama.cpp rounds activations in its own way, whatever the "
        f"variant says of them.{rounded}"
    )


def _load_packed(_info: CardInfo) -> str:
    return (
        "No other engine reads this format.\n\n"
        "```bash\npip install .   # in a checkout of hwpq-pipeline\n```\n\n```python\n"
        "from hwpq_pipeline.runtime import load_packed\n"
        "from transformers import AutoTokenizer\n\n"
        'model = load_packed("path/to/this/directory")   # on the CPU\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")\n```\n\n'
        "The zeros are not stored: of every four weights there are two values and their places."
    )


def _load_onnx(_info: CardInfo) -> str:
    return (
        "```bash\npip install onnxruntime transformers\n```\n\n```python\n"
        "import onnxruntime\n"
        "from transformers import AutoTokenizer\n\n"
        'session = onnxruntime.InferenceSession("path/to/this/directory/model.onnx")\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")\n```\n\n'
        "Inputs are `input_ids`, `attention_mask` and `past_key_values.<block>.{key,value}`, outputs `logits` and "
        "`present.<block>.{key,value}`. Activations are not rounded by the graph."
    )


#: By format: the hub's name of the library, and what the section on loading says.
LIBRARIES = {"compressed-tensors": "transformers", "gguf": "gguf", "semi-structured": "hwpq-pipeline", "onnx": "onnx"}
LOADING = {
    "compressed-tensors": _load_checkpoint,
    "gguf": _load_gguf,
    "semi-structured": _load_packed,
    "onnx": _load_onnx,
}
