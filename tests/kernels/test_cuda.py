"""The CUDA kernels against the references: on a GPU where there is one, else under Triton's interpreter on the CPU.

The interpreter takes about a second for some hundred columns, so sizes are small. What it cannot show (types, layouts,
registers) the compiler can without a GPU: the last test builds every kernel for real ones.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: pip install 'hwpq-pipeline[cuda]'")

from hwpq_pipeline.compression.bits import pack_bits
from hwpq_pipeline.kernels.coordinate_descent import Walk
from hwpq_pipeline.kernels.coordinate_descent import cuda as descent
from hwpq_pipeline.kernels.coordinate_descent import reference as descent_reference
from hwpq_pipeline.kernels.ewma_select import Average
from hwpq_pipeline.kernels.ewma_select import cuda as ewma
from hwpq_pipeline.kernels.fp8 import cuda as fp8
from hwpq_pipeline.kernels.fp8 import reference as fp8_reference
from hwpq_pipeline.kernels.group_scale import cuda as scales
from hwpq_pipeline.kernels.group_scale import reference as scales_reference
from hwpq_pipeline.kernels.stored import Stored
from hwpq_pipeline.kernels.two_of_four import cuda as fours
from hwpq_pipeline.kernels.two_of_four import reference as fours_reference
from tests.kernels.cuda import DEVICE, DTYPES, NAN, factors, random, there

pytestmark = pytest.mark.usefixtures("poisoned")

SMALL = ewma.Tile(4, 32, 4, 2)
PLAIN = Average(alpha=1 / 64, beta=1 / 64, domain="sqrt")


# --- two of four


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 4), (3, 12), (5, 36), (2, 100)])
@pytest.mark.parametrize("crossed", [False, True])
def test_two_of_four_is_the_reference_to_the_bit(dtype: torch.dtype, rows: int, columns: int, crossed: bool) -> None:
    tile = fours.Tile(2, 32, 1)
    for weight in ((4 * random(rows, columns)).round(), random(rows, columns), torch.zeros(rows, columns)):
        parts = factors(rows, columns, crossed)
        keep, finite = fours.select(*there(weight.to(dtype), *parts), tile)
        assert bool(finite.all())
        assert torch.equal(keep.cpu(), pack_bits(fours_reference.select_two_of_four(weight.to(dtype), *parts)))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_two_of_four_names_rows_that_are_not_finite() -> None:
    weight = random(5, 68)
    weight[1, 3], weight[4, 67] = NAN, float("inf")
    _, finite = fours.select(*there(weight, *factors(5, 68)), fours.Tile(2, 32, 1))
    assert finite.tolist() == [True, False, True, True, False]


# --- addresses


@pytest.mark.parametrize("kernel", ["ewma", "two_of_four", "fp8"])
def test_rows_further_apart_than_32_bits_can_tell(kernel: str) -> None:
    """Two rows 2³¹ + 16 elements apart: a virtual 4 GiB, of which only the rows' pages are ever touched."""
    stride, columns = 2**31 + 16, 40
    memory = _untouched(stride + columns)
    weight = memory.as_strided((2, columns), (stride, 1))
    weight.copy_(random(2, columns))
    near, parts = weight.clone(memory_format=torch.contiguous_format), there(*factors(2, columns))
    far: Any
    close: Any
    if kernel == "ewma":
        lam = torch.zeros(2, device=DEVICE)
        far, close = (ewma.Pass(w, *parts, PLAIN, SMALL).select(lam) for w in (weight, near))
    elif kernel == "two_of_four":
        far, close = (fours.select(w, *parts, fours.Tile(2, 32, 1)) for w in (weight, near))
    else:
        far, close = ((codes.view(torch.uint8), scale) for codes, scale in (fp8.quantize(w) for w in (weight, near)))
    assert all(torch.equal(one, other) for one, other in zip(far, close, strict=True))


def _untouched(elements: int) -> Tensor:
    if DEVICE == "cuda":
        return torch.zeros(elements, dtype=torch.bfloat16, device=DEVICE)
    return torch.from_numpy(np.zeros(elements, np.int16)).view(torch.bfloat16)  # calloc: pages come when touched


# --- FP8


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 7), (2, 1100)])
def test_fp8_is_torchs_own_to_the_bit(dtype: torch.dtype, scale_dtype: torch.dtype, rows: int, columns: int) -> None:
    weight = (random(rows, columns) * 10 ** (2 * random(rows, columns, seed=7))).to(dtype)  # subnormal codes, too
    weight[-1, columns // 2 :] = 0
    codes, scale = fp8.quantize(weight.to(DEVICE), scale_dtype)
    expected, wanted = fp8_reference.quantize(weight, scale_dtype)
    assert torch.equal(codes.cpu().view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(scale.cpu(), wanted)


def test_fp8_rounds_every_kind_of_number_as_torch_does() -> None:
    codes = torch.arange(0, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    between = (codes[1:] + codes[:-1]) / 2
    near = torch.cat([codes, between, between.nextafter(codes[1:]), between.nextafter(codes[:-1])])
    weight = torch.cat([near, -near, torch.tensor([448.0])])[None]  # 448 makes the scale one
    found, scale = fp8.quantize(weight.to(DEVICE))
    assert scale.item() == 1
    assert torch.equal(found.cpu().view(torch.uint8), weight.to(torch.float8_e4m3fn).view(torch.uint8))


# --- rounding to integers


def problem(rows: int, columns: int, groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = random(4 * columns, columns, seed=8) + random(4 * columns, 3, seed=9) @ random(3, columns, seed=10)
    weight = random(rows, columns, seed=11)
    scale = random(rows, groups, seed=12).abs() * 0.1 + 0.2
    codes = (weight / scale.repeat_interleave(columns // groups, 1)).round().clamp(-8, 7).to(torch.int8)
    return codes, scale, weight, inputs.T @ inputs / columns


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("coarsening", [False, True])
@pytest.mark.parametrize(("rows", "columns", "groups"), [(1, 4, 1), (9, 33, 3), (3, 96, 2)])
def test_coordinate_descent_reaches_the_reference(
    monkeypatch: pytest.MonkeyPatch, rows: int, columns: int, groups: int, coarsening: bool, masked: bool, refit: bool
) -> None:
    monkeypatch.setattr(descent, "PANEL", 66)  # several panels, of unequal size
    codes, scale, weight, gram = problem(rows, columns, groups)
    mask = None
    if masked:
        mask = random(rows, columns, seed=13) < 0.3
        codes = codes * mask
    walk = Walk(-8.0, 7.0, sweeps=2, refit=refit)
    if coarsening:
        walk = Walk(-12.0, 12.0, sweeps=2, refit=refit, coarsening=True)
        codes = codes.sign() * (codes.abs() + (codes.abs() == 5) + (codes.abs() == 7))
    slow_codes, slow_scale = descent_reference.descend(codes, scale, weight, gram, mask, walk)
    arguments = there(codes, scale, weight, gram)
    fast = descent.descend(*arguments, None if mask is None else mask.to(DEVICE), walk)
    fast_codes, fast_scale, before, after = (part.cpu() for part in fast)
    assert (fast_codes == slow_codes).double().mean() >= 0.98  # near-ties may fall to either side, and pull others
    torch.testing.assert_close(fast_scale.double(), slow_scale, rtol=0.02, atol=1e-4)
    slow, reached, start = (
        descent_reference.objective(c.double() * s.double().repeat_interleave(columns // groups, 1), weight, gram)
        for c, s in ((slow_codes, slow_scale), (fast_codes, fast_scale), (codes, scale))
    )
    torch.testing.assert_close(reached, slow, rtol=0.02, atol=1e-6)
    torch.testing.assert_close(after.double(), reached, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(before.double(), start, rtol=1e-3, atol=1e-5)
    if mask is not None:
        assert bool((fast_codes[~mask] == 0).all())


def test_coordinate_descent_keeps_scales_to_the_stored_type() -> None:
    codes, scale, weight, gram = problem(3, 32, 2)
    scale = scale.bfloat16().float()
    walk = Walk(-8.0, 7.0, sweeps=2, refit=True, stored=Stored.of(torch.bfloat16))
    _, found, before, after = descent.descend(*there(codes, scale, weight, gram), None, walk)
    assert torch.equal(found.bfloat16().float(), found)
    assert not torch.equal(found.cpu(), scale)
    assert bool((after < before).all())


@pytest.mark.parametrize(("rows", "groups", "size"), [(1, 1, 1), (3, 5, 33), (2, 3, 64)])
def test_searched_scales_have_the_reference_error(rows: int, groups: int, size: int) -> None:
    grouped, importance = random(rows, groups, size), random(groups, size, seed=14).abs()
    full = grouped.abs().amax(2) / 7
    found = scales.search(*there(grouped, full, importance), -8.0, 7.0).cpu()
    expected = scales_reference.search(grouped, full, importance, -8.0, 7.0)
    one, other = (
        scales_reference.errors(grouped.double(), s.double(), importance.double(), -8.0, 7.0) for s in (found, expected)
    )
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(("rows", "groups", "size", "number"), [(1, 1, 1, 1), (3, 5, 16, 17), (2, 3, 32, 3)])
def test_chosen_scales_have_the_reference_error(rows: int, groups: int, size: int, number: int) -> None:
    grouped, importance = random(rows, groups, size), random(groups, size, seed=14).abs()
    candidates = (grouped.abs().amax(2) / 12)[..., None] * torch.linspace(1.0, 0.25, number)
    found = scales.choose(*there(grouped, candidates, importance)).cpu()
    assert torch.equal(found.double(), scales_reference.choose(grouped, candidates, importance))


# --- real machine code


@pytest.mark.slow
def test_every_kernel_compiles_for_real_gpus(root: Path) -> None:
    """Triton's compiler needs no GPU. A kernel that spills registers would be slow: none does."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{root}{os.pathsep}{root / 'src'}"
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_cuda"],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    built = json.loads(done.stdout)
    assert len(built) >= 12
    assert {name: row["stack"] for name, row in built.items() if row["stack"]} == {}
