"""The best of several lists of scored chunks, as chunk_topk returns them, and the fusion weights of what is kept.

A token reads several memories (a memorised one, perhaps in parts over processes, and its own chunks): each is ranked
alone, then their lists are ranked together. While nothing is trained a GPU does it in one launch (triton_combine.py).
Called by nn/chunk_retriever.py; tests/ops/test_combined.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hsa_ultralong.ops._common import choose_impl
from hsa_ultralong.ops._triton import triton_runs_on
from hsa_ultralong.ops.chunk_topk.lists import MOST_ENTRIES, MOST_LISTS, ScoredChunks, softmax_fusion


def combine_topk(
    lists: Sequence[ScoredChunks],
    *,
    topk: int,
    rankings: Sequence[torch.Tensor] | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The `topk` best chunks of all lists, and the softmax of their scores.

    Args:
        lists: from low chunk numbers to high ones, their ranges disjoint, each in descending order with -1 last.
        topk: K >= 1.
        rankings: what to choose by instead of the scores, one tensor a list (scores with noise).
        impl: "auto", "triton" or "torch". "triton" takes fp32 scores without gradients or rankings.

    Returns:
        indices (B, T, Hr, min(K, all k)) int32 in descending order, -1 last; their scores, -inf in empty slots;
        weights = softmax(scores), 0 in empty slots. Ties go to the lower chunk. Gradients reach the scores. Of several
        lists, an entry whose score is not finite is an empty slot (chunk_topk returns none).

    Raises:
        ValueError: without lists, for topk < 1, rankings that do not fit, an unknown impl, or what impl="triton" does
            not take.
    """
    if not lists or topk < 1:
        raise ValueError(f"needs at least one list and topk >= 1, got {len(lists)} lists and topk={topk}")
    scores = [one.scores for one in lists]
    if rankings is not None and [one.shape for one in rankings] != [part.shape for part in scores]:
        raise ValueError(f"rankings must be one tensor for each of the {len(lists)} lists, of its shape")
    needs_gradient = torch.is_grad_enabled() and any(part.requires_grad for part in scores)
    entries = sum(part.shape[-1] for part in scores)
    is_plain = rankings is None and not needs_gradient and entries <= MOST_ENTRIES
    is_plain = is_plain and all(part.dtype == torch.float32 for part in scores)
    auto = "triton" if is_plain and entries and triton_runs_on(scores[0]) else "torch"
    if choose_impl("combine_topk", impl, ("triton", "torch"), auto) == "triton":
        if not is_plain:
            raise ValueError(
                f'combine_topk: impl="triton" takes fp32 scores without gradients or rankings and at most '
                f"{MOST_ENTRIES} entries a token; got {entries} of {scores[0].dtype}"
            )
        from hsa_ultralong.ops.chunk_topk.triton_combine import combine_lists

        surplus = len(lists) - MOST_LISTS
        if surplus > 0:
            lists = [_joined(lists[: surplus + 1]), *lists[surplus + 1 :]]
        return combine_lists(lists, topk)
    if len(lists) == 1 and entries <= topk:
        # nothing to rank; chunk_topk has left out what is not finite
        only = lists[0]
        numbers = torch.where(only.indices < 0, -1, only.indices + only.offset) if only.offset else only.indices
        return numbers, only.scores, softmax_fusion(only.scores)
    # from the lowest chunk on and stable, so that ties go to the lower one
    rising = _joined([ScoredChunks(one.indices.flip(-1), one.scores.flip(-1), one.offset) for one in lists])
    ranking = rising.scores.detach()
    if rankings is not None:
        ranking = torch.cat([part.flip(-1) for part in rankings], -1).masked_fill(rising.indices < 0, -torch.inf)
    kept = ranking.argsort(dim=-1, descending=True, stable=True)[..., :topk]
    indices, place = rising.indices.gather(-1, kept).sort(-1, descending=True)
    values = rising.scores.gather(-1, kept).gather(-1, place)
    return indices, values, softmax_fusion(values)


def _joined(lists: Sequence[ScoredChunks]) -> ScoredChunks:
    """One list, counted from 0, the lists behind one another; what is not finite is empty."""
    indices = torch.cat([torch.where(one.indices < 0, -1, one.indices + one.offset) for one in lists], -1)
    scores = torch.cat([one.scores for one in lists], -1)
    indices = indices.masked_fill(~scores.isfinite(), -1)
    return ScoredChunks(indices, scores.masked_fill(indices < 0, -torch.inf))
