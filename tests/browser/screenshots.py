"""The pictures of the MLflow UI in `docs/images`: `make screenshots`."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tests.browser.chromium import browser
from tests.browser.mlflow_pages import close_assistant, open_charts, open_comparison, open_run, open_table
from tests.conftest import ROOT
from tests.logged import experiment_id, logged_runs
from tests.servers import mlflow_server


def main() -> None:
    """Serve the database, open the pages, write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--database", required=True)
    parser.add_argument("--experiment", default="hwpq")
    parser.add_argument("--run", default="2of4-fp8")
    parser.add_argument("--to", type=Path, default=ROOT / "docs" / "images")
    given = parser.parse_args()
    runs = logged_runs(given.database, given.experiment, "attributes.status = 'FINISHED'")
    one = next(run.info.run_id for run in runs if run.info.run_name == given.run)
    where = experiment_id(given.database, given.experiment)
    with (
        tempfile.TemporaryDirectory() as folder,
        mlflow_server(given.database, Path(folder)) as server,
        browser() as chromium,
    ):
        page = chromium.new_page(viewport={"width": 1600, "height": 900})

        def shoot(name: str) -> None:
            page.wait_for_timeout(2500)  # plots are drawn after they are there
            page.screenshot(path=given.to / f"mlflow_{name}.png")

        open_table(page, server, where)
        close_assistant(page)
        shoot("runs")
        open_charts(page, server, where)
        shoot("charts")
        open_comparison(page, server, where, [run.info.run_id for run in runs])
        shoot("compare")
        open_run(page, server, where, one)
        shoot("run")
        open_run(page, server, where, one, tab="model-metrics")
        shoot("layers")


if __name__ == "__main__":
    main()
