"""gather_chunks in plain torch, block by block: the specification, and what runs without a GPU."""

from __future__ import annotations

import torch

from hsa_ultralong.ops.chunk_gather.blocks import ChunkBlocks


def gather_chunks_reference(blocks: ChunkBlocks, chunks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """payload * scales of the chunks as `gather_chunks` states it; needs at least one block."""
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
