"""Rows of chunks out of blocks that lie on a GPU, in pinned host memory, or on both, widened to one dtype.

A GPU reads pinned host memory by itself, so one kernel serves every tier, nothing waits for the host, and the call can
be part of a CUDA graph. Called by memory/tiers.py; tests/ops/test_chunk_gather.py.
"""

from __future__ import annotations

import torch

from hsa_ultralong.ops._common import choose_impl
from hsa_ultralong.ops._triton import triton_runs_on
from hsa_ultralong.ops.chunk_gather.blocks import ChunkBlocks
from hsa_ultralong.ops.chunk_gather.reference import gather_chunks_reference


@torch.no_grad()
def gather_chunks(blocks: ChunkBlocks, chunks: torch.Tensor, dtype: torch.dtype, *, impl: str = "auto") -> torch.Tensor:
    """payload * scales of these chunks, rounded once to `dtype`.

    Args:
        chunks: (n,) int32 or int64 on `blocks.device`, in any order, each any number of times; -1 gives zeros.
        impl: "auto", "triton" or "torch"; only the former needs no answer from the device, and works on both tiers.

    Returns:
        (n, ..., D) of `dtype` on `blocks.device`.

    Raises:
        ValueError: without any block, or for an unknown impl.
    """
    if not blocks.payloads:
        raise ValueError("no blocks to gather from")
    auto = "triton" if triton_runs_on(chunks) else "torch"
    if choose_impl("gather_chunks", impl, ("triton", "torch"), auto) == "triton":
        from hsa_ultralong.ops.chunk_gather.triton_gather import gather_chunks_triton

        assert blocks.addresses is not None
        return gather_chunks_triton(blocks, chunks, dtype)
    return gather_chunks_reference(blocks, chunks, dtype)
