"""The memory of HSA behind the attention interface of vLLM, on any device: a prototype for docs/vllm.md.

Takes what vLLM's backends are given: requests flattened into one row of tokens, pages of keys and values, a block
table. A page is a chunk, so its landmark stands beside it and the chunks that a token chose are pages to read.
tests/test_vllm_operator.py compares it with a model's own memory. vLLM is not needed and not imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from hsa_ultralong.ops import ChunkVisibility, chunk_topk, hsa_attention


@dataclass
class BatchMetadata:
    """The part of vLLM's CommonAttentionMetadata that is used.

    query_start_loc: (B + 1,) first token of every request, and the end. seq_lens: (B,) tokens of every request, those
    of this step included. block_table_tensor: (B, n) int32 pages in the order of the text. slot_mapping: (N,) where
    the tokens of this step are kept: page * S + place.
    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table_tensor: torch.Tensor
    slot_mapping: torch.Tensor


class MemoryOperator:
    """Chunks in pages: kv_cache (P, 2, S, Hkv, D), landmarks (P, Hr, R)."""

    def __init__(self, num_heads: int, head_size: int, num_kv_heads: int, chunk_size: int, topk: int) -> None:
        self.num_heads, self.head_size, self.num_kv_heads = num_heads, head_size, num_kv_heads
        self.chunk_size, self.topk = chunk_size, topk

    def update(
        self, kv_cache: torch.Tensor, landmarks: torch.Tensor, pages: torch.Tensor, encoded: tuple[torch.Tensor, ...]
    ) -> None:
        """Keep encoded chunks, k and v (n, S, Hkv, D) and landmarks (n, Hr, R), in these pages (n,)."""
        kv_cache[pages, 0], kv_cache[pages, 1], landmarks[pages] = encoded

    def retrieve(
        self, query: torch.Tensor, landmarks: torch.Tensor, scale: torch.Tensor | None, metadata: BatchMetadata
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pages and weights (N, Hr, K) of retrieval queries (N, Hr, R); once for all layers of a group."""
        found = []
        for request, (start, stop) in enumerate(self._ranges(metadata)):
            length = int(metadata.seq_lens[request])
            table = metadata.block_table_tensor[request, : length // self.chunk_size]
            positions = torch.arange(length - (stop - start), length, dtype=torch.int32, device=query.device)[None]
            ends = torch.arange(1, len(table) + 1, dtype=torch.int32, device=query.device)[None] * self.chunk_size
            visible = ChunkVisibility(torch.zeros_like(positions), positions, torch.zeros_like(ends), ends)
            indices, scores = chunk_topk(
                query[None, start:stop], landmarks[table.long()][None], visible, topk=self.topk, scale=scale
            )
            pages = torch.where(indices < 0, -1, table[indices.clamp_min(0).long()] if len(table) else -1)
            empty = self.topk - pages.shape[-1]
            found.append(
                (
                    torch.nn.functional.pad(pages[0], (0, empty), value=-1).to(torch.int32),
                    torch.nn.functional.pad(scores[0], (0, empty), value=-torch.inf),
                )
            )
        pages, scores = (torch.cat(parts) for parts in zip(*found, strict=True))
        # chunks are pages now, in no order of their own: softmax fusion needs none
        weights = scores.masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0.0).softmax(-1)
        return pages, weights.masked_fill(pages < 0, 0.0)

    def forward(
        self, query: torch.Tensor, kv_cache: torch.Tensor, pages: torch.Tensor, weights: torch.Tensor,
        output: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """Attention of queries (N, Hq, D) in the chosen pages, into output; no block table is needed any more."""
        k, v = (kv_cache[:, part].flatten(0, 1)[None] for part in (0, 1))  # (1, P*S, Hkv, D)
        read = hsa_attention(query[None], k, v, pages[None], weights[None], chunk_size=self.chunk_size)
        return output.copy_(read[0])

    @staticmethod
    def _ranges(metadata: BatchMetadata) -> list[tuple[int, int]]:
        starts = metadata.query_start_loc.tolist()
        return list(pairwise(starts))
