"""Passages of a memory as text in the prompt: what the model itself retrieves for a question, it reads again.

The chunks that the prompt's last token retrieves are ranked by their largest fusion weight over layers and heads. The
best of them stand as text in front of the question, in the order of the memory, neighbours joined. The memory is read
as well. Called by ask.py and serve/answers.py; tests/inference/test_passages.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hsa_ultralong.inference.prompts import Prompt, prompt_ids, with_passages
from hsa_ultralong.memory.chunk_memory import Memory
from hsa_ultralong.memory.stored_memory import SharedMemory
from hsa_ultralong.models import HSACache, HSAForCausalLM
from hsa_ultralong.models.evaluation import evaluating
from hsa_ultralong.models.fingerprint import require_same_model
from hsa_ultralong.models.wrapped import device_of


@dataclass(frozen=True)
class RetrievedChunk:
    """A retrieved chunk: document number and name, token range in it, and its largest fusion weight."""

    document: int
    name: str
    start: int
    stop: int
    weight: float


@dataclass(frozen=True)
class Reread:
    """A prompt that holds passages: token ids, numbers of its chunks in the memory's order, and the largest weight of
    every chunk that was retrieved for the bare prompt."""

    ids: list[int]
    chunks: list[int]
    weights: dict[int, float]


def locate(memory: Memory, chunk: int, weight: float) -> RetrievedChunk:
    """Where a chunk of a memory stands in its documents."""
    for number, document in enumerate(memory.documents):
        inside = chunk - document.first_chunk
        if 0 <= inside < document.num_chunks:
            start = inside * memory.chunk_size
            stop = min(start + memory.chunk_size, document.num_tokens)
            return RetrievedChunk(number, document.name, start, stop, weight)
    raise AssertionError(f"chunk {chunk} belongs to no document")


def note_weights(best: dict[int, float], indices: torch.Tensor, weights: torch.Tensor, num_chunks: int) -> None:
    """Keep the largest weight of every chunk below `num_chunks` among what one token retrieved."""
    for index, weight in zip(indices.flatten().tolist(), weights.flatten().tolist(), strict=True):
        if 0 <= index < num_chunks:
            best[index] = max(best.get(index, 0.0), weight)


def retrieved_weights(model: HSAForCausalLM, memory: Memory, ids: torch.Tensor) -> dict[int, float]:
    """Largest fusion weight of every chunk that the last of the tokens ids (n,) retrieves, a new document."""
    require_same_model(model, memory)
    cache, best = HSACache(model.config, memory=memory), dict[int, float]()
    with evaluating(model):
        outputs = model(ids[None].to(device_of(model)), past_key_values=cache, logits_to_keep=1, output_retrieval=True)
    for found in outputs.retrieval:
        note_weights(best, found.indices[:, -1], found.weights[:, -1].float(), memory.num_chunks_of_all)
    return best


def best_chunks(weights: dict[int, float], count: int) -> list[int]:
    """The `count` chunks of the greatest weights, the greatest first; of equal ones the later."""
    return sorted(weights, key=lambda chunk: (-weights[chunk], -chunk))[:count]


def reread_prompt(
    model: HSAForCausalLM, tokenizer: Any, memory: Memory, prompt: Prompt, count: int, *, most_tokens: int | None = None
) -> Reread:
    """The prompt with the `count` best passages of its memory in front of the question.

    Args:
        most_tokens: tokens by which the prompt may grow; what does not fit is left out, the worst first. None: any.

    Raises:
        ValueError: fewer than one passage, or not even the best one fits.
    """
    if count < 1:
        raise ValueError(f"reread is a number of passages from 1 on, got {count}")
    if isinstance(memory, SharedMemory) and memory.is_joined:
        raise ValueError("no process has the texts of all that several have read: ask a joined memory without reread")
    bare = prompt_ids(tokenizer, prompt)
    weights = retrieved_weights(model, memory, torch.tensor(bare))
    best = best_chunks(weights, count)
    for kept in range(len(best), 0, -1):
        chunks = sorted(best[:kept])
        ids = prompt_ids(tokenizer, with_passages(prompt, passage_texts(tokenizer, memory, chunks)))
        if most_tokens is None or len(ids) - len(bare) <= most_tokens:
            return Reread(ids, chunks, weights)
    raise ValueError(
        f"the best passage does not fit into the prompt: passages have up to {memory.chunk_size} tokens, and "
        f"{most_tokens} are left for them; give more room, or answer from the memory alone"
    )


def passage_texts(tokenizer: Any, memory: Memory, chunks: Sequence[int]) -> list[str]:
    """Texts of chunks in ascending order; chunks that follow each other in a document are one text."""
    found = (locate(memory, chunk, 0.0) for chunk in chunks)
    places = ((one.document, one.start, one.stop) for one in found)
    return place_texts(tokenizer, places, lambda number: memory.documents[number].tokens)


def place_texts(tokenizer: Any, places: Iterable[tuple[int, int, int]], tokens_of: Callable[[int], Any]) -> list[str]:
    """Texts of tokens start..stop of documents, in order; places that follow each other in a document are one text.

    Args:
        places: number of a document, start, stop. tokens_of: the tokens (n,) of a document, a tensor or an array.
    """
    spans: list[list[int]] = []
    for document, start, stop in places:
        if spans and spans[-1][0] == document and spans[-1][2] == start:
            spans[-1][2] = stop
        else:
            spans.append([document, start, stop])
    tokens = (tokens_of(number)[start:stop].tolist() for number, start, stop in spans)
    # halves of characters at the ends are no text
    return [str(tokenizer.decode(part, skip_special_tokens=True)).strip("\ufffd") for part in tokens]
