"""Section `select`: from weight to mask, beside a copy of the same bytes and the rivals that sort."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.layers import BLOCKS, SHAPES, Layer, make_layer
from benchmarks.gpu.rivals import wanda_mask
from benchmarks.gpu.timing import Bench
from hwpq_pipeline.compression.bits import unpack_bits
from hwpq_pipeline.compression.contribution import root_factors
from hwpq_pipeline.compression.ewma import Threshold, ewma_select
from hwpq_pipeline.compression.structured import select_two_of_four
from hwpq_pipeline.kernels.ewma_select import Average
from hwpq_pipeline.kernels.ewma_select import cuda as ewma
from hwpq_pipeline.kernels.ewma_select import reference as ewma_reference
from hwpq_pipeline.kernels.two_of_four import cuda as fours
from hwpq_pipeline.kernels.two_of_four import reference as fours_reference
from hwpq_pipeline.method.presets import GAIN

METRIC, LAMBDA = "wanda", -0.25
AVERAGE = Average(alpha=GAIN, beta=GAIN, domain="sqrt")
SOLVED = Threshold(alpha=GAIN, beta=GAIN, domain="sqrt", scope="row", sparsity=0.5)
#: Of all bits of the rows that are looked at, how many may differ: those on the line (`ewma.TIE`).
TIES = 1e-3
ROWS_CHECKED = 4
#: Rows, columns, warps (and loads in flight) of a program.
CUTS: dict[str, list[Any]] = {
    "two_of_four": [(4, 512, 4), (8, 256, 4), (8, 512, 4), (8, 1024, 4), (16, 512, 4), (8, 512, 8)],
    "ewma": [
        (16, 128, 4, 3), (8, 256, 4, 3), (32, 64, 4, 3), (64, 32, 4, 3), (64, 64, 4, 3), (32, 128, 8, 3),
        (16, 64, 4, 3), (32, 64, 4, 2), (16, 128, 4, 4),
    ],
}  # fmt: skip
SMALL_CUTS: dict[str, list[Any]] = {"two_of_four": [(2, 32, 1)], "ewma": [(8, 32, 4, 2)]}


def prepared(layer: Layer, tile: ewma.Tile | None = None) -> tuple[ewma.Pass, Tensor]:
    """The layer as the kernel takes it, and λ."""
    if not layer.weight.is_cuda:  # Triton's interpreter takes its time for every column of a tile
        tile = ewma.Tile(*SMALL_CUTS["ewma"][0])
    parts = root_factors(METRIC, layer.weight, layer.energy)
    one = ewma.Pass(layer.weight, parts.column, parts.row, parts.cross, AVERAGE, tile)
    return one, torch.full((layer.weight.shape[0],), LAMBDA, device=layer.weight.device)


def check_ewma(layer: Layer, keep: Tensor) -> str:
    """What is wrong with a mask, on some rows, by the reference."""
    rows = torch.linspace(0, len(layer.weight) - 1, ROWS_CHECKED).long()
    some = layer.weight[rows.to(layer.weight.device)].cpu()
    parts = root_factors(METRIC, some, layer.energy.cpu())
    columns = some.shape[1]
    lam = torch.full((len(rows),), LAMBDA)
    expected, _ = ewma_reference.ewma_select(some, parts.column, parts.row, parts.cross, lam, AVERAGE)
    wrong = (unpack_bits(keep[rows.to(keep.device)].cpu(), columns) != expected).double().mean()
    return f"{float(wrong):.2%} of the bits differ from the reference" if wrong > TIES else ""


def check_fours(layer: Layer, keep: Tensor) -> str:
    """What is wrong with a 2:4 mask, to the bit, on some rows."""
    rows = torch.linspace(0, len(layer.weight) - 1, ROWS_CHECKED).long()
    some = layer.weight[rows.to(layer.weight.device)].cpu()
    parts = root_factors(METRIC, some, layer.energy.cpu())
    expected = fours_reference.select_two_of_four(some, parts.column, parts.row, parts.cross)
    found = unpack_bits(keep[rows.to(keep.device)].cpu(), some.shape[1])
    return "" if torch.equal(found, expected) else "the mask differs from the reference"


def scores(layer: Layer) -> Tensor:
    """Wanda's, in the weight's dtype."""
    return layer.weight.abs() * layer.energy.sqrt().to(layer.weight.dtype)


def sort(layer: Layer) -> Tensor:
    """A full sort of every row, threshold at the wanted rank."""
    found = scores(layer)
    return found >= torch.sort(found, dim=1).values[:, found.shape[1] // 2, None]


def topk(layer: Layer) -> Tensor:
    """The best half of every row, by their indices."""
    found = scores(layer)
    best = torch.topk(found, found.shape[1] // 2, dim=1, sorted=False).indices
    return torch.zeros_like(found, dtype=torch.bool).scatter_(1, best, True)


def topk_groups(layer: Layer) -> Tensor:
    """2:4 by topk on groups of four."""
    groups = scores(layer).unflatten(1, (-1, 4))
    best = torch.topk(groups, 2, dim=2, sorted=False).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(2, best, True).flatten(1)


def run(bench: Bench) -> None:
    """All shapes, then the whole model."""
    names = ("tiny",) if bench.dry else ("7b", "70b")
    for name in names:
        for shape in SHAPES[name]:
            with bench.guarded(section="select", shape=f"{shape[0]}x{shape[1]}", method="make"):
                one_layer(bench, make_layer(shape, bench.device), model=name)
    with bench.guarded(section="select", method="whole"):
        whole(bench, names[0])


def one_layer(bench: Bench, layer: Layer, model: str) -> None:
    """Each method on one layer."""
    labels: dict[str, Any] = {"section": "select", "model": model, "shape": layer.name, "dtype": "bfloat16"}
    size, masks = layer.weight.nbytes, layer.weight.numel() / 8
    target = torch.empty_like(layer.weight)
    bench.measure(lambda: target.copy_(layer.weight), moved=2 * size, method="copy", **labels)
    one, lam = prepared(layer)
    parts = root_factors(METRIC, layer.weight, layer.energy)
    factors = (parts.column, parts.row, parts.cross)
    bench.measure(
        lambda: one.select(lam),
        moved=size + masks,
        check=lambda: check_ewma(layer, one.select(lam)[0]),
        method="ewma",
        **labels,
    )
    bench.measure(
        lambda: fours.select(layer.weight, *factors),
        moved=size + masks,
        check=lambda: check_fours(layer, fours.select(layer.weight, *factors)[0]),
        method="two_of_four",
        **labels,
    )
    bench.measure(lambda: ewma_select(layer.weight, METRIC, layer.energy, SOLVED), method="ewma_row_solved", **labels)
    bench.measure(
        lambda: select_two_of_four(layer.weight, METRIC, layer.energy), method="two_of_four_with_factors", **labels
    )
    for rival in (sort, topk, topk_groups):
        bench.measure(partial(rival, layer), method=rival.__name__, **labels)
    bench.measure(lambda: wanda_mask(layer.weight, layer.energy), method="wanda", **labels)


def run_tiles(bench: Bench) -> None:
    """How the work is cut, on the first and the last shape: each cut of the moving average is compiled anew."""
    shapes = list(SHAPES["tiny" if bench.dry else "7b"])
    for layer in (make_layer(shape, bench.device) for shape in (shapes[0], shapes[-1])):
        labels: dict[str, Any] = {"section": "tiles", "shape": layer.name, "dtype": "bfloat16"}
        moved = layer.weight.nbytes + layer.weight.numel() / 8
        parts = root_factors(METRIC, layer.weight, layer.energy)
        factors = (parts.column, parts.row, parts.cross)
        for cut in (SMALL_CUTS if bench.dry else CUTS)["two_of_four"]:
            bench.measure(
                partial(fours.select, layer.weight, *factors, fours.Tile(*cut)),
                moved=moved,
                method="two_of_four",
                tile=list(cut),
                budget=0.1,
                **labels,
            )
        for cut in (SMALL_CUTS if bench.dry else CUTS)["ewma"]:
            one, lam = prepared(layer, ewma.Tile(*cut))
            bench.measure(
                partial(one.select, lam),
                moved=moved,
                method="ewma",
                tile=list(cut),
                budget=0.1,
                **labels,
            )


def whole(bench: Bench, model: str) -> None:
    """All linear weights of the model, one after the other, each its own memory."""
    shapes = [shape for shape, count in SHAPES[model].items() for _ in range(count)] * BLOCKS[model]
    layers = [make_layer(shape, bench.device, seed) for seed, shape in enumerate(shapes)]
    size = sum(layer.weight.nbytes for layer in layers)
    targets = {layer.weight.shape: torch.empty_like(layer.weight) for layer in layers}
    ready = [(prepared(layer), root_factors(METRIC, layer.weight, layer.energy)) for layer in layers]

    def copy() -> None:
        for layer in layers:
            targets[layer.weight.shape].copy_(layer.weight)

    def by_average() -> None:
        for (one, lam), _ in ready:
            one.select(lam)

    def by_fours() -> None:
        for layer, (_, parts) in zip(layers, ready, strict=True):
            fours.select(layer.weight, parts.column, parts.row, parts.cross)

    labels: dict[str, Any] = {
        "section": "select_whole",
        "model": model,
        "shape": f"{len(layers)} layers",
        "dtype": "bfloat16",
    }
    bench.measure(copy, moved=2 * size, method="copy", **labels)
    bench.measure(by_average, moved=size * 17 / 16, method="ewma", **labels)
    bench.measure(by_fours, moved=size * 17 / 16, method="two_of_four", **labels)
    for name, rival in (("sort", sort), ("topk", topk), ("wanda", lambda one: wanda_mask(one.weight, one.energy))):
        bench.measure(partial(each, rival, layers), method=name, budget=0, warm=False, **labels)


def each(work: Callable[[Layer], Tensor], layers: list[Layer]) -> None:
    """Keep no mask: the next layer's takes its place, as with ours."""
    for layer in layers:
        work(layer)
