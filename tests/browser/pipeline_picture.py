"""The picture of the pipelines in `docs/images`, by Kedro-Viz: `make pipeline-picture`."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from tests.browser.chromium import browser
from tests.conftest import ROOT
from tests.servers import free_port, serving

#: Nodes and data, without parameters; the namespace of the variants as one box.
VIEW = "types=nodes,datasets&expandAllPipelines=false&pid=__default__"
#: Covers of the graph, and what a picture has no use for.
HIDDEN = """
  [class*=feature-hints], [class*=update-reminder], [class*=pipeline-minimap], [class*=pipeline-toolbar],
  [class*=pipeline-sidebar], [class*=pipeline-global-toolbar], [class*=pipeline-primary-toolbar]
  { display: none !important; }
"""


def main() -> None:
    """Serve the project's pipelines, open them on a light page, write the picture of the graph."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kedro", required=True, help="the `kedro` of an environment with Kedro-Viz")
    parser.add_argument("--to", type=Path, default=ROOT / "docs" / "images" / "pipeline.png")
    given = parser.parse_args()
    port = free_port()
    command = [given.kedro, "viz", "run", "--no-browser", "--host", "127.0.0.1", "--port", str(port)]
    # Its packages warn of what they deprecate in each other; it is to be started where the project is.
    os.environ["PYTHONWARNINGS"] = "ignore"
    os.chdir(ROOT)
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(command, port, Path(folder) / "server.log") as server,
        browser() as chromium,
    ):
        page = chromium.new_page(viewport={"width": 1400, "height": 1000})
        page.goto(f"{server}/?{VIEW}")
        page.get_by_label("Change to light theme").click()
        page.get_by_label("Hide menu").first.click()
        page.add_style_tag(content=HIDDEN)
        page.get_by_label("Reset zoom").dispatch_event("click")
        page.wait_for_timeout(3000)  # the graph glides to its place
        page.screenshot(path=given.to)


if __name__ == "__main__":
    main()
