"""Where each token of a call stands: its document, its place in the row, and which chunks of its row it may read.

Documents of a row start at multiples of the chunk size, so the row is one grid of chunks, and a chunk is past if and
only if it ends at or before the token's place in the row (fact 1). Called by modeling_hsa.py; tests in tests/models/:
test_documents.py, test_isolation.py, test_pool.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from hsa_ultralong.models.cache_hsa import HSACache, NewChunks
from hsa_ultralong.models.padding import Padding
from hsa_ultralong.models.ranks import ContextExchange
from hsa_ultralong.nn.chunk_retriever import Retrieval
from hsa_ultralong.ops.chunk_topk.visibility import UNUSED

_LOW_BITS = 2**31 - 1


class Layout(NamedTuple):
    """Tokens of a call, (B, T) int32.

    segments: document, -1 = padding. positions: place in the row's grid of chunks, negative in left padding.
    groups: a token reads those past chunks of its row that are of its group, -1 = padding. window_segments (B, n + T):
    documents of cached and new tokens, None for one document a row. is_packed: the caller gave documents. padding: the
    masked tokens, None without any; rows are then moved together, and all else here says where the moved tokens stand.
    For a pool: isolated (B, 1) bool, rows that read nothing of it; source_ids (B,) or (B, T), one per row if None.
    """

    segments: torch.Tensor
    positions: torch.Tensor
    groups: torch.Tensor
    window_segments: torch.Tensor | None
    is_packed: bool
    padding: Padding | None = None
    isolated: torch.Tensor | None = None
    source_ids: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return self.segments.shape[1]

    @property
    def counts(self) -> list[int] | None:
        """Real tokens of every row, on the host; None if all are."""
        return None if self.padding is None else self.padding.counts

    def close_up(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, T, M) with the real tokens of every row at its start."""
        return x if self.padding is None else self.padding.close_up(x)

    def spread(self, x: torch.Tensor, fill: float = 0.0, columns: torch.Tensor | None = None) -> torch.Tensor:
        """x (B, T, ...) at the columns of the call, or some of them: see Padding.spread."""
        if self.padding is not None:
            return self.padding.spread(x, fill, columns)
        return x if columns is None else x[:, columns]

    def placed(self, found: Retrieval, kept: int | torch.Tensor | None) -> Retrieval:
        """What the last `kept` tokens of the call retrieved, or those at the columns `kept`; None or 0 = all."""
        columns = kept if isinstance(kept, torch.Tensor) else None
        if isinstance(kept, int) and kept:
            # as an index, so that no view holds what a long prompt retrieved
            columns = torch.arange(max(0, self.num_tokens - kept), self.num_tokens, device=found.indices.device)
        indices, weights = self.spread(found.indices, -1, columns), self.spread(found.weights, 0.0, columns)
        return found._replace(indices=indices, weights=weights, scores=self.spread(found.scores, -torch.inf, columns))


def plain_layout(x: torch.Tensor, padding: Padding | None = None, cache: HSACache | None = None) -> Layout:
    """One document per row of x (B, T, ...), real tokens first, after the cached tokens."""
    batch, num_tokens = x.shape[:2]
    seen = 0 if cache is None else cache.num_seen
    index = torch.arange(num_tokens, dtype=torch.int32, device=x.device)
    padded = cache.padding if cache is not None else None
    if padded is None and padding is None:
        segments = x.new_zeros((batch, num_tokens), dtype=torch.int32)
        return Layout(segments, (index + seen).expand(batch, -1), segments, None, False)
    counts = [num_tokens] * batch if padding is None else padding.counts
    left, count = torch.tensor([padded or [0] * batch, counts], dtype=torch.int32, device=x.device)[..., None]  # (B, 1)
    past = 0 if cache is None else cache.length
    all_index = torch.arange(seen - past, seen + num_tokens, dtype=torch.int32, device=x.device)
    is_real = (all_index >= left) & (all_index < seen + count)
    window_segments = torch.where(is_real, 0, -1).to(torch.int32)  # (B, past + T)
    segments = window_segments[:, past:]
    return Layout(segments, index + seen - left, segments, window_segments, False, padding)


def packed_layout(
    segment_ids: torch.Tensor, chunk_size: int, attention_mask: torch.Tensor | None, cache: HSACache | None
) -> Layout:
    """Rows of several documents, of which a token reads its own and the earlier ones."""
    num_tokens = segment_ids.shape[1]
    if (cache is not None and cache.num_seen) or num_tokens % chunk_size:
        raise ValueError(
            "segment_ids go with a whole row of a multiple of chunk_size tokens, without cached ones; got "
            f"{num_tokens} tokens and chunk_size={chunk_size}"
        )
    if attention_mask is not None and not torch.equal(attention_mask != 0, segment_ids >= 0):
        raise ValueError("segment_ids say -1 on padding: attention_mask must be 0 at the same tokens, or left out")
    segments = segment_ids.to(torch.int32)
    positions = torch.arange(num_tokens, dtype=torch.int32, device=segments.device).expand_as(segments)
    groups = torch.where(segments < 0, -1, 0).to(torch.int32)
    return Layout(segments, positions, groups, segments, True)


def restrict(
    layout: Layout, isolate_documents: bool | torch.Tensor | None, source_ids: torch.Tensor | None = None
) -> Layout:
    """The layout with isolated rows, whose tokens read their own document only, and the sources of a pool.

    Raises:
        ValueError: for tensors of other shapes than HSAModel.forward names.
    """
    batch, num_tokens = layout.segments.shape
    groups, isolated = layout.groups, None
    if source_ids is not None:
        if source_ids.shape != (batch,) and (source_ids.shape != (batch, num_tokens) or not layout.is_packed):
            raise ValueError(
                f"source_ids must be ({batch},), one per row, or with segment_ids ({batch}, {num_tokens}), one per "
                f"document; got {tuple(source_ids.shape)}"
            )
        if source_ids.dim() == 2:
            # the pool shows the other sources of the row
            groups = torch.where(groups < 0, -1, source_numbers(source_ids))
    if isinstance(isolate_documents, torch.Tensor) and isolate_documents.shape != (batch,):
        raise ValueError(
            f"isolate_documents must be a bool or ({batch},), one per row; got {tuple(isolate_documents.shape)}"
        )
    if isinstance(isolate_documents, torch.Tensor) or isolate_documents:
        isolated = torch.as_tensor(isolate_documents, device=groups.device).bool().expand(batch)[:, None]
        groups = torch.where(isolated, layout.segments, groups)
    return layout._replace(groups=groups, isolated=isolated, source_ids=source_ids)


def slice_layout(layout: Layout, ranks: ContextExchange, reach: int) -> Layout:
    """The layout of this rank's slice of rows shared over ranks; windows reach `reach` tokens before it."""
    num_tokens = layout.segments.shape[1]
    layout = layout._replace(positions=layout.positions + ranks.rank * num_tokens)
    if not layout.is_packed:
        return layout
    before = ranks.before(layout.segments[:, -min(reach, num_tokens) :], reach, num_tokens)
    return layout._replace(window_segments=torch.cat((before, layout.segments), 1))


def source_numbers(source_ids: torch.Tensor) -> torch.Tensor:
    """Any integers -> int32 from 0 on: the low 31 bits, so that 64-bit hashes serve."""
    return (source_ids & _LOW_BITS).to(torch.int32)


class ChunkPlaces(NamedTuple):
    """Chunks of whole rows, (B, C) int32: tokens in each (None: all full), group and end, as ChunkTensors has them."""

    lengths: torch.Tensor | None
    segments: torch.Tensor
    ends: torch.Tensor


def chunk_places(layout: Layout, chunk_size: int) -> ChunkPlaces:
    """The chunks of rows that begin with this call; tokens after the last full chunk of a plain row have none."""
    num_chunks = layout.num_tokens // chunk_size
    ends = layout.positions[:, : num_chunks * chunk_size : chunk_size] + chunk_size
    if layout.is_packed:
        by_chunk = layout.segments.unflatten(1, (num_chunks, chunk_size))  # (B, C, S)
        lengths = ((by_chunk == by_chunk[..., :1]) & (by_chunk >= 0)).sum(-1).to(torch.int32)
        groups = layout.groups[:, ::chunk_size]
        return ChunkPlaces(lengths, torch.where(groups < 0, UNUSED, groups), ends)
    local = torch.arange(1, num_chunks + 1, dtype=torch.int32, device=layout.segments.device) * chunk_size
    # chunks that padding leaves incomplete: their own row never reaches them, but a pool would
    real = (layout.segments >= 0).sum(1, keepdim=True)
    return ChunkPlaces(None, torch.where(local <= real, 0, UNUSED).to(torch.int32), ends)


def whole_chunks(x: torch.Tensor, layout: Layout, chunk_size: int) -> NewChunks | None:
    """The chunks of rows that begin with this call, from their lower outputs x (B, T, M)."""
    if layout.num_tokens < chunk_size:
        return None
    lengths, segments, ends = chunk_places(layout, chunk_size)
    hidden = x[:, : ends.shape[1] * chunk_size].unflatten(1, (-1, chunk_size))  # (B, C, S, M)
    return NewChunks(hidden, lengths, segments, ends)
