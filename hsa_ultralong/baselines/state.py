"""What a layer keeps of the tokens before a call, as transformers' caches want it. tests/baselines/test_rivals.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers.cache_utils import Cache

from hsa_ultralong.models.cache_hsa import OwnCacheLayer
from hsa_ultralong.ops._common import accumulation_dtype

_FIRST_CAPACITY = 256


class LayerState(OwnCacheLayer):
    """State of one layer; every tensor attribute has the batch as its first dimension."""

    is_croppable = False

    keys: torch.Tensor | None
    values: torch.Tensor | None

    def _change(self, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
        for name, value in list(vars(self).items()):
            if isinstance(value, torch.Tensor):
                setattr(self, name, change(value))
            elif isinstance(value, LayerState):
                value._change(change)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._change(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda part: part.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._change(lambda part: part[indices])

    def reset(self) -> None:
        self._change(lambda part: None)
        for part in (self, *vars(self).values()):
            if isinstance(part, LayerState):
                part.length = 0

    def num_bytes(self, *, with_room: bool = True) -> int:
        """Bytes held, room for growth included or not."""
        parts = vars(self)
        own = sum(
            (value if with_room else self._filled(name, value)).nbytes
            for name, value in parts.items()
            if isinstance(value, torch.Tensor)
        )
        states = (value for value in parts.values() if isinstance(value, LayerState))
        return own + sum(state.num_bytes(with_room=with_room) for state in states)

    def _filled(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """What of a tensor is in use."""
        return value


def grown(buffer: torch.Tensor | None, used: int, new: torch.Tensor) -> torch.Tensor:
    """A buffer (B, room, ...): its first `used` entries of dim 1, then `new` (B, n, ...); the room doubles."""
    needed = used + new.shape[1]
    if buffer is None or buffer.shape[1] < needed:
        # a long prompt is rarely followed by as many tokens again
        room = max(_FIRST_CAPACITY, needed + min(needed, 1 << 14))
        larger = new.new_empty(new.shape[0], room, *new.shape[2:])
        if buffer is not None:
            larger[:, :used] = buffer[:, :used]
        buffer = larger
    buffer[:, used:needed] = new.detach()
    return buffer


class AllKeyValues(LayerState):
    """All keys, as they are compared, and values: (B, room, Hkv, D)."""

    def extend(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Kept and new ones, (B, n + T, Hkv, D)."""
        total = self.length + keys.shape[1]
        self.keys = grown(self.keys, self.length, keys)
        self.values = grown(self.values, self.length, values)
        self.length = total
        return self.keys[:, :total], self.values[:, :total]

    def _filled(self, name: str, value: torch.Tensor) -> torch.Tensor:
        return value[:, : self.length]


def num_blocks(length: int, size: int, stride: int) -> int:
    """Whole blocks of `size` tokens, one every `stride`, among `length` tokens."""
    return max(0, (length - size) // stride + 1)


def block_means(x: torch.Tensor, size: int, stride: int) -> torch.Tensor:
    """Means (B, C, H, D) of the whole blocks of x (B, N, H, D), added up in fp32 or wider."""
    count = num_blocks(x.shape[1], size, stride)
    if count == 0:
        return x.new_zeros(x.shape[0], 0, *x.shape[2:])
    wide = accumulation_dtype(x.dtype)
    # sums over strides first: a block has few of them
    whole = x[:, : (x.shape[1] // stride) * stride]
    sums = whole.unflatten(1, (-1, stride)).sum(2, dtype=wide)  # (B, N / stride, H, D)
    return (sums.unfold(1, size // stride, 1).sum(-1)[:, :count] / size).to(x.dtype)


class BlockedKeyValues(AllKeyValues):
    """KeyValues and the mean key of every whole block of `size` tokens, one every `stride`."""

    def __init__(self, size: int, stride: int) -> None:
        super().__init__()
        self.size, self.stride = size, stride
        self.blocks: torch.Tensor | None = None
        self.count = 0

    def means(self) -> torch.Tensor:
        """(B, C, Hkv, D), those of blocks that have become whole made now."""
        assert self.keys is not None
        count = num_blocks(self.length, self.size, self.stride)
        if self.blocks is None or count > self.count:
            new = block_means(self.keys[:, self.count * self.stride : self.length], self.size, self.stride)
            self.blocks = grown(self.blocks, self.count, new)
            self.count = count
        return self.blocks[:, :count]

    def _filled(self, name: str, value: torch.Tensor) -> torch.Tensor:
        return value[:, : self.count] if name == "blocks" else super()._filled(name, value)

    def reset(self) -> None:
        super().reset()
        self.count = 0


class LastKeyValues(LayerState):
    """Keys and values of the last `keep` tokens, and of the first `first`."""

    def __init__(self, keep: int, first: int = 0) -> None:
        super().__init__()
        self.keep, self.first = keep, first
        self.first_keys: torch.Tensor | None = None
        self.first_values: torch.Tensor | None = None

    def extend(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The last ones kept, at most `keep`, and the new ones."""
        new = keys.shape[1]
        if self.length < self.first:
            missing = self.first - self.length
            self.first_keys = _joined(self.first_keys, keys[:, :missing].detach())
            self.first_values = _joined(self.first_values, values[:, :missing].detach())
        keys, values = _joined(self.keys, keys), _joined(self.values, values)
        begin = max(0, keys.shape[1] - self.keep)
        self.keys, self.values = keys[:, begin:].detach().clone(), values[:, begin:].detach().clone()
        self.length += new
        return keys, values


def _joined(kept: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
    return new if kept is None else torch.cat((kept, new), 1)


class RivalCache(Cache):
    """A state per layer of a batch of rows that are equally long.

    Args:
        chunk_size: places of the stream from one landmark to the next; 0 without landmarks.
    """

    def __init__(self, states: list[LayerState], chunk_size: int = 0) -> None:
        super().__init__(layers=states)
        self.chunk_size = chunk_size

    @property
    def states(self) -> list[LayerState]:
        return self.layers  # type: ignore[return-value]

    @property
    def num_places(self) -> int:
        """Places of the stream so far, landmarks included."""
        return self.states[0].length

    @property
    def num_seen(self) -> int:
        """Tokens of every row so far."""
        return self.num_places - (self.num_places // self.chunk_size if self.chunk_size else 0)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """What transformers takes for the number of tokens that a cache has seen."""
        return self.num_seen

    def num_bytes(self, *, with_room: bool = True) -> int:
        """Bytes of all layers, room for growth included or not."""
        return sum(state.num_bytes(with_room=with_room) for state in self.states)
