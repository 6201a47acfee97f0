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
from hsa_ultralong.baselines.window import attend_sinks
from hsa_ultralong.nn.rotary import apply_rotary
from hsa_ultralong.ops._common import accumulation_dtype

# tokens of a page, as in Quest
PAGE = 16


class Selection(NamedTuple):
    """kind: "sinks" or "pages". budget: tokens read. tail: last tokens of a prompt that are cut too. num_sinks: of the
    budget, with "sinks"."""

    kind: str
    budget: int
    tail: int
    num_sinks: int


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
        if cut:
            select = read_sinks if self.selection.kind == "sinks" else read_pages
            parts.append(select(q[:, whole:], k, v, self.selection, self.rope))
        return torch.cat(parts, 1)


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
