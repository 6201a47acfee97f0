"""Continue from a converted transformer: stay close to the teacher where it can read, learn to remember beyond.

A step adds the divergence from the teacher on texts of its length and the ordinary loss on long rows, on which the
memory must work. Used by examples/convert_and_distill.py; tests/train/test_distillation.py, docs/convert.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from hsa_ultralong.models import HSAForCausalLM
from hsa_ultralong.train.optim import decay_groups

IGNORED = -100


def divergence(student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """KL(teacher || student) per token, mean, in fp32 (fp64 kept); logits (..., V)."""
    wide = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    student = (student_logits.to(wide) / temperature).log_softmax(-1)
    teacher = (teacher_logits.to(wide) / temperature).log_softmax(-1)
    return (teacher.exp() * (teacher - student)).sum(-1).mean()


def student_logits(student: HSAForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Logits (B, T, V) inside the autograd graph; in training the model itself returns a loss alone."""
    return student.lm_head(student.model(ids, use_cache=False).last_hidden_state)


def distill(
    student: HSAForCausalLM,
    teacher: torch.nn.Module,
    texts: Iterator[torch.Tensor | dict[str, torch.Tensor]],
    *,
    steps: int,
    learning_rate: float,
    long_rows: Iterator[dict[str, torch.Tensor]] | None = None,
    long_weight: float = 1.0,
    warmup_steps: int = 10,
    on_step: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, float]]:
    """Train `student` in place: AdamW, linear warm-up, and linear decay to zero over the last quarter.

    Args:
        teacher: any causal model whose call on ids (B, T) returns `.logits`.
        texts: token ids (B, T) of at most the teacher's length, or input_ids and labels, both (B, T): then only tokens
            with a label, -100 being none, count. long_rows: inputs of the student with labels.

    Returns:
        Per step: step, divergence, and long_loss if there are long rows.

    Raises:
        ValueError: if teacher and student have other vocabularies.
    """
    teacher.eval()
    student.train()
    optimizer = torch.optim.AdamW(decay_groups(student.parameters(), 0.1), lr=learning_rate, betas=(0.9, 0.95))
    records: list[dict[str, float]] = []
    for step in range(steps):
        rate = learning_rate * min(1.0, (step + 1) / max(1, warmup_steps), 4 * (1 - step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = next(texts)
        ids = batch if isinstance(batch, torch.Tensor) else batch["input_ids"]
        with torch.no_grad():
            wanted = teacher(ids).logits
        found = student_logits(student, ids)
        if found.shape[-1] != wanted.shape[-1]:
            raise ValueError(f"the teacher has {wanted.shape[-1]} words, the student {found.shape[-1]}")
        if not isinstance(batch, torch.Tensor):
            # logits of one token foretell the next
            is_counted = batch["labels"][:, 1:] != IGNORED
            found, wanted = found[:, :-1][is_counted], wanted[:, :-1][is_counted]
        loss = divergence(found, wanted)
        record = {"step": step, "divergence": loss.item()}
        if long_rows is not None:
            long_loss = student(**next(long_rows), use_cache=False).loss
            loss = loss + long_weight * long_loss
            record["long_loss"] = long_loss.item()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        records.append(record)
        if on_step is not None:
            on_step(record)
    student.eval()
    return records
