"""The authors' own tests (Tencent-Hunyuan/HiLS-Attention at a483571: wording and parameters), passkey and key-values.

S-NIAH, MQ (2 of 6) and VT are theirs, scored as they do, by teacher-forced argmax of the whole answer. Passkey is that
of the long-context literature, key-values that of "Lost in the Middle" (MIT). See README.md.
"""

from __future__ import annotations

import json
import string
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from hsa_ultralong.data.needles import Needle
from hsa_ultralong.data.seeds import namespaced_rng
from hsa_ultralong.eval.tasks.assembly import Form, filled, finish, make_form, middle_depth, write_in
from hsa_ultralong.eval.tasks.material import Material
from hsa_ultralong.eval.tasks.ruler_needles import NOISE
from hsa_ultralong.eval.tasks.sample import Sample, Tokens

# S-NIAH: what is hidden, and what is asked
_HIDDEN = " |One of the special magic numbers for long-context is:{value}|"
_ASKED = " What is the special magic number for long-context mentioned in the provided text? Answer: "


def authors_needles(seed: int, number: int) -> list[Needle]:
    """The authors' sentences with numbers of their own, for eval/needles.py, which reaches lengths and forms of a
    memory that suites do not. They share one key, so one at a time may be in a text."""
    found = []
    for index in range(number):
        value = str(namespaced_rng("eval/s_niah_authors/needles", seed, index).integers(10**7, 10**8))
        hidden = _HIDDEN.format(value=value)
        found.append(Needle("long-context", value, hidden, _ASKED, value, hidden[: -len(value) - 1]))
    return found


def _capitals(rng: np.random.Generator, number: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < number:
        found["".join(string.ascii_uppercase[i] for i in rng.integers(26, size=5))] = None
    return list(found)


def _anywhere(material: Material, form: Form, length: int) -> tuple[Tokens, range]:
    """A haystack whose facts may stand at any token."""
    return material.haystack(length, form.room)[0], range(form.room)


@dataclass(frozen=True)
class AuthorsNeedle:
    """One number of eight digits anywhere in the text."""

    name: str = "s_niah_authors"
    metric: str = "exact"
    max_new_tokens: int = 16
    is_editable: bool = True

    def samples(self, material: Material, length: int, number: int, seed: int) -> Iterator[Sample]:
        form = make_form(material, self, length, "", _ASKED, "")
        form.require(64, self.name)
        for index in range(number):
            rng, depth = namespaced_rng("eval/s_niah_authors", seed, length, index), middle_depth(index, number)
            value = str(rng.integers(10**7, 10**8))
            context, starts = _anywhere(material, form, length)
            spans = write_in(context, starts, [material.encode(_HIDDEN.format(value=value))], [depth], self.name)
            yield finish(self, form, context, index, [value], "long-context", depth, spans, value)


@dataclass(frozen=True)
class AuthorsQueries:
    """Six names with a number each, two of which are asked for."""

    name: str = "mq_authors"
    facts: int = 6
    asked: int = 2
    metric: str = "in_order"
    max_new_tokens: int = 32
    is_editable: bool = True

    def samples(self, material: Material, length: int, number: int, seed: int) -> Iterator[Sample]:
        for index in range(number):
            rng = namespaced_rng("eval/mq_authors", seed, length, index)
            names = _capitals(rng, self.facts)
            values = [str(value) for value in rng.integers(10**5, 10**6, size=self.facts)]
            chosen = rng.permutation(self.facts)[: self.asked]
            query = " and ".join(names[i] for i in chosen)
            asked = f" What are all the special magic numbers for {query} mentioned in the provided text?. Answer: "
            form = make_form(material, self, length, "", asked, "")
            form.require(256, self.name)
            context, starts = _anywhere(material, form, length)
            pieces = [
                material.encode(f"| One of the special magic numbers for {name} is {value}.|")
                for name, value in zip(names, values, strict=True)
            ]
            spans = write_in(context, starts, pieces, rng.random(self.facts).tolist(), self.name)
            evidence, answers = [spans[i] for i in chosen], [values[i] for i in chosen]
            yield finish(self, form, context, index, answers, query, None, evidence, " ".join(answers))


@dataclass(frozen=True)
class AuthorsVariables:
    """Two chains of three names, their assignments in random order; the names of one chain are asked for."""

    name: str = "vt_authors"
    chains: int = 2
    links: int = 3
    metric: str = "in_order"
    max_new_tokens: int = 32
    is_editable: bool = True

    def samples(self, material: Material, length: int, number: int, seed: int) -> Iterator[Sample]:
        for index in range(number):
            rng = namespaced_rng("eval/vt_authors", seed, length, index)
            names = _capitals(rng, self.chains * self.links)
            values = [str(value) for value in rng.integers(10**7, 10**8, size=self.chains)]
            lines, owner = [], []
            for chain, value in enumerate(values):
                own = names[chain * self.links : (chain + 1) * self.links]
                lines += [f"|VAR {own[0]} = {value}|"]
                lines += [f"|VAR {later} = {earlier}|" for earlier, later in pairwise(own)]
                owner += [chain] * self.links
            asked = f" Find all variables that are assigned the value {values[0]}. Answer: "
            form = make_form(material, self, length, "", asked, "")
            form.require(256, self.name)
            context, starts = _anywhere(material, form, length)
            pieces = [material.encode(line) for line in lines]
            spans = write_in(context, starts, pieces, rng.random(len(pieces)).tolist(), self.name)
            evidence = [span for span, chain in zip(spans, owner, strict=True) if chain == 0]
            answers = names[: self.links]
            yield finish(self, form, context, index, answers, values[0], None, evidence, ", ".join(answers))


@dataclass(frozen=True)
class Passkey:
    """Five digits in the noise of grass, sky and sun."""

    name: str = "passkey"
    metric: str = "exact"
    max_new_tokens: int = 8
    is_editable: bool = True

    def samples(self, material: Material, length: int, number: int, seed: int) -> Iterator[Sample]:
        before = (
            "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
            "I will quiz you about the important information there.\n"
        )
        form = make_form(material, self, length, before, "\nWhat is the pass key? The pass key is", "")
        form.require(128, self.name)
        line = material.encode(f"{NOISE} ")
        for index in range(number):
            rng, depth = namespaced_rng("eval/passkey", seed, length, index), middle_depth(index, number)
            value = str(rng.integers(10**4, 10**5))
            context = filled([], form.room, line)
            piece = material.encode(f"The pass key is {value}. Remember it. {value} is the pass key. ")
            spans = write_in(context, np.arange(0, form.room, len(line)), [piece], [depth], self.name)
            yield finish(self, form, context, index, [value], "pass key", depth, spans)


@dataclass(frozen=True)
class KeyValues:
    """One JSON object of random UUIDs, one key of which is asked for."""

    name: str = "kv"
    metric: str = "part"
    max_new_tokens: int = 64
    is_editable: bool = True

    def samples(self, material: Material, length: int, number: int, seed: int) -> Iterator[Sample]:
        before = "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n{"
        rng = namespaced_rng("eval/kv", seed, length)
        pairs: list[tuple[str, str]] = []
        parts: list[list[int]] = []
        size = 0
        while size < length:
            new = [(_uuid(rng), _uuid(rng)) for _ in range(1 + min(65536, (length - size) // 48))]
            texts = [f"{json.dumps(key)}: {json.dumps(value)},\n " for key, value in new]
            encoded = material.tokenizer(texts, add_special_tokens=False)["input_ids"]
            pairs, parts, size = pairs + new, parts + encoded, size + sum(map(len, encoded))
        ends = np.cumsum([len(part) for part in parts])
        tokens = np.concatenate([np.asarray(part, dtype=np.int32) for part in parts])
        for index in range(number):
            depth = middle_depth(index, number)
            usable = 0
            for _ in range(2):  # the question's length depends on the key, the key on the room
                key, value = pairs[int(depth * usable)]
                asked = f'}}\n\nKey: "{key}"\nCorresponding value:'
                form = make_form(material, self, length, before, asked, "")
                form.require(len(parts[0]) + 16, self.name)
                usable = max(1, int(np.searchsorted(ends, form.room - 16, side="right")))
            chosen = int(depth * usable)
            span = (int(ends[chosen - 1]) if chosen else 0, int(ends[chosen]))
            key, value = pairs[chosen]
            form = make_form(material, self, length, before, f'}}\n\nKey: "{key}"\nCorresponding value:', "")
            context = filled(tokens, form.room, material.encode("\n"))
            yield finish(self, form, context, index, [value], key, depth, [span])


def _uuid(rng: np.random.Generator) -> str:
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


PAPER = (AuthorsNeedle(), AuthorsQueries(), AuthorsVariables(), Passkey(), KeyValues())
