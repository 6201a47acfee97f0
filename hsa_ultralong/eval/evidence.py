"""What a question retrieved from the memory of a sample, and where the chunks that hold its answer stood in it.

Called by readers.py (while it answers) and suite.py (for records); tests/eval/test_evidence.py.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from hsa_ultralong.eval.tasks import Sample

# passages that a record keeps, of what was retrieved and of the evidence, and the characters of each
MAX_PASSAGES = 4
MAX_CHARACTERS = 600


@dataclass(frozen=True)
class Passage:
    """Tokens [start, stop) of a document of the memory (0: the context, then the notes), the largest fusion weight on
    it in any head, and whether evidence stands in it."""

    document: int
    start: int
    stop: int
    weight: float
    is_evidence: bool


class Seen:
    """What was retrieved while answering one sample, and where the evidence stood in it when the answer began."""

    def __init__(self, sample: Sample, chunk_size: int, num_chunks: int) -> None:
        self.sample, self.chunk_size, self.num_chunks = sample, chunk_size, num_chunks
        spans = [(start // chunk_size, (stop - 1) // chunk_size + 1) for start, stop in sample.evidence]
        self.wanted = {chunk for first, last in spans for chunk in range(first, last)}
        self.certainty = 0.0
        self.found: bool | None = None
        self.rank: int | None = None
        self.weight: float | None = None
        self.margin: float | None = None
        self._weights: dict[int, float] = {}

    def note(
        self, retrieved: list[tuple[torch.Tensor, torch.Tensor]], row: int, offset: int, *, is_first: bool
    ) -> None:
        """Add one step's retrieval: per upper group indices and weights (B, Hr, K), chunks counted from `offset`."""
        for indices, weights in retrieved:
            own = indices[row] - offset
            inside = (own >= 0) & (own < self.num_chunks) & (indices[row] >= 0)
            if inside.any():
                self.certainty = max(self.certainty, float(weights[row][inside].max()))
            if is_first:
                self._begin(own, weights[row], inside)

    def _begin(self, own: torch.Tensor, weights: torch.Tensor, inside: torch.Tensor) -> None:
        for chunks, shares, kept in zip(own.tolist(), weights.tolist(), inside.tolist(), strict=True):
            ranked = sorted(((w, c) for c, w, k in zip(chunks, shares, kept, strict=True) if k), reverse=True)
            for weight, chunk in ranked:
                self._weights[chunk] = max(weight, self._weights.get(chunk, 0.0))
            if self.wanted:
                self._place(ranked)

    def _place(self, ranked: Sequence[tuple[float, int]]) -> None:
        """The best of the evidence in one head, if it stands better than in the heads before."""
        self.found = bool(self.found)
        place = next((n for n, (_, chunk) in enumerate(ranked) if chunk in self.wanted), None)
        if place is None:
            return
        self.found = True
        weight = ranked[place][0]
        other = max((w for w, chunk in ranked if chunk not in self.wanted), default=0.0)
        margin = math.log(max(weight, 1e-30) / max(other, 1e-30))
        if self.margin is None or margin > self.margin:
            self.rank, self.weight, self.margin = place + 1, weight, margin

    def passages(self) -> tuple[Passage, ...]:
        """The MAX_PASSAGES chunks of the greatest weights, the greatest first."""
        best = sorted(self._weights.items(), key=lambda item: (-item[1], item[0]))[:MAX_PASSAGES]
        return tuple(self.passage(chunk, weight) for chunk, weight in best)

    def passage(self, chunk: int, weight: float) -> Passage:
        """Where a chunk of the sample's memory stands."""
        inside = chunk
        for document, size in enumerate((len(self.sample.context), *map(len, self.sample.notes))):
            chunks = -(-size // self.chunk_size)
            if inside < chunks:
                start = inside * self.chunk_size
                return Passage(document, start, min(size, start + self.chunk_size), weight, chunk in self.wanted)
            inside -= chunks
        raise AssertionError(f"chunk {chunk} belongs to no document of {self.sample.task}")


def sample_digest(sample: Sample) -> str:
    """Eight hexadecimal digits that tell samples apart: of all their tokens, the answers and how they are scored."""
    found = zlib.crc32(np.ascontiguousarray(sample.context).data)
    rest = repr((sample.answers, sample.metric, sample.max_new_tokens))
    for part in (f"({sample.question!r}, ".encode(), _notes_bytes(sample.notes), f", {rest[1:]}".encode()):
        found = zlib.crc32(part, found)
    return f"{found:08x}"


@lru_cache(maxsize=2)
def _notes_bytes(notes: tuple[tuple[int, ...], ...]) -> bytes:
    # many questions have the same notes, thousands of them
    return repr(notes).encode()


def passage_records(
    sample: Sample, retrieved: Sequence[Passage] | None, chunk_size: int, tokenizer: Any, *, with_text: bool
) -> dict[str, Any]:
    """Fields of a record: `retrieved` (null where the reader cannot know) and `evidence`, the chunks that hold it, both
    bounded; texts only where wanted, so that a run of thousands of right answers stays small."""
    spans = [(start - start % chunk_size, stop) for start, stop in sample.evidence][:MAX_PASSAGES]
    spans = [(start, min(len(sample.context), -(-stop // chunk_size) * chunk_size)) for start, stop in spans]
    places: list[dict[str, Any]] = [{"document": 0, "start": start, "stop": stop} for start, stop in spans]
    found: list[dict[str, Any]] = [
        {"document": p.document, "start": p.start, "stop": p.stop, "weight": p.weight, "is_evidence": p.is_evidence}
        for p in retrieved or ()
    ]
    for place in (*places, *found) if with_text else ():
        place["text"] = _text(sample, place, tokenizer)
    return {"retrieved": None if retrieved is None else found, "evidence": places}


def _text(sample: Sample, place: dict[str, Any], tokenizer: Any) -> str:
    tokens = (sample.context, *sample.notes)[place["document"]][place["start"] : place["stop"]]
    text: str = tokenizer.decode([int(token) for token in tokens], skip_special_tokens=True)
    return text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS] + " ..."
