"""Rows for a converted model: facts in any sentence form asked as chat, and spans of text to be quoted again.

Half of the facts are of the forms below, half of the grammar of fact_forms.py.

A quarter of the rows asks plainly, the others by the tokenizer's own chat template, half of these begun with its system
message; a tokenizer without a template asks by that of chat.py. Words come from the corpus' word bank, which holds none
of evaluation's. The answers alone have `answer_mask`, which a run with a teacher counts as the loss of the memory.
Called by mixture.py; tests/data/test_facts.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hsa_ultralong.data.chat_form import Asker, ChatForm, Turn
from hsa_ultralong.data.fact_forms import FactForm, StatedFact, sample_fact, sample_form, state
from hsa_ultralong.data.fact_rows import crossed
from hsa_ultralong.data.fact_values import Draw, coined_name
from hsa_ultralong.data.rows import NeedleOptions, Row, RowLayout, RowWriter, haystack, hide, round_up
from hsa_ultralong.data.sampler import DocumentSampler
from hsa_ultralong.data.tokenizer import PieceTokenizer


def _parts(text: str) -> tuple[str, ...]:
    return tuple(text.split("|"))


_LONGEST_SPAN, _FIRST, _TRIES = 400, 8, 30
# share of rows that ask plainly, as evaluation does
PLAIN_FRACTION = 0.25
# share of facts of the grammar
_GRAMMAR = 0.5
# kinds of the grammar's values that are names, and the share of names that are coined: listed ones and those of few
# syllables have few different tokens, and what is never copied in training is copied wrongly (docs/log.md)
_NAMED, _COINED = ("name", "place", "word", "pair"), 0.6
# share of copied spans whose tokens are shuffled, so that language foretells none of them
_SHUFFLED = 0.33
_NUMBERS = _parts(
    "access code|badge number|serial number|price in dollars|weight in grams|height in feet|age in years|"
    "account number|zip code|page number|speed limit|temperature|distance in miles|seat number|ticket number|"
    "combination|order number|flight number|vault code|capacity|locker number|phone extension|room number"
)
_WORDS = _parts(
    "colour|mascot|nickname|main ingredient|symbol|code word|favourite animal|label|theme|material|shape|title|password"
)
_CITY_ATTRIBUTES = ["home town", "destination", "headquarters", "origin", "next stop", "branch office"]
_DATES = _parts("birthday|opening day|due date|date of the last repair|founding date|anniversary")
_TIMES = _parts("closing time|departure time|start of the shift|hour of the alarm|feeding time|arrival time")
_PRICES = _parts("price|rent|entrance fee|deposit|repair bill|daily rate")
_CODES = _parts("licence plate|registration|part number|booking code|inventory mark|call sign")
# attributes of things by the kind of their value: n number, w word, c city, d date, t time, p price, x code, o person
_ATTRIBUTES: dict[str, Sequence[str]] = {
    "n": _NUMBERS, "w": _WORDS, "c": _CITY_ATTRIBUTES, "d": _DATES, "t": _TIMES, "p": _PRICES, "x": _CODES,
    "o": _parts("owner|keeper|inventor|director|architect|last visitor"),
}  # fmt: skip
_MONTHS = _parts("January|February|March|April|May|June|July|August|September|October|November|December")
_SYLLABLES = _parts("ba|bel|cor|dan|del|dra|el|fen|gor|hal|is|jor|kal|len|lo|mar|mir|nor|os|per|quin|ra|sel|tor|ul|ve")
_FRAMES = (
    "The {a} of the {k} is {v}.", "The {k} has the {a} {v}.", "For the {k}, the {a} is {v}.",
    "{v} is the {a} of the {k}.", "Note: {k}, {a}: {v}.", "As {a}, the {k} was given {v}.",
    "Everyone knows that the {a} of the {k} is {v}.",
    "They set the {a} of the {k} to {v}.", "When asked about the {k}, say that its {a} is {v}.",
    "In the register the {k} stands with {a} {v}.",
)  # fmt: skip
_ASKED = (
    "What is the {a} of the {k}?", "Which {a} does the {k} have?", "Tell me the {a} of the {k}.",
    "The {k}: what is its {a}?",
)  # fmt: skip
# what somebody does | how it is asked | the kind of what is asked for
_DEEDS = tuple(
    _parts(line)
    for line in (
        "lives in {v}.|Where does {p} live?|c",
        "moved to {v}.|Where did {p} move?|c",
        "works in {v}.|Where does {p} work?|c",
        "grew up in {v}.|Where did {p} grow up?|c",
        "travelled to {v} last spring.|Where did {p} travel last spring?|c",
        "studies {v}.|What does {p} study?|w",
        "sold a {v}.|What did {p} sell?|w",
        "drives a {v}.|What does {p} drive?|w",
        "collects every {v}.|What does {p} collect?|w",
        "is afraid of the {v}.|What is {p} afraid of?|w",
        "keeps a {v} in the drawer.|What does {p} keep in the drawer?|w",
        "hid the {v} under the stairs.|What did {p} hide under the stairs?|w",
        "paid {v} euros.|How many euros did {p} pay?|n",
        "is {v} days old.|How many days old is {p}?|n",
        "won {v} points.|How many points did {p} win?|n",
        "called at {v}.|At what number did {p} call?|n",
        "married {v}.|Whom did {p} marry?|o",
        "met {v} at the market.|Whom did {p} meet at the market?|o",
        "was baptised on {v}.|When was {p} baptised?|d",
        "arrived at {v}.|At what time did {p} arrive?|t",
        "spent {v} on flowers.|How much did {p} spend on flowers?|p",
        "has the ticket {v}.|Which ticket does {p} have?|x",
    )
)
_OPENINGS = ("", "", "", "Last year ", "They say that ")
_NAMES = _parts(
    "Alice|Bruno|Clara|David|Elena|Felix|Greta|Hassan|Irene|Jonas|Karim|Laura|Marco|Nadia|Oscar|Paula|Quentin|"
    "Rosa|Stefan|Tara|Ulrich|Vera|Walter|Xenia|Yusuf|Zoe"
)
_CITIES = _parts(
    "Paris|Lima|Oslo|Cairo|Delhi|Quito|Rome|Turin|Bergen|Hanoi|Kyoto|Lagos|Malmo|Nairobi|Porto|Riga|Seoul|"
    "Tunis|Vienna|Warsaw|Zagreb|Dublin|Geneva|Boston"
)


@dataclass(frozen=True)
class ChatFact:
    """A sentence, with a blank in front, and a question about it with its answer."""

    statement: str
    question: str
    answer: str


def _value(rng: np.random.Generator, kind: str, words: Sequence[str]) -> str:
    """A value of a kind of _ATTRIBUTES."""
    if kind == "w":
        return _one(rng, words) if rng.random() < 0.7 else f"{_one(rng, words)} {_one(rng, words)}"
    if kind == "c":
        return _one(rng, _CITIES) if rng.random() < 0.2 else _open_name(rng, words)
    if kind == "o":
        return _person(rng, words)
    if kind == "d":
        return f"{rng.integers(1, 29)} {_one(rng, _MONTHS)} {rng.integers(1700, 2030)}"
    if kind == "t":
        return f"{rng.integers(0, 24):02}:{rng.integers(0, 60):02}"
    if kind == "p":
        return f"{rng.integers(1, 1000)}.{rng.integers(0, 100):02} euros"
    if kind == "x":
        letters = "".join(chr(65 + int(letter)) for letter in rng.integers(0, 26, int(rng.integers(2, 4))))
        return f"{letters}-{rng.integers(100, 100_000)}"
    count = int(rng.integers(3, 8)) if rng.random() < 0.8 else int(rng.integers(8, 19))
    return "".join(str(digit) for digit in rng.integers(0, 10, count))


def _one(rng: np.random.Generator, options: Sequence[str]) -> str:
    return str(options[int(rng.integers(len(options)))])


def _made_name(rng: np.random.Generator) -> str:
    """A name that no text holds, so that it must be copied."""
    return "".join(_one(rng, _SYLLABLES) for _ in range(int(rng.integers(2, 4)))).capitalize()


def _open_name(rng: np.random.Generator, words: Sequence[str]) -> str:
    return coined_name(Draw(rng), words) if rng.random() < _COINED else _made_name(rng)


def _person(rng: np.random.Generator, words: Sequence[str]) -> str:
    # a first and a last word each, which p_hard takes apart
    surname = _open_name(rng, words).replace(" ", "") if rng.random() < 0.7 else _one(rng, words).capitalize()
    first = _one(rng, _NAMES) if rng.random() < 0.5 else _open_name(rng, words).replace(" ", "")
    return f"{first} {surname}"


def _with_open_name(draw: Draw, form: FactForm, stated: StatedFact, words: Sequence[str]) -> StatedFact:
    """The fact, its value in this share a coined name where it is a name or words."""
    if form.value not in _NAMED or not draw.chance(_COINED):
        return stated
    value = coined_name(draw, words)
    if form.value == "name":
        value = f"{value.replace(' ', '')} {coined_name(draw, words).replace(' ', '')}"
    return state(form, stated.subject, value, draw.pick(form.questions))


def sample_facts(rng: np.random.Generator, count: int, words: Sequence[str], p_hard: float = 0.25) -> list[ChatFact]:
    """Facts whose questions are all different.

    p_hard: probability that a fact has the form of an earlier one: the same deed or attribute, of somebody or something
    whose name shares a word with that one's.
    """
    found: dict[str, ChatFact] = {}
    told: list[tuple[str, tuple[str, str, str], str]] = []
    draw, forms = Draw(rng), list[tuple[FactForm, str]]()
    while len(found) < count:
        if draw.chance(_GRAMMAR):
            before = forms[draw.below(len(forms))] if forms and draw.chance(p_hard) else None
            grammar = sample_form(draw) if before is None else before[0]
            stated = sample_fact(draw, grammar, words)
            if before is not None:
                stated = sample_fact(draw, grammar, words, crossed(draw, stated.subject, before[1]))
            stated = _with_open_name(draw, grammar, stated, words)
            if stated.question not in found:
                sentence = f"{stated.left}{stated.value}{stated.right}"
                found[stated.question] = ChatFact(sentence, stated.question, stated.answer.strip())
                forms.append((grammar, stated.subject))
            continue
        like = told[int(rng.integers(len(told)))] if told and rng.random() < p_hard else None
        if (rng.random() < 0.3) if like is None else (like[0] == "deed"):
            deed = _DEEDS[int(rng.integers(len(_DEEDS)))] if like is None else like[1]
            person = _person(rng, words)
            if like is not None:
                first, last = like[2].split()
                person = f"{first} {person.split()[1]}" if rng.random() < 0.5 else f"{person.split()[0]} {last}"
            value = _value(rng, deed[2], words)
            statement = _one(rng, _OPENINGS) + f"{person} {deed[0].format(v=value)}"
            question, form = deed[1].format(p=person), ("deed", (deed[0], deed[1], deed[2]), person)
        else:
            kind = _one(rng, "nnnwwccodtpx") if like is None else like[1][2]
            attribute = _one(rng, _ATTRIBUTES[kind]) if like is None else like[1][0]
            key = [_one(rng, words), _one(rng, words)]
            if like is not None:
                shared = int(rng.integers(2))
                key[shared] = like[2].split()[shared]
            name, value = " ".join(key), _value(rng, kind, words)
            statement = _one(rng, _FRAMES).format(a=attribute, k=name, v=value)
            question, form = _one(rng, _ASKED).format(a=attribute, k=name), ("thing", (attribute, "", kind), name)
        if question not in found:
            found[question] = ChatFact(f" {statement}", question, value)
            told.append(form)
    return list(found.values())


def _as_sentence(statement: str) -> str:
    """The statement, which answers its question; "" if it is no sentence, but a note."""
    text = statement.strip()
    return f"{text[:1].upper()}{text[1:]}" if text.endswith(".") and ": " not in text else ""


def chat_facts_row(
    rng: np.random.Generator,
    layout: RowLayout,
    sampler: DocumentSampler,
    tokenizer: PieceTokenizer,
    words: Sequence[str],
    options: NeedleOptions,
    form: ChatForm,
) -> Row:
    """Facts hidden in a text, some asked at its end, in half of the rows in a document of their own.

    Raises:
        ValueError: a row too short for one fact and its question.
    """
    is_inline = bool(rng.random() < 0.5)
    asker = Asker(rng, tokenizer, form, PLAIN_FRACTION, options.p_sentence, options.says_short)
    asked: list[Turn] = []
    for _ in range(_TRIES):  # the longest facts do not fit into the shortest rows
        facts = sample_facts(rng, int(rng.integers(1, options.max_needles + 1)), words, options.p_hard)
        # a question and its fact together, so that all facts that are asked find room in the text
        room = layout.seq_len // 2
        for number, fact in enumerate(facts[: options.max_questions]):
            begins = number == 0
            question, said = asker.choose(fact.question, fact.answer, _as_sentence(fact.statement))
            turn = asker(question, said, begins=begins and not is_inline, follows_text=begins and is_inline)
            room -= turn.size + len(tokenizer.encode(fact.statement))
            if room < 0:
                break
            asked.append(turn)
        if asked:
            break
    else:
        raise ValueError(
            f"a fact and its question do not fit into half of a row: seq_len={layout.seq_len} is too small"
        )
    size = sum(turn.size for turn in asked)
    cost = size if is_inline else round_up(size + 2, layout.chunk_size)
    (text,) = haystack(rng, layout, sampler, layout.seq_len - cost - is_inline, 1)
    statements = [tokenizer.encode(fact.statement) for fact in [*facts[: len(asked)], *facts[options.max_questions :]]]
    hidden = hide(rng, [text], statements)
    assert len(hidden) >= len(asked)
    writer = RowWriter(layout)
    tokens: list[int] = text.tolist() if is_inline else []
    if not is_inline:
        writer.add(text)
    start, answers = writer.end + 1, []
    for turn, (_, place), statement in zip(asked, hidden, statements, strict=False):
        first = len(tokens) + len(turn.head)
        answers.append((first, first + len(turn.answer)))
        tokens += [*turn.head, *turn.answer, *turn.tail]
        # the text begins with bos
        cited = slice(start + first, start + first + len(turn.answer))
        writer.cite(cited, place + 1, place + 1 + len(statement))
    writer.add(tokens, answers, is_whole=True)
    return writer.row("chat_facts")


def span_copy_row(rng: np.random.Generator, layout: RowLayout, sampler: DocumentSampler) -> Row:
    """A text in which a span of an eighth to a third of the row, at most 400 tokens, stands again at the end; all of it
    but its first tokens, by which it is known, is an answer. A third of the spans are shuffled, token by token."""
    length = min(int(rng.integers(layout.seq_len // 8, layout.seq_len // 3 + 1)), _LONGEST_SPAN)
    text = sampler.fill(rng, layout.seq_len - 2 - length)
    start = int(rng.integers(0, max(1, (len(text) - length) // 4)))
    if rng.random() < _SHUFFLED:
        text[start : start + length] = rng.permutation(text[start : start + length])
    tokens = np.concatenate([text, text[start : start + length]])
    first = min(_FIRST, length - 1)
    writer = RowWriter(layout)
    begin = writer.add(tokens, [(len(text) + first, len(tokens))], is_whole=True)
    writer.cite_copy(begin + len(text) + first, begin + start + np.arange(first, length))
    return writer.row("span_copy")
