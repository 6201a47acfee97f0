"""Rows of chunks out of blocks that lie on a GPU, in pinned host memory, or on both, widened to one dtype.

A GPU reads pinned host memory by itself, so one kernel serves every tier, nothing waits for the host, and the call can
be part of a CUDA graph. Called by memory/tiers.py; tests/ops/test_chunk_gather.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from hsa_ultralong.ops._common import choose_impl
from hsa_ultralong.ops._triton import is_interpreted, triton_runs_on

# addresses that the table of a GPU has room for, so that it stays where it is while blocks are added
_MOST_BLOCKS = 1 << 14


@dataclass
class ChunkBlocks:
    """Blocks of `per_block` chunks each, in order; chunk i is row i % per_block of block i // per_block.

    Attributes:
        payloads: (per_block, ..., D) each, one dtype. scales: (per_block, ...) bf16 each, for 8-bit payloads, or empty.
        device: where chunks are gathered to. addresses: (2, most blocks) int64 on a GPU, of payloads and scales.
    """

    per_block: int
    device: torch.device
    payloads: list[torch.Tensor] = field(default_factory=list)
    scales: list[torch.Tensor] = field(default_factory=list)
    addresses: torch.Tensor | None = None

    def add(self, payload: torch.Tensor, scales: torch.Tensor | None) -> None:
        """Take one more block; on the host it must be pinned if `device` is a GPU.

        Raises:
            ValueError: for a block that the device cannot read.
        """
        for part in (payload, scales):
            if part is not None and self.device.type == "cuda" and not (part.is_cuda or part.is_pinned()):
                raise ValueError("a block in host memory must be pinned to be read by a GPU")
        number = len(self.payloads)
        self.payloads.append(payload)
        if scales is not None:
            self.scales.append(scales)
        if self.device.type != "cuda" and not is_interpreted():
            return
        if self.addresses is None:
            self.addresses = torch.zeros((2, _MOST_BLOCKS), dtype=torch.int64, device=self.device)
        if number >= _MOST_BLOCKS:
            raise ValueError(f"more than {_MOST_BLOCKS} blocks; make them larger")
        places = [payload.data_ptr(), 0 if scales is None else scales.data_ptr()]
        self.addresses[:, number] = torch.tensor(places, device=self.device)


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
    shape = blocks.payloads[0].shape[1:]
    out = torch.zeros((len(chunks), *shape), dtype=dtype, device=blocks.device)
    # both factors are exact in bf16 (8 bits) and wider; fp16 lacks the range of the scales
    wide = torch.float32 if dtype == torch.float16 else dtype
    for number, payload in enumerate(blocks.payloads):
        inside = (chunks // blocks.per_block == number) & (chunks >= 0)
        places = inside.nonzero()[:, 0]
        if len(places) == 0:
            continue
        rows = (chunks[places] % blocks.per_block).to(payload.device, torch.int64)
        found = payload.flatten(1).view(torch.uint8)[rows].view(payload.dtype).unflatten(1, shape).to(out.device)
        if blocks.scales:
            scales = blocks.scales[number][rows].to(out.device)
            out[places] = (found.to(wide) * scales.to(wide)[..., None]).to(dtype)
        else:
            out[places] = found.to(dtype)
    return out
