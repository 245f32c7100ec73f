"""The configuration's files, read strictly before anything uses them, and the whole of it checked before a run.

Kedro's loader reads YAML with OmegaConf: a key that stands there twice, a list where keys are wanted, a tag or a tower
of anchors ends in its own machinery's traceback, or hangs. So every file of the folders that count is composed here
first (nothing is built from it, so no tag runs), with limits on its size and on what its anchors expand to. Then the
merged parameters are checked section by section, also those that the asked pipelines do not read: a mistake is told
before the first computation and not after an hour. Each mistake is one line with its file and line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.parameters import SECTIONS
from hwpq_pipeline.variant import Variant

#: Sections that are no class of `parameters`: a table of variants, and the limits that pipeline `gate` checks itself.
OTHERS = ("variants", "quality_gates")
MOST_BYTES, MOST_VALUES, MOST_DEPTH = 1_000_000, 100_000, 100
_TAGS = frozenset(
    f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map", "merge")
)
_PATTERNS = ("parameters*.yml", "quality_gates*.yml")


def folders_of(env: str | None, conf: Path = Path("conf")) -> list[Path]:
    """The folders that count in an environment, the one that wins first.

    Raises:
        HwpqError: there is no such environment.
    """
    chosen, base = conf / (env or "local"), conf / "base"
    for folder in (chosen, base):
        if not folder.is_dir():
            known = sorted(path.name for path in conf.iterdir() if path.is_dir()) if conf.is_dir() else []
            remedy = f"Use one of {', '.join(known)}. {near(env or '', known)}"
            raise HwpqError("no such environment", where=str(folder), remedy=remedy)
    return [chosen, base] if chosen != base else [base]


def check_files(env: str | None) -> None:
    """Read every YAML file that counts in an environment.

    Raises:
        HwpqError: no such environment, or a file that is no plain mapping of YAML.
    """
    for folder in folders_of(env):
        for file in sorted((*folder.rglob("*.yml"), *folder.rglob("*.yaml"))):
            read_yaml(file)


def read_yaml(file: Path) -> yaml.MappingNode | None:
    """A YAML file's nodes, which know their lines; None if it is empty.

    Raises:
        HwpqError: it is no UTF-8, no YAML, no mapping; a key stands twice or is no name; a tag, or anchors that expand
            to too much.
    """
    try:
        raw = file.read_bytes()
        if len(raw) > MOST_BYTES:
            raise _wrong(file, None, f"{len(raw)} bytes, and {MOST_BYTES} is the most")
        root = yaml.compose(raw.decode("utf-8"), Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise _wrong(file, line, f"not UTF-8 text (byte {error.start})") from error
    except yaml.reader.ReaderError as error:
        line = raw[: error.position].count(b"\n") + 1
        raise _wrong(file, line, f"a character that YAML does not allow ({error.reason})") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = " ".join(filter(None, (error.context, error.problem)))
        raise _wrong(file, mark.line + 1 if mark else None, f"not valid YAML ({said})") from error
    except RecursionError as error:
        raise _wrong(file, None, "nested too deeply") from error
    except OSError as error:
        raise _wrong(file, None, f"cannot be read ({error.strerror})") from error
    if root is None:
        return None
    if not isinstance(root, yaml.MappingNode):
        raise _wrong(file, root.start_mark.line + 1, "not a list of `key: value` entries")
    _values(root, file, {}, ())
    return root


def _values(node: yaml.Node, file: Path, counted: dict[int, int], above: tuple[int, ...]) -> int:
    """Values that a node stands for, its anchors expanded; each node is looked at once.

    Raises:
        HwpqError: as `read_yaml`.
    """
    if id(node) in counted:
        return counted[id(node)]
    line = node.start_mark.line + 1
    if id(node) in above or len(above) > MOST_DEPTH:
        raise _wrong(file, line, "an anchor that holds itself" if id(node) in above else "nested too deeply")
    if node.tag not in _TAGS:
        raise _wrong(file, line, f"the tag {node.tag.replace('tag:yaml.org,2002:', '!!')} is not allowed")
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        _check_keys(node, file)
        parts = [value for _, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        parts = node.value
    total = 1
    for part in parts:
        total += _values(part, file, counted, (*above, id(node)))
        if total > MOST_VALUES:
            raise _wrong(file, line, f"its anchors expand to more than {MOST_VALUES} values")
    counted[id(node)] = total
    return total


def _check_keys(node: yaml.MappingNode, file: Path) -> None:
    seen: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if key.tag == "tag:yaml.org,2002:merge":
            continue
        if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
            raise _wrong(file, line, f"{getattr(key, 'value', 'a list')!r} is no name. Put it in quotes, if it is one")
        if key.value in seen:
            raise _wrong(file, line, f"key {key.value!r} stands in line {seen[key.value]} already")
        seen[key.value] = line


def _wrong(file: Path, line: int | None, what: str) -> HwpqError:
    return HwpqError(what, where=f"{file}:{line}" if line else str(file), remedy="Mend the file.")


def mistakes(parameters: Mapping[str, Any], env: str | None) -> list[HwpqError]:
    """Everything that is wrong with the merged parameters, each with its file and line.

    Args:
        parameters: as the environment and the command line give them.
        env: the environment; None for `local`.
    """
    known = [*SECTIONS, *OTHERS]
    found = [located((name,), "no such section", env, near(name, known)) for name in parameters if name not in known]
    for name, section in SECTIONS.items():
        if name in parameters:
            found += _validated((name,), section, parameters[name], env)
        else:
            found.append(HwpqError("the section is missing", where=f"conf: {name}", remedy="Take it from conf/base."))
    variants = parameters.get("variants")
    for name, entry in (variants if isinstance(variants, Mapping) else {}).items():
        if isinstance(entry, Mapping):  # else `project.variant_names` says so
            found += _validated(("variants", str(name)), Variant, entry, env)
    return found


#: What the validator's words on a wrong shape mean in YAML, and the remedy.
_NO_SECTION = ("not a section", "Write its keys below it, or `{}` for all defaults.")
_NO_LIST = ("not a list", "Write it in brackets: `[…]`.")
_MEANT = dict.fromkeys(("model_type", "model_attributes_type"), _NO_SECTION)
_MEANT |= dict.fromkeys(("tuple_type", "list_type"), _NO_LIST)


def _validated(path: tuple[str, ...], section: type[BaseModel], values: Any, env: str | None) -> Iterator[HwpqError]:
    try:
        section.model_validate(values)
    except ValidationError as error:
        for problem in error.errors():
            loc = tuple(map(str, problem["loc"]))
            message, remedy = problem["msg"].removeprefix("Value error, "), ""
            if problem["type"] == "extra_forbidden":
                message, remedy = "no such key", near(loc[-1], _fields(section, loc[:-1]))
            elif problem["type"] in _MEANT:
                message, remedy = _MEANT[problem["type"]]
            yield located((*path, *loc), message, env, remedy)


def _fields(section: type[BaseModel], loc: Sequence[str]) -> list[str]:
    """Names of the keys that a section, or a part of it, has."""
    for name in loc:
        field = section.model_fields.get(name)
        kinds = [] if field is None else [field.annotation, *get_args(field.annotation)]
        inner = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if inner is None:
            return []
        section = inner
    return list(section.model_fields)


def near(word: str, known: Sequence[str]) -> str:
    """`Did you mean …?` with the nearest of the known words, or nothing."""
    matches = get_close_matches(word, known, n=1, cutoff=0.6)
    return f"Did you mean {matches[0]}?" if matches else ""


def located(path: tuple[str, ...], message: str, env: str | None, remedy: str = "") -> HwpqError:
    """A mistake in the configuration: the line in the YAML, the parameter, what is wrong."""
    where = f"{find_line(path, env) or 'conf'}: {'.'.join(path)}"
    return HwpqError(message.rstrip("."), where=where, remedy=remedy)


def find_line(path: Sequence[str], env: str | None) -> str | None:
    """The line of a parameter, or of the nearest entry above it: `conf/base/parameters_variants.yml:12`.

    Args:
        path: keys from the outermost, `("variants", "fp8", "quantization", "grid")`.
        env: the environment. The file that has more of the path counts; of two, the one that wins.

    Returns:
        File and line, counted from 1; None if no file has the outermost key.
    """
    best: tuple[int, str] | None = None
    for folder in folders_of(env):
        for file in sorted(file for pattern in _PATTERNS for file in folder.glob(pattern)):
            depth, line = _deepest(read_yaml(file), path)
            if depth and (best is None or depth > best[0]):
                best = (depth, f"{file}:{line}")
    return best[1] if best else None


def _deepest(node: yaml.Node | None, path: Sequence[str]) -> tuple[int, int]:
    """How many keys of the path exist, and the line of the last."""
    depth = line = 0
    for key in path:
        entries = node.value if isinstance(node, yaml.MappingNode) else ()
        found = next(((name, value) for name, value in entries if name.value == key), None)
        if found is None:
            break
        depth, line, node = depth + 1, found[0].start_mark.line + 1, found[1]
    return depth, line
