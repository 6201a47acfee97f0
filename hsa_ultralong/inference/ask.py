"""Asking a memory: greedy answer, the chunks it was read from, and how sure the retrieval was.

Called by `hsa ask`, conversation.py and programs; tests/inference/test_questions.py, test_passages.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from hsa_ultralong.inference.answer_text import AnswerText
from hsa_ultralong.inference.engine import DecodingEngine
from hsa_ultralong.inference.passages import RetrievedChunk, locate, note_weights, reread_prompt
from hsa_ultralong.inference.prompts import Prompt, prompt_ids
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
class Answer:
    """Generated text and where it came from; `weight` is the largest fusion weight on one chunk of the memory, and
    below `threshold` the answer is likely a guess. Without a threshold nothing is known: `is_uncertain` is None.
    `reread`: the passages that stood as text in the prompt, in the memory's order."""

    text: str
    tokens: list[int]
    weight: float
    threshold: float | None
    sources: list[RetrievedChunk] = field(default_factory=list)
    reread: list[RetrievedChunk] = field(default_factory=list)

    @property
    def is_uncertain(self) -> bool | None:
        return None if self.threshold is None else self.weight < self.threshold


def end_tokens(model: HSAForCausalLM) -> list[int]:
    """Tokens that end an answer."""
    found = model.generation_config.eos_token_id if model.generation_config is not None else model.config.eos_token_id
    return [] if found is None else [found] if isinstance(found, int) else list(found)


class AnswerStream:
    """An answer as it comes: pieces of text to iterate over once; `answer` is what is known so far."""

    def __init__(
        self,
        model: HSAForCausalLM,
        tokenizer: Any,
        memory: Memory | None,
        prompt: Prompt,
        *,
        max_new_tokens: int = 24,
        num_sources: int = 3,
        unsure_below: float | None = None,
        reread: int = 0,
        reread_tokens: int | None = None,
    ) -> None:
        """See `ask`; a memory of None or without chunks leaves the answer to the model alone."""
        if unsure_below is not None and not 0 <= unsure_below <= 1:
            raise ValueError(f"unsure_below is a retrieval weight from 0 to 1, got {unsure_below}")
        if reread_tokens is not None and not reread:
            raise ValueError("reread_tokens is the room of passages in the prompt: say how many, reread=4")
        self.model, self.tokenizer = unwrapped(model), tokenizer
        self.memory = memory if memory is not None and memory.num_chunks_of_all else None
        self.max_new_tokens, self.num_sources, self.unsure_below = max_new_tokens, num_sources, unsure_below
        # a text is gone on with to the end of its line, a message is answered at whatever length
        self.is_one_line = isinstance(prompt, str)
        self.tokens: list[int] = []
        self._best: dict[int, float] = {}
        self._reread: list[int] = []
        self._ids = prompt_ids(tokenizer, prompt)
        if reread:
            if self.memory is None:
                raise ValueError("reread puts passages of a memory into the prompt, and there is no memory")
            found = reread_prompt(self.model, tokenizer, self.memory, prompt, reread, most_tokens=reread_tokens)
            self._ids, self._reread, self._best = found.ids, found.chunks, dict(found.weights)

    def __iter__(self) -> Iterator[str]:
        text = AnswerText(self.tokenizer, ["\n"] if self.is_one_line else [])
        num_chunks = 0 if self.memory is None else self.memory.num_chunks_of_all
        engine = DecodingEngine(self.model, self.memory, max_tokens=len(self._ids) + self.max_new_tokens)
        ends = end_tokens(self.model)
        for step in engine.stream([torch.tensor(self._ids)], self.max_new_tokens, stop_tokens=ends):
            assert step.tokens[0] is not None
            self.tokens.append(step.tokens[0])
            for indices, weights in step.retrieved:
                note_weights(self._best, indices, weights, num_chunks)
            if piece := text.put(step.tokens[0]):
                yield piece
            if text.is_stopped:
                return
        if piece := text.end():
            yield piece

    @property
    def answer(self) -> Answer:
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        text = text.split("\n")[0] if self.is_one_line else text
        if self.memory is None:
            return Answer(text, self.tokens, 0.0, None)
        memory, best = self.memory, self._best
        ranked = sorted(best.items(), key=lambda item: (-item[1], -item[0]))[: self.num_sources]
        sources = [locate(memory, index, weight) for index, weight in ranked]
        read = [locate(memory, index, best[index]) for index in self._reread]
        line = unsure_weight(self.model.config, memory.num_chunks_of_all)
        threshold = line if self.unsure_below is None else self.unsure_below
        return Answer(text, self.tokens, max(best.values(), default=0.0), threshold, sources, read)


def ask(
    model: HSAForCausalLM,
    tokenizer: Any,
    memory: Memory,
    prompt: Prompt,
    *,
    max_new_tokens: int = 24,
    num_sources: int = 3,
    unsure_below: float | None = None,
    on_text: Callable[[str], None] | None = None,
    reread: int = 0,
    reread_tokens: int | None = None,
) -> Answer:
    """Answer `prompt`, a new document that reads the whole memory; greedy.

    Args:
        prompt: a text, which is gone on with up to the end token or a line break; or messages {"role", "content"},
            put through the tokenizer's chat template and answered up to the end token. `as_question` makes either.
        unsure_below: best weight from 0 to 1 below which the answer counts as unsure, in place of the line that the
            model has for a memory of this size (`HSAConfig.unsure_below`).
        on_text: called with every new piece of the answer as soon as it is known.
        reread: so many passages, the best by the model's own retrieval for the prompt, stand in it as text as well
            (passages.py). 0 answers from the memory alone.
        reread_tokens: tokens by which they may make the prompt longer; the worst are left out (`Answer.reread`).

    Raises:
        ValueError: for an empty prompt, an empty memory or another model's, a weight that is none, messages without a
            chat template, or passages none of which fits.
    """
    require_chunks(memory)
    stream = AnswerStream(
        model, tokenizer, memory, prompt, max_new_tokens=max_new_tokens, num_sources=num_sources,
        unsure_below=unsure_below, reread=reread, reread_tokens=reread_tokens,
    )  # fmt: skip
    for piece in stream:
        if on_text is not None:
            on_text(piece)
    return stream.answer
