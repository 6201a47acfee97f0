"""Long texts out of fragments that are encoded once."""

from __future__ import annotations

import numpy as np
import pytest

from hsa_ultralong.eval.tasks import ruler_words
from hsa_ultralong.eval.tasks.fragments import Fragments, first_distinct


def whole(material, fragments, order):
    return material.encode(fragments.text(order))


def test_a_text_of_pieces_has_the_tokens_that_the_tokenizer_gives_it(material):
    rng = np.random.default_rng(0)
    fragments = Fragments(material, ("", ["sheep"], " a"), ("a", [" sheep", " sleeps", " snores."], " a"))
    order = np.concatenate([[0], rng.integers(1, 4, size=3000)])
    assert fragments.encode(order).tolist() == whole(material, fragments, order)


def test_fragments_that_the_tokenizer_joins_are_encoded_as_one_text(material, monkeypatch):
    def encode(self, texts):
        return [[len(text), *map(ord, text)] for text in texts]  # a text begins with its length

    monkeypatch.setattr(type(material), "encode_all", encode)
    monkeypatch.setattr(type(material), "encode", lambda self, text: encode(self, [text])[0])
    fragments = Fragments(material, ("", ["ab", "c"], ""))
    order = np.array([0, 1, 1])
    assert fragments.tokens(order).tolist() != fragments.encode(order).tolist() == [4, *map(ord, "abcc")]


@pytest.mark.parametrize("words", [12, 400])
def test_a_numbered_list_of_words_or_pairs_is_that_text(material, monkeypatch, words):
    single, pairs = [f"word{chr(97 + i)} " for i in range(20)], (["bold", "blue-eyed ", "ad hoc"], [])
    pairs[1].extend(f"noun{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(200))
    monkeypatch.setattr(ruler_words, "_single_words", lambda: single)
    monkeypatch.setattr(ruler_words, "word_pairs", lambda: pairs)
    task = ruler_words.CommonWords()
    fragments, order, common = task._list(material, np.random.default_rng(0), words, 30, 3)
    items = [f"{i + 1}. {word}" for i, word in enumerate(listed(np.random.default_rng(0), words, single, pairs))]
    assert fragments.text(order) == " ".join(items)
    assert fragments.encode(order).tolist() == material.encode(" ".join(items))
    assert len(common) == 10


def listed(rng, words, single, pairs):
    """Words one by one, as the list is defined."""
    if words <= len(single):
        chosen = [single[i] for i in rng.permutation(len(single))[:words]]
    else:
        found: dict[str, None] = {}
        while len(found) < words:
            found["-".join(part[rng.integers(len(part))] for part in pairs)] = None
        chosen = list(found)
    drawn = chosen[:10] * 30 + chosen[10:] * 3
    rng.shuffle(drawn)
    return drawn


def test_different_draws_are_those_of_a_stream_drawn_one_by_one():
    one, many = np.random.default_rng(3), np.random.default_rng(3)
    found: dict[tuple[int, ...], None] = {}
    while len(found) < 40:
        found[tuple(one.integers(4, size=3).tolist())] = None
    drawn = first_distinct(many, lambda n: many.integers(4, size=(n, 3)), lambda rows: rows @ [16, 4, 1], 40)
    assert drawn.tolist() == [list(row) for row in found]
    assert one.integers(100) == many.integers(100)
