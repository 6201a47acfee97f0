"""Training-free selection for decoding with a model of full attention: what its last tokens read is cut to a budget.

Tokens of a long prompt read all before them, as such a model does; the prompt's last `tail` tokens (the question, if
it is that short) and every generated one read `budget` tokens. It shows what a selection loses, not what it saves: keys
are summarised anew at every step, O(N). tests/baselines/test_decoding.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from hsa_ultralong.baselines.attention import Rope, causal_attention, repeated
from hsa_ultralong.baselines.full_attention import FullAttention
from hsa_ultralong.baselines.selected import selected_attention
from hsa_ultralong.baselines.state import AllKeyValues, grown
from hsa_ultralong.baselines.window import attend_sinks
from hsa_ultralong.nn.rotary import apply_rotary
from hsa_ultralong.ops._common import accumulation_dtype

# tokens of a page, as in Quest
PAGE = 16
# tokens that stand for a block, as in InfLLM
REPRESENTATIVES = 4


class Selection(NamedTuple):
    """kind: "sinks", "pages" or "blocks". budget: tokens read. tail: last tokens of a prompt that are cut too.
    num_sinks: of the budget, with "sinks" and "blocks". chunk_size: of "blocks"."""

    kind: str
    budget: int
    tail: int
    num_sinks: int
    chunk_size: int


class QueriesToo(AllKeyValues):
    """AllKeyValues and all queries, (B, room, Hq, D): how much a token was looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.queries: torch.Tensor | None = None

    def add_queries(self, queries: torch.Tensor, total: int) -> torch.Tensor:
        """All `total` of them."""
        self.queries = grown(self.queries, total - queries.shape[1], queries)
        return self.queries[:, :total]


class SelectingAttention(FullAttention):
    """Full attention whose last tokens read a part: see Selection."""

    def __init__(self, *, selection: Selection, rope: Rope, **heads: Any) -> None:
        super().__init__(**heads)
        self.selection, self.rope = selection, rope

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: Any) -> torch.Tensor:
        if self.training:
            raise ValueError(f"decoding={self.selection.kind!r} selects without training: train with decoding=full")
        start, new = 0 if state is None else state.length, q.shape[1]
        if state is not None:
            k, v = state.extend(k, v)
        cut = 1 if new == 1 and start else min(self.selection.tail, new)
        whole = new - cut
        parts = []
        if whole:
            parts.append(causal_attention(q[:, :whole], k[:, : start + whole], v[:, : start + whole]))
        if self.selection.kind == "blocks":
            queries = q if state is None else state.add_queries(q, start + new)
            parts.append(read_blocks(q[:, whole:], k, v, self.selection, self.rope, queries))
        elif cut:
            select = read_sinks if self.selection.kind == "sinks" else read_pages
            parts.append(select(q[:, whole:], k, v, self.selection, self.rope))
        return torch.cat(parts, 1)

    def new_state(self) -> AllKeyValues:
        return QueriesToo() if self.selection.kind == "blocks" else AllKeyValues()


def read_sinks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, selection: Selection, rope: Rope) -> torch.Tensor:
    """The first `num_sinks` tokens and the last ones, places counted inside what is read (Xiao et al. 2023)."""
    total, sinks = k.shape[1], selection.num_sinks
    window = selection.budget - sinks
    places = torch.arange(total - q.shape[1], total, device=q.device)
    # turned back to where the sinks stand directly before the window
    turned = apply_rotary(q, rope.at(places.clamp_max(window + sinks - 1) - places, q.dtype))
    if rope.scaling is not None:
        # both tables have YaRN's factor, one is enough
        turned = turned / rope.at(places[:1] * 0, q.dtype).cos[0, 0].to(q.dtype)
    return attend_sinks(q, turned, k, v, k[:, :sinks], v[:, :sinks], window=window, start=total - q.shape[1])


def read_pages(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, selection: Selection, rope: Rope) -> torch.Tensor:
    """The own page of 16 tokens and those before it whose largest possible product with the query is largest, by query
    head: sum over dimensions of max(q min(k), q max(k)) over the keys of the page (Tang et al. 2024, Quest)."""
    new, total, heads = q.shape[1], k.shape[1], q.shape[2]
    own = torch.arange(total - new, total, device=q.device) // PAGE  # (t,)
    fixed = own[None, :, None, None].expand(q.shape[0], -1, heads, -1)
    count = total // PAGE
    best = min(selection.budget // PAGE - 1, count)
    if best < 1:
        return selected_attention(q, k, v, fixed, chunk_size=PAGE)
    low, high = k[:, : count * PAGE].unflatten(1, (count, PAGE)).aminmax(dim=2)  # (B, P, Hkv, D)
    low, high = (repeated(x, heads).permute(0, 2, 3, 1).to(accumulation_dtype(q.dtype)) for x in (low, high))
    query = q.transpose(1, 2).to(low.dtype)
    scores = F.relu(query) @ high - F.relu(-query) @ low  # (B, Hq, t, P)
    scores = scores.masked_fill(torch.arange(count, device=q.device) >= own[:, None], -torch.inf)
    found = scores.transpose(1, 2).topk(best)
    others = torch.where(found.values > -torch.inf, found.indices, -1)
    return selected_attention(q, k, v, torch.cat((fixed, others), -1), chunk_size=PAGE)


def read_blocks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, selection: Selection, rope: Rope, queries: torch.Tensor
) -> torch.Tensor:
    """The last W = budget / 2 tokens, the first `num_sinks`, and blocks between them, all of these W tokens away
    (Xiao et al. 2024, InfLLM), chosen for all heads at once: by the products of the query with each block's four tokens
    that the W queries after them looked at most. Only blocks that end before the window are read.

    queries: (B, N, Hq, D), of all tokens, rotated at their places.
    """
    new, total, window = q.shape[1], k.shape[1], selection.budget // 2
    if new == 0:
        return q
    size, sinks, wide = selection.chunk_size, selection.num_sinks, accumulation_dtype(q.dtype)
    t = torch.arange(total - new, total, device=q.device)
    unturned = apply_rotary(k, rope.at(-torch.arange(total, device=q.device), q.dtype))  # (B, N, Hkv, D)
    far_q = apply_rotary(q, rope.at(window - t, q.dtype))
    if rope.scaling is not None:
        # YaRN's factor is in the rotated ones already
        factor = rope.at(t[:1] * 0, q.dtype).cos[0, 0].to(q.dtype)
        unturned, far_q = unturned / factor, far_q / factor
    count = max(0, (total - sinks) // size)
    kept = min((selection.budget - window - sinks) // size, count)
    sink_places = torch.arange(sinks, device=q.device).expand(q.shape[0], new, -1)
    places = torch.where(sink_places <= (t - window)[:, None], sink_places, -1)
    if kept > 0:
        looked_at = _looked_at(queries, k, window)[:, sinks : sinks + count * size]
        best = looked_at.unflatten(1, (count, size)).topk(min(REPRESENTATIVES, size), dim=2).indices  # (B, C, r)
        best = best + (sinks + size * torch.arange(count, device=q.device))[:, None]
        row = torch.arange(q.shape[0], device=q.device)[:, None]
        keys = repeated(unturned[row, best.flatten(1)], q.shape[2]).to(wide)  # (B, C r, Hq, D)
        scores = torch.einsum("bthd,bchd->btc", far_q.to(wide), keys).unflatten(-1, (count, -1)).sum(-1)  # (B, t, C)
        ends = sinks + size * (torch.arange(count, device=q.device) + 1)
        found = scores.masked_fill(ends > (t - window + 1)[:, None], -torch.inf).topk(kept)
        chosen = sinks + found.indices[..., None] * size + torch.arange(size, device=q.device)
        chosen = torch.where(found.values[..., None] > -torch.inf, chosen, -1).flatten(2)
        places = torch.cat((places, chosen), -1)
    near = (t[:, None] - torch.arange(window, device=q.device)).expand(q.shape[0], -1, -1)
    return _read_places((far_q, q), (unturned, k), v, (places, near.clamp_min(-1)))


def _looked_at(queries: torch.Tensor, k: torch.Tensor, window: int) -> torch.Tensor:
    """Mean product of every key with the queries of the `window` tokens after it, added up over heads, (B, N)."""
    wide = accumulation_dtype(k.dtype)
    summed = F.pad(queries.unflatten(2, (k.shape[2], -1)).sum(3).to(wide).cumsum(1), (0, 0, 0, 0, 1, 0))
    total = k.shape[1]
    first = torch.arange(1, total + 1, device=k.device)
    last = (first + window).clamp_max(total)
    mean = (summed[:, last] - summed[:, first]) / (last - first).clamp_min(1)[:, None, None]
    return (mean * k.to(wide)).sum((2, 3))


def _read_places(
    queries: tuple[torch.Tensor, torch.Tensor], keys: tuple[torch.Tensor, torch.Tensor], v: torch.Tensor,
    places: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:  # fmt: skip
    """One softmax over two lists of places (B, t, n), -1 for none, each with its queries (B, t, Hq, D) and keys."""
    heads, row = queries[0].shape[2], torch.arange(v.shape[0], device=v.device).view(-1, 1, 1)
    logits = []
    for q, k, where in zip(queries, keys, places, strict=True):
        read = repeated(k[row, where.clamp_min(0)].flatten(0, 1), heads)
        read = read.unflatten(0, where.shape[:2])  # (B, t, n, Hq, D)
        scores = torch.einsum("bthd,btnhd->bthn", q, read).to(accumulation_dtype(q.dtype)) * q.shape[-1] ** -0.5
        logits.append(scores.masked_fill((where < 0)[:, :, None], -torch.inf))
    weights = torch.cat(logits, -1).softmax(-1).to(v.dtype)
    where = torch.cat(places, -1).clamp_min(0)
    read = repeated(v[row, where].flatten(0, 1), heads).unflatten(0, where.shape[:2])
    return torch.einsum("bthn,btnhd->bthd", weights, read)
