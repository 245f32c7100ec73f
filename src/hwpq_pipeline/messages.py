"""What a user is told of an error that ended a run: one line for each mistake, or nothing where no user can mend it."""

from __future__ import annotations

import errno
import re
import traceback

from kedro.config import MissingConfigException
from kedro.validation.exceptions import DataValidationError, ParameterValidationError
from omegaconf.errors import OmegaConfBaseException

from hwpq_pipeline.configuration import folders_of, located, near
from hwpq_pipeline.errors import HwpqError, first_line

#: Modules of Kedro that read the command's arguments.
_RUNS = re.compile(r"kedro\.(framework\.(cli|session|project)|pipeline|runner|config|io)")
#: What a user can do about the machine's errors.
_REMEDIES = {
    errno.ENOSPC: "Free some space, and run it again: what is whole is kept.",
    errno.EACCES: "Give yourself the right to write there.",
    errno.EROFS: "The disk is read-only: mount it for writing, or run the project elsewhere.",
    errno.ENOTDIR: "A file stands where a folder is wanted: remove it.",
    errno.EISDIR: "A folder stands where a file is wanted: remove it.",
    errno.EEXIST: "A file stands where a folder is wanted: remove it.",
}
_RUNNERS = ("SequentialRunner", "ThreadRunner", "ParallelRunner")


def explain(error: BaseException, env: str | None = None) -> list[str]:
    """Lines that tell the user what to mend; none for an error that the user cannot mend.

    Args:
        error: the error that ended the run.
        env: the run's Kedro environment.
    """
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for link in chain:
        if isinstance(link, HwpqError):
            return [str(link)]
        if isinstance(link, ExceptionGroup) and all(isinstance(part, HwpqError) for part in link.exceptions):
            return [str(part) for part in link.exceptions]
        if isinstance(link, ParameterValidationError):
            return _parameter_lines(str(link), env)
        if isinstance(link, DataValidationError):
            return [" ".join(str(link).split())]
        if isinstance(link, ValueError) and (found := re.search(r"following namespaces: (.+)$", str(link))):
            return [f"{found[1]}: no such variant. Use one of {', '.join(_known_variants())}, as variants.<name>"]
        if isinstance(link, OmegaConfBaseException):
            path = tuple(str(getattr(link, "full_key", None) or "conf").split("."))
            return [str(located(path, " ".join(first_line(link).split()), env))]
    return _of_others(chain, env)


def _of_others(chain: list[BaseException], env: str | None) -> list[str]:
    """What the system, or Kedro of its arguments, says."""
    for link in chain:
        if isinstance(link, MissingConfigException):
            try:
                folders_of(env)
            except HwpqError as missing:
                return [str(missing)]
        if isinstance(link, OSError) and link.errno in _REMEDIES:
            return [_of_the_system(link)]
        if "No space left on device" in str(link):  # safetensors keeps no number
            return [_of_the_system(OSError(errno.ENOSPC, "No space left on device"))]
    if (said := next(filter(None, map(_of_kedro, chain)), None)) is not None:
        return [said]
    return []


def _known_variants() -> list[str]:
    from hwpq_pipeline.project import variant_names

    return variant_names()


def _of_the_system(error: OSError) -> str:
    """A disk that is full, a folder that is read-only, a file where a folder is wanted."""
    where = str(error.filename or "data")
    said = (error.strerror or first_line(error)).rstrip(".")
    return str(HwpqError(said.lower(), where=where, remedy=_REMEDIES[error.errno or 0]))


def _of_kedro(error: BaseException) -> str | None:
    """What Kedro itself says of its arguments, with the nearest name; None if the error arose elsewhere."""
    frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    if not frames or not frames[-1].startswith(("kedro.", "importlib")) or not any(map(_RUNS.match, frames)):
        return None
    said = " ".join(str(error).split())[:300].rstrip(".")
    words = re.findall(r"'([\w.\-:]+)'", said) or [said]
    from kedro.framework.project import pipelines

    whole = pipelines["__default__"]
    known = [*pipelines, *(node.name for node in whole.nodes), *whole.datasets(), *_RUNNERS]
    hints = [hint for word in words if word not in known and (hint := near(word, known))]
    return str(HwpqError(said, where="kedro run", remedy=hints[0] if hints else ""))


def _parameter_lines(message: str, env: str | None) -> list[str]:
    """Pydantic's report, a line a mistake: `conf/base/quality_gates.yml:9: quality_gates.variants.fp8: …`."""
    lines: list[str] = []
    for part in re.split(r"\n- (?=Parameter ')", message)[1:]:
        name = re.match(r"Parameter '([^']+)'", part)
        where = name[1] if name else "parameters"
        details = re.findall(r"\n([\w.-]+)?\n?  (.+?)(?: \[type=.*)?(?=\n|$)", part)
        problems = [(field, text) for field, text in details if not text.lstrip().startswith("For further")]
        if not problems:
            lines.append(" ".join(part.split()))
        for field, text in problems:
            path = ".".join(filter(None, (where.removeprefix("params:"), field)))
            lines.append(str(located(tuple(path.split(".")), text.strip().removeprefix("Value error, "), env)))
    return list(dict.fromkeys(lines))
