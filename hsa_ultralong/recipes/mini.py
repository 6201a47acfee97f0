"""The next size: 31M parameters by the recipe of `nano_facts`."""

from __future__ import annotations

from dataclasses import replace

from hsa_ultralong.recipes.nano_facts import nano_facts
from hsa_ultralong.train import TrainConfig


def mini() -> TrainConfig:
    """`hsa train mini --data SHARDS -o runs/mini --device cuda --export models/mini`; `make mini` asks it too.

    One H200, 8.4 minutes alone, 11.4 with the questions of `make mini` (results/training-mini); it goes on in pieces
    with `--max-minutes 8`. 31,471,426 parameters, 60 MiB; the weights do not ship. SHARDS: text under permissive
    licences and passages of Wikipedia, `hsa data corpus.txt passages.jsonl --tokenizer checkpoints/nano -o SHARDS`.

    The stages of `nano_facts` with lower rates and fewer tokens, and pools of at most 262,144 tokens, whose chunks fit
    beside the wider activations.
    """
    config = nano_facts()
    warmup, long, mixed = config.stages
    return replace(
        config,
        preset="mini",
        model={},
        stages=[
            replace(warmup, tokens=190_000_000, learning_rate=1.5e-3, warmup_steps=150),
            replace(long, tokens=40_000_000, learning_rate=8e-4),
            replace(
                mixed,
                tokens=62_914_560,
                batch_tokens=524_288,
                learning_rate=6e-4,
                shapes=((2048, 128), (8192, 16), (2048, 32), (32_768, 4)),
                average_decay=0.97,
            ),
        ],
        mfu=0.12,
    )
