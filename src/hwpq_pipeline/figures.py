"""What is told of a variant: each figure (metric) once, with its name, label, number format and direction.

A figure is a number of `metrics.json` that people are shown. `FIGURES` is the only list of them. All that shows
figures reads it: the terminal, `comparison.csv`, the report and its plots, MLflow, the model cards, the quality
gates, the check of the comparison's table, the README, and the summary of `make ci`. So a new figure is two changes:
the place that computes it, which puts it into `metrics.json`, and an entry here.

**Seconds to make** are those from the dense model to the export: calibration, selection, compression and export. All
variants share one calibration, and it counts for each of them, because each needs it. Evaluation does not count.

How the columns of the layer table are shown stands here too, in `LAYER_FIGURES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.measuring import SECONDS

#: The stages that make a variant of the dense model; the others bring the model, or judge the variant.
_MAKING = {"calibrate", "select", "compress", "export"}


@dataclass(frozen=True)
class Figure:
    """One figure of a variant.

    Attributes:
        name: the key in `metrics.json`, the column in `comparison.csv`, the metric in MLflow.
        label: what people read, with the unit of what is shown.
        meaning: one sentence for those who do not know the label.
        unit: of the number as it is stored; empty for a plain number. A `share` is 0 to 1, `bytes` are whole.
        format: of what is shown, as Python's format specification.
        better: which direction is better; None where neither is.
        divisor: what is shown is the stored number divided by it.
        positive: whether zero is no possible value. No figure is below zero.
        gate: what its quality gate is called after `maximum_` or `minimum_`; empty for a figure without a gate.
        dense: the dense model's: the number, or the key of `metrics.json` that holds it; None where there is none.
    """

    name: str
    label: str
    meaning: str
    unit: str = ""
    format: str = ".2f"
    better: Literal["lower", "higher"] | None = None
    divisor: float = 1
    positive: bool = False
    gate: str = ""
    dense: float | str | None = None

    def show(self, value: float) -> str:
        """The number as people read it, without its label."""
        return f"{value / self.divisor:{self.format}}"

    @property
    def told(self) -> str:
        """What it means, and which direction is better."""
        return self.meaning + (f" ({self.better} is better)" if self.better else "")

    @property
    def limit(self) -> str:
        """The name of its quality gate: the most of what should be low, the least of what should be high."""
        return f"{'maximum' if self.better == 'lower' else 'minimum'}_{self.gate}" if self.gate else ""

    @property
    def whole(self) -> bool:
        """Whether it is a whole number."""
        return self.unit == "bytes"

    @property
    def most(self) -> float | None:
        """The largest possible value, if there is one."""
        return 1.0 if self.unit == "share" else None


#: The axes of the plots that compare variants: how good one is against its size and its time.
QUALITY = Figure(
    "perplexity_ratio",
    "perplexity, × dense",
    "perplexity as a multiple of the dense model's, on the same tokens",
    unit="×",
    format=".3f",
    better="lower",
    positive=True,
    gate="perplexity_ratio",
    dense=1,
)
SIZE = Figure(
    "size_bytes",
    "MB on disk",
    "bytes of the exported safetensors files, in millions",
    unit="bytes",
    format=".1f",
    better="lower",
    divisor=1e6,
    positive=True,
    gate="bytes",
    dense="dense_bytes",
)
TIME = Figure(
    "seconds_to_make",
    "seconds to make, calibration included",
    "seconds from the dense model to the export: calibrate, select, compress, export",
    unit="seconds",
    format=".0f",
    better="lower",
)
#: In the order in which they are shown.
FIGURES = (
    Figure(
        "perplexity",
        "perplexity",
        "exp of the mean negative log-likelihood of the next token",
        better="lower",
        positive=True,
        dense="dense_perplexity",
    ),
    QUALITY,
    Figure(
        "kl_divergence",
        "KL, nats a token",
        "mean divergence KL(dense ‖ variant) of the next token's distribution",
        unit="nats a token",
        format=".4f",
        better="lower",
        dense=0,
    ),
    Figure(
        "top1_agreement",
        "top-1 agreement",
        "share of positions at which the dense model and the variant find the same token likeliest",
        unit="share",
        format=".1%",
        better="higher",
        gate="top1_agreement",
        dense=1,
    ),
    Figure(
        "coverage",
        "coverage",
        "share of the weights inside the decoder blocks that were pruned or rounded; 0 where nothing was to be done",
        unit="share",
        format=".1%",
        better="higher",
        gate="coverage",
        dense=0,
    ),
    Figure(
        "sparsity",
        "sparsity of the blocks",
        "share of zeros among all weights inside the decoder blocks, after rounding; embeddings and head do not count",
        unit="share",
        format=".1%",
    ),
    SIZE,
    Figure(
        "compression_ratio",
        "× smaller",
        "the whole dense model's bytes, embeddings included, as a multiple of the variant's",
        unit="×",
        better="higher",
        positive=True,
        dense=1,
    ),
    TIME,
)
#: The figures that a quality gate may limit.
GATED = tuple(figure for figure in FIGURES if figure.gate)


@dataclass(frozen=True)
class LayerFigure:
    """How a column of the layer table is shown.

    Attributes:
        column: its name (`layer_columns`).
        label: what people read.
        curve: what its curves over the decoder blocks are called in MLflow, before `/<kind>`; empty for none.
    """

    column: str
    label: str
    curve: str = ""


ERRORS = (
    LayerFigure("error_pruned", "output error, pruned", "error_pruned"),
    LayerFigure("error_recovered", "output error, recovered", "error_recovered"),
    LayerFigure("error_quantized", "output error, rounded", "error_quantized"),
)
REACHED = LayerFigure("reached_sparsity", "sparsity, reached", "sparsity")
WANTED = LayerFigure("wanted_sparsity", "sparsity, wanted")
LAYER_FIGURES = (*ERRORS, REACHED, WANTED)


def values(metrics: Mapping[str, Any] | None, *, where: str) -> dict[str, float]:
    """The figures of a variant by name, in the order of `FIGURES`.

    Args:
        metrics: as in its `metrics.json`, which may be damaged.
        where: whose they are, for the error.

    Raises:
        HwpqError: a figure is missing, or is no number. NaN is one: people see it, and it keeps no limit.
    """
    known = dict(metrics) if isinstance(metrics, Mapping) else {}
    times = known.get(SECONDS)
    if isinstance(times, Mapping) and times and all(map(_is_number, times.values())):
        known[TIME.name] = making_seconds(known)
    if missing := [figure.name for figure in FIGURES if not _is_number(known.get(figure.name))]:
        raise HwpqError(f"no {', '.join(missing)}", where=where, remedy="Run the evaluate pipeline again.")
    return {figure.name: known[figure.name] for figure in FIGURES}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def cells(figures: Mapping[str, Any]) -> list[str]:
    """The figures as people read them, in the order of `FIGURES`."""
    return [figure.show(figures[figure.name]) for figure in FIGURES]


def making_seconds(metrics: Mapping[str, Any]) -> float:
    """Seconds from the dense model to the export: calibrate, select, compress, export."""
    return float(sum(value for stage, value in metrics[SECONDS].items() if stage in _MAKING))
