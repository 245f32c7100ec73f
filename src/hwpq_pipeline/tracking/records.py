"""What is known about a finished variant, as it goes into a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hwpq_pipeline.figures import TIME, making_seconds
from hwpq_pipeline.measuring import COSTS, SECONDS


@dataclass(frozen=True)
class Dataset:
    """Data that a run read, shown as its input.

    Attributes:
        name: for people.
        digest: sha256 of the content; MLflow shows its beginning.
        context: what it was read for: `calibration`, `evaluation`, `model`.
        source: where it came from, as plain values.
        profile: its extent, as plain values.
    """

    name: str
    digest: str
    context: str
    source: Mapping[str, Any] = field(default_factory=dict)
    profile: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """What is logged for one variant.

    Attributes:
        variant: its name.
        parameters: nested mapping of plain values; logged flat, `selection.metric`.
        metrics: figures, and by stage what it took, under the names in `measuring.COSTS`.
        digests: sha256 by name: `model`, `corpus`, `export`, `evaluation`; logged as tags.
        series: figures with a value a step, (step, value) by name: layers of one kind, by block.
        datasets: what it was made from and judged on.
        files: artifacts on disk.
        texts: artifacts as text, by file name.
        tags: further tags.
        description: in Markdown, shown above the run.
    """

    variant: str
    parameters: Mapping[str, Any]
    metrics: Mapping[str, Any]
    digests: Mapping[str, str]
    series: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    datasets: Sequence[Dataset] = ()
    files: Sequence[Path] = ()
    texts: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    description: str = ""

    @property
    def key(self) -> str:
        """Digest of the content, without what the stages took."""
        content = {
            "variant": self.variant,
            "parameters": flat(self.parameters),
            "digests": dict(self.digests),
            "metrics": {name: value for name, value in self.metrics.items() if name not in COSTS},
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()

    @property
    def figures(self) -> dict[str, float]:
        """All single numbers by name: figures, `seconds_to_make`, and each stage's `seconds/<stage>` and so on."""
        single = {name: float(value) for name, value in self.metrics.items() if _is_number(value)}
        # MLflow makes a section of charts from what stands before the slash.
        for cost in COSTS:
            single |= {f"{cost}/{stage}": float(value) for stage, value in self.metrics.get(cost, {}).items()}
        return single | ({TIME.name: making_seconds(self.metrics)} if self.metrics.get(SECONDS) else {})


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    result: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, Mapping):
            result.update(flat(value, f"{prefix}{name}."))
        else:
            result[f"{prefix}{name}"] = value
    return result


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
