"""Codes against tables of values from the number formats' definitions, and scales against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hwpq_pipeline.compression import codes, scales
from hwpq_pipeline.compression.grids import GRIDS


def float8_values(exponent_bits: int, mantissa_bits: int, bias: int) -> list[float]:
    """The values of all 256 bit patterns by the definition of a float, specials of the IEEE kind left in."""
    values = []
    for pattern in range(256):
        sign = -1.0 if pattern >> 7 else 1.0
        exponent = (pattern >> mantissa_bits) & (2**exponent_bits - 1)
        mantissa = pattern & (2**mantissa_bits - 1)
        if exponent == 0:
            values.append(sign * mantissa * 2.0 ** (1 - bias - mantissa_bits))
        else:
            values.append(sign * (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias))
    return values


E4M3 = sorted({v for v in float8_values(4, 3, 7) if abs(v) <= 448.0})  # 480 would be the NaN pattern
E5M2 = sorted({v for v in float8_values(5, 2, 15) if abs(v) <= 57344.0})
BOTH = sorted(set(E4M3) & set(E5M2))


def nearest(values: list[float], number: float) -> set[float]:
    """The closest values, two at a tie."""
    distance = min(abs(v - number) for v in values)
    return {v for v in values if abs(v - number) == distance}


@pytest.mark.parametrize(("name", "values"), [("fp8_e4m3", E4M3), ("fp8_e5m2", BOTH)])
def test_float_codes_are_the_nearest_values_of_the_table(name: str, values: list[float]) -> None:
    grid = GRIDS[name]
    numbers = np.concatenate(
        [
            np.asarray(E4M3),
            np.asarray(E5M2),
            (np.asarray(E4M3)[1:] + np.asarray(E4M3)[:-1]) / 2,
            np.random.default_rng(0).normal(size=400) * np.logspace(-4, 2.4, 400),
        ]
    ).astype(np.float32)
    found = codes.round_to(torch.from_numpy(numbers)[None], torch.ones(1, 1), grid)
    assert found.dtype == torch.float8_e4m3fn
    for number, code in zip(numbers.tolist(), found.float()[0].tolist(), strict=True):
        assert code in nearest(values, min(max(number, -448.0), 448.0)), (number, code)


def test_every_stored_e5m2_value_is_an_e5m2_value() -> None:
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(1)) * 0.03
    grid = GRIDS["fp8_e5m2"]
    scale = scales.absmax_scale(weight, grid, 256)
    assert set(codes.round_to(weight, scale, grid).float().unique().tolist()) <= set(E5M2)
    for row, s in zip(weight, scale[:, 0].tolist(), strict=True):
        assert np.log2(s) == int(np.log2(s))
        assert s * 224 < float(row.abs().max()) <= s * 448  # the smallest power of two that saturates nothing


@pytest.mark.parametrize("exponent", range(-20, 20))
def test_power_of_two_scale_at_exact_powers(exponent: int) -> None:
    weight = torch.tensor([[448.0 * 2.0**exponent, 1.0 * 2.0**exponent]])
    assert scales.absmax_scale(weight, GRIDS["fp8_e5m2"], 2).item() == 2.0**exponent


@pytest.mark.parametrize("name", GRIDS)
def test_zeros_stay_zero_and_dead_groups_have_a_scale(name: str) -> None:
    grid = GRIDS[name]
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
    weight[1] = 0.0
    weight[:, ::2] = 0.0
    weight[2, :] = 1e-42
    weight[3, :] *= 1e37
    for group in (32,) if grid.is_float else (8, 32):
        scale = scales.absmax_scale(weight, grid, group)
        if grid.stored_as != "model":
            scale = scales.choose_scale(weight, grid, group, scales.tensor_scale(weight, grid))
        elif grid.bits <= 4:
            scale = scales.search_scale(weight, grid, group)
        assert bool(torch.isfinite(scale).all())
        assert bool((scale > 0).all())
        quantized = codes.Quantized(codes.round_to(weight, scale, grid), scale, name, None)
        values = codes.dequantize(quantized)
        assert bool(torch.isfinite(values).all())
        assert bool((values[weight == 0] == 0).all())


@pytest.mark.parametrize(("name", "bound"), [("fp8_e4m3", 2**-4), ("fp8_e5m2", 2**-3), ("int8", None)])
def test_rounding_error_of_eight_bits_is_within_half_a_step(name: str, bound: float | None) -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(3))
    grid = GRIDS[name]
    scale = scales.absmax_scale(weight, grid, 64)
    values = codes.dequantize(codes.Quantized(codes.round_to(weight, scale, grid), scale, name, None))
    allowed = 0.5 * scale if bound is None else bound * weight.abs() + scale * 2.0**-10
    assert bool(((values - weight).abs() <= allowed * 1.001).all())


@pytest.mark.parametrize("name", ["int4", "int3"])
def test_searched_scale_is_near_the_best_of_a_fine_brute_force_search(name: str) -> None:
    grid = GRIDS[name]
    rng = np.random.default_rng(4)
    weight = rng.standard_t(4, size=(6, 32)).astype(np.float32)
    importance = rng.gamma(1.0, size=32).astype(np.float32)
    found = scales.search_scale(torch.from_numpy(weight), grid, 16, importance=torch.from_numpy(importance))

    def error(scale: float, w: np.ndarray, h: np.ndarray) -> float:
        codes = np.clip(np.round(w.astype(np.float64) / scale), grid.low, grid.high)
        return float((h * (scale * codes - w) ** 2).sum())

    for row in range(6):
        for group in range(2):
            columns = slice(16 * group, 16 * group + 16)
            w, h = weight[row, columns], importance[columns]
            absmax = np.abs(w).max()
            best = min(error(absmax / grid.high * f, w, h) for f in np.linspace(0.2, 1.0, 4000))
            plain = error(absmax / grid.high, w, h)
            mine = error(float(found[row, group]), w, h)
            assert mine <= plain * (1 + 1e-6)
            assert mine <= 1.25 * best


E2M1 = sorted({sign * value for value in (0, 0.5, 1, 1.5, 2, 3, 4, 6) for sign in (-1, 1)})  # OCP MX v1.0, table 6


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_four_bit_float_codes_are_the_nearest_values_of_the_table(name: str) -> None:
    numbers = np.concatenate([np.linspace(-7, 7, 2001), (np.asarray(E2M1)[1:] + np.asarray(E2M1)[:-1]) / 2])
    found = codes.round_to(torch.from_numpy(2 * numbers).float()[None], torch.ones(1, 1), GRIDS[name])
    assert codes.on_grid(found, GRIDS[name])
    for number, code in zip(numbers.tolist(), found[0].tolist(), strict=True):
        assert code / 2 in nearest(E2M1, min(max(number, -6.0), 6.0)), (number, code)
    assert not codes.on_grid(torch.tensor([[5]], dtype=torch.int8), GRIDS[name])


@pytest.mark.parametrize("seed", range(3))
def test_scales_of_four_bit_floats_are_the_best_of_all_that_can_be_stored(seed: int) -> None:
    """Every positive E4M3 number times the tensor's scale, and every power of two, is tried."""
    rng = np.random.default_rng(seed)
    weight = (rng.standard_t(4, size=(4, 32)) * 0.03).astype(np.float32)
    importance = rng.gamma(1.0, size=32).astype(np.float32) + 0.01
    table = np.asarray([v / 2 for v in E2M1])

    def error(scale: float, w: np.ndarray, h: np.ndarray) -> float:
        halves = 4 * table
        nearest_code = halves[np.abs(w[:, None] / scale - halves).argmin(1)]
        return float((h * (scale * nearest_code - w) ** 2).sum())

    for name, group in (("nvfp4", 16), ("mxfp4", 32)):
        grid = GRIDS[name]
        factor = scales.tensor_scale(torch.from_numpy(weight), grid)
        assert np.log2(factor) == int(np.log2(factor))
        found = scales.choose_scale(
            torch.from_numpy(weight), grid, group, factor, importance=torch.from_numpy(importance)
        )
        every = [v / factor for v in E4M3 if v >= 2.0**-6] if name == "nvfp4" else [2.0**e for e in range(-40, 20)]
        for row, place in np.ndindex(*found.shape):
            columns = slice(group * place, group * (place + 1))
            mine = float(found[row, place])
            assert mine in every
            best = min(error(scale, weight[row, columns], importance[columns]) for scale in every)
            assert error(mine, weight[row, columns], importance[columns]) <= best * (1 + 1e-4)


def test_the_tensors_scale_fits_its_largest_weight() -> None:
    grid = GRIDS["nvfp4"]
    for size in (1e-30, 1e-3, 0.7, 1.0, 50.0, 1e30):
        factor = scales.tensor_scale(torch.tensor([[size, -size / 3]]), grid)
        assert 112 < size / 12 * factor <= 224
    assert scales.tensor_scale(torch.zeros(2, 16), grid) == 1.0
    assert scales.tensor_scale(torch.ones(2, 16), GRIDS["int4"]) == 1.0
