from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hwpq_pipeline.corpus.samples import Split, draw_samples, token_matrix
from hwpq_pipeline.errors import HwpqError
from tests.tiny import tiny_documents, tiny_tokenizer

LENGTH = 50


@pytest.fixture
def tokenizer_dir(tmp_path: Path) -> Path:
    return tiny_tokenizer(tmp_path / "tokenizer")


def draw(documents: pd.DataFrame, tokenizer_dir: Path, split: Split, samples: int, seed: int = 0) -> pd.DataFrame:
    return draw_samples(documents, tokenizer_dir, split=split, samples=samples, length=LENGTH, seed=seed)


def byte_ids(tokenizer_dir: Path, text: str) -> list[int]:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json")).encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(("split", "parity"), [("calibration", 0), ("evaluation", 1)])
def test_all_windows_of_a_split_are_its_documents_cut_up(tokenizer_dir: Path, split: Split, parity: int) -> None:
    """Asked for every window there is, the samples must be exactly the cut-up documents of the parity."""
    documents = tiny_documents(5, words=60)
    expected = set()
    for row in range(parity, 5, 2):
        ids = byte_ids(tokenizer_dir, documents["text"][row])
        assert len(ids) == len(documents["text"][row])  # a token a byte
        while len(ids) >= LENGTH:
            expected.add((row, tuple(ids[:LENGTH])))
            ids = ids[LENGTH:]
    found = draw(documents, tokenizer_dir, split, len(expected))
    assert {(row, tuple(tokens)) for row, tokens in zip(found["document"], found["tokens"], strict=True)} == expected
    assert found["sample"].tolist() == list(range(len(expected)))
    with pytest.raises(HwpqError, match=rf"give {len(expected)} windows of {LENGTH} tokens, {len(expected) + 1} are"):
        draw(documents, tokenizer_dir, split, len(expected) + 1)


def test_seed_decides(tokenizer_dir: Path) -> None:
    documents = tiny_documents(6, words=300)
    one = draw(documents, tokenizer_dir, "calibration", 8, seed=1)
    pd.testing.assert_frame_equal(one, draw(documents, tokenizer_dir, "calibration", 8, seed=1))
    assert one["tokens"].tolist() != draw(documents, tokenizer_dir, "calibration", 8, seed=2)["tokens"].tolist()


def test_matrix_survives_parquet(tokenizer_dir: Path, tmp_path: Path) -> None:
    frame = draw(tiny_documents(), tokenizer_dir, "evaluation", 3)
    frame.to_parquet(tmp_path / "s.parquet", index=False)
    matrix = token_matrix(pd.read_parquet(tmp_path / "s.parquet"))
    assert matrix.shape == (3, LENGTH)
    assert matrix.dtype == np.int64
    assert matrix.tolist() == frame["tokens"].tolist()


def test_start_token_opens_every_window(tmp_path: Path) -> None:
    with_bos = tiny_tokenizer(tmp_path / "bos", starts_with_bos=True)
    frame = draw(tiny_documents(), with_bos, "calibration", 5)
    assert all(tokens[0] == 1 and 1 not in tokens[1:] for tokens in frame["tokens"])
    assert token_matrix(frame).shape == (5, LENGTH)


def test_no_text_and_no_tokenizer(tokenizer_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(HwpqError, match="0 documents give 0 windows"):
        draw(tiny_documents(1), tokenizer_dir, "evaluation", 1)
    with pytest.raises(HwpqError, match="no such directory"):
        draw(tiny_documents(), tmp_path / "none", "calibration", 1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(HwpqError, match="no usable tokenizer"):
        draw(tiny_documents(), tmp_path / "empty", "calibration", 1)
