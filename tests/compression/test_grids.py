"""Facts of the grids against the dtypes that hold their codes, and refusals."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hwpq_pipeline.compression import grids
from hwpq_pipeline.compression.codes import on_grid
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.kernels.fp8 import E4M3_MAX


@pytest.mark.parametrize("grid", grids.GRIDS.values(), ids=grids.GRIDS)
def test_codes_fit_their_dtype_and_their_bits(grid: grids.Grid) -> None:
    dtype = getattr(torch, grid.code_dtype)
    if grid.is_float:
        assert (grid.low, grid.high) == (torch.finfo(dtype).min, torch.finfo(dtype).max) == (-E4M3_MAX, E4M3_MAX)
    else:
        assert torch.iinfo(dtype).min <= grid.low < 0 < grid.high <= torch.iinfo(dtype).max
        every = torch.arange(int(grid.low), int(grid.high) + 1)
        codes = sum(on_grid(code[None].to(dtype), grid) for code in every)
        assert 2 ** (grid.bits - 1) < codes <= 2**grid.bits


def test_the_facts_import_no_torch() -> None:
    code = "import sys, hwpq_pipeline.compression.grids, hwpq_pipeline.parameters; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def words(file: Path) -> Iterator[str]:
    """Strings of a module's code, docstrings left out."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def test_only_the_grids_and_two_tables_of_engines_name_a_grid(root: Path) -> None:
    """Everything else asks the grid for a fact. The kernels' `int8` is a dtype."""
    sources = root / "src" / "hwpq_pipeline"
    naming = {
        file.relative_to(sources).as_posix()
        for file in sources.rglob("*.py")
        if not grids.GRIDS.keys().isdisjoint(words(file)) and "kernels" not in file.parts
    }
    assert naming == {"compression/grids.py", "export/compressed_tensors.py", "export/gguf.py"}


@pytest.mark.parametrize(("group", "remedy"), [(128, "32 or 64,"), (0, "32 or 64,"), (7, "32 or 64,")])
def test_group_that_does_not_divide_names_those_that_do(group: int, remedy: str) -> None:
    with pytest.raises(HwpqError, match=f"layer.7.*576 columns.*{group}.*{remedy}"):
        grids.check_group(576, grids.GRIDS["int4"], group, "layer.7")


def test_columns_that_no_offered_group_divides_name_another_way() -> None:
    """35 columns divide by 5 and 7, but no grid offers such groups."""
    with pytest.raises(HwpqError, match=r"35 columns.*Choose another grid, or leave this layer as it is \(`ignore`"):
        grids.check_group(35, grids.GRIDS["int4"], 64, "layer.7")


def test_refuses_groups_for_floats_and_unknown_grids() -> None:
    with pytest.raises(HwpqError, match="Leave the group size out"):
        grids.check_group(64, grids.GRIDS["fp8_e4m3"], 32, "layer.7")
    with pytest.raises(HwpqError, match=r"int5.*fp8_e4m3, fp8_e5m2, int8, int4, int3"):
        grids.find_grid("int5", "layer.7")
