"""A headless Chromium of this machine, driven by Playwright; and which is missing where there is none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")


def executable() -> str | None:
    """Path of the browser, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def missing() -> str:
    """Why no page can be opened here; empty where it can."""
    if find_spec("playwright") is None:
        return "Playwright is not installed: pip install -e '.[browser]'"
    if executable() is None:
        return f"no browser among {', '.join(NAMES)}: install Chromium from the system's packages"
    return ""


@contextmanager
def browser() -> Iterator[Any]:
    """A browser; its `new_page` opens pages."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Tests may run as root, where Chromium has no sandbox; the pages are our own.
        chromium = playwright.chromium.launch(executable_path=executable(), args=["--no-sandbox"])
        try:
            yield chromium
        finally:
            chromium.close()
