"""Asking a memory: greedy answer, the chunks it was read from, and how sure the retrieval was."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from hsa_ultralong.inference.engine import DecodingEngine
from hsa_ultralong.memory.chunk_memory import Memory
from hsa_ultralong.models import HSAConfig, HSAForCausalLM
from hsa_ultralong.models.fingerprint import require_chunks
from hsa_ultralong.models.wrapped import unwrapped


def unsure_weight(config: HSAConfig, num_chunks: int) -> float | None:
    """Best fusion weight below which an answer from so many chunks is likely a guess: the line `unsure_below` of the
    model. Fusion weights spread as the memory grows. None for a model that has no line."""
    pairs = config.unsure_below or []
    for (low, weight), (high, other) in pairwise(pairs):
        if num_chunks < high:
            share = max(0.0, math.log2(max(1, num_chunks) / low) / math.log2(high / low))
            return weight + share * (other - weight)
    return pairs[-1][1] if pairs else None


@dataclass(frozen=True)
class RetrievedChunk:
    """A retrieved chunk: document number and name, token range in it, and its largest fusion weight."""

    document: int
    name: str
    start: int
    stop: int
    weight: float


@dataclass(frozen=True)
class Answer:
    """Generated text and where it came from; `weight` is the largest fusion weight on one chunk of the memory, and
    below `threshold` the answer is likely a guess. Without a threshold nothing is known: `is_uncertain` is None."""

    text: str
    tokens: list[int]
    weight: float
    threshold: float | None
    sources: list[RetrievedChunk] = field(default_factory=list)

    @property
    def is_uncertain(self) -> bool | None:
        return None if self.threshold is None else self.weight < self.threshold


class _Line:
    """Passes on the first line of the answer, piece by piece; what decoding may still change is held back."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        self.tokenizer, self.on_text, self.shown = tokenizer, on_text, ""

    def show(self, tokens: list[int]) -> None:
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        line = text.split("\n")[0].removesuffix("\ufffd")
        if len(line) > len(self.shown):
            self.on_text(line[len(self.shown) :])
            self.shown = line


def end_tokens(model: HSAForCausalLM) -> list[int]:
    """Tokens that end an answer."""
    found = model.generation_config.eos_token_id if model.generation_config is not None else model.config.eos_token_id
    return [] if found is None else [found] if isinstance(found, int) else list(found)


def ask(
    model: HSAForCausalLM,
    tokenizer: Any,
    memory: Memory,
    prompt: str,
    *,
    max_new_tokens: int = 24,
    num_sources: int = 3,
    unsure_below: float | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Answer:
    """Answer `prompt`, a new document that reads the whole memory; greedy, up to the end token or a line break.

    Args:
        unsure_below: best weight from 0 to 1 below which the answer counts as unsure, in place of the line that the
            model has for a memory of this size (`HSAConfig.unsure_below`).
        on_text: called with every new piece of the answer as soon as it is known.

    Raises:
        ValueError: for an empty prompt, an empty memory or another model's, or a weight that is none.
    """
    if unsure_below is not None and not 0 <= unsure_below <= 1:
        raise ValueError(f"unsure_below is a retrieval weight from 0 to 1, got {unsure_below}")
    if not prompt.strip():
        raise ValueError("the prompt is empty; ask something like 'The secret code of the amber falcon is'")
    model = unwrapped(model)
    require_chunks(memory)
    ids = torch.tensor(tokenizer(prompt)["input_ids"])
    num_chunks = memory.num_chunks_of_all
    engine = DecodingEngine(model, memory, max_tokens=len(ids) + max_new_tokens)
    line = None if on_text is None else _Line(tokenizer, on_text)
    tokens: list[int] = []
    best: dict[int, float] = {}
    for step in engine.stream([ids], max_new_tokens, stop_tokens=end_tokens(model)):
        assert step.tokens[0] is not None
        tokens.append(step.tokens[0])
        if line is not None:
            line.show(tokens)
        for indices, weights in step.retrieved:
            for index, weight in zip(indices.flatten().tolist(), weights.flatten().tolist(), strict=True):
                if 0 <= index < num_chunks:
                    best[index] = max(best.get(index, 0.0), weight)
    text = tokenizer.decode(tokens, skip_special_tokens=True).split("\n")[0]
    ranked = sorted(best.items(), key=lambda item: (-item[1], -item[0]))[:num_sources]
    sources = [_source(memory, index, weight) for index, weight in ranked]
    weight = max(best.values(), default=0.0)
    threshold = unsure_weight(model.config, num_chunks) if unsure_below is None else unsure_below
    return Answer(text, tokens, weight, threshold, sources)


def as_question(prompt: str) -> str:
    """A bare question in the form that the model was trained on; anything else stays."""
    prompt = prompt.strip()
    return f"Question: {prompt}\nAnswer:" if prompt.endswith("?") else prompt


def _source(memory: Memory, chunk: int, weight: float) -> RetrievedChunk:
    for number, document in enumerate(memory.documents):
        inside = chunk - document.first_chunk
        if 0 <= inside < document.num_chunks:
            start = inside * memory.chunk_size
            return RetrievedChunk(
                number, document.name, start, min(start + memory.chunk_size, document.num_tokens), weight
            )
    raise AssertionError(f"chunk {chunk} belongs to no document")
