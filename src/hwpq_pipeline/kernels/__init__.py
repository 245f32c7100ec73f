"""Fast kernels, a folder for each operation: `reference` is the readable oracle, `cpu` in numba, `cuda` in Triton.

Callers use the functions of an operation's `__init__` alone: its door. The door chooses by the device that the tensors
are on, and imports no more than it needs: a machine that works on a GPU needs no numba, and one without a GPU no
Triton. Three operations lack a file. `mask_descent` and `packed_linear` have no `cuda` yet: their doors copy tensors on
a GPU to the CPU and the result back (`devices.on_the_cpu`). `fp8` has no `cpu`: the CPU runs its reference, which is
plain torch. `packed_linear` has a second kernel for the CPU, `native`, in C++. `int8_linear` is torch's own kernel, in
one module.

The CPU kernels share three things: how they are compiled (`jit`), how rows are spread over cores (`over_rows`), and how
a weight is read without a copy (`flat_rows`).

**Compiling.** Machine code is cached beside the source, else in the user's cache directory, or where `NUMBA_CACHE_DIR`
points. If none of these can be written to, a kernel is compiled once a process. Numba forgets cached code when the
kernel's own file changes, but not when another file changes from which the kernel takes its inner loop or a constant.
`jit` makes the cache depend on the sources of all kernels. There is no fastmath: the results are defined to the bit.
(LLVM fuses no multiplication into an addition unless told to.) `contracted` compiles the kernels whose results are
defined by an objective.

**Threads.** The kernels are serial and release the GIL. Plain threads run them over chunks of rows. There are as many
threads as `numba.get_num_threads()` says (the cores, unless `NUMBA_NUM_THREADS` or `numba.set_num_threads` says less).
Chunks are taken one at a time, by the caller too, so a slow core does not hold up the rest. Callers may themselves be
threads or forked processes, which numba's own thread pools do not all allow.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["compiled", "flat_rows", "jit", "over_rows"]

#: Below this much work (one selected weight counts as one) threads cost more to start than they save: a 576 x 576 layer
#: took 121 us on one thread and 207 us on two. A chunk is at least an eighth of it.
SMALLEST_SHARED = 1 << 19


@functools.cache
def _sources() -> str:
    """A digest of every source below this folder."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def jit(function: Callable[..., Any]) -> Any:
    """Compile for the CPU: no GIL, numpy's error model, strict arithmetic, cached on disk where that is possible."""
    return compiled(function, fastmath=False)


def compiled(function: Callable[..., Any], *, fastmath: bool | set[str]) -> Any:
    """Compile for the CPU with these liberties of LLVM's; see `jit`."""
    import numba

    options = {"nogil": True, "error_model": "numpy", "fastmath": fastmath}
    try:
        found = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # numba found no directory that it may write to
        return numba.njit(**options)(function)
    # Numba offers no public way to widen what its cache depends on. Without this one, no cache is better than a stale
    # one.
    index = getattr(getattr(found, "_cache", None), "_cache_file", None)
    if not hasattr(index, "_source_stamp"):
        return numba.njit(**options)(function)
    index._source_stamp = (index._source_stamp, _sources())  # type: ignore[union-attr]  # noqa: SLF001
    return found


def over_rows(work: Callable[[int, int], None], rows: int, columns: int, block: int = 1) -> None:
    """Call `work(first, last)` over all rows, in chunks of whole blocks, on all of numba's threads.

    Args:
        work: does rows `first` to `last - 1`; it must not touch what other rows write.
        rows: how many there are.
        columns: the work in one row.
        block: chunk borders are multiples of it.
    """
    import numba

    threads = numba.get_num_threads()
    if threads == 1 or rows * columns < SMALLEST_SHARED:
        work(0, rows)
        return
    share = max(-(-rows // (threads * 8)), SMALLEST_SHARED // 8 // columns)
    chunk = -(-share // block) * block
    starts = iter(range(0, rows, chunk))  # taking the next of an iterator is atomic

    def drain() -> None:
        for first in starts:
            work(first, min(first + chunk, rows))

    helpers = [_pool().submit(drain) for _ in range(threads - 1)]
    try:
        drain()  # the caller works too: small layers are done before a helper wakes
    finally:
        for helper in helpers:
            if not helper.cancel():
                helper.result()


@functools.cache
def _pool() -> ThreadPoolExecutor:
    """The helping threads, started when first needed, and shared by all callers."""
    import numba

    return ThreadPoolExecutor(numba.config.NUMBA_NUM_THREADS, thread_name_prefix="kernels")


# Threads do not survive a fork: the child starts its own.
os.register_at_fork(after_in_child=_pool.cache_clear)


def flat_rows(weight: Tensor) -> tuple[np.ndarray[Any, Any], int]:
    """A weight's memory as a vector, and the distance between its rows: rows need not be next to each other.

    Args:
        weight: on the CPU, shape (out, in). float32 and bfloat16 are read where they lie if their columns are
            neighbours in memory; other dtypes are converted to float32, other layouts copied.

    Returns:
        `(flat, stride)`: row i is `flat[i * stride : i * stride + in]`; float32, or bfloat16's bits as uint16.
    """
    weight = weight.detach()
    if weight.dtype not in (torch.float32, torch.bfloat16):
        weight = weight.to(torch.float32)
    rows, columns = weight.shape
    if columns > 1 and weight.stride(1) != 1:
        weight = weight.contiguous()
    stride = weight.stride(0) if rows > 1 else columns
    flat = weight.as_strided(((rows - 1) * stride + columns,), (1,))
    if weight.dtype == torch.bfloat16:
        return flat.view(torch.int16).numpy().view(np.uint16), stride
    return flat.numpy(), stride
