"""Charts: drawn for every kind of table, alike each time, the front found as its definition says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.reporting.charts import error_by_layer, pareto, pareto_front, sparsity_by_layer

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ERRORS = ["error_pruned", "error_recovered", "error_quantized"]


def layers(blocks: int = 3) -> pd.DataFrame:
    generator = np.random.default_rng(0)
    table = pd.DataFrame([{"block": block, "kind": kind} for block in range(blocks) for kind in KINDS])
    for column in ERRORS:
        table[column] = generator.uniform(1e-4, 1e-1, len(table))
    table["wanted_sparsity"] = 0.5
    table["reached_sparsity"] = generator.uniform(0.499, 0.501, len(table))
    return table


def comparison() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "variant": ["dense", "fp8", "int4", "2of4-fp8"],
            "perplexity_ratio": [1.0, 1.02, 1.18, 3.5],
            "size_bytes": [269_000_000, 163_000_000, 113_000_000, 163_000_000],
            "seconds_to_make": [20.0, 40.0, 90.0, 60.0],
        }
    )


DRAWN: list[tuple[Callable[[pd.DataFrame, Path], Path], pd.DataFrame]] = [
    (error_by_layer, layers()),
    (error_by_layer, layers().assign(error_pruned=np.nan)),
    (error_by_layer, layers().assign(**dict.fromkeys(ERRORS, np.nan))),
    (error_by_layer, layers().assign(**dict.fromkeys(ERRORS, 0.0))),
    (sparsity_by_layer, layers()),
    (sparsity_by_layer, layers().assign(wanted_sparsity=np.nan, reached_sparsity=0.0)),
    (sparsity_by_layer, layers(blocks=1).head(1)),
    (pareto, comparison()),
    (pareto, comparison().head(1)),
    (pareto, pd.concat([comparison()] * 6, ignore_index=True)),
]


@pytest.mark.parametrize(("draw", "table"), DRAWN)
def test_every_table_gives_a_picture_and_the_same_each_time(
    tmp_path: Path, draw: Callable[[pd.DataFrame, Path], Path], table: pd.DataFrame
) -> None:
    first, second = draw(table, tmp_path / "a" / "one.png"), draw(table.copy(), tmp_path / "two.png")
    picture = first.read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert picture == second.read_bytes()
    assert b"Software" not in picture
    assert b"tIME" not in picture
    assert [path.name for path in first.parent.iterdir()] == ["one.png"]


def test_what_is_drawn_depends_on_the_table(tmp_path: Path) -> None:
    one = error_by_layer(layers(), tmp_path / "one.png")
    two = error_by_layer(layers().assign(error_pruned=0.5), tmp_path / "two.png")
    assert one.read_bytes() != two.read_bytes()


def test_front_is_the_set_of_points_that_no_other_beats() -> None:
    generator = np.random.default_rng(1)
    for size in (1, 2, 5, 20):
        for _ in range(20):
            x, y = generator.integers(0, 6, size).astype(float), generator.integers(0, 6, size).astype(float)
            beaten = [
                any(x[j] <= x[i] and y[j] <= y[i] and (x[j] < x[i] or y[j] < y[i]) for j in range(size))
                for i in range(size)
            ]
            wanted = {(x[i], y[i]) for i in range(size) if not beaten[i]}
            front = pareto_front(x, y)
            assert {(x[i], y[i]) for i in front} == wanted
            assert len(front) == len(wanted)  # equal points once
            assert list(x[front]) == sorted(x[front])


@pytest.mark.parametrize("draw", [error_by_layer, sparsity_by_layer, pareto])
def test_tables_without_columns_or_rows_are_refused(tmp_path: Path, draw: Any) -> None:
    with pytest.raises(HwpqError, match="no column"):
        draw(pd.DataFrame({"block": [0]}), tmp_path / "chart.png")
    empty = (comparison() if draw is pareto else layers()).head(0)
    with pytest.raises(HwpqError, match="no rows"):
        draw(empty, tmp_path / "chart.png")
    assert not (tmp_path / "chart.png").exists()
