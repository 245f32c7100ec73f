"""The GPU benchmark runs whole on the CPU, and a section that fails takes no other with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install 'hwpq-pipeline[cuda]'")

from benchmarks.gpu.__main__ import SECTIONS, TOTAL

ON_A_GPU_ALONE = {"sparse_bf16", "sparse_fp8", "sparse_int8"}


def bench(root: Path, out: Path, *options: str) -> dict:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(root / "src"), str(root)])
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(out), *options]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert "| section | shape |" in done.stdout
    assert (out / "gpu.md").read_text() == done.stdout
    return json.loads((out / "gpu.json").read_text())


@pytest.mark.slow
def test_a_dry_run_does_all_of_it(root: Path, tmp_path: Path) -> None:
    report = bench(root, tmp_path, "--dry-run")
    failed = {row["method"]: row["error"] for row in report["rows"] if isinstance(row.get("error"), str)}
    assert set(failed) == (set() if torch.cuda.is_available() else ON_A_GPU_ALONE), failed
    assert {row["section"].partition("_")[0] for row in report["rows"]} == set(SECTIONS)
    rows = {(row["section"], row["method"]): row for row in report["rows"] if "seconds" in row}
    assert all(row["seconds"] > 0 for row in rows.values())
    for method in ("ewma", "two_of_four"):
        assert rows["select", method]["checked"]
        assert rows["select", method]["fraction_of_ceiling"] > 0
    # On inputs that are correlated, recovery and descent do what they are for.
    assert rows["recover", "recover_2of4"]["error"] < 0.5 * rows["recover", "mask_2of4"]["error"]
    assert rows["recover", "int4"]["error"] < rows["recover", "int4_nearest"]["error"]
    for rival, ours in (("sparsegpt_2of4", "recover_2of4"), ("gptq_int4", "int4_nearest")):
        assert 0 < rows["recover", rival]["error"] < rows["recover", "mask_2of4"]["error"]
        assert rows["recover", rival]["zeros"] == pytest.approx(rows["recover", ours]["zeros"], abs=0.1)
    assert report["machine"]["torch"] == torch.__version__


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")
def test_a_section_that_fails_is_a_row(root: Path, tmp_path: Path) -> None:
    report = bench(root, tmp_path, "--sections", "ceilings", "tiles")
    assert [(row["section"], row["error"]) for row in report["rows"]] == [
        ("ceilings", "exit status 1"),
        ("tiles", "exit status 1"),
    ]


def test_all_sections_together_take_less_than_ten_minutes() -> None:
    assert sum(SECTIONS.values()) <= TOTAL < 600
