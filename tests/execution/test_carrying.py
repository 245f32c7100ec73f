"""Workers that see another disk: all files travel by a local S3 server, and the bytes are the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
from moto.server import ThreadedMotoServer

from hwpq_pipeline.calibration.statistics import collect_statistics
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.evaluation.quality import evaluate_export, load_reference, make_reference
from hwpq_pipeline.execution.carrying import Carrier
from hwpq_pipeline.execution.engines import opened
from hwpq_pipeline.export.compressed_tensors import export_checkpoint
from hwpq_pipeline.method.executor import of_run
from hwpq_pipeline.method.recipe import Recipe
from hwpq_pipeline.method.run import write_model
from tests.tiny import tiny_checkpoint, tiny_tokens

pytestmark = pytest.mark.slow
TOKENS = tiny_tokens(6, 32)
SPARSE = {"selection": {"structure": "2of4"}, "recovery": {"preset": "fast"}, "quantization": {"grid": "int8"}}


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    variables = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in {**variables, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}.items():
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3", skip_instance_cache=True).makedirs("bucket", exist_ok=True)
    yield "s3://bucket/runs"
    server.stop()


def test_the_bytes_are_the_same_and_nothing_is_left(bucket: str, tmp_path: Path) -> None:
    model, statistics, recipe = tmp_path / "model", tmp_path / "statistics", Recipe.from_variant(SPARSE)
    tiny_checkpoint(model)
    collect_statistics(model, TOKENS, target=statistics, dtype="float32")
    made = {}
    for name, files in {"here": None, "there": bucket}.items():
        (tmp_path / name).mkdir()
        with opened("local" if files is None else "dask", workers=None if files is None else 2, files=files):
            write_model(model, statistics, recipe, tmp_path / name, name="v", executor=of_run())
        made[name] = {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
    assert made["there"] == made["here"]
    export_checkpoint(model, tmp_path / "here", tmp_path / "export")
    make_reference(model, TOKENS, tmp_path / "reference")
    answer = load_reference(tmp_path / "reference")
    with opened("dask", workers=2, files=bucket):
        judged = evaluate_export(tmp_path / "export", answer, work=tmp_path / "work")
    alone = evaluate_export(tmp_path / "export", answer)
    assert replace(judged, seconds=alone.seconds) == alone
    assert fsspec.filesystem("s3", skip_instance_cache=True).find("bucket") == []


def test_an_address_that_cannot_be_written_is_a_line(bucket: str) -> None:
    with pytest.raises(HwpqError, match=r"execution.files: s3://nowhere/x: cannot be written to"):
        Carrier("s3://nowhere/x")
