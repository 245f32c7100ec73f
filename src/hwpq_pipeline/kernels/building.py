"""A C++ source compiled once for this machine by torch, and kept in torch's cache of extensions.

    <root>/<name>_<digest>/      TORCH_EXTENSIONS_DIR, or ~/.cache/torch_extensions
        <name>.so                whole: moved here when it was compiled
        <name>.so.sha256         of its bytes, written last: with it the build is finished
        build.lock               held by the process that compiles; the system frees it when that process dies
        build-…/                 where torch compiles, and its own lock; what a killed process leaves is removed

A finished build is loaded without writing, so a cache may be read-only. One whose bytes are not those of its digest (a
file that was cut) is compiled again: to load it would end the process. torch's lock alone is a file that stays when its
process is killed, and the next process waits for ever.

It needs a C++ compiler and ninja. Nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from hwpq_pipeline.errors import HwpqError

#: Seconds to wait for another process that compiles. It takes half a minute, more on a busy machine.
PATIENCE = 600.0
_CACHE = "TORCH_EXTENSIONS_DIR"


def load_compiled(name: str, source: Path, flags: Sequence[str], *, where: str) -> Path:
    """Load a source's library into this process, compiled if no finished build of it is in the cache.

    Args:
        name: the library's.
        source: a file of C++.
        flags: of the compiler.
        where: what it is for people, for errors.

    Returns:
        The library.

    Raises:
        HwpqError: it does not compile, the cache cannot be written, or another process does not end its build.
    """
    place = cache_root() / f"{name}_{_digest(source, flags)}"
    library = place / f"{name}.so"
    try:
        if not is_finished(library):
            place.mkdir(parents=True, exist_ok=True)
            with FileLock(place / "build.lock", timeout=PATIENCE):
                if not is_finished(library):
                    _compile(name, source, flags, library, where)
        torch.ops.load_library(library)
    except Timeout as error:
        raise HwpqError(
            f"another process compiles it and holds {error.lock_file}",
            where=where,
            remedy="Wait for that process, or end it.",
        ) from error
    except OSError as error:
        raise HwpqError(
            f"its cache {place} cannot be used ({error.strerror or _reason(str(error))})",
            where=where,
            remedy=f"Let {_CACHE} name a folder that you may write to.",
        ) from error
    return library


def cache_root() -> Path:
    """Where torch keeps compiled extensions."""
    from torch.utils.cpp_extension import get_default_build_root

    return Path(os.environ.get(_CACHE) or get_default_build_root())


def is_finished(library: Path) -> bool:
    """Whether a library is there, with the bytes that were compiled."""
    try:
        wanted = _signature(library).read_text(encoding="ascii").strip()
        return hashlib.sha256(library.read_bytes()).hexdigest() == wanted
    except (OSError, ValueError):
        return False


def _signature(library: Path) -> Path:
    return library.with_name(f"{library.name}.sha256")


def _compile(name: str, source: Path, flags: Sequence[str], library: Path, where: str) -> None:
    """Compile in a folder of its own, then move the library in and sign it; the lock is held."""
    for left in library.parent.glob("build-*"):
        shutil.rmtree(left, ignore_errors=True)
    # A new name each time: torch skips a build in a folder that this process has tried already.
    folder = Path(tempfile.mkdtemp(prefix="build-", dir=library.parent))
    try:
        made = _by_torch(name, source, flags, folder, where)
        _signature(library).unlink(missing_ok=True)
        digest = hashlib.sha256(made.read_bytes()).hexdigest()
        made.replace(library)
        (folder / "digest").write_text(digest, encoding="ascii")
        (folder / "digest").replace(_signature(library))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _by_torch(name: str, source: Path, flags: Sequence[str], folder: Path, where: str) -> Path:
    """The library in `folder`, already loaded."""
    from torch.utils.cpp_extension import load

    _find_ninja()
    try:
        made = load(name, [str(source)], extra_cflags=list(flags), build_directory=str(folder), is_python_module=False)
    except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
        raise HwpqError(
            f"it does not compile ({_reason(str(error))})",
            where=where,
            remedy="Install g++ and ninja, or take the default kernel.",
        ) from error
    return Path(made)


def _reason(said: str) -> str:
    """The compiler's first complaint in what torch and ninja say around it, in at most 200 characters."""
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["no reason is given"]
    complaint = re.compile(r"\berror\b.*:|not found|no such file|no space|cannot|denied|killed", re.IGNORECASE)
    found = next((line for line in lines[1:] if complaint.search(line)), lines[-1] if len(lines) > 1 else lines[0])
    return found[:200].rstrip(" .:")


def _find_ninja() -> None:
    """Put the package's ninja where torch looks for it: not every Python is started with its folder in PATH."""
    if importlib.util.find_spec("ninja") is not None and shutil.which("ninja") is None:
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def _digest(source: Path, flags: Sequence[str]) -> str:
    """Of all that decides on the code: one for another processor must not run here."""
    try:
        found = (line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
        processor = next(found)
    except (OSError, StopIteration):
        processor = platform.processor()
    parts = [*flags, processor, platform.machine(), torch.__version__, str(sysconfig.get_config_var("SOABI"))]
    return hashlib.sha256(source.read_bytes() + "\n".join(parts).encode()).hexdigest()[:12]
