"""Hierarchical sparse attention over retrieved chunks (paper sec. 2.2, equations 3 and 4)."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from hsa_ultralong.ops._common import choose_impl
from hsa_ultralong.ops._triton import KERNEL_SIZES, triton_runs_on
from hsa_ultralong.ops.hsa.indices import within
from hsa_ultralong.ops.hsa.operands import require_operands
from hsa_ultralong.ops.hsa.reference import hsa_attention_reference
from hsa_ultralong.ops.hsa.torch_dense import hsa_attention_dense
from hsa_ultralong.ops.hsa.torch_gather import hsa_attention_gather


@lru_cache(maxsize=1)
def _kernels() -> Callable[..., torch.Tensor]:
    from hsa_ultralong.ops.hsa.triton_attention import hsa_attention_triton  # imports triton, which may be missing

    return hsa_attention_triton


def _triton(*args: Any, **options: Any) -> torch.Tensor:
    return _kernels()(*args, **options)


_BACKENDS = {
    "reference": hsa_attention_reference,
    "torch_gather": hsa_attention_gather,
    "torch_dense": hsa_attention_dense,
    "triton": _triton,
}
# the dense path does C / K times the arithmetic of the gathering path, at matmul speed: see README.md
_DENSE_RATIO = {"cpu": 2, "cuda": 8}
_DENSE_MIN_TOKENS = 16


def _automatic(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_chunks: int, slots: int, chunk_size: int, scale: float
) -> str:
    is_plain = q.dtype == k.dtype == v.dtype and q.dtype in (torch.bfloat16, torch.float16)
    fits = q.shape[-1] in KERNEL_SIZES and chunk_size in KERNEL_SIZES and scale > 0
    if is_plain and fits and triton_runs_on(q):
        return "triton"
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
    first_chunk: int | None = None,
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
        first_chunk: the indices count through several memories, of which this one holds chunks first_chunk ..
            first_chunk + C - 1; those of others are empty slots here. None: all are of this memory.
        causal: promise that token t selects only chunks i with (i + 1) * S <= t (T tokens beside their own chunks,
            fact 1); lets the paths for full coverage skip tiles.
        impl: "auto", "triton", "torch_gather", "torch_dense" or "reference". "auto" is "triton" on an NVIDIA GPU for
            bf16 and fp16; elsewhere it compares the cost of gathering K chunks with that of reading all C
            (README.md of this folder).

    Returns:
        (B, T, Hq, D) in the dtype of q; exactly 0 for a token with no selected chunk.

    Raises:
        ValueError: on shapes that do not fit, an unknown impl, or shapes or dtypes that impl="triton" does not take.
        RuntimeError: impl="triton" without an NVIDIA GPU or without the triton package.
    """
    require_operands(q, k, v, indices, weights, chunk_size, chunk_lengths)
    num_tokens, dim, num_chunks = q.shape[1], q.shape[3], k.shape[1] // chunk_size
    if indices.shape[-1] == 0 or num_chunks == 0 or num_tokens == 0:
        return q * 0
    scale = dim**-0.5 if scale is None else scale
    auto = _automatic(q, k, v, num_chunks, indices.shape[-1], chunk_size, scale)
    name = choose_impl("hsa_attention", impl, tuple(_BACKENDS), auto)
    if name == "triton":
        return _triton(
            q, k, v, indices, weights, chunk_size=chunk_size, chunk_lengths=chunk_lengths, scale=scale,
            first_chunk=first_chunk, causal=causal,
        )  # fmt: skip
    indices = within(indices, first_chunk, num_chunks)
    return _BACKENDS[name](
        q, k, v, indices, weights, chunk_size=chunk_size, chunk_lengths=chunk_lengths, scale=scale, causal=causal
    )
