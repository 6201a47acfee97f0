"""In-training probes: does the model answer held-out needle questions, teacher-forced, at several lengths?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from hsa_ultralong.data import MixtureConfig, MixtureDataset, TokenShards, collate
from hsa_ultralong.eval.retrieval_statistics import RetrievalStatistics
from hsa_ultralong.models import HSAForCausalLM

_PROBE_TOKENS = 1 << 18


def answer_accuracy(
    model: Any,
    batch: dict[str, Any],
    device: torch.device | str,
    statistics: RetrievalStatistics | None = None,
) -> tuple[int, int, float, int]:
    """Exact answers, all answers, summed loss and number of answer tokens of one collated batch of needle rows.

    model: HSAForCausalLM, or one called alike; statistics of what it retrieves are of the former only.
    """
    inputs = {name: batch[name].to(device) for name in ("input_ids", "segment_ids")}
    wanted: dict[str, Any] = {}
    if statistics is not None:
        tokens = statistics.sample(inputs["input_ids"].shape[1], device)
        wanted = {"output_retrieval": True, "retrieval_to_keep": tokens}
    outputs = model.model(**inputs, use_cache=False, **wanted)
    if statistics is not None:
        statistics.add(outputs.retrieval, tokens)
    hidden = outputs.last_hidden_state
    mask = batch["answer_mask"].to(device)[:, 1:]  # (B, T - 1)
    logits = model.lm_head(hidden[:, :-1][mask]).float()  # (n, V)
    target = inputs["input_ids"][:, 1:][mask]
    loss = torch.nn.functional.cross_entropy(logits, target, reduction="sum").item()
    # answers are runs of the mask; a run starts where the mask does
    starts = mask & ~torch.nn.functional.pad(mask[:, :-1], (1, 0))
    run = starts.flatten().cumsum(0)[mask.flatten()] - 1
    count = int(starts.sum())
    wrong = torch.zeros(count, device=run.device).index_add_(0, run, (logits.argmax(-1) != target).float())
    return int((wrong == 0).sum()), count, loss, int(mask.sum())


def needle_probe(
    shards: TokenShards,
    tokenizer: Any,
    *,
    rows: int,
    device: torch.device | str,
    lengths: Iterable[int] = (),
    chunk_size: int = 64,
    kind: str = "needles",
    questions: Sequence[str] = (),
    families: Sequence[str] = (),
    says_short: bool = False,
) -> Callable[[Any, int], dict[str, Any]]:
    """A probe for train.Trainer: held-out documents, at most `rows` rows of the length asked for and of a kind
    that asks (`needles`, `chat_facts`, `facts`, with files of questions `passage_questions`); what it returns includes
    the statistics of their retrieval.

    families: "kind" or "kind/family" (data.mixture.FORM_FAMILIES), whose accuracy is measured apart, "family/NAME".

    says_short: short answers are asked for, as in training beside answers in a sentence.

    Raises:
        ValueError: rows of one of `lengths`, with chunks of `chunk_size`, cannot be made; else the probe raises it.
    """
    cache: dict[tuple[str, int], list[dict[str, Any]]] = {}

    def rows_of(name: str, length: int, chunk_size: int) -> MixtureDataset:
        base, _, family = name.partition("/")
        options: dict[str, Any] = {"seed": 1, "family": family, "questions": questions}
        options["says_short"] = says_short
        config = MixtureConfig(weights={base: 1.0}, seq_len=length, chunk_size=chunk_size, **options)
        return MixtureDataset(shards, tokenizer, config, split="validation")

    for length in lengths:
        for name in (kind, *families):
            rows_of(name, length, chunk_size)

    def batches_of(name: str, length: int, chunk_size: int) -> list[dict[str, Any]]:
        if (name, length) not in cache:
            dataset = rows_of(name, length, chunk_size)
            count = max(2, min(rows, _PROBE_TOKENS // length))
            group = max(1, min(count, 65_536 // length))
            cache[name, length] = [
                collate([dataset[i] for i in range(start, min(start + group, count))])
                for start in range(0, count, group)
            ]
        return cache[name, length]

    def probe(model: Any, length: int) -> dict[str, Any]:
        right = total = tokens = 0
        loss = 0.0
        statistics = None
        if isinstance(model, HSAForCausalLM):
            statistics = RetrievalStatistics(model.config.chunk_size, model.config.sliding_window)
        for batch in batches_of(kind, length, model.config.chunk_size):
            part = answer_accuracy(model, batch, device, statistics)
            right, total, loss, tokens = right + part[0], total + part[1], loss + part[2], tokens + part[3]
        accuracy, answer_loss = right / max(1, total), loss / max(1, tokens)
        measured: dict[str, Any] = {"needle_accuracy": accuracy, "answer_loss": answer_loss}
        for name in families:
            parts = [
                answer_accuracy(model, batch, device) for batch in batches_of(name, length, model.config.chunk_size)
            ]
            measured[f"family/{name}"] = sum(part[0] for part in parts) / max(1, sum(part[1] for part in parts))
        return measured if statistics is None else {**measured, "retrieval": statistics.record()}

    return probe
