"""combine_topk as one Triton launch, one program a token and retrieval head; tests/ops/test_combined.py.

What the kernel needs and who sees to it: kernel_combine.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hsa_ultralong.ops._triton import next_power_of_two, on_own_device, require_triton
from hsa_ultralong.ops.chunk_topk import kernel_combine
from hsa_ultralong.ops.chunk_topk.lists import MOST_LISTS, ScoredChunks

_FEWEST_ENTRIES = 32


@torch.compiler.disable
def combine_lists(lists: Sequence[ScoredChunks], topk: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """combine_topk of at most MOST_LISTS lists in one launch."""
    require_triton("combine_topk", lists[0].scores)
    return _combine(lists[0].scores, lists, topk)


@on_own_device
def _combine(
    first: torch.Tensor, lists: Sequence[ScoredChunks], topk: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    widths = [one.scores.shape[-1] for one in lists]
    kept, device = min(topk, sum(widths)), first.device
    shape = (*first.shape[:-1], kept)
    indices = torch.empty(shape, dtype=torch.int32, device=device)
    scores, weights = (torch.empty(shape, dtype=torch.float32, device=device) for _ in range(2))
    if indices.numel() == 0:
        return indices, scores, weights
    missing = MOST_LISTS - len(lists)
    padded = [*lists, *[lists[0]] * missing]  # pointers of no use, but of the right kind
    # a prompt's own chunks make lists of any length: few forms of the kernel serve them all
    entries = max(_FEWEST_ENTRIES, next_power_of_two(sum(widths)))
    slots, warps = min(entries, max(2, next_power_of_two(topk))), 1 if entries <= 128 else 4
    kernel_combine.combine_kernel[(indices.numel() // kept,)](
        *(one.indices.contiguous() for one in padded), *(one.scores.contiguous() for one in padded),
        *(one.offset for one in padded), indices, scores, weights, kept, *widths, *[0] * missing,
        LISTS=len(lists), ENTRIES=entries, KP=slots, num_warps=warps,
    )  # fmt: skip
    return indices, scores, weights
