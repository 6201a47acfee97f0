"""The page of a run: one file, everything escaped, readable without its script."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from html.parser import HTMLParser

import pytest

from hsa_ultralong.eval.html_report import write_page
from hsa_ultralong.eval.html_report.elements import Markup, escaped, tag
from hsa_ultralong.eval.html_report.failures import chosen, missed_samples

HOSTILE = [
    "<script>alert(1)</script>", "</article></main><h1>x", '"><img src=x onerror=alert(1)>', "<!--", "]]>",
    "&lt;b&gt; & 'quoted' \"twice\"", "\x00\x1b[31m\x7f", "\u202eright to left\u2066", "\ud800 half",
    "</style><svg onload=alert(1)>", "javascript:alert(1)", "</script><script>alert(1)</script>", "\u2028line",
    "x" * 5000,
]  # fmt: skip


class Page(HTMLParser):
    """Elements in order, attributes, and whether everything that opens is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in ("meta", "br", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def values(self, name: str) -> list[str | None]:
        return [value for _, key, value in self.attributes if key == name]


def a_run(runs, text: str = "plain", **more):
    """A run with every kind of miss, all of whose texts are `text` somewhere."""
    kinds = ["reading", "fusion", "retrieval", "not known"]
    records = [runs.record(length=n, index=i) for n in (2048, 4096) for i in range(3)]
    for number, kind in enumerate(kinds):
        place = {"document": 1, "start": 0, "stop": 64, "text": text}
        texts = {
            "query": text, "answered": text, "evidence": [place],
            "retrieved": [{**place, "weight": 0.3, "is_evidence": kind == "reading"}],
        }  # fmt: skip
        records.append(runs.record(index=3 + number, **{**runs.missing(kind), **texts}))
    records += [runs.record("vt", index=i, score=0.5, metric="all", depth=None) for i in range(2)]
    records += [runs.record("recall_absent", index=i, score=None if i % 2 else 1.0) for i in range(4)]
    meta = {"command": f"hsa eval {text}", "versions": {"torch": text}}
    return runs.stored(records, skipped={("cwe", 2048): f"too short {text}"}, meta=meta, **more)


def page_of(tmp_path, *written) -> Page:
    write_page(written, tmp_path / "report.html")
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def test_the_page_is_one_file_that_loads_nothing(tmp_path, runs):
    page = page_of(tmp_path, a_run(runs))
    assert not page.values("src") and all(value.startswith("#") for value in page.values("href"))
    assert {value[1:] for value in page.values("href")} <= set(page.values("id"))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "url(" not in text and "@import" not in text and "http:" not in text and "https:" not in text


def test_only_the_pages_own_script_may_run(tmp_path, runs):
    page_of(tmp_path, a_run(runs))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    (script,) = re.findall("<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = re.findall('Content-Security-Policy" content="([^"]*)"', text)
    assert f"script-src &#x27;sha256-{digest}&#x27;" in policy and policy.startswith("default-src &#x27;none&#x27;")


@pytest.mark.parametrize("text", HOSTILE)
def test_text_of_models_and_haystacks_makes_no_element_and_no_attribute(tmp_path, runs, text):
    plain, hostile = page_of(tmp_path, a_run(runs)), page_of(tmp_path, a_run(runs, text))
    assert hostile.tags == plain.tags
    assert Counter((t, name) for t, name, _ in hostile.attributes) == Counter(
        (t, name) for t, name, _ in plain.attributes
    )
    bare = re.sub(r"[^ -~]", "", text.strip())[:40]
    assert bare in hostile.text
    shown = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", shown)


def test_names_of_runs_and_tasks_are_text_too(tmp_path, runs):
    name = '"><img src=x onerror=alert(1)>'
    records = [runs.record(name, index=0, score=0.0, metric=name), runs.record(name, index=1)]
    page = page_of(tmp_path, runs.stored(records, name), runs.stored(records, "b"))
    assert "img" not in page.tags and not page.values("onerror") and name in page.text


def test_text_is_escaped_unless_it_was_made_here():
    assert escaped("<b>") == "&lt;b&gt;" and escaped(Markup("<b>")) == "<b>"
    assert tag("td", "<i>", tag("b", "&"), title='"', hidden=False) == '<td title="&quot;">&lt;i&gt;<b>&amp;</b></td>'


def test_cells_say_how_many_samples_and_the_interval(tmp_path, runs):
    page = page_of(tmp_path, runs.stored([runs.record(index=i, score=float(i < 4)) for i in range(8)]))
    assert "4 of 8 samples: 50%, 95% interval 22 to 78%" in page.text
    # of every depth one sample
    assert page.text.count("1 of 1 samples: 100%, 95% interval 21 to 100%") == 4


def test_every_table_has_a_caption_and_is_reached_by_keyboard(tmp_path, runs):
    page = page_of(tmp_path, a_run(runs), a_run(runs, name="other"))
    regions = [value for name, key, value in page.attributes if (name, key) == ("div", "aria-label")]
    assert len(regions) == page.tags.count("table") == page.tags.count("caption") and all(regions)
    assert page.values("tabindex") == ["0"] * len(regions)
    assert all(value for name, key, value in page.attributes if name == "svg" and key == "aria-label")


def test_nothing_but_the_filters_needs_the_script(tmp_path, runs):
    page = page_of(tmp_path, a_run(runs))
    assert [(name, key) for name, key, _ in page.attributes if key == "hidden"] == [("form", "hidden")]
    for text in ("not answered rightly", "the right passage", "put down to fusion", "Not measured (1)", "retrieved"):
        assert text in page.text


def test_a_miss_shows_question_answers_and_the_right_passage_beside_what_was_retrieved(tmp_path, runs):
    wrong = {"document": 0, "start": 640, "stop": 704, "text": "Sheep sleep.", "weight": 0.7, "is_evidence": False}
    one = runs.record(**{**runs.missing("fusion"), "retrieved": [wrong]})
    page = page_of(tmp_path, runs.stored([one]))
    text = " ".join(page.text.split())
    for part in ("What is it, 0?", "7654321", "put down to fusion: the right chunk stood at 3, weight 0.1",
                 "weight 0.7, tokens 640 to 704", "Sheep sleep.", "tokens 64 to 128"):  # fmt: skip
        assert part in text
    assert page.tags.count("mark") == 1  # the expected answer in the right passage


def test_few_misses_of_a_cell_are_shown_those_that_runs_disagree_on_first(runs):
    first = [runs.record(index=i, score=0.0) for i in range(20)]
    second = [runs.record(index=i, score=float(i == 13)) for i in range(20)]
    missed = missed_samples([runs.stored(first, "a"), runs.stored(second, "b")])
    shown = chosen(missed)
    assert len(missed) == 20 and len(shown) == 4
    assert shown[0].key[2] == 13 and shown[0].is_disputed and set(shown[0].records) == {"a", "b"}


def test_other_samples_of_one_index_stand_apart(runs):
    other = runs.record(score=0.0, sample="other")
    missed = missed_samples([runs.stored([runs.record(score=0.0)], "a"), runs.stored([other], "b")])
    assert [list(one.records) for one in missed] == [["a"], ["b"]]


def test_many_misses_make_a_page_of_bounded_size(tmp_path, runs):
    long = {"document": 0, "start": 0, "stop": 64, "text": "x" * 600, "weight": 0.1, "is_evidence": False}
    many = [
        runs.record(f"task_{t}", 2048, i, **{**runs.missing("fusion"), "retrieved": [long] * 4})
        for t in range(150) for i in range(8)
    ]  # fmt: skip
    page_of(tmp_path, runs.stored(many))
    assert (tmp_path / "report.html").stat().st_size < 5_000_000
    assert (tmp_path / "report.html").read_text().count('<article class="failure"') == 400


def test_a_run_of_a_model_without_a_memory_says_that_retrieval_is_not_known(tmp_path, runs):
    page = page_of(tmp_path, runs.stored([runs.record(index=i, **runs.missing("not known")) for i in range(3)]))
    assert "What was retrieved is not known." in page.text and "retrieval not known" in page.text


def test_a_run_without_a_miss_says_so(tmp_path, runs):
    assert "Every sample was answered rightly." in page_of(tmp_path, runs.stored([runs.record()])).text


def test_settings_and_origin_of_every_run_are_shown(tmp_path, runs):
    page = page_of(tmp_path, a_run(runs, "one"), a_run(runs, "two", name="other"))
    for text in ("haystack_tokens", "hsa eval one", "hsa eval two", json.dumps(4)):
        assert text in page.text
