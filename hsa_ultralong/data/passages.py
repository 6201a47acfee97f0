"""Files of questions over passages: those of SQuAD, HotpotQA and 2WikiMultihopQA. tests/eval/tasks/test_samples.py."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import zlib
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """A question with its answers. Numbers of passages: gold, that it comes with; support, of these that hold the
    answer; near, of the same article."""

    id: str
    text: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    support: tuple[int, ...]
    near: tuple[int, ...] = ()


@dataclass(frozen=True)
class Passages:
    """Passages, each once, and questions about them."""

    texts: list[str]
    questions: list[Question]


def passage_id(text: str) -> str:
    """Twelve hexadecimal digits that name a passage."""
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:12]


@lru_cache(maxsize=1)
def evaluation_passages() -> frozenset[str]:
    """Names of the passages of SQuADShifts and NQ that must not be trained on: a fifth of each."""
    text = resources.files("hsa_ultralong.data").joinpath("assets/evaluation_passages.txt").read_text(encoding="utf-8")
    return frozenset(line for line in text.split("\n") if line and not line.startswith("#"))


def read_squad(path: Path) -> Passages:
    """SQuAD's JSON (XQuAD and SQuADShifts too); questions that are marked impossible are left out.

    Raises:
        ValueError: for a file of another form.
    """
    whole = _json(path)
    numbers: dict[str, int] = {}
    questions: list[Question] = []
    try:
        for article in whole["data"]:
            here = [
                numbers.setdefault(_text(paragraph["context"]), len(numbers)) for paragraph in article["paragraphs"]
            ]
            for number, paragraph in zip(here, article["paragraphs"], strict=True):
                near = tuple(dict.fromkeys(other for other in here if other != number))
                for asked in paragraph["qas"]:
                    if not asked.get("is_impossible"):
                        answers = tuple(dict.fromkeys(_text(answer["text"]) for answer in asked["answers"]))
                        text = _text(asked["question"])
                        questions.append(Question(str(asked["id"]), text, answers, (number,), (number,), near))
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is no SQuAD file: data, paragraphs, context and qas are wanted") from None
    return Passages(list(numbers), questions)


def read_multihop(path: Path) -> Passages:
    """HotpotQA's form, a JSON list or a line each: question, answer, context of [title, sentences].

    Questions that come without a context are left out, and how many they are is logged.

    Raises:
        ValueError: for a file of another form, or one in which no question has a context.
    """
    rows = _json(path) if path.suffix == ".json" else _lines(path)
    numbers: dict[str, int] = {}
    questions: list[Question] = []
    try:
        told_of = [row for row in rows if "context" in row]
        if bare := len(rows) - len(told_of):
            logger.warning("%s: %d of %d questions come without a context and are left out", path, bare, len(rows))
        if not told_of:
            raise KeyError("context")
        for row in told_of:
            texts = [f"{title}\n{''.join(sentences)}" for title, sentences in row["context"]]
            gold = tuple(numbers.setdefault(text, len(numbers)) for text in texts)
            told = {title for title, _ in row.get("supporting_facts", [])}
            support = tuple(n for n, (title, _) in zip(gold, row["context"], strict=True) if title in told) or gold
            questions.append(Question(str(row["_id"]), _text(row["question"]), (str(row["answer"]),), gold, support))
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path} is no HotpotQA file: question, answer and context are wanted") from None
    return Passages(list(numbers), questions)


def read_nq(path: Path) -> Passages:
    """NQ-open with gold passages in the form of "Lost in the Middle", plain or .gz: question, answers, ctxs.

    Raises:
        ValueError: for a file of another form.
    """
    numbers: dict[str, int] = {}
    questions: list[Question] = []
    try:
        for place, row in enumerate(_lines(path)):
            texts = [f"{passage['title']}\n{passage['text']}" for passage in row["ctxs"]]
            gold = tuple(dict.fromkeys(numbers.setdefault(text, len(numbers)) for text in texts))
            # a text is no list of letters
            if isinstance(row["answers"], str):
                raise TypeError
            answers = tuple(map(_text, row["answers"]))
            questions.append(Question(str(place), _text(row["question"]), answers, gold, gold))
    except (KeyError, TypeError):
        raise ValueError(f"{path} is no file of NQ with passages: question, answers and ctxs are wanted") from None
    return Passages(list(numbers), questions)


def read_wiki(path: Path) -> list[str]:
    """Passages without questions: a JSON list of title and text.

    Raises:
        ValueError: for a file of another form.
    """
    try:
        return list(dict.fromkeys(f"{row['title']}\n{row['text']}" for row in _json(path)))
    except (KeyError, TypeError):
        raise ValueError(f"{path} is no list of passages with title and text") from None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ValueError(f"{path} is not JSON") from None


def _lines(path: Path) -> list[Any]:
    # not splitlines(): strings may hold other line separators
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise ValueError(f"{path} is no whole .gz file; get it again") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ValueError(f"{path} is not JSON with one object a line") from None
