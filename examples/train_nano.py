"""From a text to a trained model and back, in Python: what `hsa data`, `hsa train` and `hsa ask` do.

    python examples/train_nano.py corpus.txt -o runs/mine [--preset nano] [--tokens 20000000] [--device cuda]

Retrieval appears after tens of millions of tokens: minutes on a GPU, days on a CPU. Killed and run again, it goes on
where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from hsa_ultralong import HSAForCausalLM, memorize
from hsa_ultralong.data import DOCUMENT_SEPARATOR, TokenShards, build_shards, load_tokenizer, train_tokenizer
from hsa_ultralong.models.presets import preset
from hsa_ultralong.train import StageConfig, TrainConfig, Trainer
from hsa_ultralong.train.export import export_model


def shards_of(text: Path, folder: Path, vocabulary: int) -> tuple[TokenShards, Path]:
    """Tokenizer and token shards of a text, made once."""
    if not (folder / "manifest.json").is_file():
        documents = text.read_text(encoding="utf-8").split(DOCUMENT_SEPARATOR)
        build_shards(text, train_tokenizer(documents, vocabulary), folder)
    return TokenShards.open(folder), folder / "tokenizer"


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/mine"))
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--tokens", type=int, default=20_000_000)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch-tokens", type=int, default=65_536)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)

    shards, tokenizer_folder = shards_of(options.text, options.output / "shards", preset(options.preset).vocab_size)
    tokenizer = load_tokenizer(tokenizer_folder)

    # The warm-up of the paper: a short window and full coverage leave the work to retrieval. Rows in which a text comes
    # twice, and rows with facts that are asked for later, give it a reason.
    warmup = StageConfig(
        name="warmup",
        seq_len=options.seq_len,
        tokens=options.tokens,
        batch_tokens=options.batch_tokens,
        learning_rate=2e-3,
        warmup_steps=100,
        mixture={"text": 0.3, "self_copy": 0.3, "needles": 0.4},
    )
    trainer = Trainer(
        TrainConfig(preset=options.preset, stages=[warmup]),
        options.output / "run",
        shards,
        tokenizer,
        device=options.device,
        listener=lambda record: print(record),
    )
    trainer.train()

    exported = options.output / "model"
    export_model(trainer.model, tokenizer, exported, topk=trainer.topk)
    model = HSAForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    memory = memorize(model, torch.tensor(tokenizer(options.text.read_text(encoding="utf-8")[:100_000])["input_ids"]))
    print(f"the new model memorised {memory.num_tokens:,} tokens")
    print(f"ask it: hsa ask --model {exported} --text {options.text} ...")
    return exported


if __name__ == "__main__":
    main()
