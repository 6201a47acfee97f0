"""Which chunks the tokens of a benchmark read: random, shared between neighbours, or recorded from a trained model.

All three give (T, K) int32, descending, -1 in empty slots; token t sees the chunks 0 .. t // S - 1. The lists of a
token do not depend on T: a shorter benchmark uses a prefix of a longer one. tests/bench/test_benchmarks.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hsa_ultralong.models import HSAForCausalLM

RESTART = 512  # shared lists start anew at multiples of this
KEEP = 0.9  # probability that a chunk stays in the list of the next token
_LANES = 64  # stretches of shared lists that are advanced together
_ROWS = 4096  # random lists drawn together


class _Lists:
    """Rows of K distinct visible chunks each, filled by drawing again what is taken; `owner` is who holds a chunk."""

    def __init__(self, generator: np.random.Generator, rows: int, topk: int, num_chunks: int) -> None:
        self.generator = generator
        self.chunks: np.ndarray = np.full((rows, topk), -1, dtype=np.int32)
        self.owner: np.ndarray = np.full((rows, max(1, num_chunks)), -1, dtype=np.int16)

    def drop(self, is_dropped: np.ndarray) -> None:
        """Empty the slots marked in (rows, K)."""
        rows, slots = np.nonzero(is_dropped & (self.chunks >= 0))
        self.owner[rows, self.chunks[rows, slots]] = -1
        self.chunks[rows, slots] = -1

    def fill(self, visible: np.ndarray) -> None:
        """Give every empty slot a uniformly drawn chunk below visible[row] that the row does not hold yet."""
        topk = self.chunks.shape[1]
        (few,) = np.nonzero(visible <= topk)
        if few.size:
            # all that is visible: drawing would take long to find the last one
            place: np.ndarray = np.arange(topk, dtype=np.int32)
            self.chunks[few] = np.where(place < visible[few, None], place, -1)
            self.owner[few] = -1
            rows, slots = np.nonzero(self.chunks[few] >= 0)
            self.owner[few[rows], slots] = slots
        rows, slots = np.nonzero((self.chunks < 0) & (visible > topk)[:, None])
        while rows.size:
            drawn = (self.generator.random(rows.size) * visible[rows]).astype(np.int64)
            free = self.owner[rows, drawn] < 0
            row, slot, chunk = rows[free], slots[free], drawn[free]
            # of several slots that drew the same chunk the last one keeps it
            self.owner[row, chunk] = slot
            won = self.owner[row, chunk] == slot
            self.chunks[row[won], slot[won]] = chunk[won]
            left = self.chunks[rows, slots] < 0
            rows, slots = rows[left], slots[left]


def _descending(lists: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.sort(lists, axis=-1)[..., ::-1])


def random_lists(num_tokens: int, topk: int, chunk_size: int, seed: int = 0) -> np.ndarray:
    """Every token draws K visible chunks of its own: the worst case for locality."""
    out: np.ndarray = np.empty((num_tokens, topk), dtype=np.int32)
    for start in range(0, num_tokens, _ROWS):
        visible: np.ndarray = np.arange(start, start + _ROWS) // chunk_size
        lists = _Lists(np.random.default_rng([seed, 0, start]), _ROWS, topk, int(visible[-1]))
        lists.fill(visible)
        stop = min(start + _ROWS, num_tokens)
        out[start:stop] = lists.chunks[: stop - start]
    return _descending(out)


def shared_lists(num_tokens: int, topk: int, chunk_size: int, seed: int = 0) -> np.ndarray:
    """Token t keeps each chunk of token t - 1 with probability KEEP and fills up with uniformly drawn visible chunks.

    Every list restarts at multiples of RESTART, so stretches of RESTART tokens are advanced side by side.
    """
    out: np.ndarray = np.empty((num_tokens, topk), dtype=np.int32)
    span = _LANES * RESTART
    for start in range(0, num_tokens, span):
        lanes = min(_LANES, -(-(num_tokens - start) // RESTART))
        generator = np.random.default_rng([seed, 1, start])
        lists = _Lists(generator, _LANES, topk, (start + span) // chunk_size)
        block: np.ndarray = np.empty((RESTART, lanes, topk), dtype=np.int32)
        first: np.ndarray = start + RESTART * np.arange(_LANES)
        for step in range(RESTART):
            lists.drop(generator.random(lists.chunks.shape) >= KEEP)
            lists.fill((first + step) // chunk_size)
            block[step] = lists.chunks[:lanes]
        tokens = block.transpose(1, 0, 2).reshape(-1, topk)  # (lanes * RESTART, K)
        stop = min(start + span, num_tokens)
        out[start:stop] = tokens[: stop - start]
    return _descending(out)


def mean_union(lists: np.ndarray, neighbours: int) -> float:
    """Mean number of different chunks that `neighbours` adjacent tokens read together, in aligned groups."""
    groups = lists[: len(lists) // neighbours * neighbours].reshape(-1, neighbours * lists.shape[1])
    ordered = np.sort(groups, axis=-1)
    is_new = np.diff(ordered, axis=-1, prepend=-1) != 0
    return float((is_new & (ordered >= 0)).sum(-1).mean())


@torch.no_grad()
def recorded_lists(model: Any, tokens: torch.Tensor, topk: int) -> np.ndarray:
    """What the last retrieval of a trained model selects while it reads `tokens` (T,), first retrieval head.

    Args:
        model: an HSAForCausalLM; it is run in evaluation mode with chunk_topk = topk and left as it was.

    Raises:
        ValueError: if the model retrieves nothing.
    """
    if not isinstance(model, HSAForCausalLM):
        raise ValueError("the model has no retrieval whose selections could be recorded")
    before, was_training = model.config.chunk_topk, model.training
    try:
        model.config.chunk_topk = topk
        model.eval()
        outputs = model.model(tokens[None].long().to(model.device), use_cache=False, output_retrieval=True)
    finally:
        model.config.chunk_topk = before
        model.train(was_training)
    lists = outputs.retrieval[-1].indices[0, :, 0].cpu().numpy()
    out: np.ndarray = np.full((len(tokens), topk), -1, dtype=np.int32)
    out[:, : lists.shape[1]] = lists
    return out
