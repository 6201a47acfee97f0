"""From a transformer to a model with a memory, end to end on one CPU core, in about half an hour.

A small Llama learns, on rows of at most 256 tokens, Newton's Opticks and to recall: in rows of random tokens a span
comes twice, and the second time it can be foretold. Converted with windows of 16 it no longer can, until distillation
on rows of the teacher's length and the ordinary loss on longer ones teach its memory to. Rows grow once they are
recalled: short ones teach it soon, long ones later. Reported before and after: the divergence from the teacher, and
the share of tokens recalled at the teacher's length and far beyond it.

    python examples/convert_and_distill.py [--steps 1200] [--output runs/convert]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hsa_ultralong.data import train_tokenizer
from hsa_ultralong.eval.haystack import opticks
from hsa_ultralong.eval.metadata import run_metadata, write_json
from hsa_ultralong.models.convert import convert_model
from hsa_ultralong.train.optim import decay_groups
from hsa_ultralong.train.teaching import divergence

VOCABULARY, TEACHER_LENGTH, WINDOW, CHUNK = 512, 256, 16, 16
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
IGNORED = -100


def recall_rows(length, rows, generator):
    """Random tokens in which a span of at most 64 and half a row comes again at the end; labels: this second time."""
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    labels = torch.full_like(ids, IGNORED)
    for row in range(rows):
        span = min(64, int(torch.randint(length // 4, length // 2 + 1, (), generator=generator)))
        start = int(torch.randint(length - 2 * span + 1, (), generator=generator))
        ids[row, -span:] = ids[row, start : start + span]
        labels[row, 1 - span :] = ids[row, 1 - span :]
    return {"input_ids": ids, "labels": labels}


class Rows:
    """For ever: recall rows, and text rows of at most the teacher's length if there is text. `length` doubles, up to
    `longest`, once rows of the present one are recalled (`learnt`)."""

    def __init__(self, length, longest, *, recall_tokens, seed, text=None, text_tokens=512):
        self.length, self.longest, self.recall_tokens = length, longest, recall_tokens
        self.text, self.text_tokens = text, text_tokens
        self.generator, self.loss = torch.Generator().manual_seed(seed), 6.0

    def __iter__(self):
        return self

    def __next__(self):
        batch = recall_rows(self.length, self.recall_tokens // self.length, self.generator)
        if self.text is not None:
            last = len(self.text) - self.length
            starts = torch.randint(last, (self.text_tokens // self.length,), generator=self.generator)
            plain = torch.stack([self.text[start : start + self.length] for start in starts.tolist()])
            batch = {name: torch.cat((plain, batch[name])) for name in batch}
        return batch

    def learnt(self, loss, enough=2.0):
        """Take note of a loss; True if the rows have grown."""
        self.loss = 0.8 * self.loss + 0.2 * loss
        if self.loss > enough or self.length >= self.longest:
            return False
        self.length, self.loss = 2 * self.length, 6.0
        return True


def train_teacher(text, steps):
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=TEACHER_LENGTH,
    )  # fmt: skip
    teacher = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    recall = Rows(32, TEACHER_LENGTH, recall_tokens=3072, seed=1)
    plain = Rows(32, TEACHER_LENGTH, recall_tokens=0, seed=2, text=text, text_tokens=1024)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 50, 4 * (1 - step / steps))
        losses = [teacher(**next(rows)).loss for rows in (plain, recall)]
        optimizer.zero_grad(set_to_none=True)
        sum(losses).backward()
        torch.nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
        optimizer.step()
        recall.learnt(losses[1].item())
        plain.length = recall.length
        if step % 50 == 0 or step == steps - 1:
            text_loss, recall_loss = (loss.item() for loss in losses)
            lengths = f"teacher step {step}, rows of {recall.length}: "
            print(f"{lengths}text {text_loss:.2f}, recall {recall_loss:.2f}", flush=True)
    return teacher.eval()


def student_logits(student, ids):
    """Logits (B, T, V) inside the autograd graph; in training the model itself returns a loss alone."""
    return student.lm_head(student.model(ids, use_cache=False).last_hidden_state)


def distill(student, teacher, texts, long_rows, *, steps, learning_rate, warmup_steps, on_step=lambda record: None):
    """Train `student` in place: AdamW, linear warm-up, and linear decay to zero over the last quarter.

    texts: input_ids and labels (B, T) of at most the teacher's length, of which only tokens with a label count.
    long_rows: rows on which the memory must work. Returns, and gives to `on_step`, step, divergence and long_loss.
    """
    teacher.eval()
    student.train()
    optimizer = torch.optim.AdamW(decay_groups(student.parameters(), 0.1), lr=learning_rate, betas=(0.9, 0.95))
    records = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / max(1, warmup_steps), 4 * (1 - step / steps))
        batch = next(texts)
        with torch.no_grad():
            wanted = teacher(batch["input_ids"]).logits
        # logits of one token foretell the next
        is_counted = batch["labels"][:, 1:] != IGNORED
        found = student_logits(student, batch["input_ids"])[:, :-1][is_counted]
        near = divergence(found, wanted[:, :-1][is_counted])
        far = student(**next(long_rows), use_cache=False).loss
        optimizer.zero_grad(set_to_none=True)
        (near + far).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        records.append({"step": step, "divergence": near.item(), "long_loss": far.item()})
        on_step(records[-1])
    student.eval()
    return records


def share_recalled(logits, labels):
    is_asked = labels[:, 1:] != IGNORED
    return (logits[:, :-1].argmax(-1) == labels[:, 1:])[is_asked].float().mean().item()


@torch.no_grad()
def measure(student, teacher, held_out):
    """Divergence from the teacher, mean over text and what is recalled; the share of tokens recalled by length."""
    student.eval()
    batch = next(Rows(TEACHER_LENGTH, TEACHER_LENGTH, recall_tokens=4096, seed=5, text=held_out, text_tokens=4096))
    is_counted = batch["labels"][:, 1:] != IGNORED
    ours = student_logits(student, batch["input_ids"])[:, :-1][is_counted]
    theirs = teacher(batch["input_ids"]).logits[:, :-1][is_counted]
    found = {"divergence": round(divergence(ours, theirs).item(), 4), "recalled": {}}
    for length in LENGTHS:
        batch = recall_rows(length, max(2, 8192 // length), torch.Generator().manual_seed(length))
        logits = student_logits(student, batch["input_ids"])
        found["recalled"][length] = round(share_recalled(logits, batch["labels"]), 4)
        if length == TEACHER_LENGTH:
            teachers = teacher(batch["input_ids"]).logits
            found["recalled_by_the_teacher"] = round(share_recalled(teachers, batch["labels"]), 4)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1200, help="of the student; the teacher takes 900 at most")
    parser.add_argument("--output", type=Path, default=Path("runs/convert"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    start = time.perf_counter()
    book = opticks()
    tokenizer = train_tokenizer([book], VOCABULARY)
    tokens = torch.tensor(tokenizer(book)["input_ids"])
    train, held_out = tokens[:-40_000], tokens[-40_000:]
    teacher = train_teacher(train, min(900, arguments.steps))
    student = convert_model(
        teacher, sliding_window=WINDOW, num_upper_groups=2, num_memory_heads=2, retrieval_dim=64, chunk_topk=32,
        chunk_size=CHUNK,
    ).model  # fmt: skip
    before = measure(student, teacher, held_out)
    texts = Rows(4 * CHUNK, TEACHER_LENGTH, recall_tokens=2048, seed=3, text=train)
    longer = Rows(8 * CHUNK, 4 * TEACHER_LENGTH, recall_tokens=2048, seed=4)

    def follow(record):
        if longer.learnt(record["long_loss"]):
            texts.length = min(longer.length // 2, TEACHER_LENGTH)
        if record["step"] % 50 == 0:
            lengths = f"student step {record['step']}, rows of {texts.length} and {longer.length}: "
            print(lengths + "divergence {divergence:.3f}, long rows {long_loss:.3f}".format(**record), flush=True)

    records = distill(
        student, teacher, texts, longer, steps=arguments.steps, learning_rate=2e-3, warmup_steps=20, on_step=follow
    )  # fmt: skip
    result = {
        "meta": run_metadata("python examples/convert_and_distill.py", 0, steps=arguments.steps),
        "teacher_length": TEACHER_LENGTH, "before": before, "after": measure(student, teacher, held_out),
        "minutes": round((time.perf_counter() - start) / 60, 1), "log": records[:: max(1, len(records) // 100)],
    }  # fmt: skip
    write_json(arguments.output / "report.json", result)
    student.save_pretrained(arguments.output / "student")
    tokenizer.save_pretrained(arguments.output / "student")
    print(json.dumps({key: result[key] for key in ("before", "after", "minutes")}, indent=1))
    print(f"Written: {arguments.output / 'report.json'} and {arguments.output / 'student'}")


if __name__ == "__main__":
    main()
