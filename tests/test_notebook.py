"""The notebook runs from top to bottom on a project's own results."""

from __future__ import annotations

import json

import nbformat
import pytest
from nbclient import NotebookClient

from tests.small import VARIANTS

pytestmark = pytest.mark.slow


def test_the_notebook_shows_every_variant(small_project, root, monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MPLBACKEND"):  # as a user has them: the project's store, pictures inline
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(small_project / "src"))
    notebook = nbformat.read(root / "notebooks" / "compare_variants.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "commit it without outputs"
    run = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(small_project)}})
    shown = [
        "".join(output["data"].get("text/html", ""))
        for cell in run.execute().cells
        for output in cell.get("outputs", [])
        if "data" in output
    ]
    for variant in VARIANTS:
        assert sum(variant in table for table in shown) >= (1 if variant == "dense" else 2)
    assert "image/png" in json.dumps(run.nb)
