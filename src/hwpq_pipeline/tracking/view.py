"""How the experiment opens in the MLflow UI: its description, the columns of its table, its charts.

The UI keeps columns and charts in the browser of whoever set them up. A view that someone shares is kept in a tag of
the experiment instead, and opened by its key in the address. Such a tag is written here, so that nobody has to set
anything up. It is the UI's own format, not a documented interface: a UI that cannot read it shows its defaults.
"""

from __future__ import annotations

import json
from typing import Any

from hwpq_pipeline.figures import FIGURES

SHARE_KEY = "variants"
QUERY = f"viewStateShareKey={SHARE_KEY}"
COLUMNS = (*FIGURES, "seconds_to_make")
QUALITY, SIZE, TIME = "perplexity_ratio", "size_bytes", "seconds_to_make"

NOTE = """\
One run a compressed variant and content: what is logged here was made by `kedro run` or `dvc repro`, and running
again adds nothing. A run's name is its variant.

**[Open the table with its columns](#/experiments/{experiment_id}/runs?{query})**; its chart
view has the variants by quality, size and time. Lower perplexity, fewer bytes and fewer seconds are better; `dense` is
the model as it came. Each run holds its layers (`error_…/<kind>`, `sparsity/<kind>`, step = decoder block), its plots,
the table of layers, what it was made from, and where its export lies.
"""


def _section(name: str) -> dict[str, Any]:
    return {"uuid": name, "name": name, "display": True, "isReordered": False, "deleted": False, "isGenerated": False}


def _scatter(x: str) -> dict[str, Any]:
    return {
        "type": "SCATTER",
        "uuid": x,
        "metricSectionId": "Choosing a variant",
        "deleted": False,
        "isGenerated": False,
        "runsCountToCompare": 100,
        "xaxis": {"key": x, "type": "METRIC"},
        "yaxis": {"key": QUALITY, "type": "METRIC"},
    }


def view_state() -> dict[str, Any]:
    """The shared view: columns in order, parallel coordinates, quality against size and against time."""
    parallel = {
        "type": "PARALLEL",
        "uuid": "parallel",
        "metricSectionId": "Choosing a variant",
        "deleted": False,
        "isGenerated": False,
        "runsCountToCompare": 100,
        "selectedParams": [],
        "selectedMetrics": [QUALITY, "top1_agreement", SIZE, TIME],
        "showAllRuns": False,
    }
    return {
        "selectedColumns": [f"metrics.`{name}`" for name in COLUMNS],
        "columnOrder": [f"metrics.`{name}`" for name in COLUMNS],
        "orderByKey": "metrics.`perplexity`",
        "orderByAsc": True,
        "runsHiddenMode": "FIRST_20_RUNS",
        "compareRunCharts": [parallel, _scatter(SIZE), _scatter(TIME)],
        "compareRunSections": [_section("Choosing a variant")],
    }


def experiment_tags(experiment_id: str) -> dict[str, str]:
    """Tags of the experiment: description, kind (the UI would ask) and shared view."""
    return {
        "mlflow.note.content": NOTE.format(experiment_id=experiment_id, query=QUERY),
        "mlflow.experimentKind": "custom_model_development",
        f"mlflow.sharedViewState.{SHARE_KEY}": json.dumps(view_state()),
    }
