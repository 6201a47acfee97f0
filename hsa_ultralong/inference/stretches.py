"""Chunks of many stretches of documents, read together; what stands before a stretch is read once.

Used where memories differ by a few chunks each (eval/memory_reader.py); tests/inference/test_stretches.py.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, groupby
from typing import NamedTuple

import torch

from hsa_ultralong.memory.chunk_memory import ChunkMemory, Document
from hsa_ultralong.memory.row_memories import Chunk
from hsa_ultralong.models import HSACache, HSAForCausalLM
from hsa_ultralong.models.evaluation import evaluating
from hsa_ultralong.models.fingerprint import memory_fingerprint
from hsa_ultralong.models.finite import FiniteCheck
from hsa_ultralong.models.wrapped import device_of, unwrapped
from hsa_ultralong.nn.views import ChunkTensors

# tokens of stretches that are read together; on a CPU they stay in its caches
_TOKENS_AT_ONCE = {"cpu": 1 << 11, "cuda": 1 << 16}

_State = list[tuple[torch.Tensor, torch.Tensor]]


class Stretch(NamedTuple):
    """Whole chunks of a document, the last of which may be its short end.

    lead: token ids (n,) int32 that stand before, `lower_reach` of them or all there are. tokens: those of the chunks.
    """

    lead: torch.Tensor
    tokens: torch.Tensor


class StretchReader:
    """Reads stretches with a model that must not change meanwhile."""

    def __init__(self, model: HSAForCausalLM, *, kept_leads: int = 512) -> None:
        """kept_leads: leads whose windows are kept, the latest used."""
        self.model, self.kept_leads = unwrapped(model), kept_leads
        self.size = self.model.config.chunk_size
        self._windows: OrderedDict[bytes, _State] = OrderedDict()

    def read(self, stretches: Sequence[Stretch]) -> list[list[Chunk]]:
        """The chunks of each, equal to those of the documents read as a whole."""
        found: list[list[Chunk]] = [[]] * len(stretches)
        leads = {_key(stretch.lead): stretch.lead for stretch in stretches if len(stretch.lead)}
        with evaluating(self.model):
            new = [lead for key, lead in leads.items() if key not in self._windows]
            for part in self._parts(new, len):
                self._read_leads([new[i] for i in part])
            # windows of one length make a batch, and stretches of like lengths waste little
            for _, group in groupby(
                sorted(range(len(stretches)), key=lambda i: self._order(stretches[i])), lambda i: len(stretches[i].lead)
            ):
                numbers = list(group)
                own = [stretches[i] for i in numbers]
                for part in self._parts(own, lambda stretch: len(stretch.tokens)):
                    for i, chunks in zip(part, self._read_chunks([own[i] for i in part]), strict=True):
                        found[numbers[i]] = chunks
        for key in leads:
            self._windows.move_to_end(key)
        while len(self._windows) > self.kept_leads:
            self._windows.popitem(last=False)
        return found

    def memory(self, texts: Sequence[torch.Tensor]) -> ChunkMemory:
        """A memory of closed documents (n,) int32 that are short and many: read together rather than one by one."""
        chunks = self.read([Stretch(text[:0], text) for text in texts])
        flat = [chunk for own in chunks for chunk in own]
        counts = torch.tensor([len(own) for own in chunks])
        firsts = counts.cumsum(0) - counts
        number = torch.repeat_interleave(torch.arange(len(texts)), counts)  # (C,)
        inside = torch.arange(len(flat)) - firsts[number]
        lengths = torch.tensor([chunk.length for chunk in flat])
        k, v = (torch.cat(parts)[None] for parts in zip(*((chunk.k, chunk.v) for chunk in flat), strict=True))
        places = (
            part[None].to(k.device, torch.int32) for part in (lengths, number, (inside + 1) * self.size)
        )  # (1, C) each
        tensors = ChunkTensors(k, v, torch.stack([chunk.landmark for chunk in flat])[None], *places)
        documents = [
            Document(text, first, count)
            for text, first, count in zip(texts, firsts.tolist(), counts.tolist(), strict=True)
        ]
        fingerprint = memory_fingerprint(self.model)
        return ChunkMemory(
            self.size, tensors, len(flat), documents, fingerprint, is_composable=self.model.config.is_composable
        )

    def _order(self, stretch: Stretch) -> tuple[int, int]:
        return len(stretch.lead), len(stretch.tokens)

    def _parts(self, items: Sequence[object], length: Callable[..., int]) -> Iterator[list[int]]:
        """Numbers of items, in order of their lengths, as many together as may be read at once."""
        most = _TOKENS_AT_ONCE.get(device_of(self.model).type, 1 << 11)
        part: list[int] = []
        for number in sorted(range(len(items)), key=lambda i: length(items[i])):
            if part and (len(part) + 1) * length(items[number]) > most:
                yield part
                part = []
            part.append(number)
        if part:
            yield part

    def _lower(self, tokens: Sequence[torch.Tensor], cache: HSACache) -> torch.Tensor:
        """Lower outputs (B, T, M) of tokens (n,) each, behind what the cache has; shorter ones end in others."""
        filled = torch.zeros((len(tokens), max(map(len, tokens))), dtype=torch.int64)
        for row, own in zip(filled, tokens, strict=True):
            row[: len(own)] = own
        inner = self.model.model
        x = inner.embed_tokens(filled.to(device_of(self.model)))
        return inner.read_lower(x, inner.rotary(x, cache), None, cache)

    def _read_leads(self, leads: Sequence[torch.Tensor]) -> None:
        for _, group in groupby(leads, len):  # in order of their lengths
            own = list(group)
            cache = HSACache(self.model.config, rewind=0)
            self._lower(own, cache)
            for row, lead in enumerate(own):
                self._windows[_key(lead)] = [
                    (keys[row : row + 1].clone(), values[row : row + 1].clone()) for keys, values in self._states(cache)
                ]

    def _states(self, cache: HSACache) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for number in range(self.model.config.num_lower_layers):
            state = cache.state(number)
            assert state.keys is not None and state.values is not None
            yield state.keys, state.values

    def _read_chunks(self, stretches: Sequence[Stretch]) -> Iterator[list[Chunk]]:
        cache = HSACache(self.model.config, rewind=0)
        if len(stretches[0].lead):
            rows = [self._windows[_key(stretch.lead)] for stretch in stretches]
            for number, parts in enumerate(zip(*rows, strict=True)):
                state = cache.state(number)
                state.keys, state.values = (torch.cat(own) for own in zip(*parts, strict=True))
        x = self._lower([stretch.tokens for stretch in stretches], cache)
        sizes = [len(stretch.tokens) for stretch in stretches]
        counts = [-(-size // self.size) for size in sizes]
        lower = [
            torch.nn.functional.pad(row[:size], (0, 0, 0, count * self.size - size))
            for row, size, count in zip(x, sizes, counts, strict=True)
        ]
        lengths = torch.tensor(
            [min(self.size, size - start) for size in sizes for start in range(0, size, self.size)], dtype=torch.int32
        )
        chunks = torch.cat(lower).unflatten(0, (-1, self.size))[None]  # (1, n, S, M)
        k, v, landmarks = self.model.model.chunk_encoder(chunks, lengths.to(x.device)[None])
        check = FiniteCheck()
        check.note(k, v, landmarks)
        check.require("a document")
        k, v = (part[0].unflatten(0, (-1, self.size)) for part in (k, v))  # (n, S, Hkv, D)
        # copies: a chunk that is kept keeps no others alive
        made = [
            Chunk(keys.clone(), values.clone(), landmark.clone(), length)
            for keys, values, landmark, length in zip(k, v, landmarks[0], lengths.tolist(), strict=True)
        ]
        for count, stop in zip(counts, accumulate(counts), strict=True):
            yield made[stop - count : stop]


def _key(lead: torch.Tensor) -> bytes:
    return lead.numpy().tobytes()
