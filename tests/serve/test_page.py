"""The page in a real browser: a file is dropped, read and asked, wide and on a phone, by keyboard alone.

Needs the package playwright and a Chromium, of the system or of playwright; skipped without.
"""

from __future__ import annotations

import shutil

import pytest

from tests.serve.conftest import FILLER, LANTERN

pytestmark = pytest.mark.slow
playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright and a Chromium")
WAIT = 600_000  # milliseconds


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as found:
        path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        try:
            one = found.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")
        yield one
        one.close()


@pytest.mark.parametrize("view", ["wide", "phone"])
def test_a_file_is_read_and_asked_and_the_passage_is_shown(browser, server, tmp_path, view):
    size = {"width": 1200, "height": 900} if view == "wide" else {"width": 390, "height": 844}
    page = browser.new_context(viewport=size, color_scheme="light" if view == "wide" else "dark").new_page()
    page.set_default_timeout(WAIT)
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    (tmp_path / "book.txt").write_text(f"{FILLER * 3}<b>bold</b> {LANTERN} {FILLER}")
    page.goto(server[0])
    page.fill("#name", f"book-{view}")
    page.set_input_files("#files", tmp_path / "book.txt")
    page.wait_for_selector("#memories input:checked")
    # by keyboard alone from here
    page.focus("#question")
    page.keyboard.type("What is the secret code of the silver lantern?")
    page.keyboard.press("Enter")
    page.wait_for_selector("#passages li")
    assert page.inner_text("#answer") == "4821937"
    assert "<b>bold</b>" in page.inner_text("#passages")
    page.focus("#strip button:first-child")
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")  # the passage's own button has the focus now
    page.wait_for_selector("mark")
    assert "lantern" in page.inner_text("mark")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert (tmp_path / "page.png").stat().st_size > 10_000 and not errors
