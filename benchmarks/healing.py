"""What healing gives, and whether the model was healed or the text was learnt: before and after it, on three texts.

    make bench-healing                     HEALED names some; rows of others stay

Each variant is healed from the compressed model that `make run` left in `data/06_models`, with the numbers of
`healing: {}`, unless `<variant>-healed` is there already. Then the dense model, the variant and the healed variant are
asked for three texts that nothing learnt from: the evaluation tokens, others of the same articles, and news of the
Australian Broadcasting Corporation (gensim's Lee corpus, in the wheel that the default text comes from). FP8 layers
round their inputs as well. Writes `benchmarks/results/healing.{json,md}`.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.judge import hidden_states, judge
from benchmarks.machine import machine, processor
from benchmarks.number_formats import loaded
from benchmarks.output import RESULTS, write_results
from benchmarks.peers.ours import put, round_activations
from hwpq_pipeline.checkpoints.compressed import CompressedModel
from hwpq_pipeline.checkpoints.download import fetch_wheel_member
from hwpq_pipeline.corpus.samples import draw_samples, token_matrix
from hwpq_pipeline.decoder.memory import keep_freed_memory
from hwpq_pipeline.method.healed import samples_needed, write_healed
from hwpq_pipeline.method.recipe import Recipe

ROOT = Path(__file__).parents[1]
SAMPLES, LENGTH = 16, 512
NEWS = (
    "gensim==4.4.0",
    "gensim/test/test_data/lee_background.cor",
    "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb",
)
VARIANTS = ("2of4-fp8", "2of4-int4", "ewma50-fp8")


def texts(data: Path) -> dict[str, Tensor]:
    """(samples, length) tokens of each text."""
    model_dir, documents = data / "01_raw" / "model", pd.read_parquet(data / "02_intermediate" / "documents.parquet")
    drawn = {
        name: draw_samples(documents, model_dir, split="evaluation", samples=SAMPLES, length=LENGTH, seed=seed)
        for name, seed in (("evaluation", 0), ("seed 1", 1))
    }
    found = {name: torch.from_numpy(token_matrix(samples)) for name, samples in drawn.items()}
    news = fetch_wheel_member(*NEWS, data / ".cache").read_text(encoding="utf-8")
    ids = torch.tensor(AutoTokenizer.from_pretrained(model_dir)(news)["input_ids"])
    windows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    return {**found, "news": windows[:: len(windows) // SAMPLES][:SAMPLES]}


def judged(compressed: Path, data: Path, tokens: dict[str, Tensor], dense: dict[str, Any]) -> dict[str, Any]:
    """A compressed model's figures on each text, as shares of the dense model's."""
    source, model = CompressedModel(compressed), loaded(data / "01_raw" / "model")
    put(compressed, model)
    if Recipe.from_json(source.recipe).parts[0].quantization.grid.startswith("fp8"):  # type: ignore[union-attr]
        round_activations(model)
    found = {}
    for name, ids in tokens.items():
        own = judge(model, ids, dense[name]["hidden"], dense["head"])
        found[name] = {"times_dense": own["perplexity"] / dense[name]["perplexity"], **own}
    return found


def healed(variant: str, data: Path, scratch: Path) -> tuple[Path, float | None]:
    """The healed variant's compressed model, and the seconds that it took; None if `make run` made it."""
    made = data / "06_models" / f"{variant}-healed" / "model"
    if made.is_dir():
        return made, None
    source = data / "06_models" / variant / "model"
    recipe = Recipe.from_variant({"healing": {}})
    documents, model_dir = pd.read_parquet(data / "02_intermediate" / "documents.parquet"), data / "01_raw" / "model"
    drawn = draw_samples(
        documents, model_dir, split="calibration", samples=samples_needed(recipe, LENGTH), length=LENGTH, seed=0
    )
    target, begun = scratch / variant, time.perf_counter()
    target.mkdir()
    states, tokens = scratch / "states", token_matrix(drawn)
    write_healed(model_dir, source, recipe, target, tokens=tokens, states=states, device=torch.device("cpu"))
    return target, time.perf_counter() - begun


class Said(logging.Handler):
    """What the healing said of itself: that its minutes ended it, for one."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        self.lines.append(record.getMessage())


def table(report: dict[str, Any]) -> str:
    """The rows as Markdown."""
    names = list(report["dense"])
    lines = [
        f"Times the dense perplexity; {SAMPLES} × {LENGTH} tokens of each text. "
        "Dense: " + ", ".join(f"{name} {report['dense'][name]:.2f}" for name in names) + ".",
        "",
        "| variant | " + " | ".join(names) + " | minutes |",
        "|---|" + "---:|" * (len(names) + 1),
    ]
    for row in report["rows"]:
        cells = " | ".join(f"{row['texts'][name]['times_dense']:.3f}" for name in names)
        minutes = f"{row['seconds'] / 60:.0f}" if row.get("seconds") else ""
        lines.append(f"| {row['variant']} | {cells} | {minutes} |")
    said = [f"`{row['variant']}`: {line}" for row in report["rows"] for line in row.get("said", ())]
    return "\n".join([*lines, "", *said, f"{processor(report['machine'])}.", ""])


def main() -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "data")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    keep_freed_memory()
    tokens, dense_model = texts(options.data), loaded(options.data / "01_raw" / "model")
    dense: dict[str, Any] = {"head": dense_model.lm_head.weight.detach().clone()}
    for name, ids in tokens.items():
        hidden = hidden_states(dense_model, ids)
        dense[name] = {"hidden": hidden, **judge(dense_model, ids, hidden, dense["head"])}
    file = options.out / "healing.json"
    old = json.loads(file.read_text())["rows"] if file.exists() else []
    perplexities = {name: dense[name]["perplexity"] for name in tokens}
    report: dict[str, Any] = {"machine": machine(), "dense": perplexities, "rows": old}
    logger = logging.getLogger("hwpq_pipeline.method.healing")
    for variant in options.variants:
        plain = options.data / "06_models" / variant / "model"
        said = Said()
        logger.addHandler(said)
        with tempfile.TemporaryDirectory(dir=options.data) as folder:
            path, seconds = healed(variant, options.data, Path(folder))
            made = {variant: (plain, None), f"{variant}-healed": (path, seconds)}
            rows = [
                {
                    "variant": name,
                    "seconds": spent,
                    "texts": judged(where, options.data, tokens, dense),
                    "said": list(said.lines) if spent else [],
                }
                for name, (where, spent) in made.items()
            ]
        logger.removeHandler(said)
        report["rows"] = [row for row in report["rows"] if row["variant"] not in made] + rows
        write_results(options.out, "healing", report, table(report))
    print(table(report))


if __name__ == "__main__":
    main()
