"""What was missed: the question, what was expected and said, what was retrieved beside the right passage.

tests/eval/test_html_report.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hsa_ultralong.eval.html_report.elements import Markup, details, escaped, join, tag
from hsa_ultralong.eval.plots import human_tokens
from hsa_ultralong.eval.stored_runs import StoredRun
from hsa_ultralong.eval.suite_diagnosis import CAUSES, RIGHT, cause

# samples shown of a task and length, and in all; of the first ones the passages are unfolded
_PER_CELL, _MOST, _UNFOLDED = 4, 400, 8
_LONGEST_ANSWER = 1000


class Missed(NamedTuple):
    """A sample that one run at least did not answer rightly, and the records of all runs that were asked it."""

    key: tuple[str, int, int, str]
    records: Mapping[str, Mapping[str, Any]]

    @property
    def is_disputed(self) -> bool:
        return any(record["score"] >= 1 for record in self.records.values())


def missed_samples(runs: Sequence[StoredRun]) -> list[Missed]:
    """All of them, in the order of the records."""
    found: dict[tuple[str, int, int, str], dict[str, Mapping[str, Any]]] = {}
    for run in runs:
        for record in run.records:
            if record["score"] is not None:
                key = (record["task"], record["length"], record["index"], record.get("sample", run.name))
                found.setdefault(key, {})[run.name] = record
    return [
        Missed(key, records)
        for key, records in found.items()
        if any(record["score"] < 1 for record in records.values())
    ]


def chosen(missed: Sequence[Missed]) -> list[Missed]:
    """Few of every task and length, first those that runs disagree on, then spread over their depths."""
    of_cell: dict[tuple[str, int], list[Missed]] = {}
    for one in missed:
        of_cell.setdefault(one.key[:2], []).append(one)
    kept = []
    for cell in of_cell.values():
        disputed = [one for one in cell if one.is_disputed]
        others = [one for one in cell if not one.is_disputed]
        kept.append([*_spread_out(disputed, _PER_CELL), *_spread_out(others, max(0, _PER_CELL - len(disputed)))])
    rounds = [cell[number] for number in range(_PER_CELL) for cell in kept if number < len(cell)][:_MOST]
    wanted = {one.key for one in rounds}
    return [one for cell in kept for one in cell if one.key in wanted]


def _spread_out(items: Sequence[Missed], number: int) -> list[Missed]:
    if len(items) <= number:
        return list(items)
    return [items[(2 * i + 1) * len(items) // (2 * number)] for i in range(number)]


def failures(runs: Sequence[StoredRun]) -> Markup:
    missed = missed_samples(runs)
    if not missed:
        return tag("p", "Every sample was answered rightly.")
    shown = chosen(missed)
    text = f"{len(shown):,} of {len(missed):,} samples that were not answered rightly"
    text += f", at most {_PER_CELL} of a task and length" if len(shown) < len(missed) else ""
    text += ". All stand in records.jsonl."
    articles = [_article(one, len(runs) > 1, is_open=number < _UNFOLDED) for number, one in enumerate(shown)]
    return join([tag("p", text, class_="note"), _filters(shown), *articles])


def _filters(shown: Sequence[Missed]) -> Markup:
    """Choices that the script makes visible, since nothing would happen without it."""

    def choice(label: str, name: str, values: Mapping[str, str]) -> Markup:
        options = [tag("option", "all", value=""), *(tag("option", text, value=key) for key, text in values.items())]
        return tag("label", label, " ", tag("select", *options, name=name))

    kinds = [cause(record) for one in shown for record in one.records.values()]
    causes = {name: name for name in CAUSES if name != RIGHT and name in kinds}
    lengths = {str(length): human_tokens(length) for length in sorted({one.key[1] for one in shown})}
    return tag(
        "form", choice("task", "task", {one.key[0]: one.key[0] for one in shown}), choice("length", "length", lengths),
        choice("put down to", "cause", causes), tag("label", "text ", tag("input", type_="search", name="text")),
        tag("output", "", aria_live="polite"), id_="filters", hidden=True,
    )  # fmt: skip


def _article(one: Missed, is_many: bool, *, is_open: bool) -> Markup:
    task, length, index, _ = one.key
    records = list(one.records.values())
    first = records[0]
    kinds = list(dict.fromkeys(cause(record) for record in records))
    place = "" if first["depth"] is None else f", depth {100 * first['depth']:.0f}%"
    facts = [("question", first["query"]), ("expected", " | ".join(first["expected"]))]
    rows = [join([tag("dt", name), tag("dd", _isolated(value))]) for name, value in facts]
    for name, record in one.records.items():
        said = record["answered"]
        said = said if len(said) <= _LONGEST_ANSWER else said[:_LONGEST_ANSWER] + " ..."
        label = f"answer of {name}" if is_many else "answer"
        is_right = record["score"] >= 1
        rows.append(tag("dt", label))
        rows.append(
            tag("dd", _isolated(said) if said.strip() else tag("i", "nothing"), " ", _verdict(record),
                class_="good" if is_right else "bad")
        )  # fmt: skip
    heading = tag("h3", task, " ", tag("span", f"{human_tokens(length)}{place}, sample {index}", class_="metric"))
    return tag(
        "article", heading, tag("dl", *rows), _passages(one, is_many, is_open), class_="failure", data_task=task,
        data_length=length, data_cause="|".join(kinds),
    )  # fmt: skip


def _verdict(record: Mapping[str, Any]) -> Markup:
    kind = cause(record)
    text = "right" if kind == RIGHT else f"put down to {kind}" if record["found"] is not None else "retrieval not known"
    if 0 < record["score"] < 1:
        text = f"{100 * record['score']:.0f}% right, " + text
    if kind != RIGHT and record["rank"] is not None:
        text += f": the right chunk stood at {record['rank']}, weight {record['weight']:.2g}"
    return tag("span", text, class_=f"verdict {kind.replace(' ', '-')}")


def _passages(one: Missed, is_many: bool, is_open: bool) -> Markup:
    """Per run what was retrieved, and beside it the right passages once."""
    expected = next(iter(one.records.values()))["expected"]
    right = next((places for r in one.records.values() if (places := _with_text(r.get("evidence")))), [])
    columns = []
    if right:
        columns.append(
            tag("div", tag("h4", "the right passage"), *(_passage(p, expected, is_right=True) for p in right))
        )
    for name, record in one.records.items():
        title = f"retrieved by {name}" if is_many else "retrieved"
        if places := _with_text(record.get("retrieved")):
            found = [_passage(place, expected, is_right=place["is_evidence"]) for place in places]
            columns.append(tag("div", tag("h4", title), tag("div", *found, class_="found"), class_="many"))
    if not columns:
        return Markup("")
    return details("passages", tag("div", *columns, class_="passages"), is_open=is_open)


def _with_text(places: Sequence[Mapping[str, Any]] | None) -> list[Mapping[str, Any]]:
    return [place for place in places or () if "text" in place]


def _passage(place: Mapping[str, Any], expected: Sequence[str], *, is_right: bool) -> Markup:
    where = f"tokens {place['start']:,} to {place['stop']:,}"
    where = f"document {place['document']}, {where}" if place["document"] else where
    weight = f"weight {place['weight']:.2g}, " if "weight" in place else ""
    note = ", holds the answer" if is_right and "weight" in place else ""
    kind = "passage right" if is_right else "passage"
    text = re.sub(r"\s*\n\s*", "\n", place["text"].strip())
    quote = tag("blockquote", _marked(text, expected), dir_="auto")
    return tag("div", tag("p", weight, where, note, class_="where"), quote, class_=kind)


def _marked(text: str, expected: Sequence[str]) -> Markup:
    """The text with the expected answers marked."""
    wanted = sorted({one.strip() for one in expected if one.strip()}, key=len, reverse=True)
    if not wanted:
        return escaped(text)
    pattern = re.compile(f"({'|'.join(map(re.escape, wanted))})", re.IGNORECASE)
    return join(tag("mark", part) if number % 2 else part for number, part in enumerate(pattern.split(text)))


def _isolated(text: str) -> Markup:
    """Text of any direction of writing, which turns nothing around it."""
    return tag("bdi", text)
