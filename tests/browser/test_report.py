"""The report in Chromium: on a desk, on a phone, in the dark; whole, with nothing fetched."""

from __future__ import annotations

import pytest

from tests.browser.chromium import browser, missing
from tests.small import VARIANTS

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=missing()),
]

LUMINANCE = """() => {
  const [r, g, b] = getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number);
  return (r + g + b) / 3;
}"""


@pytest.fixture(scope="module")
def chromium():
    with browser() as started:
        yield started


@pytest.mark.parametrize(("scheme", "dark"), [("light", False), ("dark", True)])
@pytest.mark.parametrize("width", [1280, 360])
def test_the_report_reads_on_any_screen(chromium, small_project, scheme, dark, width):
    page = chromium.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto((small_project / "data" / "09_comparison" / "index.html").as_uri())
    for variant in VARIANTS:
        assert page.get_by_role("row").filter(has_text=variant).first.is_visible()
    assert page.locator("svg").count() >= 4
    assert page.get_by_text("a <cold> stone").first.is_visible()
    assert (page.evaluate(LUMINANCE) < 128) is dark
    # Wide tables scroll inside the page; the page itself does not.
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert len(requests) == 1
