"""What a converted model's source writes for its training: answers in conversations, answers in a sentence, questions.

Each function takes prompts in rounds to a `Scribe` (train/writing.py), keeps what passes, and counts why the rest was
dropped. Passages that evaluation asks about, and those of the validation split, are left out. Called by cli/write.py;
tests/data/test_self_written.py.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from hsa_ultralong.data.answer_words import contains, f1, normalised
from hsa_ultralong.data.chat import ASSISTANT, SYSTEM, USER
from hsa_ultralong.data.cloze import FUNCTION_WORDS
from hsa_ultralong.data.conversations import Messages
from hsa_ultralong.data.passages import passage_id

CONVERSATIONS, SENTENCES, QUESTIONS = "chat", "sentences", "questions"
KINDS = (CONVERSATIONS, SENTENCES, QUESTIONS)


class SourcePrompt(NamedTuple):
    """What the source is asked: messages, or a text to go on with; and how its answer begins."""

    asked: str | Sequence[Mapping[str, str]]
    begin: str = ""


class Said(NamedTuple):
    """An answer with its beginning; is_whole: the source ended it, not the bound."""

    text: str
    is_whole: bool


class Scribe(Protocol):
    """Answers prompts; `name` is that of the round. `size`: tokens of a prompt."""

    def ask(self, name: str, prompts: Sequence[SourcePrompt], max_new_tokens: int) -> list[Said]: ...

    def size(self, prompt: SourcePrompt) -> int: ...


@dataclass(frozen=True)
class AskedPassage:
    """A passage, what it is called (an article or a document), and with sentences a question with its answers."""

    text: str
    title: str
    question: str = ""
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bounds:
    """turns: of a conversation; conversation: its tokens; answer: tokens of an answer in one; per_passage: questions
    about a passage; seed: which."""

    turns: int = 3
    conversation: int = 1024
    answer: int = 192
    per_passage: int = 3
    seed: int = 0


def write_conversations(
    scribe: Scribe, conversations: Sequence[Messages], bounds: Bounds
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """The users' words of each conversation, answered by the source turn by turn; its other answers are not seen.

    A conversation ends before a turn that would make it longer than the bound, and before an answer that is cut off,
    empty, or says one thing over and over. It is kept with one answer.
    """
    said: list[Messages] = [messages[: messages[0]["role"] == SYSTEM] for messages in conversations]
    asked = [[one for one in messages if one["role"] == USER] for messages in conversations]
    going, dropped = list(range(len(conversations))), Counter[str]()
    for turn in range(bounds.turns):
        going = [i for i in going if turn < len(asked[i])]
        prompts = {i: SourcePrompt([*said[i], asked[i][turn]]) for i in going}
        fits = {i: scribe.size(prompts[i]) + bounds.answer <= bounds.conversation for i in going}
        going = [i for i in going if fits[i]]
        answers = scribe.ask(f"turn {turn}", [prompts[i] for i in going], bounds.answer)
        still: list[int] = []
        for i, answer in zip(going, answers, strict=True):
            if why := _why_no_answer(answer):
                dropped[why] += not any(one["role"] == ASSISTANT for one in said[i])
                continue
            said[i] += [asked[i][turn], {"role": ASSISTANT, "content": answer.text.strip()}]
            still.append(i)
        dropped["longer than the bound"] += sum(not fit and turn == 0 for fit in fits.values())
        going = still
    kept = [{"messages": messages} for messages in said if messages and messages[-1]["role"] == ASSISTANT]
    return kept, +dropped


def _why_no_answer(answer: Said) -> str:
    words = answer.text.split()
    if not words:
        return "empty"
    if not answer.is_whole:
        return "longer than --answer-tokens"
    return "repeats" if len(words) > 30 and len({*zip(words, words[1:], words[2:])}) < 0.6 * (len(words) - 2) else ""


# texts, questions, answers, answers in a sentence: what the source is shown
_EXAMPLES = (
    (
        "The mill at Tavora was built in 1742 by Anna Melk. It ground barley for the whole valley until the flood.",
        "Who built the mill at Tavora?",
        "Anna Melk",
        "The mill at Tavora was built by Anna Melk.",
    ),
    (
        "Lake Orm lies north of the town of Sela. In winter its fishermen sell mostly smoked trout.",
        "What do the fishermen of Lake Orm sell in winter?",
        "smoked trout",
        "In winter the fishermen of Lake Orm sell smoked trout.",
    ),
    (
        "The bridge was closed for repairs on 4 March 1902, after a storm had damaged two of its arches.",
        "When was the bridge closed?",
        "4 March 1902",
        "The bridge was closed on 4 March 1902.",
    ),
)
_ENDS = re.compile(r"(?<=[a-z0-9)%][a-z0-9)%])[.!?][\"”')]?\s+(?=[\"“A-Z])")
_LEAST_WORDS, _MOST_WORDS = 4, 40
# a sentence has one of these, or a word in -ed, -es or -s
_VERBS = frozenset(
    re.findall(
        r"\w+",
        """
    is are was were be been am has have had do does did can could will would may might must shall should became become
    began begun brought built came chose did drew drove ended felt fought found gave got grew held kept knew lay led
    left lost made meant met paid ran rose said sat saw sent set sold sought spent spoke stood struck taught thought
    told took understood went won wore wrote
    """,
    )
)
_VERB_END = re.compile(r"[a-z]{2,}(ed|es|s)\Z")


def is_sentence(text: str) -> bool:
    """One sentence of 4 to 40 words with a verb, as far as its marks and the forms of its words show."""
    text = text.strip()
    return (
        _LEAST_WORDS <= len(text.split()) <= _MOST_WORDS
        and bool(re.search(r"[.!?][\"”')]?\Z", text))
        and "\n" not in text
        and not _ENDS.search(text)
        and any(word in _VERBS or _VERB_END.match(word) for word in re.findall(r"[\w’']+", text)[1:])
        and not re.match(r"(?i)(the )?(short )?(answer|question|sentence)( is)?\s*:", text)
    )


def first_sentence(text: str) -> str:
    """That of the first line, as far as its marks show."""
    line = text.strip().split("\n")[0].strip()
    end = _ENDS.search(line)
    return line[: end.end()].strip() if end else line


def write_sentences(scribe: Scribe, told: Sequence[AskedPassage]) -> tuple[list[dict[str, Any]], Counter[str]]:
    """A sentence that answers each question, the passage in the prompt: the first of what is said. First the answer
    is told too; where nothing passes, asked once more without. Kept: a sentence that holds an answer, more words than
    it and a third of the question's content words."""
    dropped, kept = Counter[str](), dict[int, dict[str, Any]]()
    for name, ask in (("told", _ask_told), ("sentence", _ask_sentence)):
        open_ = [i for i in range(len(told)) if i not in kept]
        dropped.clear()
        for i, said in zip(open_, scribe.ask(name, [ask(told[i]) for i in open_], 64), strict=True):
            text = first_sentence(said.text)
            held = [answer for answer in told[i].answers if contains(text, [answer])]
            if not is_sentence(text):
                dropped["cut off" if not said.is_whole and text == said.text.strip() else "no one sentence"] += 1
            elif len(_content(text) & (asked := _content(told[i].question))) < len(asked) / 3:
                dropped["little of the question in it"] += 1
            elif not held:
                dropped["without an answer"] += 1
            elif len(text.split()) < len(max(held, key=len).split()) + 2:
                dropped["no more than the answer"] += 1
            else:
                kept[i] = {
                    "passage": passage_id(told[i].text), "question": told[i].question, "sentence": text,
                    "with_answer": name == "told",
                }  # fmt: skip
    return [kept[i] for i in sorted(kept)], dropped


def _ask_sentence(one: AskedPassage) -> SourcePrompt:
    turns = [
        message
        for text, question, _, sentence in _EXAMPLES[:2]
        for message in (*_user(_in_a_sentence(text, question)), {"role": ASSISTANT, "content": sentence})
    ]
    return SourcePrompt([*turns, *_user(_in_a_sentence(one.text, one.question))])


def _in_a_sentence(text: str, question: str) -> str:
    return f"{text}\n\n{question} Answer in one complete sentence."


def _ask_told(one: AskedPassage) -> SourcePrompt:
    """As a text to go on with, the short answer in front of the sentence."""
    form = "Question: {}\nShort answer: {}\nThe same in one sentence:"
    shown = [f"{text}\n\n{form.format(asked, short)} {said}" for text, asked, short, said in _EXAMPLES]
    asked = form.format(one.question, one.answers[0])
    return SourcePrompt("\n\n".join([*shown, f"{one.text}\n\n{asked}"]))


# how a question may begin; each passage is asked several
BEGINNINGS = ("What", "Who", "When", "Where", "Which", "How many", "What is the name of", "In what year")
_LEAST_QUESTION, _MOST_QUESTION, _MOST_ANSWER = 4, 25, 8
_SAME = 0.6
# words of a question that asks about the text itself, or repeats what the source was told
_OF_THE_TEXT = {"text", "passage", "question", "article", "author"}


def write_questions(
    scribe: Scribe, told: Sequence[AskedPassage], bounds: Bounds
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Questions that the source asks about each passage, each of another beginning, with the answer that it finds.

    Kept: the answer stands in the passage, has 1 to 8 words and is not in the question, half of the question's content
    words are in the passage, and asked again in another form the source gives the same answer (an F1 of 0.6).

    Returns:
        passages with their questions, for `as_squad`, and why questions were dropped.
    """
    dropped = Counter[str]()
    tries = [(one, begin) for one in told for begin in _beginnings(one, bounds)]
    prompts = [_wish_question(one, begin) for one, begin in tries]
    asked: dict[tuple[str, str], AskedPassage] = {}
    for (one, _), said in zip(tries, scribe.ask("ask", prompts, 32), strict=True):
        question = said.text.strip().split("\n")[0]
        question = f"{question.split('?')[0].strip()}?" if "?" in question else ""
        if why := _why_no_question(question, one.text):
            dropped[why] += 1
        elif (one.text, question.lower()) in asked:
            dropped["asked twice"] += 1
        else:
            asked[one.text, question.lower()] = AskedPassage(one.text, one.title, question)
    found: list[AskedPassage] = []
    prompts = [_ask_shortly(one, "Question: {}\nAnswer:", _EXAMPLES) for one in asked.values()]
    for one, said in zip(asked.values(), scribe.ask("answer", prompts, 16), strict=True):
        answer, why = _in_passage(said, one)
        if why:
            dropped[why] += 1
        else:
            found.append(AskedPassage(one.text, one.title, one.question, (answer,)))
    kept: list[dict[str, Any]] = []
    prompts = [_ask_shortly(one, "Q: {}\nA (words of the text):", _EXAMPLES[::-1]) for one in found]
    for one, said in zip(found, scribe.ask("again", prompts, 16), strict=True):
        if f1(said.text.strip().split("\n")[0], one.answers) < _SAME:
            dropped["another answer when asked again"] += 1
        else:
            kept.append({"title": one.title, "context": one.text, "question": one.question, "answer": one.answers[0]})
    return kept, dropped


def _wish_question(one: AskedPassage, begin: str) -> SourcePrompt:
    """Two examples as turns of chat, then the passage."""
    wish = "Write one short question that this text answers."
    turns = [
        message
        for text, question, *_ in _EXAMPLES[:2]
        for message in (*_user(f"{text}\n\n{wish}"), {"role": ASSISTANT, "content": question})
    ]
    return SourcePrompt([*turns, *_user(f"{one.text}\n\n{wish}")], begin)


def _ask_shortly(one: AskedPassage, form: str, examples: Sequence[tuple[str, ...]]) -> SourcePrompt:
    """Examples with short answers, then the question, as a text to go on with: in chat a small model makes sentences
    whatever it is told."""
    shown = [f"{text}\n\n{form.format(question)} {answer}" for text, question, answer, _ in examples]
    return SourcePrompt("\n\n".join([*shown, f"{one.text}\n\n{form.format(one.question)}"]))


def _beginnings(one: AskedPassage, bounds: Bounds) -> list[str]:
    """Different ones, the same for a passage whatever stands beside it."""
    name = int(passage_id(one.text), 16)
    order = np.random.default_rng([bounds.seed, name]).permutation(len(BEGINNINGS))
    return [BEGINNINGS[i] for i in order[: bounds.per_passage]]


def _content(text: str) -> set[str]:
    return set(normalised(text).split()) - FUNCTION_WORDS


def _why_no_question(question: str, passage: str) -> str:
    if not _LEAST_QUESTION <= len(question.split()) <= _MOST_QUESTION:
        return "no question of 4 to 25 words"
    if (set(normalised(question).split()) & _OF_THE_TEXT) - set(normalised(passage).split()):
        return "about the text, not what it tells"
    asked = _content(question) - _content(" ".join(BEGINNINGS))
    return "" if asked and len(asked & _content(passage)) >= 0.5 * len(asked) else "little of the passage in it"


def _in_passage(said: Said, one: AskedPassage) -> tuple[str, str]:
    """The answer as it stands in the passage, or why there is none."""
    answer = said.text.strip().split("\n")[0].strip().strip('"“”*').rstrip(".").strip()
    if not answer or len(answer.split()) > _MOST_ANSWER:
        return "", "no answer of 1 to 8 words"
    place = re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", one.text, re.IGNORECASE)
    if place is None:
        return "", "the answer is not in the passage"
    begin = one.question.lower()
    is_number = begin.startswith(("when", "how many", "in what year"))
    if (is_number and not re.search(r"\d", answer)) or (
        begin.startswith("who") and not re.search("[A-Z]", place.group())
    ):
        return "", "another kind of answer than was asked for"
    if contains(one.question, [answer]) or not _content(answer):
        return "", "the answer is in the question"
    return place.group(), ""


def as_squad(kept: Sequence[Mapping[str, str]], version: str) -> dict[str, Any]:
    """What `write_questions` kept in SQuAD's form."""
    articles: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for one in kept:
        asked = articles.setdefault(one["title"], {}).setdefault(one["context"], [])
        name = hashlib.sha256(f"{one['context']}\n{one['question']}".encode()).hexdigest()[:16]
        answer = {"text": one["answer"], "answer_start": one["context"].index(one["answer"])}
        asked.append({"id": name, "question": one["question"], "answers": [answer]})
    data = [
        {"title": title, "paragraphs": [{"context": context, "qas": qas} for context, qas in passages.items()]}
        for title, passages in articles.items()
    ]
    return {"version": version, "data": data}


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": USER, "content": text}]
