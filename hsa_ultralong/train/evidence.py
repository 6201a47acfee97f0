"""Retrieval taught directly: a token that must be recalled should find the chunks that tell it, among all of the batch.

Rows say which chunks these are (data.Row.evidence). Chunks of other rows are wrong ones too, whether rows read each
other or not, so a batch of short rows trains the choice among hundreds. A memory in use has a thousand times as many:
wrong chunks can count as if there were `num_chunks` of them, which asks for the margin that survives there. Called by
teaching.py; tests/train/test_evidence.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from hsa_ultralong.nn.views import GraphView
from hsa_ultralong.ops.chunk_topk.visibility import UNUSED

# at most so many tokens of a forward are taught, drawn at random
_MOST_TOKENS = 4096


class Told(NamedTuple):
    """Tokens whose next one is told somewhere in the row: row and place (n,), first and last chunk (n, 2), and how many
    there are for each that was drawn."""

    rows: torch.Tensor
    places: torch.Tensor
    chunks: torch.Tensor
    scale: float

    def to(self, device: torch.device) -> Told:
        rows, places, chunks = (part.to(device, non_blocking=True) for part in self[:3])
        return self._replace(rows=rows, places=places, chunks=chunks)


def told_tokens(batch: dict[str, Any], answers: torch.Tensor) -> Told | None:
    """Of a batch on the host; answers (B, T - 1) as answer_tokens says. None if no token is."""
    chunks = batch["evidence"][:, 1:]
    found = (answers & (chunks[..., 0] >= 0)).nonzero()
    if not len(found):
        return None
    chosen = found[torch.randperm(len(found))[:_MOST_TOKENS]]
    rows, places = chosen.unbind(1)
    return Told(rows, places, chunks[rows, places].long(), len(found) / len(chosen))


def visible_chunks(told: Told, view: GraphView) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, B * C) bool: chunks that a token may be taught against, and of these the right ones; all on one device."""
    segments = view.memory.segments
    batch, count = segments.shape
    own = view.visible.mask()[told.rows, told.places]  # (n, C)
    numbers = torch.arange(count, device=own.device)
    right = own & (numbers >= told.chunks[:, :1]) & (numbers <= told.chunks[:, 1:])
    is_own = torch.arange(batch, device=own.device)[:, None] == told.rows[:, None, None]  # (n, B, 1)
    seen = torch.where(is_own, own[:, None], (segments != UNUSED)[None])
    return seen.flatten(1), (is_own & right[:, None]).flatten(1)


def evidence_loss(
    query: torch.Tensor,
    landmarks: torch.Tensor,
    factor: torch.Tensor | None,
    seen: torch.Tensor,
    right: torch.Tensor,
    num_chunks: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-log of the share that the right chunks have in the softmax over all that are seen, summed over the tokens, and
    how many rank a right one first; both mean over the heads.

    Args:
        query: (n, Hr, R). landmarks: (C, Hr, R). factor: (Hr,), of the products; None for 1 / sqrt(R).
        seen, right: (n, C) bool. Tokens without a right chunk count nothing.
        num_chunks: wrong chunks count as if there were so many in all, if there are fewer.
    """
    with torch.autocast(query.device.type, enabled=False):
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        scale = query.shape[-1] ** -0.5 if factor is None else factor.to(wide)[:, None]
        scores = torch.einsum("nhr,chr->nhc", query.to(wide), landmarks.to(wide)) * scale  # (n, Hr, C)
    seen, right = seen[:, None], right[:, None]
    is_told = right.any(-1)  # (n, 1)
    best = scores.detach().masked_fill(~seen, -torch.inf).argmax(-1, keepdim=True)
    first = (right.expand_as(scores).gather(-1, best)[..., 0] & is_told).to(wide).mean(1).sum()
    if num_chunks:
        wrong = seen & ~right
        count = wrong.sum(-1, keepdim=True)
        more = (num_chunks / count.clamp_min(1)).log().clamp_min(0)
        scores = torch.where(wrong, scores + more, scores)
    # a row without any stays finite, and counts nothing
    seen, right = (part | ~is_told[..., None] for part in (seen, right))
    whole = scores.masked_fill(~seen, -torch.inf).logsumexp(-1)
    own = scores.masked_fill(~right, -torch.inf).logsumexp(-1)
    return ((whole - own) * is_told).mean(1).sum(), first
