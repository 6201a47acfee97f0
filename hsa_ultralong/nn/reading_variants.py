"""Ways to read retrieved chunks that the paper argues against, for studies: RoPE in HSA, one softmax for all chunks.

The memory stays as it is: keys have no positions in it and are rotated when they are read. So chunks must lie on the
device as one memory; stores, pools and memories laid together are refused. Called by
hierarchical_sparse_attention.py; tests/nn/test_reading_variants.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from hsa_ultralong.nn.chunk_retriever import Retrieval
from hsa_ultralong.nn.rotary import rotary_at
from hsa_ultralong.nn.views import GraphView, MemoryView, StoredView
from hsa_ultralong.ops import hsa_attention, joint_attention


class ReadingVariant(NamedTuple):
    """is_joint: one softmax over the keys of all chunks of a token, with the logarithms of the fusion weights as bias.
    rope_theta: RoPE by the distance from a token to a key, None without; rope_scaling: as in nn/rotary.py."""

    is_joint: bool
    rope_theta: float | None
    rope_scaling: Mapping[str, Any] | None = None

    def read(self, q: torch.Tensor, retrieval: Retrieval, views: Sequence[MemoryView], chunk_size: int) -> torch.Tensor:
        """Attention of queries (B, T, Hq, D) inside the retrieved chunks of all memories, of the same shape.

        Raises:
            ValueError: for chunks that are no tensors of one memory on the device.
        """
        outputs, masses = [], []
        for view, offset in zip(views, retrieval.offsets, strict=True):
            memory, visible, is_causal, is_full = _on_device(view)
            lengths = None if is_full else memory.lengths
            queries, keys = q.to(memory.v.dtype), memory.k
            if self.rope_theta is not None:
                slots = torch.arange(chunk_size, device=q.device) - chunk_size
                places = (visible.chunk_end[..., None] + slots).flatten(1)  # (1 or B, C*S)
                queries, keys = self.rotate(queries, visible.query_position), self.rotate(keys, places)
            operands = queries, keys, memory.v, retrieval.indices, retrieval.weights
            if self.is_joint:
                output, mass = joint_attention(
                    *operands, chunk_size=chunk_size, chunk_lengths=lengths, first_chunk=offset, causal=is_causal
                )
                masses.append(mass)
            else:
                output = hsa_attention(
                    *operands, chunk_size=chunk_size, chunk_lengths=lengths, first_chunk=offset, causal=is_causal
                )
            outputs.append(output)
        if not outputs:
            return torch.zeros_like(q)
        if not self.is_joint or len(outputs) == 1:
            return torch.stack(outputs).sum(0)
        mass = torch.stack(masses)  # (memories, B, T, Hq)
        share = mass.masked_fill((mass == -torch.inf).all(0), 0.0).softmax(0)[..., None]
        return (share.to(q.dtype) * torch.stack(outputs)).sum(0)

    def rotate(self, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """x (B, T, H, D) turned by the angles of places (1 or B, T); pairs as in nn/rotary.py."""
        assert self.rope_theta is not None
        table = rotary_at(places.flatten(), x.shape[-1], self.rope_theta, x.dtype, self.rope_scaling)
        cos, sin = (part.view(*places.shape, 1, part.shape[-1]) for part in table)  # (1 or B, T, 1, D / 2)
        left, right = x.to(cos.dtype).chunk(2, dim=-1)
        return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).to(x.dtype)


def _on_device(view: MemoryView) -> GraphView:
    if isinstance(view, StoredView) and view.store is None:
        return GraphView(view.memory, view.visible)
    if isinstance(view, GraphView):
        return view
    raise ValueError(
        "memory_softmax='joint' and memory_positions='rope' read one memory on the device: leave stores, pools, ranks "
        "and memories laid together out"
    )
