"""HSACache: all that a sequence needs to go on. Windows of every layer, the open chunk, its own chunks, a memory.

A transformers Cache, so generate() can reorder, repeat, select, crop and reset it. What differs between training,
reading and decoding lives here; the model code is the same. tests/models/test_cache.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import BaseModelOutputWithPast

from hsa_ultralong.memory.chunk_memory import ChunkMemory, Memory
from hsa_ultralong.memory.mixed_rows import MixedRows
from hsa_ultralong.memory.row_memories import RowMemories
from hsa_ultralong.models.configuration_hsa import HSAConfig
from hsa_ultralong.nn.views import ChunkTensors
from hsa_ultralong.nn.window_attention import WindowState
from hsa_ultralong.ops.chunk_topk.visibility import UNUSED

# how transformers calls the cache of a model: "past_key_values" up to 5.23
CACHE_NAME = next(field.name for field in fields(BaseModelOutputWithPast) if field.name in ("cache", "past_key_values"))
# tokens that crop() can take back unless more are asked for: kept beyond what the windows and the open chunk need
REWIND = 64


class NewChunks(NamedTuple):
    """Chunks that a call completes: lower outputs (B, n, S, M), and (B, n) int32 tokens in each (None: all full), group
    and end. In a cache: their slots (B, n) int64, and on the host slots needed and chunks in all."""

    hidden: torch.Tensor
    lengths: torch.Tensor | None
    segments: torch.Tensor
    ends: torch.Tensor
    slots: torch.Tensor | None = None
    room: int = 0
    total: int = 0

    @property
    def full_lengths(self) -> torch.Tensor:
        """Tokens in each, at least 1, (B, n) int32."""
        return torch.full_like(self.ends, self.hidden.shape[2]) if self.lengths is None else self.lengths.clamp_min(1)


class OwnCacheLayer(CacheLayerMixin):
    """What transformers asks of the cache of a layer that extends its state itself.

    Attributes:
        length: tokens that the layer has seen.
    """

    is_compileable = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.length = 0
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing is to be done."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        raise RuntimeError("the layers of this model extend their states themselves")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1


class WindowCacheLayer(OwnCacheLayer):
    """transformers' view of the WindowState of one layer: keys (not rotated) and values as (B, Hkv, n, D)."""

    is_croppable = True

    def __init__(self, window: int, rewind: int) -> None:
        self.state = WindowState(max(window - 1, 0) + rewind)
        super().__init__()

    @property
    def keys(self) -> torch.Tensor | None:
        return None if self.state.keys is None else self.state.keys.transpose(1, 2)

    @keys.setter
    def keys(self, keys: torch.Tensor | None) -> None:
        self.state.keys = None if keys is None else keys.transpose(1, 2)

    @property
    def values(self) -> torch.Tensor | None:
        return None if self.state.values is None else self.state.values.transpose(1, 2)

    @values.setter
    def values(self, values: torch.Tensor | None) -> None:
        self.state.values = None if values is None else values.transpose(1, 2)

    def reset(self) -> None:
        self.keys = self.values = None
        self.length = 0


class HSACache(Cache):
    """State of a batch of sequences.

    Attributes:
        memory: a memorised Memory (batch 1) that every sequence may read, RowMemories or MixedRows, or None.
        own_memory: chunks of the sequences themselves, or None before the first.
        rewind: tokens that can be taken back at once.
        pending: (B, n, M) lower outputs of the last tokens: the open chunk and `rewind` more.
        mask: (B, n) bool, False at masked tokens, up to the last call that had some; None without any.
        padding: masked tokens of every row, on the host. The cache holds each row without them, moved to the right.
        num_seen: tokens of every row so far, masked ones included.
        dead_end: why the cache cannot be continued (packed row), or None.
    """

    def __init__(
        self,
        config: HSAConfig,
        memory: Memory | RowMemories | MixedRows | None = None,
        *,
        rewind: int = REWIND,
        library: Memory | RowMemories | MixedRows | None = None,
    ) -> None:
        """
        Args:
            library: the former name of `memory`, deprecated.

        Raises:
            ValueError: the memory is another model's, or was given twice.
        """
        if library is not None:
            if memory is not None:
                raise ValueError("library is the former name of memory: give memory alone")
            warnings.warn("HSACache(library=...) is called memory now", FutureWarning, stacklevel=2)
            memory = library
        self.chunk_size, self.rewind = config.chunk_size, rewind
        super().__init__(layers=[WindowCacheLayer(window, rewind) for window in config.layer_windows])
        if memory is not None and memory.chunk_size != config.chunk_size:
            raise ValueError(f"the memory has chunks of {memory.chunk_size} tokens, the model of {config.chunk_size}")
        if memory is not None and memory.is_composable != config.is_composable:
            raise ValueError("the memory was built by a model with another kind of fusion; memorise the text again")
        self.memory = memory
        self._clear()

    def _clear(self) -> None:
        self.own_memory: ChunkMemory | None = None
        self.pending: torch.Tensor | None = None
        self.mask: torch.Tensor | None = None
        self.padding: list[int] | None = None
        self.num_seen = 0
        self.dead_end: str | None = None
        self._shifted = 0

    @property
    def length(self) -> int:
        """Tokens before the next call's that a window holds."""
        return max(layer.state.length for layer in self.layers)

    def state(self, layer: int) -> WindowState:
        return self.layers[layer].state

    @property
    def _pending_kept(self) -> int:
        return self.chunk_size - 1 + self.rewind

    def _keep_pending(self, hidden: torch.Tensor) -> None:
        """Keep the last of the lower outputs (B, n, M): the open chunk, and what may be taken or moved back."""
        kept = self._pending_kept + self._shifted
        self.pending = hidden[:, max(0, hidden.shape[1] - kept) :].detach().clone()

    def open_gaps(self, longest: int) -> None:
        """Prepare for new tokens of which up to `longest` at the end of a row are masked ones."""
        self._shifted = longest
        for layer in self.layers:
            layer.state.keep += longest

    def close_gaps(self, mask: torch.Tensor, gaps: list[int]) -> None:
        """Move every row right by its number of masked new tokens; mask (B, n) of all tokens so far."""
        self.mask = mask
        self.padding = [old + new for old, new in zip(self.padding or [0] * len(gaps), gaps, strict=True)]
        shift = torch.tensor(gaps, device=mask.device)[:, None]  # (B, 1)

        def moved(x: torch.Tensor, kept: int) -> torch.Tensor:
            index = (torch.arange(x.shape[1], device=x.device) - shift).clamp_min(0)
            index = index[:, max(0, x.shape[1] - kept) :]
            return x.gather(1, index.view(*index.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:]))

        longest, self._shifted = self._shifted, 0
        for layer in self.layers:
            state = layer.state
            state.keep -= longest
            if state.keys is not None and state.values is not None:
                state.keys, state.values = moved(state.keys, state.keep), moved(state.values, state.keep)
        if self.pending is not None:
            self.pending = moved(self.pending, self._pending_kept)

    def advance(self, num_tokens: int) -> None:
        """Count tokens as seen, after the model has processed them."""
        self.num_seen += num_tokens
        for layer in self.layers:
            layer.length = self.num_seen

    @property
    def chunks(self) -> ChunkTensors | None:
        """The rows' own chunks, None before the first."""
        return None if self.own_memory is None or self.own_memory.num_chunks == 0 else self.own_memory.tensors

    def complete_chunks(self, x: torch.Tensor, counts: list[int] | None = None) -> NewChunks | None:
        """Take in the lower outputs x (B, T, M) of a call; the chunks that are full now, None if none is.

        Args:
            counts: real tokens of every row, which lead it; None if all are.
        """
        size, (batch, num_tokens, _) = self.chunk_size, x.shape
        hidden = x if self.pending is None else torch.cat((self.pending, x), dim=1)
        first_token = self.num_seen + num_tokens - hidden.shape[1]
        self._keep_pending(hidden)
        padding = self.padding or [0] * batch
        seen = [self.num_seen - pad for pad in padding]
        lengths = [before + new for before, new in zip(seen, counts or [num_tokens] * batch, strict=True)]
        firsts = [max(before, 0) // size for before in seen]
        count = max(length // size - first for length, first in zip(lengths, firsts, strict=True))
        if count <= 0:
            return None
        slots = torch.tensor(firsts, device=x.device)[:, None] + torch.arange(count, device=x.device)  # (B, n)
        left = torch.tensor(padding, device=x.device)[:, None] - first_token
        index = (slots * size + left)[..., None] + torch.arange(size, device=x.device)  # (B, n, S)
        index = index.clamp(0, hidden.shape[1] - 1).flatten(1)
        hidden = hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[2])).unflatten(1, (count, size))
        ends = ((slots + 1) * size).to(torch.int32)
        # a row with more padding than others completes fewer chunks: its last slots are written again later
        real = torch.tensor(lengths, device=x.device)[:, None]  # (B, 1)
        segments = torch.where(ends <= real, 0, UNUSED).to(torch.int32)
        return NewChunks(hidden, None, segments, ends, slots, max(firsts) + count, max(lengths) // size)

    def append_chunks(self, new: NewChunks, encoded: ChunkTensors, empty: Callable[[], ChunkMemory]) -> None:
        """Put new chunks, encoded, into the rows' own memory."""
        assert new.slots is not None
        if self.own_memory is None:
            self.own_memory = empty()
        self.own_memory.reserve(new.room)
        self.own_memory.write_rows(new.slots, encoded)
        self.own_memory.num_chunks = new.total

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.num_seen

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor], rows: list[int] | None) -> None:
        for layer in self.layers:
            if layer.state.keys is not None:
                layer.state.keys, layer.state.values = function(layer.state.keys), function(layer.state.values)
        if self.pending is not None:
            self.pending = function(self.pending)
        if self.own_memory is not None:
            self.own_memory.map_batch(function)
        if self.mask is not None:
            self.mask = function(self.mask)
        if self.padding is not None and rows is not None:
            self.padding = [self.padding[row] for row in rows]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        rows = beam_idx.tolist() if self.padding is not None else None
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)), rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = None if self.padding is None else [row for row in range(len(self.padding)) for _ in range(repeats)]
        self._map(lambda x: x.repeat_interleave(repeats, 0), rows)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        rows = torch.arange(len(self.padding))[indices.cpu()].tolist() if self.padding is not None else None
        self._map(lambda x: x[indices.to(x.device)], rows)

    def crop(self, max_length: int) -> None:
        """Forget the newest tokens; `max_length` <= 0 is how many (transformers 5), > 0 the length to keep."""
        remove = -max_length if max_length <= 0 else self.num_seen - max_length
        if remove <= 0:
            return
        if remove > min(self.rewind, self.num_seen):
            most = min(self.rewind, self.num_seen)
            raise ValueError(
                f"this HSACache can take back at most {most} tokens at once, asked for {remove}; "
                f"make it with HSACache(config, rewind={remove})"
            )
        left = self.num_seen - remove
        if self.mask is not None and bool((~self.mask & (self.mask.cumsum(1) > 0))[:, left:].any()):
            raise ValueError("an HSACache cannot take back tokens together with masked ones among them")
        states = [layer.state for layer in self.layers]
        for state in states:
            if state.keys is not None and state.length - remove < min(left, state.keep - self.rewind):
                raise ValueError(f"the windows no longer hold the keys needed to take back {remove} tokens")
        for state in states:
            if state.keys is not None and state.values is not None:
                state.keys, state.values = state.keys[:, :-remove], state.values[:, :-remove]
        if self.pending is not None:
            self.pending = self.pending[:, :-remove]
        if self.mask is not None and left < self.mask.shape[1]:
            self.mask = self.mask[:, :left]
            self.padding = (~self.mask).sum(1).tolist()
        self.num_seen = left
        self.advance(0)
        if self.own_memory is not None:
            self.own_memory.num_chunks = min(self.own_memory.num_chunks, self.num_seen // self.chunk_size)

    def reset(self) -> None:
        for layer in self.layers:
            layer.reset()
        self._clear()


def given_cache(past_key_values: HSACache | None, cache: HSACache | None) -> HSACache | None:
    """The cache, whichever name it came by.

    Raises:
        ValueError: if both were given.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError("past_key_values and cache name the same thing: give one of them")
    return cache if past_key_values is None else past_key_values
