"""Planted secrets are nowhere, users' words do nothing, nothing of a model's files runs, names stay in their folder."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hwpq_pipeline.checkpoints.places import check_inside
from hwpq_pipeline.checkpoints.reader import Checkpoint
from hwpq_pipeline.checkpoints.sources import ModelSource, fetch_model
from hwpq_pipeline.corpus.chat import as_text
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.export.card import CardInfo, render_card
from hwpq_pipeline.export.compressed_tensors import STORAGE
from hwpq_pipeline.inert import markdown, plain
from tests.small import kedro, ok
from tests.tiny import tiny_checkpoint, tiny_documents

SECRET = "planted-7f3a9c"  # noqa: S105 (nobody's)
PLANTED = {
    name: f"{SECRET}-{name.lower()}"
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD",
                 "MLFLOW_TRACKING_USERNAME", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID")
}  # fmt: skip
HOSTILE = (
    "<script>alert(1)</script>", "![x](http://example.org/beacon.png)", "[click](javascript:alert(1))", "a | b | c",
    "`code`", "# head", "<img src=x onerror=alert(1)>", "\x1b[31mred\x1b[0m", "**bold**",
)  # fmt: skip


def told(folder: Path) -> list[Path]:
    """Files below that hold the secret."""
    return [
        file for file in folder.rglob("*")
        if file.is_file() and not file.is_symlink() and ".git" not in file.relative_to(folder).parts
        and SECRET.encode() in file.read_bytes()
    ]  # fmt: skip


@pytest.mark.slow
def test_planted_secrets_are_nowhere(small_project: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / ".netrc").write_text(f"machine 127.0.0.1 login me password {SECRET}-netrc\n")
    environment = {**PLANTED, "HOME": str(home), "PIP_INDEX_URL": f"https://me:{SECRET}-pip@127.0.0.1:9/simple"}
    done = ok(kedro(small_project, "--pipelines", "recipes,report,track", env=environment))
    refused = kedro(
        small_project,
        "--pipelines",
        "track",
        env={**environment, "MLFLOW_TRACKING_URI": f"http://me:{SECRET}@127.0.0.1:9"},
    )
    assert refused.returncode != 0
    assert "***@127.0.0.1" in refused.stderr
    for process in (done, refused):
        assert SECRET not in process.stdout + process.stderr
    assert told(small_project) == []


@pytest.mark.parametrize("words", HOSTILE)
def test_words_do_nothing_in_markdown(words: str) -> None:
    shown = markdown(f"{words} and more")
    assert "<" not in shown
    assert not re.search(r"(?<!\\)[\[\]`|]", shown)
    assert not re.search(r"(?<!\\)\*\*", shown)
    assert not shown.startswith("#")
    assert "\x1b" not in shown


def test_ordinary_words_stay_as_they_are() -> None:
    for words in (
        "8-bit floating point, half the bytes.",
        "SmolLM2-135M-Instruct",
        "2:4 sparse, in 4 bits",
        "int4_g64!",
    ):
        assert markdown(words) == words
    assert plain("a\x1b[31mb\tc\n") == "a [31mb c\n"
    assert str(HwpqError("\x1b[2Jx", where="a\nb", remedy="c")) == "a b: [2Jx. c"


@pytest.mark.parametrize("words", HOSTILE)
def test_a_card_holds_words_and_no_more(words: str) -> None:
    info = CardInfo(
        variant="x", description=words, base_model=f"model {words}", license=None, grid="int8", structure="dense",
        parameters={}, calibration={"text": words}, command="dvc repro export@x",
    )  # fmt: skip
    body = render_card(info, STORAGE).split("---\n", 2)[2]
    assert "<script" not in body
    assert "<img" not in body
    assert "](http" not in body.replace("\\]", "")
    assert "\x1b" not in body


class Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.mark.slow
def test_the_page_runs_nothing_and_asks_nobody(small_project: Path) -> None:
    page = Elements()
    page.feed((small_project / "data" / "09_comparison" / "index.html").read_text())
    assert "script" not in {tag for tag, _ in page.found}
    for _, attributes in page.found:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            assert not str(attributes.get(name) or "").startswith(("http:", "//", "javascript:"))
    policy = next(found["content"] for tag, found in page.found if tag == "meta" and "http-equiv" in found)
    assert str(policy).startswith("default-src 'none'")


def test_a_models_own_code_does_not_run(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    (tmp_path / "source" / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\n")
    fetch_model(ModelSource("directory", path=str(tmp_path / "source")), tmp_path / "model", tmp_path, "float32")
    assert not (tmp_path / "canary").exists()
    assert not (tmp_path / "model" / "evil.py").exists()
    assert load_file(tmp_path / "model" / "model.safetensors")


def test_a_chat_template_runs_in_a_sandbox(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "model")
    evil = "{{ cycler.__init__.__globals__.os.system('touch " + str(tmp_path / "canary") + "') }}"
    for template in (tmp_path / "model").glob("chat_template*"):
        template.write_text(evil)
    documents = tiny_documents(1).assign(text='[{"role": "user", "content": "x"}]', chat=True)
    with pytest.raises(HwpqError, match="chat template refuses"):
        as_text(documents, tmp_path / "model")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\\b", "C:x", "x" * 300]
)
def test_names_in_an_index_stay_in_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(HwpqError, match="no name of a file beside it"):
        check_inside(name, "index")
    tiny_checkpoint(tmp_path / "model", max_shard_size="40KB")
    index = tmp_path / "model" / "model.safetensors.index.json"
    written = json.loads(index.read_text())
    written["weight_map"][next(iter(written["weight_map"]))] = name
    index.write_text(json.dumps(written))
    with pytest.raises(HwpqError, match="no name of a file beside it"):
        Checkpoint(tmp_path / "model")


def test_pickles_are_refused(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "model")
    torch.save({}, tmp_path / "model" / "pytorch_model.bin")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(HwpqError, match="unpickling runs code"):
        Checkpoint(tmp_path / "model")


def test_the_code_unpickles_nothing_and_trusts_no_remote_code(root: Path) -> None:
    banned = re.compile(
        r"torch\.load\(|(import|from) pickle|pickle\.load|trust_remote_code=True|(?<![.\w])(eval|exec)\(|yaml\.load\("
        r"|shell=True|allow_pickle=True"
    )
    found = [
        f"{file.relative_to(root)}:{number}: {line.strip()}"
        for file in sorted((root / "src").rglob("*.py"))
        for number, line in enumerate(file.read_text().splitlines(), start=1)
        if banned.search(line)
    ]
    # Dask's tasks are pickles, ours among them (docs/security.md): no file is unpickled.
    assert [line.split(":")[0] for line in found] == ["src/hwpq_pipeline/execution/cluster.py"]
