"""The MLflow pages that a variant is chosen on, in Chromium against a real server."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pandas as pd
import pytest

from hwpq_pipeline.tracking.view import COLUMNS
from tests.browser.chromium import browser, missing
from tests.browser.mlflow_pages import (
    WAIT,
    close_assistant,
    open_artifact,
    open_charts,
    open_comparison,
    open_run,
    open_table,
)
from tests.logged import logged_runs
from tests.servers import mlflow_server
from tests.small import EWMA, VARIANTS

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=missing()),
]


@pytest.fixture(scope="module")
def runs(small_project: Path) -> dict:
    return {run.info.run_name: run for run in logged_runs(f"sqlite:///{small_project}/mlflow.db")}


@pytest.fixture(scope="module")
def server(small_project: Path, tmp_path_factory):
    with mlflow_server(f"sqlite:///{small_project}/mlflow.db", tmp_path_factory.mktemp("server")) as address:
        yield address


@pytest.fixture(scope="module")
def context(server, runs):
    """A browser's session in which the panel of a first visit is closed."""
    with browser() as chromium:
        context = chromium.new_context(viewport={"width": 1600, "height": 1200})
        page = context.new_page()
        open_table(page, server, experiment_of(runs))
        close_assistant(page)
        page.close()
        yield context


@pytest.fixture
def page(context):
    page = context.new_page()
    yield page
    page.close()


def experiment_of(runs: dict) -> str:
    return next(iter(runs.values())).info.experiment_id


def metrics_of(project: Path, variant: str) -> dict:
    return json.loads((project / "data" / "08_reporting" / variant / "metrics.json").read_text())


def shown(page) -> str:
    return page.locator("body").inner_text()


def test_the_table_has_every_variant_and_the_useful_columns_with_no_set_up(page, server, runs, small_project):
    open_table(page, server, experiment_of(runs))
    for variant in VARIANTS:
        page.get_by_text(variant, exact=True).first.wait_for(timeout=WAIT)
    text = shown(page)
    assert [name for name in COLUMNS if name in text] == list(COLUMNS)
    for variant in VARIANTS:
        assert str(metrics_of(small_project, variant)["size_bytes"]) in text.replace(",", "")


def test_the_chart_view_has_quality_against_size_and_time(page, server, runs):
    open_charts(page, server, experiment_of(runs))
    for title in ("Parallel Coordinates", "size_bytes vs. perplexity_ratio", "seconds_to_make vs. perplexity"):
        page.get_by_text(title).first.wait_for(timeout=WAIT)


def test_comparing_all_variants_finds_their_figures(page, server, runs, small_project):
    open_comparison(page, server, experiment_of(runs), [run.info.run_id for run in runs.values()])
    for variant in VARIANTS:
        page.get_by_text(variant, exact=True).first.wait_for(timeout=WAIT)
    # The axis of the parallel coordinates ends at the best and the worst perplexity.
    found = [metrics_of(small_project, variant)["perplexity"] for variant in VARIANTS]
    for end in (min(found), max(found)):
        page.get_by_text(f"{end:.5f}").first.wait_for(timeout=WAIT)


def test_a_run_shows_its_headline_its_data_and_its_layers(page, server, runs, small_project):
    run = runs[EWMA]
    open_run(page, server, experiment_of(runs), run.info.run_id)
    page.get_by_text(f"{metrics_of(small_project, EWMA)['perplexity']:.2f}").first.wait_for(timeout=WAIT)
    page.get_by_text(run.data.tags["sha256.model"][:32]).first.wait_for(timeout=WAIT)  # its first input
    page.get_by_text(f"data/07_export/{EWMA}").first.wait_for(timeout=WAIT)
    open_run(page, server, experiment_of(runs), run.info.run_id, tab="model-metrics")
    page.get_by_text("error_quantized").first.wait_for(timeout=WAIT)
    page.locator(".js-plotly-plot").first.wait_for(timeout=WAIT)


#: The pictures that are on the page with some area, by their own size in pixels.
DRAWN = """() => [...document.images].filter(image => {
  const box = image.getBoundingClientRect();
  return image.complete && box.width > 100 && box.height > 50;
}).map(image => [image.naturalWidth, image.naturalHeight])"""


def test_the_plots_of_a_run_are_drawn(page, server, runs, small_project):
    run = runs[EWMA]
    for name in ("error_by_layer.png", "sparsity_by_layer.png"):
        open_artifact(page, server, experiment_of(runs), run.info.run_id, name)
        header = (small_project / "data" / "09_comparison" / "charts" / EWMA / name).read_bytes()[16:24]
        page.wait_for_function(
            f"size => ({DRAWN})().some(([width, height]) => width === size[0] && height === size[1])",
            arg=list(struct.unpack(">II", header)), timeout=WAIT,
        )  # fmt: skip


def test_the_table_of_layers_is_a_table(page, server, runs, small_project):
    open_artifact(page, server, experiment_of(runs), runs[EWMA].info.run_id, "layers.csv")
    layers = pd.read_csv(small_project / "data" / "08_reporting" / EWMA / "layers.csv", dtype=str)
    page.get_by_text(f"Previewing the first {len(layers)} rows").first.wait_for(timeout=WAIT)
    text = shown(page)
    for column in ("layer", "kind", "reached_sparsity", "error_quantized"):
        assert column in text
        assert layers[column][0] in text
