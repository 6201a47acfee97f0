"""Fine-tuning of the source itself, with its full attention, on rows whose answers count: the upper bound that a model
with a memory is compared with.

Rows are packed; every document is read by itself. The weights of the best held-out score are kept, and it ends once
that stops rising. Called by cli/tune.py; tests/train/test_tuning.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from hsa_ultralong.train.teaching import answer_tokens, readable

Measure = Callable[[], dict[str, float]]


@dataclass(frozen=True)
class TuningConfig:
    """steps: the most; learning_rate: peak, after a warm-up of a twentieth of the steps falling linearly to zero;
    every: steps between two measurements; patience: measurements without a better score before it ends."""

    steps: int
    learning_rate: float
    every: int
    patience: int
    weight_decay: float = 0.0


def tune(
    model: PreTrainedModel,
    batches: Iterator[dict[str, Any]],
    measure: Measure,
    config: TuningConfig,
    report: Callable[[dict[str, float]], None] | None = None,
) -> list[dict[str, float]]:
    """Train `model` in place and leave the best weights in it.

    Args:
        batches: one a step, as data.collate makes them.
        measure: numbers of the model in evaluation mode; of them "f1" decides.

    Returns:
        A record for every measurement, the first before training: step, loss (mean since the last one) and what was
        measured.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=config.weight_decay, fused=device.type == "cuda"
    )
    records: list[dict[str, float]] = []
    best: dict[str, torch.Tensor] = {}
    total, since, stale = torch.zeros((), device=device), 0, 0
    for step in range(config.steps + 1):
        if step % config.every == 0 or step == config.steps:
            record = {"step": float(step), "loss": total.item() / max(1, since)}
            total.zero_()
            since = 0
            model.eval()
            record |= measure()
            if report is not None:
                report(record)
            stale += 1
            # the same score again is no better one
            if not records or record["f1"] > max(one["f1"] for one in records):
                stale, best = 0, {name: part.detach().cpu().clone() for name, part in model.state_dict().items()}
            records.append(record)
            if stale >= config.patience or step == config.steps:
                break
            model.train()
        warm = (step + 1) / max(1, config.steps // 20)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * min(1.0, warm, 1 - step / config.steps)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = answer_loss(model, next(batches))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total += loss.detach()
        since += 1
    model.load_state_dict(best)
    return records


def answer_loss(model: PreTrainedModel, batch: dict[str, Any]) -> torch.Tensor:
    """Cross-entropy of the answers of packed rows, mean; each document reads itself only."""
    device = next(model.parameters()).device
    answers = answer_tokens(batch)
    ids, segments = (batch[name].to(device) for name in ("input_ids", "segment_ids"))
    hidden = model.base_model(ids, attention_mask=readable(segments)[:, None], use_cache=False)
    places = answers.flatten().nonzero()[:, 0].to(device)
    head: Any = model.get_output_embeddings()
    logits = head(hidden.last_hidden_state[:, :-1].flatten(0, 1)[places])
    return F.cross_entropy(logits.float(), batch["labels"][:, 1:][answers].to(device))
