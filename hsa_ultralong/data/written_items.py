"""What a source is asked about: questions over passages, and passages of question files or cut out of text.

Passages that evaluation asks about are left out, and those of the validation split. Called by cli/write.py;
tests/data/test_self_written.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from hsa_ultralong.data.inputs import Spool, source_files
from hsa_ultralong.data.passages import Passages, evaluation_passages, passage_id
from hsa_ultralong.data.questions import is_held_out, read_questions
from hsa_ultralong.data.self_written import AskedPassage
from hsa_ultralong.data.sources import read_sources

# words of a passage cut out of text
_LEAST_WORDS, _MOST_WORDS = 50, 130
_SENTENCE = re.compile(r"(?<=[.!?][\"”’')])\s+|(?<=[.!?])\s+")


def questions_of(files: Sequence[Path]) -> list[AskedPassage]:
    """The questions of some files that have an answer, each with its passage.

    Raises:
        ValueError: a file of another form, or none is left.
    """
    found: dict[tuple[str, str], AskedPassage] = {}
    for file in files:
        read = read_questions(file)
        for question in read.questions:
            (gold,) = question.gold
            if question.answers and _may_be_trained(read.texts[gold]):
                text = read.texts[gold]
                found.setdefault((text, question.text), AskedPassage(text, "", question.text, question.answers))
    return _some(list(found.values()), files)


def passages_of(files: Sequence[Path]) -> list[AskedPassage]:
    """The passages of files of questions, and those of 50 to 130 words that texts are cut into.

    Raises:
        ValueError: a file that cannot be read, or none is left.
    """
    found: dict[str, AskedPassage] = {}
    for file in files:
        if file.name.removesuffix(".gz").endswith((".json", ".jsonl")):
            read = read_questions(file)
            for text, title in zip(read.texts, _titles(read, file.name), strict=True):
                found.setdefault(text, AskedPassage(text, title))
            continue
        with Spool() as spool:
            for one in source_files([file], spool=spool):
                for number, document in enumerate(read_sources(one)):
                    for text in cut(document.text):
                        found.setdefault(text, AskedPassage(text, f"{one.name} {number}"))
    return _some([one for text, one in found.items() if _may_be_trained(text)], files)


def _may_be_trained(text: str) -> bool:
    name = passage_id(text)
    return name not in evaluation_passages() and not is_held_out(name)


def _some(found: list[AskedPassage], files: Sequence[Path]) -> list[AskedPassage]:
    if not found:
        raise ValueError(f"{', '.join(map(str, files))}: no passage is left that may be trained on")
    return found


def _titles(read: Passages, name: str) -> list[str]:
    """Of each passage one that the passages of its article share."""
    first = list(range(len(read.texts)))
    for question in read.questions:
        for gold in question.gold:
            first[gold] = min(gold, *question.near) if question.near else gold
    return [f"{name} {number}" for number in first]


def cut(text: str) -> Iterator[str]:
    """Passages of whole sentences in turn, each of 50 to 130 words; what does not make one is left out."""
    for paragraph in re.split(r"\n\s*\n", text):
        words, part = 0, list[str]()
        for sentence in _SENTENCE.split(" ".join(paragraph.split())):
            count = len(sentence.split())
            if words + count > _MOST_WORDS:
                if words >= _LEAST_WORDS:
                    yield " ".join(part)
                words, part = 0, []
            if count <= _MOST_WORDS:
                words, part = words + count, [*part, sentence]
        if words >= _LEAST_WORDS:
            yield " ".join(part)
