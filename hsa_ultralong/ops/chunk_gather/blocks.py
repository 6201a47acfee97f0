"""ChunkBlocks: where the chunks of a growing memory lie, block by block, on a GPU or in pinned host memory."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from hsa_ultralong.ops._triton import is_interpreted

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
