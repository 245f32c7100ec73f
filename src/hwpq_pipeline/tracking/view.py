"""How the experiment opens in the MLflow UI: its description, the columns of its table, its charts.

The UI keeps columns and charts in the browser of the person who set them up. A view that someone shares is kept in a
tag of the experiment, and its key in the address opens it. This module writes such a tag, so that nobody has to set
anything up. The tag has the UI's own format, which is no documented interface: a UI that cannot read it shows its
defaults.
"""

from __future__ import annotations

import json
from typing import Any

from hwpq_pipeline.figures import FIGURES, GATED, QUALITY, SIZE, TIME, Figure

SHARE_KEY = "variants"
QUERY = f"viewStateShareKey={SHARE_KEY}"
COLUMNS = tuple(figure.name for figure in FIGURES)

NOTE = """\
Each run is one compressed variant with one content. `kedro run` and `dvc repro` log them, and running again adds
nothing. A run's name is its variant; `dense` is the model as it came.

**[Open the table with its columns](#/experiments/{experiment_id}/runs?{query})**. Its chart view shows the variants by
quality, size and time. Each run holds its layers (`error_…/<kind>`, `sparsity/<kind>`, a step for each decoder block),
its recipe, its plots, the table of layers, what it was made from, and where its export lies.

{figures}
"""


def _section(name: str) -> dict[str, Any]:
    return {"uuid": name, "name": name, "display": True, "isReordered": False, "deleted": False, "isGenerated": False}


def _scatter(cost: Figure) -> dict[str, Any]:
    return {
        "type": "SCATTER",
        "uuid": cost.name,
        "metricSectionId": "Choosing a variant",
        "deleted": False,
        "isGenerated": False,
        "runsCountToCompare": 100,
        "xaxis": {"key": cost.name, "type": "METRIC"},
        "yaxis": {"key": QUALITY.name, "type": "METRIC"},
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
        "selectedMetrics": [figure.name for figure in (*GATED, TIME)],
        "showAllRuns": False,
    }
    return {
        "selectedColumns": [f"metrics.`{name}`" for name in COLUMNS],
        "columnOrder": [f"metrics.`{name}`" for name in COLUMNS],
        "orderByKey": f"metrics.`{COLUMNS[0]}`",
        "orderByAsc": True,
        "runsHiddenMode": "FIRST_20_RUNS",
        "compareRunCharts": [parallel, _scatter(SIZE), _scatter(TIME)],
        "compareRunSections": [_section("Choosing a variant")],
    }


def experiment_tags(experiment_id: str) -> dict[str, str]:
    """Tags of the experiment: description, kind (the UI would ask) and shared view."""
    figures = "\n".join(f"- `{figure.name}`, {figure.label}: {figure.told}" for figure in FIGURES)
    return {
        "mlflow.note.content": NOTE.format(experiment_id=experiment_id, query=QUERY, figures=figures),
        "mlflow.experimentKind": "custom_model_development",
        f"mlflow.sharedViewState.{SHARE_KEY}": json.dumps(view_state()),
    }
