"""The C++ kernel: the file beside this one, compiled for this machine when it is asked for (`kernels.building`)."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from hwpq_pipeline.kernels.building import load_compiled
from hwpq_pipeline.kernels.packed_linear.layout import fake

_FLAGS = ("-O3", "-march=native", "-fopenmp")


@functools.cache
def build() -> None:
    """Compile the native kernel if it is not in the cache, and define its ops in this process; once is enough.

    Raises:
        HwpqError: it cannot be compiled here.
    """
    load_compiled("hwpq_native", Path(__file__).with_name("native.cpp"), _FLAGS, where="the native kernel")
    torch.library.register_fake("hwpq_native::packed_linear", fake)
