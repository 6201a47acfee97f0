"""Rows of tasks with several answers: chains of names, keys with values, frequent words, several values at once.

What RULER and others test, in sentences of our own: none is a template of the evaluation. Called by ``mixture.py``;
tested in ``tests/data/test_fact_rows.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from hsa_ultralong.data.fact_forms import FAMILIES, FactForm, sample_fact, sample_form
from hsa_ultralong.data.fact_rows import FACT_FAMILIES, copied, pick
from hsa_ultralong.data.fact_values import Draw, capitals, digits, first_name, subject_of, value_of
from hsa_ultralong.data.rows import NeedleOptions, Row, RowLayout, RowWriter, haystack, round_up, too_short
from hsa_ultralong.data.sampler import DocumentSampler
from hsa_ultralong.data.tasks import ordered_places
from hsa_ultralong.data.tokenizer import PieceTokenizer

_TASKS = {"chain": 0.3, "pairs": 0.2, "frequent": 0.08, "values": 0.15, "several": 0.27}
LIST_FAMILIES = tuple(_TASKS)
assert not set(LIST_FAMILIES) & set(FACT_FAMILIES)
_MOST_LINKS = 5
# of the links of a chain
_NAMES: tuple[Callable[[Draw], str], ...] = (
    lambda draw: f"{capitals(draw, 2)}{draw.below(100)}",
    lambda draw: capitals(draw, 3 + draw.below(4)),
    lambda draw: capitals(draw, 5),
    first_name,
)
# first link | the next one, of the one before | question
_CHAINS = (
    ("The dial {a} shows {v}.", "The dial {a} shows what {b} shows.", "Which dials show {v}?"),
    ("Let {a} be {v}.", "Let {a} be the same as {b}.", "Which letters stand for {v}?"),
    ("{a} received the coin {v}.", "{b} passed the coin on to {a}.", "Who held the coin {v}, one after another?"),
    ("{a} <- {v};", "{a} <- {b};", "List the names that lead to {v}."),
    ("Tank {a} is filled from well {v}.", "Tank {a} is filled from tank {b}.", "Which tanks get water of well {v}?"),
    ("Register {a} holds {v}.", "Register {a} holds whatever {b} holds.", "Which registers hold {v}?"),
    ("(def {a} {v})", "(def {a} {b})", "List every name that is defined as {v}."),
    ("{a} equals {v};", "{a} equals {b};", "Find all symbols that equal {v}."),
    ("# {a}: {v} #", "# {a}: {b} #", "Which labels come down to {v}?"),
    ("The seal {v} was given to {a}.", "The seal of {b} was copied by {a}.", "Who has the seal {v}?"),
)
# how several facts of one attribute are asked for at once; {a} "the price of x, y and z"
_JOINT = ("What is {a}?", "Give {a}.", "What are the answers for {a}?", "Tell me {a}.", "List {a}.")
# a pair | question
_PAIRS = (
    ("{k} => {v}\n", "What does {k} point to?"),
    ('"{k}" is mapped to "{v}". ', 'To what is "{k}" mapped?'),
    ("{k}\t{v}\n", "What is written behind {k}?"),
    ("[{k}: {v}] ", "What is in the bracket of {k}?"),
    ("* {k} means {v}\n", "What does {k} mean?"),
    ("Guest {k} sleeps in {v}. ", "Where does guest {k} sleep?"),
)
_VALUES = (
    ("One {a} of {x} is {v}.", "List every {a} of {x}."),
    ("{v} is a {a} of {x}, among others.", "Which are the {a}s of {x}?"),
    ("To the {a}s of {x} belongs {v}.", "Give each {a} of {x}."),
)
_ATTRIBUTES = ("code", "number", "colour", "owner", "name", "key", "price", "label")
_STYLES = ("Question: {q}\nAnswer:", "Question: {q}\nAnswer:", "Q: {q}\nA:", "{q}", "{q} Answer: ")
_FREQUENT = ("Which word comes up most of all?", "Which {n} words are said over and over again?")


class Statement(NamedTuple):
    """Tokens, and where the part lies that an answer repeats."""

    tokens: list[int]
    part: tuple[int, int]


class ListTask(NamedTuple):
    """A question and the parts of its answer: their text, and the statement of each, -1 for none."""

    question: str
    parts: list[tuple[str, int]]


def _statement(tokenizer: PieceTokenizer, text: str, part: str) -> Statement:
    """`text` with {} where the part stands."""
    left, right = text.split("{}")
    blank = " " if left.endswith(" ") else ""
    first, middle = tokenizer.encode(left[: len(left) - len(blank)]), tokenizer.encode(blank + part)
    return Statement([*first, *middle, *tokenizer.encode(right)], (len(first), len(first) + len(middle)))


def _chain(
    draw: Draw, tokenizer: PieceTokenizer, words: Sequence[str], room: int, split: int
) -> tuple[list[Statement], list[ListTask]]:
    start, link, asked = _CHAINS[draw.below(len(_CHAINS))]
    statements: list[list[Statement]] = []
    names: set[str] = set()
    name = _NAMES[draw.below(len(_NAMES))]
    is_ordered = draw.chance(0.5)
    chains: list[tuple[str, list[str]]] = []
    for _ in range(1 + draw.below(max(1, min(room // 160, 12)))):
        value = digits(draw, 4 + draw.below(6))
        members: list[str] = []
        while len(members) < 2 + draw.below(_MOST_LINKS - 1):
            called = name(draw)
            if called not in names:
                names.add(called)
                members.append(called)
        before = [start, *[link.replace("{b}", earlier) for earlier in members[:-1]]]
        lines = [f" {line}".replace("{v}", value).replace("{a}", "{}") for line in before]
        statements.append([_statement(tokenizer, line, own) for line, own in zip(lines, members, strict=True)])
        chains.append((value, members))
    # chains mix; the links of one stay in order, or of none
    order = sorted((draw.random(), i, place) for i, chain in enumerate(statements) for place in range(len(chain)))
    mixed: list[Statement] = []
    numbers: list[dict[int, int]] = [{} for _ in statements]
    for _, i, drawn in order:
        place = len(numbers[i]) if is_ordered else drawn
        numbers[i][place] = len(mixed)
        mixed.append(statements[i][place])
    tasks = [
        ListTask(asked.replace("{v}", value), [(own, numbers[i][place]) for place, own in enumerate(members)])
        for i, (value, members) in enumerate(chains)
    ]
    return mixed, tasks


def _pairs(
    draw: Draw, tokenizer: PieceTokenizer, words: Sequence[str], room: int, split: int
) -> tuple[list[Statement], list[ListTask]]:
    text, asked = _PAIRS[draw.below(len(_PAIRS))]
    kinds = ("identifier", "number", "code", "pair", "word")
    key_kind, value_kind = draw.pick(kinds), draw.pick((*kinds, "name", "long", "phone"))
    found: dict[str, tuple[Statement, str]] = {}
    most = 2 + draw.below(254)
    while len(found) < most and room > 0:
        key, value = value_of(key_kind, draw, words), value_of(value_kind, draw, words)
        if key in found:
            most -= 1
            continue
        found[key] = _statement(tokenizer, text.replace("{k}", key).replace("{v}", "{}"), value), value
        room -= len(found[key][0].tokens)
    tasks = [ListTask(asked.replace("{k}", key), [(value, i)]) for i, (key, (_, value)) in enumerate(found.items())]
    return [statement for statement, _ in found.values()], tasks


def _values(
    draw: Draw, tokenizer: PieceTokenizer, words: Sequence[str], room: int, split: int
) -> tuple[list[Statement], list[ListTask]]:
    statements: list[Statement] = []
    tasks: list[ListTask] = []
    for _ in range(1 + draw.below(max(1, min(room // 160, 16)))):
        text, asked = _VALUES[draw.below(len(_VALUES))]
        subject, attribute = subject_of("any", draw, words), draw.pick(_ATTRIBUTES)
        kind = draw.pick(("number", "word", "name", "code", "place"))
        # in the order of their letters, as nothing in a memory says which came first
        values = sorted({value_of(kind, draw, words) for _ in range(2 + draw.below(3))})
        text, asked = (one.replace("{a}", attribute).replace("{x}", subject) for one in (text, asked))
        first = len(statements)
        line = text[:1].upper() + text[1:]
        statements += [_statement(tokenizer, " " + line.replace("{v}", "{}"), value) for value in values]
        tasks.append(ListTask(asked, [(value, first + i) for i, value in enumerate(values)]))
    return statements, tasks


def _several(
    draw: Draw, tokenizer: PieceTokenizer, words: Sequence[str], room: int, split: int
) -> tuple[list[Statement], list[ListTask]]:
    is_joint = draw.chance(0.5)
    form = sample_form(draw, split, "attributes" if is_joint else draw.pick(FAMILIES))
    is_similar = is_joint or draw.chance(0.5)
    statements: list[Statement] = []
    tasks: list[ListTask] = []
    parts: list[tuple[str, int]] = []
    asked: list[str] = []
    for number in range(2 + draw.below(max(1, min(room // 56, 16)))):
        if not is_similar:
            form = sample_form(draw, split)
        fact = sample_fact(draw, form, words)
        left, value = tokenizer.encode(fact.left), tokenizer.encode(fact.value)
        tokens = [*left, *value, *tokenizer.encode(fact.right)]
        statements.append(Statement(tokens, (len(left), len(left) + len(value))))
        asked.append(fact.subject if is_joint else fact.question)
        parts.append((fact.answer.strip(), number))
        if len(parts) >= 2 + draw.below(3):
            tasks.append(ListTask(_together(draw, asked, form if is_joint else None), parts))
            asked, parts = [], []
    if len(parts) > 1 or not tasks:
        tasks.append(ListTask(_together(draw, asked, form if is_joint else None), parts))
    return statements, tasks


def _together(draw: Draw, asked: Sequence[str], form: FactForm | None) -> str:
    """Questions one after another, or of one attribute and several subjects at once."""
    if form is None:
        return " ".join(asked)
    subjects = " and ".join(filter(None, (", ".join(asked[:-1]), asked[-1])))
    return draw.pick(_JOINT).replace("{a}", form.restated.removesuffix(" is").replace("{x}", subjects))


def _frequent(
    draw: Draw, tokenizer: PieceTokenizer, words: Sequence[str], room: int, split: int
) -> tuple[list[Statement], list[ListTask]]:
    number, often = 1 + draw.below(3), 3 + draw.below(8)
    chosen = list({draw.pick(words): None for _ in range(4 + draw.below(max(4, room // 24)))})
    listed = [word for word in chosen[:number] for _ in range(often)]
    listed += [word for word in chosen[number:] for _ in range(1 + draw.below(2))]
    listed = [word for _, word in sorted((draw.random(), word) for word in listed)]
    statements = [Statement(tokenizer.encode(f" {word}"), (0, 1)) for word in listed]
    question = _FREQUENT[number > 1].replace("{n}", str(number))
    top = sorted(chosen[:number])
    return statements, [ListTask(question, [(word, -1) for word in top])]


_MAKERS = {"chain": _chain, "pairs": _pairs, "values": _values, "several": _several, "frequent": _frequent}


def lists_row(
    rng: np.random.Generator,
    layout: RowLayout,
    sampler: DocumentSampler,
    tokenizer: PieceTokenizer,
    words: Sequence[str],
    options: NeedleOptions,
    *,
    split: int = 0,
    family: str = "",
) -> Row:
    """One of LIST_FAMILIES: statements over a text in their order, or a block of them, then questions, each a document
    or all of them behind the text.

    Raises:
        ValueError: not one question fits.
    """
    draw = Draw(rng)
    task = pick(draw, _TASKS, family)
    is_inline = draw.chance(options.inline_fraction)
    statements, tasks = _MAKERS[task](draw, tokenizer, words, layout.seq_len // 3, split)
    sizes = [len(statement.tokens) for statement in statements]
    total = sum(sizes) + 2 * layout.chunk_size
    questions: list[tuple[list[int], tuple[int, int], list[tuple[int, int, int]]]] = []
    room = layout.seq_len - total
    for number in rng.permutation(len(tasks)).tolist()[: options.max_questions]:
        tokens, answer, repeated = _asked(draw, tokenizer, tasks[number], is_inline)
        room -= round_up(len(tokens) + 2, layout.chunk_size)
        if room < 0:
            break
        questions.append((tokens, answer, repeated))
    if not questions:
        raise ValueError(too_short(layout, "list and a question about it do not fit"))
    cost = sum(round_up(len(tokens) + 2, layout.chunk_size) for tokens, _, _ in questions)
    if is_inline:
        cost = 1 + sum(len(tokens) for tokens, _, _ in questions)
    writer = RowWriter(layout)
    (text,) = haystack(rng, layout, sampler, layout.seq_len - cost, 1)
    # a block stands together, statements anywhere
    if task in ("pairs", "frequent") or draw.chance(0.2):
        first = int(rng.integers(0, len(text) - sum(sizes) + 1))
        places = [first + before for before in np.cumsum([0, *sizes[:-1]]).tolist()]
    else:
        places = [place for _, place in ordered_places(rng, [len(text)], sizes)]
    for statement, place in zip(statements, places, strict=True):
        text[place : place + len(statement.tokens)] = statement.tokens
    if is_inline:
        written: list[int] = text.tolist()
        firsts, answers = [], []
        for tokens, (begin, stop), _ in questions:
            firsts.append(1 + len(written))
            answers.append((len(written) + begin, len(written) + stop))
            written += tokens
        start = writer.add(written, answers, is_whole=True)
    else:
        start = writer.add(text)
        firsts = [writer.add(tokens, [answer], is_whole=True) for tokens, answer, _ in questions]
    for own, (_, _, repeated) in zip(firsts, questions, strict=True):
        for begin, length, number in repeated:
            first, stop = (start + places[number] + end for end in statements[number].part)
            writer.cite_copy(own + begin, copied(first, stop, length))
    return writer.row("lists")


def _asked(
    draw: Draw, tokenizer: PieceTokenizer, task: ListTask, is_inline: bool
) -> tuple[list[int], tuple[int, int], list[tuple[int, int, int]]]:
    """Tokens, the span of the answer, and of every part: first token, length and statement."""
    style, start = draw.pick(_STYLES), draw.pick(("\n", "\n", " ") if is_inline else ("", "\n"))
    tokens = tokenizer.encode(start + style.replace("{q}", task.question))
    first = len(tokens)
    repeated: list[tuple[int, int, int]] = []
    for place, (text, number) in enumerate(task.parts):
        if place:
            tokens += tokenizer.encode(",")
        part = tokenizer.encode(text if not place and style.endswith(" ") else f" {text}")
        if number >= 0:
            repeated.append((len(tokens), len(part), number))
        tokens += part
    return tokens, (first, len(tokens)), repeated
