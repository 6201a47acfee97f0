"""Give your own model a memory, at toy size on a CPU: every command of docs/own-memory.md in a minute or two.

    python examples/own_memory.py corpus.txt -o runs/own [--steps 40]

A small Llama is trained on the text for a moment and stands for your model. It is converted, aligned with itself,
taught to use its memory beside itself, and comes back from its own files and one small file of what was learnt. So few
steps on so small a model show the way, not a recall: docs/own-memory.md says what to expect where.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hsa_ultralong import memorize
from hsa_ultralong.cli.main import app
from hsa_ultralong.data import load_tokenizer
from hsa_ultralong.models import HSAForCausalLM

VOCABULARY, CHUNK, WINDOW = 512, 16, 32


def hsa(*arguments: object) -> None:
    """A command of the command line, in this process."""
    app([str(part) for part in arguments], standalone_mode=False)


def your_model(folder: Path, shards: Path, text: Path, steps: int) -> None:
    """A Llama that has seen the text, with its tokenizer, as a Hugging Face folder."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(shards / "tokenizer")
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **sizes, **ids)).train()
    tokens = torch.tensor(tokenizer(text.read_text(encoding="utf-8")[:200_000])["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        starts = torch.randint(len(tokens) - 128, (8,)).tolist()
        rows = torch.stack([tokens[start : start + 128] for start in starts])
        loss = model(rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def sizes(stage: str, seq_len: int, steps: int, window: int) -> list[str]:
    """Settings of a recipe's stage at toy size."""
    table = {"seq_len": seq_len, "batch_tokens": 4 * seq_len, "tokens": 4 * seq_len * steps, "warmup_steps": 1}
    table |= {"sliding_window": window, "hsa_sliding_window": window}
    return [part for name, value in table.items() for part in ("--set", f"{stage}.{name}={value}")]


def main(arguments: list[str] | None = None) -> dict[str, list[float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/own"))
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args(arguments)
    out, steps = options.output, options.steps
    shards, source, converted = out / "shards", out / "source", out / "converted"

    hsa("data", options.text, "-o", shards, "--vocab-size", VOCABULARY)
    your_model(source, shards, options.text, steps)
    memory = ["--set", f"chunk_size={CHUNK}", "--set", "retrieval_dim=32", "--set", "num_memory_heads=2"]
    hsa("convert", source, "-o", converted, "--window", WINDOW, "--read-at", "2,3", *memory)

    common = ["--data", shards, "--init-from", converted, "--teacher", source, "--device", "cpu"]
    common += ["--set", "lora_rank=4", "--set", "log_every=1", "--set", "probe_every=1000", "--set", "probe_rows=2"]
    aligned, learnt = out / "aligned.safetensors", out / "learnt.safetensors"
    hsa("train", "convert_align", *common, "-o", out / "align", "--export-difference", aligned,
        *sizes("align", 256, steps, CHUNK))  # fmt: skip
    stages = [*sizes("short", 256, steps, CHUNK), *sizes("choose", 256, steps, CHUNK), *sizes("widen", 512, 1, WINDOW),
              *sizes("settle", 512, 1, WINDOW)]  # fmt: skip
    hsa("train", "convert_memory", *common, "-o", out / "read", "--from-difference", aligned, "--export-difference",
        learnt, *stages, "--set", "probe_lengths=()")  # fmt: skip
    hsa("convert", source, "--apply", learnt, "-o", out / "model")
    print(f"{learnt.stat().st_size:,} bytes of what was learnt; the model: {out / 'model'}")

    model, tokenizer = HSAForCausalLM.from_pretrained(out / "model", dtype=torch.float32), load_tokenizer(out / "model")
    tokens = torch.tensor(tokenizer(options.text.read_text(encoding="utf-8")[:20_000])["input_ids"])
    print(f"it memorised {memorize(model, tokens).num_tokens:,} tokens")
    log = [json.loads(line) for line in (out / "align" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    records = [record for record in log if "loss" in record]
    names = ("divergence", "answer_loss", "retrieval_error", "output_error")
    curves = {name: [record[name] for record in records] for name in names}
    for name, values in curves.items():
        print(f"{name:16} {values[0]:.3f} -> {values[-1]:.3f}")
    return curves


if __name__ == "__main__":
    main()
