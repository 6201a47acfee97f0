"""Landmark tokens in the stream: Landmark attention (Mohtashami and Jaggi 2023) and HiLS (arXiv 2607.02980).

RivalModel puts a landmark after every S - 1 tokens, so a chunk is S places of the stream, its last one the landmark,
whose position is that of the token after it. Both attentions read a local part and chunks before it, each chunk by a
softmax of its own, weighed by one softmax over the local part's mass and the chunks' scores. tests/baselines/.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hsa_ultralong.baselines.attention import SelfAttention, repeated
from hsa_ultralong.baselines.state import AllKeyValues, grown
from hsa_ultralong.nn.rotary import RotaryTable, apply_rotary
from hsa_ultralong.ops import hsa_attention
from hsa_ultralong.ops._common import accumulation_dtype

# numbers of scores that exist at once
_ELEMENTS = 1 << 26


class LandmarkState(AllKeyValues):
    """AllKeyValues of the stream, and of every whole chunk its summary: a key (B, C, Hq, D) and a bias (B, C, Hq)."""

    def __init__(self) -> None:
        super().__init__()
        self.summary: torch.Tensor | None = None
        self.bias: torch.Tensor | None = None
        self.count = 0

    def add(self, summary: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All summaries, with those of chunks that have become whole."""
        self.summary = grown(self.summary, self.count, summary)
        self.bias = grown(self.bias, self.count, bias)
        self.count += summary.shape[1]
        return self.summary[:, : self.count], self.bias[:, : self.count]

    def _filled(self, name: str, value: torch.Tensor) -> torch.Tensor:
        return value[:, : self.count] if name in ("summary", "bias") else super()._filled(name, value)

    def reset(self) -> None:
        super().reset()
        self.count = 0


class LandmarkAttention(SelfAttention):
    """Place n of the stream reads its own chunk up to itself and, through their landmarks, the chunks before: one
    softmax over its own chunk's keys and the landmarks' keys, a landmark's weight shared out inside its chunk by a
    softmax of its own. All chunks in training, as published; the K of largest weight at evaluation, by key-value head.

    O(T N / S) time for scores, O(T S) locally, O(T K S) for the chunks (ops/hsa; K = N / S in training). The cache
    holds all keys and values of the stream and a key a query head and chunk.
    """

    window = 1  # the local part begins at the start of the chunk that holds the first of so many tokens

    def __init__(self, *, chunk_size: int, topk: int, **heads: Any) -> None:
        super().__init__(**heads)
        self.chunk_size, self.topk = chunk_size, topk

    def summary_queries(self, x: torch.Tensor, q: torch.Tensor, rotary: RotaryTable) -> torch.Tensor:
        """What scores of chunks are made with, (B, T, Hq, D)."""
        return q

    def summarise(self, query: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Key (B, n, Hq, D) and bias (B, n, Hq) of chunks, from the landmarks' queries (B, n, Hq, D) and the chunks'
        keys (B, n, S, Hkv, D)."""
        key = repeated(keys[:, :, -1], query.shape[2])
        return key, key.new_zeros(key.shape[:3])

    def kept(self, num_chunks: int) -> int:
        """K of this call."""
        return num_chunks if self.training else min(self.topk, num_chunks)

    def forward(self, x: torch.Tensor, rotary: RotaryTable, segments: None = None, state: Any = None) -> torch.Tensor:
        start, new, size = 0 if state is None else state.length, x.shape[1], self.chunk_size
        q, k, v = self.project(x)
        q, k = apply_rotary(q, rotary), apply_rotary(k, rotary)
        query = self.summary_queries(x, q, rotary)
        if state is not None:
            k, v = state.extend(k, v)
        local, mass = self._local(q, k, v, start)
        first, count = start // size, (start + new) // size
        ends = torch.arange(first + 1, count + 1, device=x.device) * size - 1 - start  # landmarks among the new places
        whole = k[:, first * size : count * size].unflatten(1, (-1, size)) if count > first else k[:, :0, None]
        summary, bias = self.summarise(query[:, ends], whole)
        if state is not None:
            summary, bias = state.add(summary, bias)
        if count == 0:
            return self.o_proj(local.flatten(-2))
        indices, weights, own = self._weigh(query, summary, bias, mass, start, self.kept(count))
        read = self._read(q, k[:, : count * size], v[:, : count * size], indices, weights)
        return self.o_proj((own[..., None].to(local.dtype) * local + read).flatten(-2))

    def _first_chunk(self, places: torch.Tensor) -> torch.Tensor:
        """Where the local part of each place begins, in chunks."""
        return ((places - self.window + 1) // self.chunk_size).clamp_min(0)

    def _local(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention over the local part without landmarks, (B, T, Hq, D), and its logsumexp (B, T, Hq)."""
        size, new, heads, wide = self.chunk_size, q.shape[1], q.shape[2], accumulation_dtype(q.dtype)
        before = -(-(self.window - 1) // size)  # chunks that a window may reach beyond its own
        chunk, offset = start // size, start % size
        count = -(-(offset + new) // size)
        right = count * size - offset - new
        q = F.pad(q, (0, 0, 0, 0, offset, right)).unflatten(1, (count, size)).transpose(2, 3)  # (B, n, Hq, S, D)
        low = (chunk - before) * size
        k, v = (F.pad(part[:, max(low, 0) :], (0, 0, 0, 0, max(-low, 0), right)) for part in (k, v))
        k, v = (repeated(part, heads).unfold(1, (before + 1) * size, size) for part in (k, v))  # (B, n, Hq, D, band)
        n = (chunk * size + torch.arange(count * size, device=q.device)).view(count, 1, size, 1)
        j = low + size * torch.arange(count, device=q.device).view(-1, 1, 1, 1)
        j = j + torch.arange((before + 1) * size, device=q.device)  # (n, 1, 1, band)
        mask = (j >= size * self._first_chunk(n)) & (j <= n) & (j % size != size - 1)
        with torch.autocast(q.device.type, enabled=False):
            scores = (q.to(wide) @ k.to(wide)) * self.head_dim**-0.5
            scores = scores.masked_fill(~mask, -torch.inf)
            mass = scores.logsumexp(-1)
            out = (scores - mass[..., None]).exp().to(v.dtype) @ v.mT  # (B, n, Hq, S, D)
        out, mass = (part.transpose(2, 3).flatten(1, 2)[:, offset : offset + new] for part in (out, mass))
        return out, mass

    def _weigh(
        self, query: torch.Tensor, summary: torch.Tensor, bias: torch.Tensor, mass: torch.Tensor, start: int, topk: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Chunks (B, T, Hkv, K) int32, their weights (B, T, Hq, K) and the local part's (B, T, Hq)."""
        size = max(1, _ELEMENTS // (query.shape[0] * query.shape[2] * summary.shape[1]))
        parts = [
            self._weigh_piece(query[:, i : i + size], summary, bias, mass[:, i : i + size], start + i, topk)
            for i in range(0, query.shape[1], size)
        ]
        indices, weights, own = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        return indices, weights, own

    def _weigh_piece(
        self, query: torch.Tensor, summary: torch.Tensor, bias: torch.Tensor, mass: torch.Tensor, start: int, topk: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        wide, heads = mass.dtype, query.shape[2]
        group = heads // (self.k_proj.out_features // self.head_dim)
        places = torch.arange(start, start + query.shape[1], device=query.device)
        hidden = torch.arange(summary.shape[1], device=query.device) >= self._first_chunk(places)[:, None]  # (t, C)
        with torch.autocast(query.device.type, enabled=False):
            logits = query.transpose(1, 2).to(wide) @ summary.permute(0, 2, 3, 1).to(wide) * self.head_dim**-0.5
        logits = logits + bias.transpose(1, 2)[:, :, None].to(wide)  # (B, Hq, t, C)
        logits = logits.masked_fill(hidden, -torch.inf)
        own = mass.transpose(1, 2)[..., None]  # (B, Hq, t, 1)
        with torch.no_grad():
            total = torch.cat((logits, own), -1).logsumexp(-1, keepdim=True)
            shares = (logits - total).unflatten(1, (-1, group)).amax(2)  # (B, Hkv, t, C)
            best = shares.topk(topk)
            indices = torch.where(best.values > -torch.inf, best.indices, -1)  # (B, Hkv, t, K)
        slots = indices.repeat_interleave(group, 1)
        chosen = logits.gather(-1, slots.clamp_min(0)).masked_fill(slots < 0, -torch.inf)
        weights = torch.cat((chosen, own), -1).softmax(-1).transpose(1, 2)  # (B, t, Hq, K + 1)
        return indices.transpose(1, 2).int(), weights[..., :-1], weights[..., -1]

    def _read(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """The chosen chunks without their landmarks, one query head a key-value head at a time, as weights differ."""
        kv_heads, count = k.shape[2], k.shape[1] // self.chunk_size
        lengths = torch.full((1, count), self.chunk_size - 1, dtype=torch.int32, device=q.device)
        q, weights = (part.unflatten(2, (kv_heads, -1)) for part in (q, weights))
        parts = [
            hsa_attention(
                q[:, :, :, g].contiguous(), k, v, indices, weights[:, :, :, g].contiguous(), chunk_size=self.chunk_size,
                chunk_lengths=lengths,
            )
            for g in range(q.shape[3])
        ]  # fmt: skip
        return torch.stack(parts, 3).flatten(2, 3)

    def new_state(self) -> LandmarkState:
        return LandmarkState()


class HiLS(LandmarkAttention):
    """The same form with a window, widened to whole chunks, as the local part; a query of its own for chunks, q plus a
    low-rank map, normed; and summaries by it: with p the softmax of the landmark's query over its chunk's keys, the key
    sum p_j k_j and as bias the entropy of p, which is log sum exp(q k_j) of the chunk to first order. The K chunks of
    largest share, the largest in a key-value head's group, count; in training too.

    O(T N / S) time for scores, O(T (W + S)) locally, O(T K S) for the chunks (ops/hsa).
    """

    def __init__(self, *, hidden_size: int, window: int, rank: int, rms_norm_eps: float, **options: Any) -> None:
        super().__init__(hidden_size=hidden_size, rms_norm_eps=rms_norm_eps, **options)
        self.window = window
        self.query_down = nn.Linear(hidden_size, rank, bias=False)
        self.query_up = nn.Linear(rank, self.q_proj.out_features, bias=False)
        self.query_norm = nn.RMSNorm(self.head_dim, eps=rms_norm_eps)

    def summary_queries(self, x: torch.Tensor, q: torch.Tensor, rotary: RotaryTable) -> torch.Tensor:
        query = self.q_proj(x) + self.query_up(self.query_down(x))
        query = self.query_norm(query.unflatten(-1, (-1, self.head_dim)))
        return apply_rotary(query.to(q.dtype), rotary)

    def summarise(self, query: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if query.shape[1] == 0:
            return query, query.new_zeros(query.shape[:3], dtype=accumulation_dtype(query.dtype))
        wide, heads = accumulation_dtype(query.dtype), query.shape[2]
        # heads beside chunks, so that keys repeat as elsewhere
        keys = repeated(keys[:, :, :-1].flatten(0, 1), heads).unflatten(0, query.shape[:2])  # (B, n, S - 1, Hq, D)
        with torch.autocast(query.device.type, enabled=False):
            logits = torch.einsum("bnhd,bnshd->bnhs", query.to(wide), keys.to(wide)) * self.head_dim**-0.5
            shares = logits.log_softmax(-1)
            weights = shares.exp()
            key = torch.einsum("bnhs,bnshd->bnhd", weights, keys.to(wide)).to(query.dtype)
        return key, -(weights * shares).sum(-1)

    def kept(self, num_chunks: int) -> int:
        return min(self.topk, num_chunks)
