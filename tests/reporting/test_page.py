"""The report: everything is in it, nothing is fetched, and what is drawn is where it belongs."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pandas as pd
import pytest

from hwpq_pipeline.figures import FIGURES
from hwpq_pipeline.reporting.comparison import comparison_table
from hwpq_pipeline.reporting.front import front, verdict
from hwpq_pipeline.reporting.heatmap import heatmap, place
from hwpq_pipeline.reporting.page import Reported, render
from hwpq_pipeline.reporting.scatter import LETTER, Point, place_labels, scatter, ticks
from hwpq_pipeline.reporting.took import what_it_took
from tests.reported import METRICS, SHOWN

NAMES = ("dense", "fp8", "2of4-fp8")
PLAN: list[dict[str, Any]] = [
    {"stage": "calibrate", "variant": None, "memory": 1_500_000_000, "gpu": 0, "disk": 400_000_000, "seconds": 50.0},
    {"stage": "compress", "variant": "fp8", "memory": 2_000_000_000, "gpu": 0, "disk": 110_000_000, "seconds": None},
]


def comparison() -> pd.DataFrame:
    ratios, sizes = (1.0, 1.02, 3.31), (269_060_552, 163_227_736, 163_227_736)
    return comparison_table(
        {
            name: {**METRICS, "perplexity_ratio": ratio, "size_bytes": size, "sparsity": 0.5 * name.startswith("2of4")}
            for name, ratio, size in zip(NAMES, ratios, sizes, strict=True)
        }
    )


def layers(error: float) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "block": [0, 1],
            "kind": ["q_proj", "q_proj"],
            "error_pruned": [np.nan, np.nan],
            "error_quantized": [error, 2 * error],
            "reached_sparsity": [0.5, 0.25],
        }
    )


def page(**changes) -> str:
    variants = [
        Reported(
            name=name,
            description=f"About {name}.",
            entry=f"{name}:\n  x: 1\n",
            recipe=f"{name}:\n  x: 1\n  damping: 0.01\n",
            layers=layers(0.001),
            continuations=[{"prompt": "Once <b>", "continuation": f"& {name} went"}],
            command=f"dvc repro evaluate@{name}",
        )
        for name in NAMES
    ]
    took = what_it_took(PLAN, dict.fromkeys(NAMES, METRICS))
    return render(comparison(), variants, conditions={"evaluated on": "16 × 512 tokens"}, took=took)


class Reader(HTMLParser):
    """Addresses that a browser would fetch, and the words."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href", "srcset", "data")]
        if tag in ("script", "link", "iframe"):
            self.fetched.append(tag)

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_everything_is_in_the_page_and_nothing_is_fetched():
    text = page()
    reader = Reader()
    reader.feed(text)
    assert reader.fetched == []
    assert "url(" not in text
    words = "".join(reader.words)
    told = {**SHOWN, "perplexity_ratio": "3.310"}
    for part in (*told.values(), "16 × 512", "Once <b>", "& 2of4-fp8 went", "About fp8.", "dvc repro evaluate@fp8",
                 "damping: 0.01", *(figure.label for figure in FIGURES)):  # fmt: skip
        assert part in words
    assert "<b>" not in text  # what models write is text


def test_the_same_input_gives_the_same_page():
    assert page() == page()


def test_a_point_is_where_its_figures_are_and_says_them():
    svg = scatter([Point("a", 100, 1), Point("b", 200, 10), Point("c", 150, 10**0.5)], across="MB", down="ratio")
    (ax, ay), (bx, by), (cx, cy) = (map(float, found) for found in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg))
    assert ax < cx < bx
    assert ay > cy > by  # worse is higher
    assert cx == pytest.approx((ax + bx) / 2, abs=0.1)
    assert cy == pytest.approx((ay + by) / 2, abs=0.1)  # logarithmic: the geometric mean is half-way
    assert "b. ratio: 10.000. MB: 200.0" in svg


def test_one_variant_alone_is_drawn():
    assert "<circle" in scatter([Point("a", 100, 1)], across="MB", down="ratio")


def test_labels_cover_neither_each_other_nor_points():
    points = [Point(f"variant-{index}", index, 1.0) for index in range(6)]
    places = [(120 + 14.0 * index, 150 + 3.0 * index) for index in range(6)]
    boxes = [
        (x, y - 9, x + LETTER * len(point.name), y + 2)
        for point, (x, y) in zip(points, place_labels(points, places), strict=True)
    ]
    for one, other in combinations(boxes, 2):
        assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (96.2, 281.7), (46, 144), (0.001, 0.0013)])
def test_ticks_are_few_round_and_inside(low, high):
    found = ticks(low, high)
    assert 3 <= len(found) <= 8
    assert all(low <= tick <= high * (1 + 1e-9) for tick in found)
    assert len({round(b - a, 9) for a, b in pairwise(found)}) == 1


def test_a_map_has_a_cell_a_layer_with_a_value():
    svg = heatmap(layers(0.001), "error_quantized", low=0.001, high=0.002, logarithmic=True)
    assert svg.count("<rect") == 2
    assert "q_proj, block 1: 0.002" in svg
    first, last = re.findall(r'fill="(#\w+)"', svg)
    assert first != last
    assert heatmap(layers(0.001), "error_pruned", low=0.001, high=0.002, logarithmic=True) == ""


def test_places_on_the_scale():
    assert place(0.1, 0.01, 1.0, logarithmic=True) == pytest.approx(0.5)
    assert place(0.0, 0.01, 1.0, logarithmic=True) == 0
    assert place(0.25, 0.0, 1.0, logarithmic=False) == 0.25
    assert place(2.0, 0.0, 1.0, logarithmic=False) == 1
    assert place(1.0, 1.0, 1.0, logarithmic=False) == 0


def row(name: str, size: int, ratio: float, sparsity: float = 0.0) -> dict[str, object]:
    return {"variant": name, "size_bytes": size * 10**6, "perplexity_ratio": ratio, "sparsity": sparsity}


def test_the_first_sentence_tells_how_far_the_sparse_variants_are_from_the_front() -> None:
    dense = [row("dense", 269, 1.0), row("int4", 113, 1.09), row("fp8", 163, 1.02)]
    assert verdict(dense) == ""
    far = [*dense, row("2of4-fp8", 163, 2.42, 0.5), row("2of4-int4", 113, 2.46, 0.6)]
    assert [found["variant"] for found in front(far)] == ["int4", "fp8", "dense"]
    said = verdict(far)
    assert said.startswith("No sparse variant is on the front")
    wanted = (
        "2.26: 2of4-int4 has 2.460 × the dense perplexity in 113.0 MB, and int4 has 1.090 × the dense perplexity in"
    )
    assert wanted in said
    near = [*far, row("2of4-small", 71, 1.9, 0.5)]
    assert "of the sparse variants: 2of4-small has 1.900 ×" in verdict(near)


def test_equal_variants_are_both_on_the_front() -> None:
    assert len(front([row("a", 5, 1.5), row("b", 5, 1.5), row("c", 6, 1.5)])) == 2


def test_the_page_begins_with_it() -> None:
    text = re.sub(r"<[^>]+>", "", page().partition("<h1>")[2])
    assert text.partition("\n")[2].lstrip().startswith("No sparse variant is on the front")


def test_the_plan_stands_beside_what_was_measured():
    took = what_it_took(PLAN, dict.fromkeys(NAMES, METRICS))
    assert took.heads == ("peak memory, GB", "disk, MB", "seconds")
    tables = dict(took.tables)
    assert tables["once, for all variants"] == (("calibrate", "1.50", "1.23", "400.0", "402.6", "50", "46"),)
    of_fp8 = {row[0]: row[1:] for row in tables["fp8"]}
    assert of_fp8["compress"] == ("2.00", "2.10", "110.0", "112.8", "–", "44")
    assert of_fp8["select"] == ("–", "0.90", "–", "13.3", "–", "3")
    text = page()
    for cell in ("peak memory, GB: planned", "<td>1.50</td><td>1.23</td>", "<summary>fp8</summary>"):
        assert cell in text


def test_the_gpu_is_told_where_one_was_used():
    used = {**METRICS, "peak_gpu_bytes": {"compress": 3_000_000_000}}
    took = what_it_took(PLAN, {"fp8": used})
    assert took.heads[1] == "peak GPU memory, GB"
    rows = {row[0]: row for row in dict(took.tables)["fp8"]}
    assert rows["compress"][3:5] == ("0.00", "3.00")
