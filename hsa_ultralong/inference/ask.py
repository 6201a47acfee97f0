"""Asking a memory: greedy answer, the chunks it was read from, and how sure the retrieval was."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from hsa_ultralong.inference.reader import evaluating
from hsa_ultralong.models import HSAForCausalLM
from hsa_ultralong.nn.chunk_memory import ChunkMemory
from hsa_ultralong.nn.chunk_retriever import ChunkRetriever, Retrieval


def low_weight(num_chunks: int) -> float:
    """Best fusion weight below which an answer of the shipped model is a guess.

    Fusion weights spread as the memory grows. The line passes through three values chosen on the hidden and never
    hidden sentences of results/needles-nano (docs/log.md, "Retrieval weight"); above 4,096 chunks it is a guess.
    """
    size = math.log2(max(1, num_chunks))
    if size > 12:
        return max(0.1, 0.34 - 0.033 * (size - 12))
    return min(0.58, 0.58 - 0.05 * (size - 6) / 3, 0.53 - 0.19 * (size - 9) / 3)


@dataclass(frozen=True)
class Source:
    """A retrieved chunk: document number and name, token range in it, and its largest fusion weight."""

    document: int
    name: str
    start: int
    stop: int
    weight: float


@dataclass(frozen=True)
class Answer:
    """Generated text and where it came from; `weight` is the largest fusion weight on one chunk of the memory, and
    below `threshold` the answer is likely a guess."""

    text: str
    tokens: list[int]
    weight: float
    threshold: float
    sources: list[Source] = field(default_factory=list)

    @property
    def is_uncertain(self) -> bool:
        return self.weight < self.threshold


class _Recorder:
    """Collects, over all retrieval layers and steps, the fusion weight of every chunk of the library."""

    def __init__(self, model: HSAForCausalLM, num_chunks: int) -> None:
        self.num_chunks = num_chunks
        self.best: dict[int, float] = {}
        retrievers = [module for module in model.modules() if isinstance(module, ChunkRetriever)]
        self.handles = [module.register_forward_hook(self._record) for module in retrievers]

    def _record(self, module: torch.nn.Module, inputs: Any, retrieval: Retrieval) -> None:
        # the last position is the one that predicts the next answer token
        indices, weights = retrieval.indices[0, -1].flatten(), retrieval.weights[0, -1].flatten()
        for index, weight in zip(indices.tolist(), weights.tolist(), strict=True):
            if 0 <= index < self.num_chunks:
                self.best[index] = max(self.best.get(index, 0.0), weight)

    def __enter__(self) -> _Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


class _Streamer(BaseStreamer):
    """Passes on the first line of the answer, piece by piece; what decoding may still change is held back."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        self.tokenizer, self.on_text = tokenizer, on_text
        self.tokens: list[int] = []
        self.shown, self.has_prompt = "", False

    def put(self, value: torch.Tensor) -> None:
        if not self.has_prompt:
            # generate() begins with the prompt itself
            self.has_prompt = True
            return
        self.tokens += value.flatten().tolist()
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        line = text.split("\n")[0].removesuffix("\ufffd")
        if len(line) > len(self.shown):
            self.on_text(line[len(self.shown) :])
            self.shown = line

    def end(self) -> None:
        pass


def ask(
    model: HSAForCausalLM,
    tokenizer: Any,
    memory: ChunkMemory,
    prompt: str,
    *,
    max_new_tokens: int = 24,
    num_sources: int = 3,
    on_text: Callable[[str], None] | None = None,
    **generate_options: Any,
) -> Answer:
    """Answer `prompt`, a new document that reads the whole memory; greedy, up to the end token or a line break.

    Args:
        on_text: called with every new piece of the answer as soon as it is known.

    Raises:
        ValueError: for an empty prompt or another model's memory.
    """
    if not prompt.strip():
        raise ValueError("the prompt is empty; ask something like 'The secret code of the amber falcon is'")
    device = model.model.embed_tokens.weight.device
    ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=device)
    with evaluating(model), _Recorder(model, memory.num_chunks_of_all) as recorder:
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            memory=memory,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            streamer=None if on_text is None else _Streamer(tokenizer, on_text),
            **generate_options,
        )
    tokens = out[0, ids.shape[1] :].tolist()
    text = tokenizer.decode(tokens, skip_special_tokens=True).split("\n")[0]
    ranked = sorted(recorder.best.items(), key=lambda item: -item[1])[:num_sources]
    sources = [_source(memory, index, weight) for index, weight in ranked]
    weight = max(recorder.best.values(), default=0.0)
    return Answer(text, tokens, weight, low_weight(memory.num_chunks_of_all), sources)


def _source(memory: ChunkMemory, chunk: int, weight: float) -> Source:
    for number, document in enumerate(memory.documents):
        inside = chunk - document.first_chunk
        if 0 <= inside < document.num_chunks:
            start = inside * memory.chunk_size
            return Source(number, document.name, start, min(start + memory.chunk_size, document.num_tokens), weight)
    raise AssertionError(f"chunk {chunk} belongs to no document")
