"""The page of a run in a real browser: nothing runs but its script, it fits wide and narrow windows, light and dark.

Needs the package playwright and a Chromium, of the system or of playwright; skipped without.
"""

from __future__ import annotations

import os
import shutil

import pytest

from hsa_ultralong.eval.html_report import write_page

pytestmark = pytest.mark.slow
playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright and a Chromium")

# the least contrast of text and what is behind it, WCAG AA
CONTRAST = 4.5
_CONTRASTS = """() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (c) => {
    const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = c.slice(0, 3).map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const color = rgb(getComputedStyle(node).backgroundColor);
      if (color.length < 4 || color[3] > 0) return getComputedStyle(node).backgroundColor;
    }
  };
  const contrast = (one, other) => {
    const pair = [light(rgb(one)), light(rgb(other))].sort((a, b) => b - a);
    return (pair[0] + 0.05) / (pair[1] + 0.05);
  };
  const found = [];
  const selector = "h1,h2,h3,p,td,th,dt,dd bdi,.verdict,blockquote,mark,summary,caption,a,.legend li,.metric";
  for (const node of document.querySelectorAll(selector)) {
    if (node.classList.contains("none") || !node.textContent.trim()) continue;
    const what = node.className || node.tagName;
    found.push([contrast(getComputedStyle(node).color, behind(node)), what, node.textContent.slice(0, 30)]);
  }
  for (const node of document.querySelectorAll("text.on")) {
    const box = node.parentElement.querySelector("rect");
    const pair = [getComputedStyle(node).fill, getComputedStyle(box).fill];
    found.push([contrast(...pair), node.className.baseVal, node.textContent]);
  }
  return found.sort((a, b) => a[0] - b[0]).slice(0, 3);
}"""


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as running:
        place = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        try:
            # a Chromium that root starts has no sandbox
            flags = ["--no-sandbox"] if os.geteuid() == 0 else []
            started = running.chromium.launch(executable_path=place, args=flags)
        except playwright.Error as error:
            pytest.skip(f"no Chromium can be started: {str(error).splitlines()[0]}")
        yield started
        started.close()


@pytest.fixture
def place(tmp_path, runs):
    """A page with every kind of cell, miss and length, and with texts that would like to run."""
    hostile = "<script>window.ran = 1</script><img src=x onerror='window.ran = 1'>"
    kinds = ["reading", "fusion", "retrieval", "not known"]
    records = []
    for x in range(9):
        for i in range(20):
            more = runs.missing(kinds[(i + x) % 4]) if i % 11 <= x else {}
            more = {**more, "answered": hostile, "depth": (i + 0.5) / 20}
            records.append(runs.record("recall_similar_256", 4096 << x, i, **more))
            records.append(runs.record("vt", 4096 << x, i, **{**more, "depth": None}))
    other = [one if i % 5 else {**one, "score": 1.0} for i, one in enumerate(records)]
    both = [runs.stored(records, "a model of a rather long name"), runs.stored(other, "another")]
    write_page(both, tmp_path / "report.html")
    return f"file://{tmp_path}/report.html"


class Opened:
    """A page, and what it said, asked for and loaded."""

    def __init__(self, browser, place, **options):
        self.page = browser.new_page(**options)
        self.said, self.loaded = [], []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.loaded.append(request.url))
        self.page.goto(place)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_the_page_fits_loads_nothing_runs_nothing_and_can_be_read(browser, place, scheme, width):
    opened = Opened(browser, place, viewport={"width": width, "height": 800}, color_scheme=scheme)
    assert not opened.said and opened.loaded == [place]
    assert opened.page.evaluate("window.ran") is None
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    least = opened.page.evaluate(_CONTRASTS)
    assert least[0][0] >= CONTRAST, least
    dark = opened.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 23, 28)"
    assert dark == (scheme == "dark")


@pytest.mark.parametrize("width", [1280, 360])
def test_hovering_a_cell_shows_what_is_behind_it_inside_the_window(browser, place, width):
    page = Opened(browser, place, viewport={"width": width, "height": 800}).page
    for cell in page.query_selector_all("#depths table:first-of-type td.cell")[:12]:
        cell.scroll_into_view_if_needed()
        cell.hover()
        box = cell.query_selector(".tip").bounding_box()
        assert box["height"] > 20 and box["x"] >= 0 and box["x"] + box["width"] <= width, box
        assert "95% interval" in cell.query_selector(".tip").inner_text()


def test_tables_take_one_tab_stop_and_the_arrow_keys(browser, place):
    page = Opened(browser, place).page
    region = page.query_selector("#scores .scroll")
    region.focus()
    page.keyboard.press("Tab")
    focused = "document.activeElement.cellIndex + ' ' + document.activeElement.parentElement.rowIndex"
    start = page.evaluate(focused)
    for key in ("ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp"):
        page.keyboard.press(key)
        assert page.evaluate("document.activeElement.matches('td.cell')")
    assert page.evaluate(focused) == start
    assert page.evaluate("getComputedStyle(document.activeElement.querySelector('.tip')).clipPath") == "none"
    page.keyboard.press("Tab")
    assert not page.evaluate("document.activeElement.matches('#scores td')")


def test_misses_can_be_narrowed_down(browser, place):
    page = Opened(browser, place).page
    seen = "document.querySelectorAll('article.failure:not([hidden])').length"
    everything = page.evaluate(seen)
    page.select_option("select[name=task]", "vt")
    page.select_option("select[name=cause]", "fusion")
    some = page.evaluate(seen)
    assert 0 < some < everything and page.inner_text("output") == f"{some} of {everything}"
    page.fill("input[name=text]", "no such text")
    assert page.evaluate(seen) == 0


def test_without_javascript_everything_is_there_but_the_filters(browser, place):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(place)
    assert page.is_visible("#scores table") and page.is_visible("article.failure blockquote >> nth=0")
    assert not page.is_visible("#filters")
    context.close()
