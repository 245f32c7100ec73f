"""The README's results table, made from what a run left on disk: `python -m benchmarks.readme`.

Reads `data/08_reporting/*/metrics.json` (written by `kedro run` or `dvc repro`) in the order of the variants,
replaces the text between the two markers in `README.md`, and copies the pictures to `docs/images/`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import transformers
import yaml

from benchmarks.machine import machine

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- results: made by `python -m benchmarks.readme` -->", "<!-- end of results -->"
PICTURES = {
    "data/09_comparison/pareto.png": "pareto.png",
    "data/08_reporting/2of4-fp8/error_by_layer.png": "error_by_layer.png",
    "data/08_reporting/ewma50-fp8/sparsity_by_layer.png": "sparsity_by_layer.png",
}


def about() -> str:
    """One line on what this was measured on."""
    facts = machine()
    return (
        f"{facts['cores']} cores of {facts['processor']} ({facts['capability']}), Python {facts['python']}, "
        f"torch {facts['torch'].partition('+')[0]}, transformers {transformers.__version__}, numba {facts['numba']}"
    )


def table() -> str:
    """The results in Markdown."""
    parameters = yaml.safe_load((ROOT / "conf/base/parameters.yml").read_text())
    variants = yaml.safe_load((ROOT / "conf/base/parameters_variants.yml").read_text())["variants"]
    lines = [
        (
            "| variant | perplexity | × dense | KL (nats) | top-1 agreement | sparsity | MB on disk | × smaller "
            "| seconds to make |"
        ),
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in variants:
        values = json.loads((ROOT / f"data/08_reporting/{name}/metrics.json").read_text())
        made = sum(seconds for stage, seconds in values["seconds"].items() if stage not in ("calibrate", "evaluate"))
        lines.append(
            f"| `{name}` | {values['perplexity']:.2f} | {values['perplexity_ratio']:.3f} "
            f"| {values['kl_divergence']:.4f} | {values['top1_agreement']:.1%} | {values['sparsity']:.1%} "
            f"| {values['size_bytes'] / 1e6:.1f} | {values['compression_ratio']:.2f} | {made:.0f} |"
        )
    calibration, evaluation = parameters["calibration"], parameters["evaluation"]
    lines += [
        "",
        (
            f"{parameters['model']['name']}; {parameters['corpus']['name']}. Calibrated on {calibration['samples']} × "
            f"{calibration['length']} tokens (seed {calibration['seed']}, even articles), once for all variants, in "
            f"{values['seconds']['calibrate']:.0f} s; evaluated from the exports, activation rounding included, "
            f"on {evaluation['samples']} × {evaluation['length']} (seed {evaluation['seed']}, odd articles). Machine: "
            f"{about()}."
        ),
    ]
    return "\n".join(lines)


def main() -> None:
    """Rewrite the table and the pictures."""
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    after = rest.split(END)[1]
    readme.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}")
    (ROOT / "docs/images").mkdir(exist_ok=True)
    for source, name in PICTURES.items():
        shutil.copyfile(ROOT / source, ROOT / "docs/images" / name)


if __name__ == "__main__":
    main()
