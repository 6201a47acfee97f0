"""Hierarchical sparse attention over retrieved chunks (paper sec. 2.2, equations 3 and 4)."""

from __future__ import annotations

import torch

from hsa_ultralong.ops._common import choose_impl, require_shape
from hsa_ultralong.ops.hsa.reference import hsa_attention_reference
from hsa_ultralong.ops.hsa.torch_dense import hsa_attention_dense
from hsa_ultralong.ops.hsa.torch_gather import hsa_attention_gather

_BACKENDS = {
    "reference": hsa_attention_reference,
    "torch_gather": hsa_attention_gather,
    "torch_dense": hsa_attention_dense,
}
# the dense path does C / K times the arithmetic of the gathering path, at matmul speed: see README.md
_DENSE_RATIO = {"cpu": 2, "cuda": 8}
_DENSE_MIN_TOKENS = 16


def _automatic(q: torch.Tensor, num_chunks: int, slots: int) -> str:
    ratio = _DENSE_RATIO.get(q.device.type, 4)
    return "torch_dense" if q.shape[1] >= _DENSE_MIN_TOKENS and num_chunks <= ratio * slots else "torch_gather"


def hsa_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    *,
    chunk_size: int,
    chunk_lengths: torch.Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    impl: str = "auto",
) -> torch.Tensor:
    """O_t = sum over selected chunks i of w_i * softmax(scale * q_t k_i^T) v_i, one softmax per chunk, no positions.

    Args:
        q: (B, T, Hq, D), Hq a multiple of Hkv.
        k, v: (1 or B, C*S, Hkv, D); batch 1 is a memory shared by the whole batch.
        indices: (B, T, Hr, K) int32, Hr = 1 or Hkv, chunks in any order, each at most once; -1 is an empty slot.
        weights: (B, T, Hr, K), fusion weights, fp32; ignored in empty slots.
        chunk_size: S.
        chunk_lengths: (1 or B, C) int32, tokens in each chunk (1..S); None means all full.
        scale: default 1 / sqrt(D).
        causal: promise that token t selects no chunk beyond t // S (T tokens beside their own chunks); lets the
            dense path skip tiles.
        impl: "auto", "torch_gather", "torch_dense" or "reference". "auto" compares the cost of gathering K chunks
            with that of reading all C (README.md of this folder).

    Returns:
        (B, T, Hq, D) in the dtype of q; exactly 0 for a token with no selected chunk.

    Raises:
        ValueError: on shapes that do not fit or an unknown impl.
    """
    if q.dim() != 4:
        raise ValueError(f"q must be (B, T, Hq, D), got {tuple(q.shape)}")
    batch, num_tokens, num_heads, dim = q.shape
    require_shape("k", k, (None, None, None, dim))
    require_shape("v", v, tuple(k.shape))
    kv_heads = k.shape[2]
    if k.shape[0] not in (1, batch):
        raise ValueError(f"k and v have batch {k.shape[0]}, required 1 or {batch}")
    if chunk_size < 1 or k.shape[1] % chunk_size:
        raise ValueError(f"k has {k.shape[1]} slots, required a multiple of chunk_size={chunk_size}")
    if num_heads % kv_heads:
        raise ValueError(f"q has {num_heads} heads, required a multiple of the {kv_heads} heads of k")
    require_shape("indices", indices, (batch, num_tokens, None, None))
    if indices.shape[2] not in (1, kv_heads):
        raise ValueError(f"indices have {indices.shape[2]} retrieval heads, required 1 or {kv_heads}")
    require_shape("weights", weights, tuple(indices.shape))
    num_chunks = k.shape[1] // chunk_size
    if chunk_lengths is not None:
        require_shape("chunk_lengths", chunk_lengths, (None, num_chunks))
        if chunk_lengths.shape[0] not in (1, batch):
            raise ValueError(f"chunk_lengths have batch {chunk_lengths.shape[0]}, required 1 or {batch}")
    if indices.shape[-1] == 0 or num_chunks == 0 or num_tokens == 0:
        return q * 0
    auto = _automatic(q, num_chunks, indices.shape[-1])
    backend = _BACKENDS[choose_impl("hsa_attention", impl, tuple(_BACKENDS), auto)]
    scale = dim**-0.5 if scale is None else scale
    return backend(
        q, k, v, indices, weights, chunk_size=chunk_size, chunk_lengths=chunk_lengths, scale=scale, causal=causal
    )
