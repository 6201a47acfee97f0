"""From a transformer to a model with a memory, end to end on a CPU.

Trains a small Llama on Newton's Opticks at 256 tokens a row, half of the rows a text followed by itself, so that it
learns to look back; converts it (windows of 32, so that it no longer can); distils it on the same kind of rows while
longer ones, 512 tokens, ask for their own first half; and reports, before and after: the divergence from the teacher,
the loss of the copied half at the teacher's length and beyond it, and hidden sentences, whatever they give.

    python examples/convert_and_distill.py [--steps 250] [--output runs/convert]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hsa_ultralong.cli.common import default_checkpoint
from hsa_ultralong.data import load_tokenizer
from hsa_ultralong.eval.haystack import opticks
from hsa_ultralong.eval.metadata import run_metadata, write_json
from hsa_ultralong.eval.needles import run_needles
from hsa_ultralong.models.convert import convert_model
from hsa_ultralong.train.distillation import distill, divergence, student_logits

LENGTH, WINDOW, LONG = 256, 32, 512


def crops(tokens, length, rows, seed):
    """Random rows (B, T) of the text, for ever."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(tokens) - length, (rows,), generator=generator)
        yield torch.stack([tokens[start : start + length] for start in starts.tolist()])


def copies(tokens, length, rows, seed):
    """Rows whose second half repeats the first, and where the repetition begins."""
    for ids in crops(tokens, length // 2, rows, seed):
        ids = torch.cat((ids, ids), 1)
        yield {"input_ids": ids, "labels": ids}


def mixed(tokens, length, rows, seed):
    """Half of every batch plain text, half texts followed by themselves."""
    for plain, copied in zip(crops(tokens, length, rows // 2, seed), copies(tokens, length, rows // 2, seed + 100)):
        yield torch.cat((plain, copied["input_ids"]))


def train_teacher(tokens, vocab_size, steps):
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=96, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=LENGTH,
    )  # fmt: skip
    teacher = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    rows = mixed(tokens, LENGTH, 4, 1)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 20) * (1 - step / steps)
        ids = next(rows)
        loss = teacher(ids, labels=ids).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"teacher step {step}: loss {loss.item():.3f}", flush=True)
    return teacher.eval()


@torch.no_grad()
def copied_loss(logits, ids):
    """Mean loss of the second half, its first tokens aside: those the window alone could give."""
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    return losses[:, ids.shape[1] // 2 + WINDOW :].mean().item()


@torch.no_grad()
def measure(student, teacher, held_out):
    student.eval()
    ids = next(mixed(held_out, LENGTH, 16, 5))
    found = {"divergence": divergence(student_logits(student, ids), teacher(ids).logits).item()}
    for name, length in (("copied_loss_at_256", LENGTH), ("copied_loss_at_512", LONG)):
        ids = next(copies(held_out, length, 8, 6))["input_ids"]
        found[name] = copied_loss(student_logits(student, ids), ids)
    ids = next(copies(held_out, LENGTH, 8, 6))["input_ids"]
    found["teachers_copied_loss_at_256"] = copied_loss(teacher(ids).logits, ids)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=250, help="of the teacher and of the student each")
    parser.add_argument("--output", type=Path, default=Path("runs/convert"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = load_tokenizer(default_checkpoint())
    tokens = torch.tensor(tokenizer(opticks())["input_ids"])
    train, held_out = tokens[:-40_000], tokens[-40_000:]
    teacher = train_teacher(train, len(tokenizer), arguments.steps)
    student = convert_model(teacher, sliding_window=WINDOW, retrieval_dim=64, chunk_topk=8).model
    before = measure(student, teacher, held_out)

    def show(record):
        if record["step"] % 50 == 0:
            print(
                "student step {step}: divergence {divergence:.3f}, long rows {long_loss:.3f}".format(**record),
                flush=True,
            )

    records = distill(
        student, teacher, mixed(train, LENGTH, 4, 2), steps=arguments.steps, learning_rate=2e-3,
        long_rows=copies(train, LONG, 2, 3), on_step=show,
    )  # fmt: skip
    after = measure(student, teacher, held_out)
    study = run_needles(student, tokenizer, held_out.to(torch.int32), lengths=[LONG], samples=10)
    result = {
        "meta": run_metadata("python examples/convert_and_distill.py", 0, steps=arguments.steps),
        "before": before, "after": after, "needles_at": LONG, "needle_accuracy": study.results[0].accuracy,
        "log": records,
    }  # fmt: skip
    write_json(arguments.output / "report.json", result)
    print(json.dumps({key: result[key] for key in ("before", "after", "needles_at", "needle_accuracy")}, indent=1))
    print(f"Written: {arguments.output / 'report.json'}")


if __name__ == "__main__":
    main()
