"""The C++ kernel, compiled by torch for this machine when it is asked for, and kept in torch's cache of extensions.

It needs a C++ compiler and ninja. Nothing is downloaded. What is compiled is the file beside this one.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import sys
from pathlib import Path

import torch

from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.kernels.packed_linear.layout import fake

_SOURCE = Path(__file__).with_name("native.cpp")


@functools.cache
def build() -> None:
    """Compile the native kernel if it is not in the cache, and define its ops in this process; once is enough.

    Raises:
        HwpqError: it cannot be compiled here.
    """
    from torch.utils.cpp_extension import load

    _find_ninja()
    try:
        load(_name(), [str(_SOURCE)], extra_cflags=["-O3", "-march=native", "-fopenmp"], is_python_module=False)
    except (RuntimeError, OSError, ImportError) as error:
        raise HwpqError(
            f"it does not compile: {str(error).strip().splitlines()[-1]}",
            where="the native kernel",
            remedy="Install g++ and ninja, or take the default kernel.",
        ) from error
    torch.library.register_fake("hwpq_native::packed_linear", fake)


def _find_ninja() -> None:
    """Put the package's ninja where torch looks for it: not every Python is started with its folder in PATH."""
    if importlib.util.find_spec("ninja") is not None and shutil.which("ninja") is None:
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def _name() -> str:
    """A name of its own for each source and processor: code for one must not run on another."""
    try:
        flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        flags = platform.processor()
    digest = hashlib.sha256(_SOURCE.read_bytes() + flags.encode() + torch.__version__.encode()).hexdigest()
    return f"hwpq_native_{digest[:12]}"
