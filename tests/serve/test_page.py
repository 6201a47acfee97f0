"""The page in a real browser: a file is dropped, read and asked, wide and on a phone, by keyboard alone.

Needs the extra `browser` and a Chromium, of the system or of playwright; skipped without.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from hsa_ultralong.inference import as_question, ask
from hsa_ultralong.testing.processes import HANG_SECONDS
from tests.serve.conftest import FERRY, FILLER, LANTERN, serving

pytestmark = pytest.mark.slow
playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra browser and a Chromium")
WAIT = HANG_SECONDS * 1000  # milliseconds
VIEWS = {"wide": {"width": 1200, "height": 900}, "phone": {"width": 390, "height": 844}}
QUESTION = "What is the secret code of the silver lantern?"
DROPPED = """([name, text]) => {
  const data = new DataTransfer();
  data.items.add(new File([text], name, { type: "text/plain" }));
  return data;
}"""
# what the page has said of its progress, every change of it
WATCHED = """() => {
  window.told = [];
  const note = () => told.push([document.getElementById("reading-text").textContent, bar.value]);
  new MutationObserver(note).observe(document.getElementById("reading"), { subtree: true, childList: true });
}"""


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


@pytest.fixture
def open_page(browser, server):
    """Opens the page; at the end nothing may have been an error in the browser, its policy included."""
    contexts, errors = [], []

    def opened(view="wide", scheme="light"):
        contexts.append(browser.new_context(viewport=VIEWS[view], color_scheme=scheme))
        page = contexts[-1].new_page()
        page.set_default_timeout(WAIT)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(server[0])
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not errors


def drop(page, name, text):
    page.dispatch_event("#drop", "drop", {"dataTransfer": page.evaluate_handle(DROPPED, [name, text])})


def asked(server, id, question):
    answers = server[1]
    memory = answers.memories.open("default", [id]).memory
    return ask(answers.model, answers.tokenizer, memory, as_question(question))


@pytest.mark.parametrize("view", list(VIEWS))
def test_a_file_is_dropped_read_and_asked_and_the_passage_is_shown(open_page, server, tmp_path, view):
    page = open_page(view, "light" if view == "wide" else "dark")
    page.evaluate(WATCHED)
    drop(page, f"book {view}.txt", f"{FILLER * 3}<b>bold</b> {FERRY} {FILLER}{LANTERN} {FILLER}")
    page.wait_for_selector("#memories input:checked")
    tokens = server[1].memories.info("default", f"book-{view}-txt")["tokens"]
    told = page.evaluate("told")
    assert told[-1] == [f"Reading book-{view}-txt: {tokens:,} of {tokens:,} tokens", 1]
    assert page.is_hidden("#reading")
    # by keyboard alone from here
    page.focus("#question")
    page.keyboard.type(QUESTION)
    page.keyboard.press("Enter")
    page.wait_for_selector("#passages li")
    expected = asked(server, f"book-{view}-txt", QUESTION)
    assert page.inner_text("#answer") == expected.text.strip()
    assert f"{expected.weight:.2f}" in page.inner_text("#certainty")
    assert page.inner_text("#certainty").startswith("Unsure") == expected.is_uncertain
    assert "<b>bold</b>" in page.inner_text("#passages")
    page.focus("#strip button:first-child")
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")  # the passage's own button has the focus now
    page.wait_for_selector("mark")
    assert page.inner_text("mark").strip() in f"{FILLER * 3}<b>bold</b> {FERRY} {FILLER}{LANTERN} {FILLER}"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert (tmp_path / "page.png").stat().st_size > 10_000


def test_a_key_is_typed_and_its_namespace_is_shown(browser, nano, tmp_path):
    keys = {hashlib.sha256(b"key-a").hexdigest(): "alice", hashlib.sha256(b"key-b").hexdigest(): "bob"}
    with serving(nano, tmp_path, keys=keys) as (address, answers):
        answers.memories.create("alice", "hers", [("note", LANTERN)])
        answers.memories.create("bob", "his", [("note", FERRY)])
        page = browser.new_page()
        page.set_default_timeout(WAIT)
        page.goto(address)
        page.wait_for_function("document.getElementById('error').textContent.includes('API key')")
        page.focus("summary")
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        page.keyboard.type("key-a")
        page.keyboard.press("Tab")
        page.wait_for_selector("#memories:has-text('hers')")
        assert page.inner_text("#error") == "" and page.locator("#memories input").count() == 1
        page.check("#memories input")
        page.fill("#question", QUESTION)
        page.press("#question", "Enter")
        page.wait_for_selector("#passages li")
        page.close()


def test_an_answer_below_the_line_is_called_unsure(open_page, server):
    server[1].memories.create("default", "road", [("road", FILLER * 3)])
    page = open_page()

    def strict(route):
        route.continue_(post_data=json.dumps({**route.request.post_data_json, "unsure_below": 1}))

    page.route("**/chat/completions", strict)
    page.check("#memories li:has-text('road') input")
    page.fill("#question", "Where does the old road run?")
    page.click("#go")
    page.wait_for_selector("#certainty.warn")
    assert page.inner_text("#certainty").startswith("Unsure: no passage stood out")


def test_enter_that_ends_a_composition_asks_nothing_and_a_second_one_waits(open_page, server, monkeypatch):
    asked = held(monkeypatch)
    page = open_page()
    page.fill("#question", "The old road")
    composed = "new KeyboardEvent('keydown', { key: 'Enter', isComposing: true, bubbles: true, cancelable: true })"
    # true: the browser goes on with it, as nobody prevented it
    assert page.evaluate(f"document.getElementById('question').dispatchEvent({composed})") is True
    page.press("#question", "Shift+Enter")
    assert page.is_enabled("#go") and not asked and "\n" in page.input_value("#question")
    page.press("#question", "Enter")
    page.wait_for_selector("#halt:visible")
    page.press("#question", "Enter")
    page.wait_for_selector("#answer:not(:empty)")
    assert page.is_disabled("#go") and len(asked) == 1
    page.click("#halt")


def held(monkeypatch):
    """Answers that stop after their first text until the client leaves; a list of those."""
    from hsa_ultralong.serve import app

    begun, real = [], app.completion_events

    async def one(*args):
        begun.append(args)
        async for event in real(*args):
            yield event
            if event["choices"][0]["delta"].get("content"):
                await asyncio.Event().wait()

    monkeypatch.setattr(app, "completion_events", one)
    return begun


def test_stop_ends_an_answer_and_the_next_question_works(open_page, server, monkeypatch):
    with monkeypatch.context() as patched:
        held(patched)
        page = open_page()
        page.fill("#question", "The old road")
        page.click("#go")
        page.wait_for_selector("#answer:not(:empty)")
        page.click("#halt")
        page.wait_for_selector("#go:enabled")
        assert page.is_hidden("#halt") and page.inner_text("#error") == ""
        end = time.monotonic() + HANG_SECONDS
        while server[1].worker.num_running and time.monotonic() < end:
            time.sleep(0.05)
        assert server[1].worker.num_running == 0
    page.click("#go")
    page.wait_for_selector("#go:disabled")
    page.wait_for_selector("#go:enabled")
    assert page.inner_text("#answer")


def test_delete_asks_first(open_page, server):
    memories = server[1].memories
    memories.create("default", "old", [("old", FERRY)])
    page = open_page()
    page.wait_for_selector("text=old")
    page.once("dialog", lambda dialog: dialog.dismiss())
    page.click("[aria-label='Delete memory old']")
    assert "old" in memories.ids("default")
    page.once("dialog", lambda dialog: dialog.accept())
    page.click("[aria-label='Delete memory old']")
    page.wait_for_selector("[aria-label='Delete memory old']", state="detached")
    assert "old" not in memories.ids("default")


def test_a_page_of_another_site_cannot_plant_a_file(browser, server):
    class Other(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    script = """(address) => {
      const form = new FormData();
      form.append("files", new File(["planted"], "a.txt"));
      return fetch(address, { method: "POST", body: form, mode: "no-cors" }).then((one) => one.type);
    }"""
    with ThreadingHTTPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        page = browser.new_page()
        page.set_default_timeout(WAIT)
        page.goto(f"http://127.0.0.1:{other.server_port}/")
        with page.expect_response("**/files") as found:
            page.evaluate(script, server[0] + "/v1/memories/planted/files")
        page.close()
        other.shutdown()
    assert found.value.status == 403 and "planted" not in server[1].memories.ids("default")
