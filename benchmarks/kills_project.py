"""The project that `benchmarks.kills` kills: a small random model, four variants, and a command for each stage.

Eight blocks, 256 wide: on one thread a stage computes for seconds, so that a kill lands in its work and not only in
Python's start. Random weights say nothing of quality, and bytes are compared here.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hwpq_pipeline.measuring import COSTS
from tests.tiny import tiny_checkpoint, tiny_config, tiny_documents

ROOT = Path(__file__).resolve().parents[1]
BLOCKS, WIDTH = 8, 256
#: Layers that are compressed as one: q/k/v, o, gate/up, down.
GROUPS = 4 * BLOCKS
_SPARSE = {"structure": "2of4", "metric": "hwpq_weighted"}
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {"description": "The model as it came."},
    "independent": {
        "description": "2:4 and INT4, group by group.",
        "selection": _SPARSE,
        "recovery": {"preset": "balanced"},
        "quantization": {"grid": "int4", "group_size": 64, "method": "coordinate_descent"},
    },
    "in-sequence": {
        "description": "2:4 and FP8, block after block.",
        "selection": _SPARSE,
        "recovery": {"preset": "quality"},
        "quantization": {"grid": "fp8_e4m3"},
    },
    "healed": {
        "description": "2:4 and FP8, healed.",
        "selection": _SPARSE,
        "recovery": {"preset": "fast"},
        "quantization": {"grid": "fp8_e4m3"},
        "healing": {"tokens": 4096, "minutes": 5, "held_out": 2},
    },
}
SHARED = ("fetch", "calibrate", "reference")
OF_A_VARIANT = ("select", "compress", "export", "evaluate", "prompts")
_OUTPUTS = {
    "fetch": ("01_raw", "02_intermediate/documents.parquet"),
    "calibrate": ("02_intermediate/calibration.parquet", "03_primary/statistics", "03_primary/calibrate_measured.json"),
    "reference": ("02_intermediate/evaluation.parquet", "03_primary/reference", "03_primary/reference_measured.json"),
    "recipes": ("04_recipes",),
    "select": ("05_selection/{}",),
    "compress": ("06_models/{}",),
    "export": (
        "07_export/{}",
        "07_export/{}.formats",
        "07_export/{}.formats.measured.json",
        "07_export/{}.measured.json",
    ),
    "evaluate": ("08_reporting/{}",),
    "prompts": ("08_prompts/{}.json",),
    "report": ("09_comparison",),
    "publish": ("10_publish",),
}
#: Their bytes hold seconds. Of `metrics.json` all but the seconds is compared.
_TIMED = (
    "measured.json", "metrics.json.crc32", "comparison.csv", "comparison.csv.crc32", "index.html", "index.html.crc32",
    "pareto.png",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A command that is run undisturbed, and killed.

    Attributes:
        stage: the pipeline.
        variant: the variant; None for a stage of all or none.
        by: `kedro` or `dvc`, which starts the same.
    """

    stage: str
    variant: str | None = None
    by: str = "kedro"

    @property
    def name(self) -> str:
        """As DVC calls it."""
        return self.stage if self.variant is None else f"{self.stage}@{self.variant}"

    @property
    def command(self) -> list[str]:
        """What a user types."""
        if self.by == "dvc":
            return [sys.executable, "-m", "dvc", "repro", "--single-item", self.name]
        own = [] if self.variant is None else ["--namespaces", f"variants.{self.variant}"]
        return [sys.executable, "-m", "kedro", "run", "--pipelines", self.stage, *own]

    @property
    def units(self) -> int:
        """In how many parts it does its work: input groups, or blocks where one needs those before it."""
        groups = self.stage == "select" or (self.stage == "compress" and self.variant != "in-sequence")
        return GROUPS if groups else BLOCKS if self.stage in ("calibrate", "reference", "compress", "evaluate") else 1

    def outputs(self, project: Path) -> list[Path]:
        """Where it writes, checksums beside files included."""
        places = [project / "data" / place.format(self.variant) for place in _OUTPUTS[self.stage]]
        return [path for place in places for path in (place, place.with_name(f"{place.name}.crc32"))]


def jobs() -> list[Job]:
    """Every stage that writes into `data/`, in the order in which one needs another."""
    each = [Job(stage, variant) for variant in VARIANTS for stage in OF_A_VARIANT]
    return [*map(Job, SHARED), Job("recipes"), *each, Job("report"), Job("publish")]


def new_project(target: Path) -> Path:
    """A project with the shipped configuration and code, for the small model; git and DVC know it."""
    target.mkdir(parents=True)
    for name in ("conf", "src"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__", "local"))
    (target / "conf" / "local").mkdir()
    for name in ("pyproject.toml", "dvc.yaml", ".gitignore", ".dvcignore"):
        shutil.copy(ROOT / name, target / name)
    config = tiny_config(
        hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=BLOCKS, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=1024, initializer_range=0.05,
    )  # fmt: skip
    tiny_checkpoint(target / "source" / "model", config)
    rows = tiny_documents(count=64, words=1200)[["title", "text"]].to_dict("records")
    (target / "source" / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _configure(target)
    for command in (["git", "init", "--quiet"], [sys.executable, "-m", "dvc", "init", "--quiet"]):
        subprocess.run(command, cwd=target, check=True)
    return target


def _configure(project: Path) -> None:
    """Write the configuration's parts that differ; DVC reads the base's, so they stand there."""
    shared = {
        "model": {"kind": "directory", "name": "random", "path": "source/model", "license": "none"},
        "corpus": {"kind": "local", "name": "words", "path": "source/corpus.jsonl", "license": "none"},
        "calibration": {"samples": 24, "length": 512, "seed": 0},
        "evaluation": {"samples": 24, "length": 512, "seed": 0},
        "report": {"prompts": ["the river"], "new_tokens": 8},
    }
    gates = {"quality_gates": {"variants": {"dense": {"maximum_perplexity_ratio": 1.1}}}}
    values: dict[str, dict[str, Any]] = {
        "parameters": shared,
        "parameters_variants": {"variants": VARIANTS},
        "quality_gates": gates,
    }
    for name, value in values.items():
        file = project / "conf" / "base" / f"{name}.yml"
        file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **value}, sort_keys=False))


def digests(job: Job, project: Path) -> dict[str, str]:
    """The digest of every file of a job's outputs that is the same after every run."""
    files = [file for place in job.outputs(project) for file in (place.rglob("*") if place.is_dir() else [place])]
    return {
        file.relative_to(project).as_posix(): hashlib.sha256(_content(file)).hexdigest()
        for file in sorted(files)
        if file.is_file() and not file.name.removesuffix(".crc32").endswith(_TIMED) and file.name not in _TIMED
    }


def _content(file: Path) -> bytes:
    if file.name != "metrics.json":
        return file.read_bytes()
    figures = json.loads(file.read_text())
    return json.dumps({name: value for name, value in figures.items() if name not in COSTS}).encode()


def left_over(project: Path) -> list[str]:
    """Working space of a run, in the project's data and in its folder for temporary files."""
    data, temporary = project / "data", project / "tmp"
    kept = (".cache", ".scratch", ".work", ".locks", ".gitignore")  # DVC writes .gitignore beside an output
    hidden = [path for path in data.rglob(".*") if path.name not in kept]
    inside = [path for name in (".scratch", ".work") for path in (data / name).rglob("*") if path.name not in kept]
    named = [*data.rglob("*.partial"), *data.rglob("*.old"), *temporary.glob("*")]
    return sorted({path.relative_to(project).as_posix() for path in (*hidden, *inside, *named)})


def work_kept(project: Path) -> int:
    """Files that a killed run left for the next one to go on from."""
    return sum(path.is_file() for path in (project / "data" / ".work").rglob("*") if path.parent.name != ".locks")


def remove_outputs(job: Job, project: Path) -> None:
    """Bring the project to where the job's inputs are there and its outputs are not; DVC remembers nothing."""
    for place in job.outputs(project):
        if place.is_dir():
            shutil.rmtree(place)
        place.unlink(missing_ok=True)
    shutil.rmtree(project / "data" / ".work", ignore_errors=True)
    (project / "dvc.lock").unlink(missing_ok=True)
    shutil.rmtree(project / ".dvc" / "cache", ignore_errors=True)
