"""The tables and sentences of `README.md` and `docs/` that are made from measured files: `python -m benchmarks.readme`.

    name        page                        made from
    headline    README.md                   data/08_reporting/*/metrics.json and benchmarks/results/peers.json
    results     README.md                   data/08_reporting/*/metrics.json (`make run` or `make repro`)
    claims      docs/results.md             data/08_reporting/*/metrics.json and benchmarks/results/*.json
    peers       docs/results.md             benchmarks/results/peers.json (`make bench-peers`)
    bits        docs/results.md             benchmarks/results/peers.json and healing.json
    healing     docs/results.md             benchmarks/results/healing.json (`make bench-healing`)
    selection   docs/results.md             benchmarks/results/selection.json (`make bench-selection`)
    serving     docs/results.md             benchmarks/results/serving.json (`make bench-serving`)
    runtime     docs/results.md             benchmarks/results/runtime.json (`make bench-runtime`)
    inference   docs/results.md             benchmarks/results/inference.json (`make bench-inference`)
    kills       docs/reliability.md         benchmarks/results/kills.json (`make bench-kills`)
    presets     docs/choosing-a-variant.md  benchmarks/results/peers.json and the presets themselves

Each replaces what stands between its two markers on its page. `results` also copies the pictures to `docs/images/`.
Name tables as arguments to make only these. `headline` and `results` name the machine that this command runs on: make
them where the run was.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
import yaml

from benchmarks import by_bits
from benchmarks.claims import claims, headline, metrics, presets
from benchmarks.healing import table as healing_table
from benchmarks.inference_tables import decoding_table, layer_table, measured_on, speed
from benchmarks.kills import table as kills_table
from benchmarks.machine import machine, processor
from benchmarks.number_formats import table as formats_table
from benchmarks.output import RESULTS
from benchmarks.peers.contest import seconds
from benchmarks.peers.jobs import TASKS
from benchmarks.runtime import render as runtime_table
from benchmarks.serving import render as serving_table
from hwpq_pipeline.figures import FIGURES, cells, values
from hwpq_pipeline.measuring import SECONDS

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- {}: made by `python -m benchmarks.readme` -->", "<!-- end of {} -->"
PICTURES = {
    "data/09_comparison/pareto.png": "pareto.png",
    "data/09_comparison/charts/2of4-fp8/error_by_layer.png": "error_by_layer.png",
    "data/09_comparison/charts/ewma50-fp8/sparsity_by_layer.png": "sparsity_by_layer.png",
}


def about() -> str:
    """One line on what this was measured on."""
    facts = machine()
    return (
        f"{facts['cores']} cores of {processor(facts)}, Python {facts['python']}, "
        f"torch {facts['torch'].partition('+')[0]}, transformers {transformers.__version__}, numba {facts['numba']}"
    )


def results() -> str:
    """The variants with their figures."""
    parameters = yaml.safe_load((ROOT / "conf/base/parameters.yml").read_text())
    variants = yaml.safe_load((ROOT / "conf/base/parameters_variants.yml").read_text())["variants"]
    heads = ["variant", *(figure.label for figure in FIGURES)]
    rows = [[f"`{name}`", *cells(values(metrics(name), where=name))] for name in variants]
    lines = [f"| {' | '.join(cell)} |" for cell in (heads, ["---"] * len(heads), *rows)]
    calibration, evaluation = parameters["calibration"], parameters["evaluation"]
    calibrated = metrics(next(iter(variants)))[SECONDS]["calibrate"]
    lines += [
        "",
        (
            f"{parameters['model']['name']}; {parameters['corpus']['name']}. Calibrated on {calibration['samples']} × "
            f"{calibration['length']} tokens (seed {calibration['seed']}, even articles), once for all variants, in "
            f"{calibrated:.0f} s; evaluated from the exports, activation rounding included, "
            f"on {evaluation['samples']} × {evaluation['length']} (seed {evaluation['seed']}, odd articles). Machine: "
            f"{about()}."
        ),
    ]
    return "\n".join(lines)


def selection() -> str:
    """The one-pass selections on each shape, beside the copy and their rivals."""
    report = json.loads((RESULTS / "selection.json").read_text())
    lines = [
        "| shape | EWMA, × copy | × faster than sort | × faster than Wanda's mask | 2:4, × copy | × faster than topk |",
        "|---|---|---|---|---|---|",
    ]
    rows = {(row["shape"], row["method"]): row for row in report["rows"] if row["dtype"] == "bfloat16"}
    for shape in dict.fromkeys(row["shape"] for row in report["rows"]):
        ewma, fours = rows[shape, "ewma"], rows[shape, "two_of_four"]
        lines.append(
            f"| {shape} | {ewma['ratio_to_copy']:.2f} | {ewma['times_faster_than']['sort']:.0f} "
            f"| {ewma['times_faster_than']['wanda']:.0f} | {fours['ratio_to_copy']:.2f} "
            f"| {fours['times_faster_than']['topk_groups']:.0f} |"
        )
    where = report["machine"]
    lines += [
        "",
        f"{where['cores']} cores of {processor(where)}, torch {where['torch']}, numba {where['numba']}; bfloat16.",
    ]
    return "\n".join(lines)


def peers() -> str:
    """For each task the best row of every method, by perplexity; a table a machine."""
    report = json.loads((RESULTS / "peers.json").read_text())
    best: dict[tuple[str, int, str, str, str], dict[str, Any]] = {}
    for row in report["rows"]:
        name = (row["processor"], row["samples"], row["task"], row["side"], row["method"])
        if "perplexity" in row and row["perplexity"] < best.get(name, {"perplexity": float("inf")})["perplexity"]:
            best[name] = row
    compared = [figure for figure in FIGURES if figure.name in ("perplexity", "perplexity_ratio", "kl_divergence")]

    def judged(row: dict[str, Any]) -> tuple[float, float, float]:
        return row["perplexity"], row["perplexity"] / report["dense_perplexity"], row["kl_divergence"]

    ordered = sorted(best.values(), key=lambda row: (row["samples"], TASKS.index(row["task"]), row["perplexity"]))
    parts = []
    for where in sorted({row["processor"] for row in ordered}):
        lines = [
            f"| samples | task | side | method | {' | '.join(figure.label for figure in compared)} | seconds |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {row['samples']} | {row['task']} | {row['side']} | {row['method']} "
            f"| {' | '.join(figure.show(value) for figure, value in zip(compared, judged(row), strict=True))} "
            f"| {seconds(row)} |"
            for row in ordered
            if row["processor"] == where
        ]
        parts.append(f"{report['machine']['cores']} cores of {where}:\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def inference() -> str:
    """One token through one layer, and decoding with whole models if they have been measured."""
    report = json.loads((RESULTS / "inference.json").read_text())
    parts = [
        layer_table(
            report["layers"]["rows"], ("2:4 int4, native", "2:4 int8, native", "2:4 int8", "2:4 float8_e4m3fn")
        ),
        f"Layers: {measured_on(report['layers'])}",
    ]
    if "models" in report:
        rows = report["models"]["rows"]
        parts += [
            (
                "Tokens a second of one sequence, in brackets × the same engine's dense model (the runtime's: "
                "transformers'):"
            ),
            decoding_table(rows),
            (
                "The dense model in bfloat16 decodes "
                f"{speed(rows, 'transformers, bfloat16', 'dense', 'decode', 1):.1f} in transformers. "
                f"Models: {measured_on(report['models'])}"
            ),
        ]
    return "\n\n".join(parts)


def formats() -> str:
    """NVFP4 and MXFP4, as the bench of number formats wrote them."""
    return formats_table(json.loads((RESULTS / "number_formats.json").read_text())).strip()


def bits() -> str:
    """The best model by bits a weight."""
    peers, healing = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("peers", "healing"))
    return by_bits.table(peers, healing)


def healing() -> str:
    """Sparse variants before and after healing, as its bench wrote them."""
    return healing_table(json.loads((RESULTS / "healing.json").read_text())).strip()


def serving() -> str:
    """Packed 2:4 in vLLM, as its bench wrote it."""
    return serving_table(json.loads((RESULTS / "serving.json").read_text())).strip()


def runtime() -> str:
    """Packed 2:4 in transformers, as its bench wrote it."""
    return runtime_table(json.loads((RESULTS / "runtime.json").read_text())).strip()


def kills() -> str:
    """Stages that were killed, as its bench wrote them."""
    return kills_table(json.loads((RESULTS / "kills.json").read_text()))


#: Each name's page, and what makes it.
PAGES: dict[str, tuple[str, Callable[[], str]]] = {
    "headline": ("README.md", headline),
    "results": ("README.md", results),
    "claims": ("docs/results.md", claims),
    "peers": ("docs/results.md", peers),
    "bits": ("docs/results.md", bits),
    "healing": ("docs/results.md", healing),
    "selection": ("docs/results.md", selection),
    "formats": ("docs/results.md", formats),
    "serving": ("docs/results.md", serving),
    "runtime": ("docs/results.md", runtime),
    "inference": ("docs/results.md", inference),
    "kills": ("docs/reliability.md", kills),
    "presets": ("docs/choosing-a-variant.md", presets),
}


def replaced(text: str, name: str, made: str) -> str:
    """A page's text with what stands between the markers of `name` replaced.

    Raises:
        ValueError: the page lacks a marker, or has it twice.
    """
    begin, end = BEGIN.format(name), END.format(name)
    if (text.count(begin), text.count(end)) != (1, 1):
        raise ValueError(f"{begin} and {end} must each stand on the page once")
    before, rest = text.split(begin)
    return f"{before}{begin}\n\n{made}\n\n{end}{rest.split(end)[1]}"


def main() -> None:
    """Rewrite the tables that are asked for, and the pictures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("tables", nargs="*", help=f"of {', '.join(PAGES)}; all if none is named")
    asked = parser.parse_args().tables or list(PAGES)
    if unknown := set(asked) - set(PAGES):
        parser.error(f"no such table: {', '.join(sorted(unknown))}. Choose from {', '.join(PAGES)}.")
    for name in asked:
        page, make = PAGES[name]
        text = (ROOT / page).read_text()
        (ROOT / page).write_text(replaced(text, name, make()))
    if "results" in asked:
        (ROOT / "docs/images").mkdir(exist_ok=True)
        for source, picture in PICTURES.items():
            shutil.copyfile(ROOT / source, ROOT / "docs/images" / picture)


if __name__ == "__main__":
    main()
