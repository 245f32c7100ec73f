"""What reaches the console while other libraries work."""

from __future__ import annotations

import io
import sys

import pytest

from hwpq_pipeline.checkpoints.quiet import WithoutBars, quiet_transformers


def test_only_bars_are_kept_from_the_console() -> None:
    console = io.StringIO()
    stream = WithoutBars(console)
    for text in ("a warning\n", "\rLoading:  50%|█████", "\n\n", "\x1b[A", "\rLoading: 100%|██████████", "\n"):
        assert stream.write(text) == len(text)
    assert console.getvalue() == "a warning\n"


def test_bars_of_tqdm_are_not_seen_and_words_are(capsys: pytest.CaptureFixture[str]) -> None:
    from tqdm import tqdm

    with quiet_transformers():
        for _ in tqdm(range(3)):
            sys.stderr.write("a warning\n")
    assert capsys.readouterr().err == 3 * "a warning\n"
