"""What the tests that break things share: each stage's command, what it wrote, and what it says when it is refused."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path
from typing import Any

from tests.small import EWMA, error_lines, kedro

#: Each stage that writes into `data/`, and where (`*` is the variant's name).
OUTPUTS = {
    "fetch": ("01_raw", "02_intermediate/documents.parquet"),
    "calibrate": ("02_intermediate/calibration.parquet", "03_primary/statistics", "03_primary/calibrate_measured.json"),
    "reference": ("02_intermediate/evaluation.parquet", "03_primary/reference", "03_primary/reference_measured.json"),
    "recipes": (f"04_recipes/{EWMA}.json",),
    "select": (f"05_selection/{EWMA}",),
    "compress": (f"06_models/{EWMA}",),
    "export": (
        f"07_export/{EWMA}",
        f"07_export/{EWMA}.formats",
        f"07_export/{EWMA}.formats.measured.json",
        f"07_export/{EWMA}.measured.json",
    ),
    "evaluate": (f"08_reporting/{EWMA}",),
    "prompts": (f"08_prompts/{EWMA}.json",),
    "report": ("09_comparison",),
    "publish": (f"10_publish/{EWMA}",),
}
#: Stages over all variants, or none.
_OF_NO_VARIANT = ("fetch", "calibrate", "reference", "report", "gate", "track")


def arguments(stage: str, variant: str = EWMA) -> list[str]:
    """What `kedro run` is told, to run a stage of the variant."""
    return ["--pipelines", stage, *([] if stage in _OF_NO_VARIANT else ["--namespaces", f"variants.{variant}"])]


def run_stage(project: Path, stage: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """`kedro run` of one stage of the variant."""
    return kedro(project, *arguments(stage), **options)


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """The one line in which a run was refused."""
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-2000:]
    assert "Traceback" not in done.stdout + done.stderr
    (line,) = error_lines(done)
    return line


def tree(folder: Path) -> dict[str, str]:
    """The digest of every file below a folder, hidden ones included, but for what a failed run leaves to go on from."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".work" not in path.parts
    }


def without_seconds(files: dict[str, str]) -> dict[str, str]:
    """The files that are the same after every run: those that hold seconds are not."""
    timed = ("measured.json", "measured.json.crc32", "metrics.json", "metrics.json.crc32")
    drawn = ("comparison.csv", "comparison.csv.crc32", "index.html", "index.html.crc32", "pareto.png")
    return {name: digest for name, digest in files.items() if not name.endswith(timed + drawn)}


def left_over(project: Path) -> list[str]:
    """Files and folders of `data/` that are working space of a run, and should be gone after it."""
    data = project / "data"
    kept = (".gitkeep", ".cache", ".scratch", ".work", ".locks")
    hidden = [path for path in data.rglob(".*") if path.name not in kept]
    inside = [path for name in (".scratch", ".work") for path in (data / name).rglob("*") if path.name not in kept]
    named = [*data.rglob("*.partial"), *data.rglob("*.old")]
    return sorted({path.relative_to(data).as_posix() for path in (*hidden, *inside, *named)})
