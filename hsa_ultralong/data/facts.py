"""Rows for a converted model: facts in hundreds of sentence forms asked as chat, and spans of text to be quoted again.

Questions have the form of the tokenizer's own chat template, without its system message; a tokenizer without one asks
by the template of chat.py. Words come from the corpus' word bank, which holds none of evaluation's. The answers alone
have `answer_mask`, which a run with a teacher counts as the loss of the memory. Called by mixture.py;
tests/data/test_facts.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerFast

from hsa_ultralong.data.rows import NeedleOptions, Row, RowLayout, RowWriter, haystack, hide, round_up
from hsa_ultralong.data.sampler import DocumentSampler
from hsa_ultralong.data.tokenizer import PieceTokenizer


def _parts(text: str) -> tuple[str, ...]:
    return tuple(text.split("|"))


_MARK = "QUESTIONMARKER"
_LONGEST_SPAN, _FIRST = 400, 8
_NUMBERS = _parts(
    "access code|badge number|serial number|price in dollars|weight in grams|height in feet|age in years|"
    "account number|zip code|page number|speed limit|temperature|distance in miles|seat number|ticket number|"
    "combination|order number|flight number|vault code|capacity|locker number|phone extension|room number"
)
_WORDS = _parts(
    "colour|mascot|nickname|main ingredient|symbol|code word|favourite animal|label|theme|material|shape|title|password"
)
_CITY_ATTRIBUTES = ["home town", "destination", "headquarters", "origin", "next stop", "branch office"]
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
# what somebody does | how it is asked | what is asked for: w a word, n a number, c a city, o another person
_DEEDS = tuple(
    _parts(line)
    for line in (
        "lives in {v}.|Where does {p} live?|c",
        "moved to {v}.|Where did {p} move?|c",
        "works in {v}.|Where does {p} work?|c",
        "grew up in {v}.|Where did {p} grow up?|c",
        "travelled to {v} last spring.|To which city did {p} travel last spring?|c",
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
class ChatForm:
    """Token ids around a question and its answer: what stands before, between and after; the blank before an answer."""

    before: list[int]
    between: list[int]
    after: list[int]
    blank: str

    @staticmethod
    def of(tokenizer: PreTrainedTokenizerFast) -> ChatForm:
        """That of a turn in the middle of a conversation, by the tokenizer's chat template if it has one."""
        before, between, after, blank = "\nUser: ", "\nAssistant:", "\n", " "
        if tokenizer.chat_template:
            first = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _MARK}]
            whole = str(tokenizer.apply_chat_template(first, tokenize=False))
            after = whole[whole.rindex(_MARK) + len(_MARK) :]
            turn = str(
                tokenizer.apply_chat_template(
                    [*first, {"role": "user", "content": _MARK}], tokenize=False, add_generation_prompt=True
                )
            )
            before, _, between = turn[len(whole) :].partition(_MARK)
            blank = ""
        # special tokens of the template are special
        ids = [list(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in (before, between, after)]
        return ChatForm(ids[0], ids[1], ids[2], blank)


@dataclass(frozen=True)
class ChatFact:
    """A sentence, with a blank in front, and a question about it with its answer."""

    statement: str
    question: str
    answer: str


def sample_facts(rng: np.random.Generator, count: int, words: Sequence[str]) -> list[ChatFact]:
    """Facts whose questions are all different."""

    def one(options: Sequence[str]) -> str:
        return str(options[int(rng.integers(len(options)))])

    def number() -> str:
        return "".join(str(digit) for digit in rng.integers(0, 10, int(rng.integers(3, 8))))

    found: dict[str, ChatFact] = {}
    while len(found) < count:
        person = f"{one(_NAMES)} {one(words).capitalize()}"
        values = {"n": number(), "w": one(words), "c": one(_CITIES), "o": f"{one(_NAMES)} {one(words).capitalize()}"}
        if rng.random() < 0.3:
            deed, question, kind = _DEEDS[int(rng.integers(len(_DEEDS)))]
            statement = one(_OPENINGS) + f"{person} {deed.format(v=values[kind])}"
            question = question.format(p=person)
        else:
            kind = "nnwc"[int(rng.integers(4))]
            attribute = one({"n": _NUMBERS, "w": _WORDS, "c": _CITY_ATTRIBUTES}[kind])
            key = f"{one(words)} {one(words)}"
            statement = one(_FRAMES).format(a=attribute, k=key, v=values[kind])
            question = one(_ASKED).format(a=attribute, k=key)
        found.setdefault(question, ChatFact(f" {statement}", question, values[kind]))
    return list(found.values())


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
    facts = sample_facts(rng, int(rng.integers(1, options.max_needles + 1)), words)
    is_inline = bool(rng.random() < 0.5)
    asked: list[tuple[list[int], list[int]]] = []
    # a question and its fact together, so that all facts that are asked find room in the text
    room = layout.seq_len // 2
    for fact in facts[: options.max_questions]:
        head = [*form.before, *tokenizer.encode(fact.question), *form.between]
        turn = head, [*tokenizer.encode(form.blank + fact.answer), *form.after[:1]]
        room -= len(turn[0]) + len(turn[1]) + len(form.after) + len(tokenizer.encode(fact.statement))
        if room < 0:
            break
        asked.append(turn)
    if not asked:
        raise ValueError(
            f"a fact and its question do not fit into half of a row: seq_len={layout.seq_len} is too small"
        )
    tokens: list[int] = []
    answers: list[tuple[int, int]] = []
    for head, answer in asked:
        answers.append((len(tokens) + len(head), len(tokens) + len(head) + len(answer)))
        tokens += [*head, *answer, *form.after[1:]]
    cost = len(tokens) if is_inline else round_up(len(tokens) + 2, layout.chunk_size)
    (text,) = haystack(rng, layout, sampler, layout.seq_len - cost - is_inline, 1)
    hidden = [*facts[: len(asked)], *facts[options.max_questions :]]
    fitted = hide(rng, [text], [tokenizer.encode(fact.statement) for fact in hidden])
    assert fitted >= len(asked)
    writer = RowWriter(layout)
    if is_inline:
        shift = len(text)
        places = [(first + shift, last + shift) for first, last in answers]
        writer.add([*text.tolist(), *tokens], places, is_whole=True)
    else:
        writer.add(text)
        writer.add(tokens, answers, is_whole=True)
    return writer.row("chat_facts")


def span_copy_row(rng: np.random.Generator, layout: RowLayout, sampler: DocumentSampler) -> Row:
    """A text in which a span of an eighth to a third of the row, at most 400 tokens, stands again at the end; all of it
    but its first tokens, by which it is known, is an answer."""
    length = min(int(rng.integers(layout.seq_len // 8, layout.seq_len // 3 + 1)), _LONGEST_SPAN)
    text = sampler.fill(rng, layout.seq_len - 2 - length)
    start = int(rng.integers(0, max(1, (len(text) - length) // 4)))
    tokens = np.concatenate([text, text[start : start + length]])
    first = min(_FIRST, length - 1)
    writer = RowWriter(layout)
    writer.add(tokens, [(len(text) + first, len(tokens))], is_whole=True)
    return writer.row("span_copy")
