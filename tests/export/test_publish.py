"""Uploading by the real client to a local stand-in of the hub's API, which keeps what it is sent."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.export import compressed_tensors, gguf
from hwpq_pipeline.export.card import CardInfo, render_card
from hwpq_pipeline.export.measured import with_quality
from hwpq_pipeline.export.publish import push_to_hub
from hwpq_pipeline.parameters import Export
from hwpq_pipeline.pipelines.publish.nodes import publish
from tests.reported import METRICS as WHOLE

# huggingface_hub hands its upload to httpx in a way that httpx calls old.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

TOKEN = "hf_standin"  # noqa: S105 (what the stand-in takes for a token)
METRICS = {
    **WHOLE, "perplexity": 23.04, "dense_perplexity": 20.61, "top1_agreement": 0.8055,
    "size_bytes": 113_175_416, "dense_bytes": 269_060_552,
}  # fmt: skip


class Hub:
    """What the stand-in was sent: repositories with their visibility and their files, by path."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.visibility: dict[str, Any] = {}
        self.objects: dict[str, bytes] = {}
        self.cards: list[str] = []
        self.complaints: list[str] = []
        self.address = ""

    def create(self, wanted: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        repo = f"{wanted['organization']}/{wanted['name']}"
        self.visibility.setdefault(repo, wanted.get("visibility") or wanted.get("private"))
        status = 409 if repo in self.repositories else 200
        self.repositories.setdefault(repo, {})
        return status, {"url": f"{self.address}/{repo}"}

    def preupload(self, asked: dict[str, Any]) -> dict[str, Any]:
        def mode(path: str) -> str:
            return "lfs" if path.endswith(".safetensors") else "regular"

        files = [{"path": f["path"], "uploadMode": mode(f["path"]), "shouldIgnore": False} for f in asked["files"]]
        return {"files": files}

    def batch(self, asked: dict[str, Any]) -> dict[str, Any]:
        upload = [{**entry, "actions": {"upload": {"href": f"{self.address}/upload/{entry['oid']}"}}}
                  for entry in asked["objects"]]  # fmt: skip
        return {"transfer": "basic", "objects": upload}

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.repositories[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.repositories[repo][value["path"]] = self.objects[value["oid"]]
        return {"commitUrl": f"{self.address}/{repo}/commit/{'a' * 40}", "commitOid": "a" * 40}


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:  # noqa: C901 (a class of short methods)
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: Any) -> None:
            pass

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def do_PUT(self) -> None:
            content, oid = self.body(), self.path.rpartition("/")[2]
            assert hashlib.sha256(content).hexdigest() == oid
            hub.objects[oid] = content
            self.answer(200, {})

        def do_POST(self) -> None:
            content = self.body()
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self.answer(401, {"error": "Invalid username or password."})
                return
            path = self.path.partition("?")[0]
            if path == "/api/repos/create":
                self.answer(*hub.create(json.loads(content)))
            elif path == "/api/validate-yaml":  # the client asks this of every card, before anything is uploaded
                hub.cards.append(json.loads(content)["content"])
                self.answer(
                    400 if hub.complaints else 200,
                    {"errors": [{"message": text} for text in hub.complaints], "warnings": []},
                )
            elif "/preupload/" in path:
                self.answer(200, hub.preupload(json.loads(content)))
            elif path.endswith("/info/lfs/objects/batch"):
                self.answer(200, hub.batch(json.loads(content)))
            else:
                repo = path.removeprefix("/api/models/").partition("/commit/")[0]
                self.answer(200, hub.commit(repo, [json.loads(line) for line in content.splitlines()]))

        def answer(self, status: int, value: dict[str, Any]) -> None:
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    return Handler


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    standin = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(standin))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    standin.address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", standin.address)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # a storage service of its own
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    yield standin
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def export(tmp_path: Path) -> Path:
    folder = tmp_path / "int4"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights" * 1000)
    (folder / "config.json").write_text("{}")
    (folder / "checksums.json").write_text("{}")  # names another card, and is not sent
    card = CardInfo("int4", "Four bits.", "tiny/model", "apache-2.0", "int4", "dense")
    (folder / "README.md").write_text(render_card(card, compressed_tensors.STORAGE))
    return folder


@pytest.fixture
def formats(tmp_path: Path) -> Path:
    folder = tmp_path / "formats" / "gguf"
    folder.mkdir(parents=True)
    (folder / "model-Q4_0.gguf").write_bytes(b"gguf")
    card = CardInfo("int4", "Four bits.", "tiny/model", "apache-2.0", "int4", "dense")
    (folder / "README.md").write_text(render_card(card, gguf.STORAGE))
    return folder.parent


def scratch(tmp_path: Path) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


def test_every_export_and_its_card_arrive(tmp_path: Path, hub: Hub, export: Path, formats: Path) -> None:
    cards = publish(export, formats, METRICS, "int4", Export(push_to_hub="me/model"), scratch(tmp_path))
    assert set(hub.repositories) == {"me/model-int4", "me/model-int4-gguf"}
    assert set(hub.visibility.values()) == {"private"}
    files = hub.repositories["me/model-int4"]
    assert set(files) == {"README.md", "config.json", "model.safetensors"}
    assert files["model.safetensors"] == (export / "model.safetensors").read_bytes()
    assert files["README.md"] == (cards / "README.md").read_bytes()
    assert hub.cards[0].encode() == files["README.md"]
    assert b"| perplexity | 20.61 | 23.04 | " in files["README.md"]
    assert hub.repositories["me/model-int4-gguf"]["README.md"] == (cards / "gguf" / "README.md").read_bytes()


def test_uploading_again_replaces(hub: Hub, export: Path) -> None:
    card = (export / "README.md").read_text()
    push_to_hub(export, card, "me/model")
    (export / "config.json").write_text('{"new": 1}')
    address = push_to_hub(export, card, "me/model")
    assert hub.repositories["me/model"]["config.json"] == b'{"new": 1}'
    assert address == f"{hub.address}/me/model/commit/{'a' * 40}"


def test_nothing_is_sent_unless_asked(tmp_path: Path, hub: Hub, export: Path, formats: Path) -> None:
    cards = publish(export, formats, METRICS, "int4", Export(), scratch(tmp_path))
    assert not hub.repositories
    assert (cards / "gguf" / "README.md").is_file()
    assert "## Quality" not in (export / "README.md").read_text()


def test_no_token_is_an_error(hub: Hub, export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HwpqError, match="hf auth login"):
        push_to_hub(export, (export / "README.md").read_text(), "me/model")
    assert not hub.repositories


def test_a_wrong_token_is_one_line_without_the_token(
    hub: Hub, export: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with caplog.at_level(logging.DEBUG), pytest.raises(HwpqError, match="refused the upload") as found:
        push_to_hub(export, (export / "README.md").read_text(), "me/model")
    assert "\n" not in str(found.value)
    assert "hf_wrong" not in str(found.value) + caplog.text


def test_a_card_that_hubs_refuse_is_not_sent(hub: Hub, export: Path) -> None:
    with pytest.raises(HwpqError, match="licence id"):
        push_to_hub(export, "---\nlicense: Not One\n---\n\ntext\n", "me/model")
    assert not hub.repositories


def test_a_card_that_the_hub_refuses_uploads_nothing(hub: Hub, export: Path) -> None:
    hub.complaints = ["base_model is not a string"]
    with pytest.raises(HwpqError, match="base_model is not a string") as found:
        push_to_hub(export, (export / "README.md").read_text(), "me/model")
    assert "\n" not in str(found.value)
    assert hub.repositories == {"me/model": {}}


def test_quality_stands_before_loading_and_the_rest_is_kept(export: Path) -> None:
    card = (export / "README.md").read_text()
    whole = with_quality(card, METRICS)
    assert whole.index("## Quality") < whole.index("## How to load")
    assert "| MB on disk | 269.1 | 113.2 | " in whole
    assert "| top-1 agreement | 100.0% | 80.5% | " in whole
    assert "| coverage | 0.0% | 100.0% | " in whole
    assert "| sparsity of the blocks |  | 50.0% | " in whole
    assert "seconds" not in whole.partition("## How to load")[0]
    kept = iter(whole.splitlines())
    assert all(line in kept for line in card.splitlines())


def test_what_was_left_dense_is_listed_as_plain_text(export: Path) -> None:
    card = (export / "README.md").read_text()
    assert "as in the dense model:" not in with_quality(card, METRICS)
    lines = ["model.layers.*.mlp.experts: 3-D tensor of experts, 88.5% of the block weights", "`# a <b>name</b>"]
    whole = with_quality(card, {**METRICS, "left_dense": lines})
    quality = whole.partition("## Quality")[2].partition("## How to load")[0]
    assert f"as in the dense model:\n\n- `{lines[0]}`\n- `# a <b>name</b>`\n" in quality


@pytest.mark.parametrize("lost", ["perplexity", "sparsity", "coverage"])
def test_metrics_that_are_not_whole_are_refused(export: Path, lost: str) -> None:
    metrics = {name: value for name, value in METRICS.items() if name != lost}
    with pytest.raises(HwpqError, match=f"no metric '{lost}'"):
        with_quality((export / "README.md").read_text(), metrics)
    with pytest.raises(HwpqError, match=f"no metric '{lost}'"):
        with_quality((export / "README.md").read_text(), {**METRICS, lost: None})


@pytest.mark.parametrize("damaged", [{}, None, []])
def test_metrics_that_are_empty_are_refused(export: Path, damaged: Any) -> None:
    with pytest.raises(HwpqError, match="no metric 'dense_perplexity'"):
        with_quality((export / "README.md").read_text(), damaged)
