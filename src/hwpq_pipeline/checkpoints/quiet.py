"""Other libraries' progress bars, kept from the console: they would interleave with the pipeline's own.

transformers' bars and hints have switches. Other bars (of GGUF's reader, of compressed-tensors) have none and write to
`sys.stderr`. There they are recognised by the carriage return that a bar begins with. All other text passes, warnings
too. Loggers keep the stream that they were made with and are not affected. Errors come as exceptions.
"""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any


class WithoutBars(io.TextIOBase):
    """Passes text on, except progress bars and the line ends and cursor moves between them.

    Args:
        stream: that gets the text.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Take a text; its length."""
        if "\r" not in text and text.replace("\x1b[A", "").strip():
            self.stream.write(text)
        return len(text)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No bars, and no hints of transformers below an error, while the context lasts."""
    from transformers.utils import logging as transformers_logging

    bars = transformers_logging.is_progress_bar_enabled()
    level = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        with redirect_stderr(WithoutBars(sys.stderr)):
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
