"""The tables of `benchmarks.inference`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from benchmarks.machine import processor


def render(results: dict[str, Any]) -> str:
    """The Markdown of `results/inference.md`."""
    parts = [
        "# Speed of the exports",
        "Made by `make bench-inference`; ratios are within one run, not across machines.",
    ]
    if "layers" in results:
        parts += [
            "## One token through one layer",
            measured_on(results["layers"]),
            *_layer_tables(results["layers"]["rows"]),
        ]
    if "models" in results:
        parts += ["## Whole models, tokens a second", measured_on(results["models"]), _models_text(results["models"])]
    return "\n\n".join(parts) + "\n"


def measured_on(part: dict[str, Any]) -> str:
    """One line on what a part was measured on."""
    info = part["machine"]
    return (
        f"{info['torch_threads']} of {info['cores']} cores of {processor(info)}, "
        f"torch {info['torch']}, numba {info['numba']}, load {info['load_before']:.1f} before."
    )


def _layer_tables(rows: list[dict[str, Any]]) -> list[str]:
    names = [name for name in rows[0]["milliseconds"] if not name.startswith(_ROOF)]
    head = "| out × in | " + " | ".join(names) + " |\n|---|" + "---|" * len(names)

    def table(value: Callable[[dict[str, Any], str], str]) -> str:
        lines = [
            f"| {row['shape'][0]} × {row['shape'][1]} | " + " | ".join(value(row, name) for name in names) + " |"
            for row in rows
        ]
        return "\n".join([head, *lines])

    def times_faster(than: str) -> Callable[[dict[str, Any], str], str]:
        return lambda row, name: f"{row['milliseconds'][than] / row['milliseconds'][name]:.2f}"

    return [
        "Milliseconds, median:", table(lambda row, name: f"{row['milliseconds'][name]:.3f}"),
        "Times as fast as dense bfloat16:", table(times_faster("dense bfloat16")),
        "Times as fast as dense float32:", table(times_faster("dense float32")),
        "Of the read rate of a copy or a sum, the faster one, the share that is reached:", table(_share),
        "Megabytes that the weight takes:", table(lambda row, name: f"{row['megabytes'][name]:.2f}"),
    ]  # fmt: skip


_ROOF = "read, "


def _share(row: dict[str, Any], name: str) -> str:
    """The share of the roofline; nothing in results that have none."""
    rates = {key: row["megabytes"][key] / row["milliseconds"][key] for key in row["milliseconds"]}
    roofs = [rate for key, rate in rates.items() if key.startswith(_ROOF)]
    return f"{rates[name] / max(roofs):.0%}" if roofs else ""


def _models_text(part: dict[str, Any]) -> str:
    rows = part["rows"]
    batches = sorted({entry["batch"] for row in rows for entry in row.get("speed", [])})
    head = ["engine", "variant", *(f"{kind}, batch {batch}" for kind in ("prefill", "decode") for batch in batches)]
    lines = ["| " + " | ".join([*head, "measured, load before"]) + " |", "|---" * (len(head) + 1) + "|"]
    for row in rows:
        name = f"| {row['engine']} | `{row['variant']}` | "
        if "error" in row:
            lines.append(f"{name}does not run: {row['error'][:200]} |" + " |" * (len(head) - 2))
            continue
        cells = [_cell(rows, row, kind, batch) for kind in ("prefill", "decode") for batch in batches]
        lines.append(name + " | ".join([*cells, f"{row['at']}, {row['load_before']:.1f}"]) + " |")
    asked = f"{part['prompt_tokens']} prompt tokens, {part['new_tokens']} new ones a sequence."
    return f"{asked} In brackets: × the dense model of the same engine (the runtime's: transformers).\n\n" + "\n".join(
        lines
    )


def speed(rows: list[dict[str, Any]], engine: str, variant: str, kind: str, batch: int) -> float:
    """Tokens a second of a row, NaN if it is not there; of an engine by how its name begins."""
    found = (row for row in rows if row["engine"].startswith(engine) and row["variant"] == variant)
    entries = (entry for row in found for entry in row.get("speed", []) if entry["batch"] == batch)
    return next((float(entry[kind]) for entry in entries), float("nan"))


def dense_of(engine: str) -> str:
    """The engine whose dense model an engine's rows are compared with."""
    if engine.startswith("llama.cpp"):
        return "llama.cpp"  # its name goes on with the type of the file
    return "transformers, float32" if engine.startswith("hwpq") else engine


def _cell(rows: list[dict[str, Any]], row: dict[str, Any], kind: str, batch: int) -> str:
    return _beside(
        speed(rows, row["engine"], row["variant"], kind, batch),
        speed(rows, dense_of(row["engine"]), "dense", kind, batch),
    )


def _beside(value: float, dense: float) -> str:
    """A speed and × the dense model's; nothing for what was not measured."""
    if math.isnan(value):
        return ""
    return f"{value:.1f}" if math.isnan(dense) else f"{value:.1f} ({value / dense:.2f})"


def decoding_table(rows: list[dict[str, Any]]) -> str:
    """Decoding one sequence, a row a variant, a column an engine: tokens a second, and × the engine's dense model."""
    engines = {row["engine"].partition(",")[0] for row in rows}
    columns = [name for name in ("transformers", "hwpq_pipeline.runtime", "ONNX Runtime", "llama.cpp", "vLLM")
               if name in engines]  # fmt: skip
    exact = {"transformers": "transformers, float32"}  # its bfloat16 row is named below the table
    lines = ["| variant | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        cells = []
        for column in columns:
            engine = exact.get(column, column)
            value = speed(rows, engine, variant, "decode", 1)
            dense = speed(rows, exact.get(dense_of(engine), dense_of(engine)), "dense", "decode", 1)
            cells.append(_beside(value, dense))
        lines.append(f"| `{variant}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def layer_table(rows: list[dict[str, Any]], kinds: tuple[str, ...]) -> str:
    """One token through one layer: milliseconds of torch's dense layers, and how many times as fast the kinds are."""
    dense = ("dense bfloat16", "dense float32")
    head = ["out × in", *(f"{name}, ms" for name in dense)]
    head += [f"{kind}, × {name.removeprefix('dense ')}" for kind in kinds for name in dense]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        times = row["milliseconds"]
        cells = [f"{times[name]:.2f}" for name in dense]
        cells += [f"{times[name] / times[kind]:.2f}" for kind in kinds for name in dense]
        lines.append(f"| {row['shape'][0]} × {row['shape'][1]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
