"""Section `ceilings`: what the card can do, measured: a large copy, and large products in each precision."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.timing import Bench


def run(bench: Bench) -> None:
    """A row each, with `ceiling` and `rate` (bytes or operations a second) for the sections after it."""
    with bench.guarded(section="ceilings", method="copy"):
        copy(bench, 1 << (16 if bench.dry else 30))
    side = 64 if bench.dry else 8192
    one, other = (torch.randn(side, side, device=bench.device) for _ in range(2))
    for name, dtype, tf32 in (
        ("bfloat16", torch.bfloat16, False),
        ("tf32", torch.float32, True),
        ("float32", torch.float32, False),
    ):
        with bench.guarded(section="ceilings", method=name):
            torch.backends.cuda.matmul.allow_tf32 = tf32
            a, b = one.to(dtype), other.to(dtype)
            product(bench, name, partial(torch.matmul, a, b), side)
    torch.backends.cuda.matmul.allow_tf32 = False
    with bench.guarded(section="ceilings", method="fp8"):
        a, b = one.to(torch.float8_e4m3fn), other.to(torch.float8_e4m3fn).T.contiguous().T
        unit = torch.ones((), device=bench.device)
        product(bench, "fp8", lambda: torch._scaled_mm(a, b, unit, unit, out_dtype=torch.bfloat16), side)  # noqa: SLF001


def copy(bench: Bench, size: int) -> None:
    """Bytes read and bytes written."""
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    seconds = statistics.median(bench.seconds(lambda: target.copy_(source)))
    note(bench, "copy", seconds, 2 * size, gigabytes_per_second=2 * size / seconds / 1e9)


def product(bench: Bench, name: str, work: Callable[[], Tensor], side: int) -> None:
    """A square product."""
    seconds = statistics.median(bench.seconds(work))
    note(bench, name, seconds, 2 * side**3, teraflops=2 * side**3 / seconds / 1e12)


def note(bench: Bench, name: str, seconds: float, amount: float, **rates: float) -> None:
    """The row, and the rate for rows of this process."""
    bench.ceilings[name] = amount / seconds
    bench.write(
        section="ceilings",
        method=name,
        ceiling=name,
        rate=amount / seconds,
        seconds=seconds,
        fraction_of_ceiling=1.0,
        **rates,
    )
