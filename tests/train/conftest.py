"""A tiny corpus with its tokenizer, and short runs of the debug model on it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from hsa_ultralong.data import TokenShards, build_shards, train_tokenizer
from hsa_ultralong.train import StageConfig, TrainConfig, Trainer

WORDS = [a + b + c for a in ("ba", "ce", "di", "fo") for b in ("lo", "mu", "na", "pe", "ro") for c in ("nd", "rs")]


@pytest.fixture(scope="session")
def make_corpus(tmp_path_factory):
    """Builds a folder of token shards with `tokenizer/` inside, as `hsa data` writes it."""

    def make(num_texts, num_words, vocab_size):
        folder = tmp_path_factory.mktemp("corpus")
        rng = np.random.default_rng(0)
        texts = [" ".join(WORDS[i] for i in rng.integers(0, len(WORDS), num_words)) for _ in range(num_texts)]
        (folder / "corpus.txt").write_text("\n\x1e\n".join(texts), encoding="utf-8")
        fact = "Question: What is the secret code of the one?\nAnswer: The access number for serial locker magic."
        tokenizer = train_tokenizer([*texts, *[fact] * 20], vocab_size=vocab_size)
        build_shards(folder / "corpus.txt", tokenizer, folder / "shards", validation_fraction=0.3)
        tokenizer.save_pretrained(folder / "shards" / "tokenizer")
        return folder / "shards", tokenizer

    return make


@pytest.fixture(scope="session")
def shards_folder(make_corpus):
    return make_corpus(4, 900, 400)


@pytest.fixture(scope="session")
def tiny_runs(shards_folder):
    """Namespace of functions: stage, config, trainer, records, losses."""
    path, tokenizer = shards_folder
    shards = TokenShards.open(path, tokenizer)

    def stage(name="warmup", **options):
        fields = {"seq_len": 128, "tokens": 768, "batch_tokens": 256, "learning_rate": 2e-3, "warmup_steps": 1}
        return StageConfig(name=name, **{**fields, "mixture": {"text": 0.5, "self_copy": 0.5}, **options})

    def config(*stages, **options):
        options = {"log_every": 1, "tensorboard": False, **options}
        return TrainConfig(preset="debug", stages=list(stages or [stage()]), compile=False, **options)

    def trainer(folder, wanted=None, **options):
        return Trainer(wanted or config(), folder, shards, tokenizer, **options)

    def records(folder):
        return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]

    def losses(folder):
        return [(one["global_step"], one["loss"], one["grad_norm"]) for one in records(folder) if "loss" in one]

    return SimpleNamespace(
        stage=stage, config=config, trainer=trainer, records=records, losses=losses, shards=shards, tokenizer=tokenizer
    )
