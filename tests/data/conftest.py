"""A tiny corpus, tokenizer and shards for all data tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from hsa_ultralong.data import TokenShards, build_shards, train_tokenizer

SYLLABLES = ("ba", "ce", "di", "fo", "gu", "ha", "je", "ki", "lo", "mu", "na", "pe", "qi", "ro", "su", "ta", "ve", "wi")


def make_text(rng: np.random.Generator, num_words: int) -> str:
    vocabulary = [a + b + c for a in SYLLABLES for b in SYLLABLES[:5] for c in ("", "nd", "rs")]
    words = [vocabulary[i] for i in rng.integers(0, len(vocabulary), num_words)]
    sentences = [" ".join(words[i : i + 9]).capitalize() + f", {i} amber falcons." for i in range(0, num_words, 9)]
    return "\n".join(sentences) + "\n"


@pytest.fixture(scope="session")
def documents() -> list[str]:
    rng = np.random.default_rng(0)
    return [make_text(rng, num_words) for num_words in (40, 3000, 700, 1200, 90, 2500, 300, 1800)]


@pytest.fixture(scope="session")
def corpus_file(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\x1e\n".join(documents), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    facts = ["Question: What is the secret code of the one?\nAnswer: The access number for serial locker magic."] * 20
    return train_tokenizer(documents + facts, vocab_size=600)


@pytest.fixture(scope="session")
def shards(
    corpus_file: Path, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> TokenShards:
    return build_shards(corpus_file, tokenizer, tmp_path_factory.mktemp("shards") / "out", validation_fraction=0.2)


def write_squad(path: Path, passage: Callable[[int, int], tuple[str, dict[str, str]]]) -> Path:
    """Thirty passages of ten articles in SQuAD's form; passage(article, number) gives a text and its answers by
    question."""
    articles = []
    for article in range(10):
        paragraphs = []
        for number in range(3):
            context, told = passage(article, number)
            qas = [
                {"id": asked, "question": asked, "answers": [{"text": answer, "answer_start": context.index(answer)}]}
                for asked, answer in told.items()
            ]
            paragraphs.append({"context": context, "qas": qas})
        articles.append({"title": str(article), "paragraphs": paragraphs})
    path.write_text(json.dumps({"data": articles}), encoding="utf-8")
    return path
