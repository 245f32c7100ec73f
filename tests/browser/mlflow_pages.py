"""The pages of the MLflow UI that a user chooses a variant on, opened and awaited."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote

from hwpq_pipeline.tracking.view import QUERY

WAIT = 60_000  # milliseconds: two cores may be busy with the server itself


def open_table(page: Any, server: str, experiment_id: str) -> None:
    """The experiment's runs, with the columns of the shared view."""
    page.goto(f"{server}/#/experiments/{experiment_id}/runs?{QUERY}")
    page.get_by_role("grid").or_(page.locator(".ag-root")).first.wait_for(timeout=WAIT)
    page.get_by_text("perplexity_ratio").first.wait_for(timeout=WAIT)


def close_assistant(page: Any) -> None:
    """The panel that a new user is shown; it stays closed for the browser's other pages."""
    page.locator('[data-component-id="mlflow.assistant.chat_panel.close"]').first.click(timeout=WAIT)


def open_charts(page: Any, server: str, experiment_id: str) -> None:
    """The experiment's chart view: parallel coordinates and scatter."""
    page.goto(f"{server}/#/experiments/{experiment_id}/runs?{QUERY}&compareRunsMode=CHART")
    page.get_by_text("size_bytes vs. perplexity_ratio").first.wait_for(timeout=WAIT)
    page.locator(".js-plotly-plot").first.wait_for(timeout=WAIT)


def open_comparison(page: Any, server: str, experiment_id: str, run_ids: Iterable[str]) -> None:
    """The page that *Compare* leads to for the runs."""
    runs, experiments = quote(json.dumps(list(run_ids))), quote(json.dumps([experiment_id]))
    page.goto(f"{server}/#/compare-runs?runs={runs}&experiments={experiments}")
    page.locator(".js-plotly-plot").first.wait_for(timeout=WAIT)


def open_run(page: Any, server: str, experiment_id: str, run_id: str, *, tab: str = "") -> None:
    """A run; `tab` may be `model-metrics` or `artifacts`."""
    page.goto(f"{server}/#/experiments/{experiment_id}/runs/{run_id}{tab and '/' + tab}")
    page.get_by_text("Artifacts").first.wait_for(timeout=WAIT)


def open_artifact(page: Any, server: str, experiment_id: str, run_id: str, path: str) -> None:
    """A file of a run, in the viewer that the UI has for it."""
    page.goto("about:blank")  # the tab reads its path once: another path on the same page changes nothing
    open_run(page, server, experiment_id, run_id, tab=f"artifacts/{path}")
    page.get_by_text(f"/artifacts/{path}").first.wait_for(timeout=WAIT)
