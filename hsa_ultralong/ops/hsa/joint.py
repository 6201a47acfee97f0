"""One softmax over the keys of all retrieved chunks, which the paper's design is compared with (docs/report.md).

hsa_attention has a softmax of its own for each chunk. By fact 3 of docs/architecture.md the joint one is hsa_attention
with the weights w_i exp(lse_i), normalised for every query head. Called by nn/reading_variants.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch

from hsa_ultralong.ops._common import accumulation_dtype, choose_impl
from hsa_ultralong.ops._triton import KERNEL_SIZES, triton_runs_on
from hsa_ultralong.ops.hsa.indices import within
from hsa_ultralong.ops.hsa.operands import require_operands
from hsa_ultralong.ops.hsa.torch_joint import joint_attention_torch

# the logarithm of a weight ends here, so that its gradient stays finite
_LEAST_WEIGHT = 1e-30
# tokens up to which a call without gradients gathers the few chunks that it reads
_DECODE_TOKENS = 64
# largest matrix of a bias for every token and chunk that "auto" lets the kernels make
_BIAS_BYTES = 1 << 30


@lru_cache(maxsize=1)
def _kernels() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    from hsa_ultralong.ops.hsa.triton_joint import joint_attention_triton  # imports triton, which may be missing

    return joint_attention_triton


def _automatic(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, weights: torch.Tensor, chunk_size: int) -> str:
    is_plain = q.dtype == k.dtype == v.dtype and q.dtype in (torch.bfloat16, torch.float16)
    fits = q.shape[-1] in KERNEL_SIZES and chunk_size in KERNEL_SIZES
    num_tokens = q.shape[0] * q.shape[1]
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, weights))
    is_decoding = num_tokens <= _DECODE_TOKENS and not needs_gradient
    is_small = 4 * num_tokens * k.shape[2] * (k.shape[1] // chunk_size) <= _BIAS_BYTES
    is_taken = is_plain and fits and is_small and not is_decoding and triton_runs_on(q)
    return "triton" if is_taken else "torch"


def joint_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    *,
    chunk_size: int,
    chunk_lengths: torch.Tensor | None = None,
    first_chunk: int | None = None,
    causal: bool = False,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """O_t = sum_j a_j v_j over keys j of all chosen chunks, a = softmax of q_t k_j^T / sqrt(D) + log w of the chunk.

    With equal weights this is plain attention over the union of the chunks. A weight below 1e-30 counts as 1e-30 and
    gets no gradient.

    Args:
        q, k, v, indices, weights, chunk_size, chunk_lengths, first_chunk, causal: as in hsa_attention.
        impl: "auto", "triton" or "torch". "auto" is "triton" on an NVIDIA GPU for bf16 and fp16, D and S in
            {16, 32, 64, 128}, where a number in fp32 for every token, memory head and chunk takes at most 1 GiB; but
            not for up to 64 tokens without gradients. Else "torch".

    Returns:
        (B, T, Hq, D) in the dtype of q, 0 for a token with no chosen chunk; and (B, T, Hq), fp32 (fp64 kept): the
        logsumexp of the logits, -inf for such a token, by which outputs of several memories are joined. Both have
        gradients.

    Raises:
        ValueError: on shapes that do not fit, an unknown impl, or shapes or dtypes that impl="triton" does not take.
        RuntimeError: impl="triton" without an NVIDIA GPU or without the triton package.
    """
    require_operands(q, k, v, indices, weights, chunk_size, chunk_lengths)
    num_chunks, wide = k.shape[1] // chunk_size, accumulation_dtype(q.dtype)
    name = choose_impl("joint_attention", impl, ("torch", "triton"), _automatic(q, k, v, weights, chunk_size))
    if indices.numel() == 0 or num_chunks == 0:
        return q * 0, q.new_full(q.shape[:3], -torch.inf, dtype=wide)
    indices = within(indices, first_chunk, num_chunks)
    bias = weights.to(wide).clamp_min(_LEAST_WEIGHT).log().masked_fill(indices < 0, -torch.inf)
    if name == "triton":
        # tiles walk the chunks that their tokens have chosen: a promise of which these are saves nothing
        return _kernels()(q, k, v, indices, bias, chunk_size=chunk_size, chunk_lengths=chunk_lengths)
    return joint_attention_torch(
        q, k, v, indices, bias, chunk_size=chunk_size, chunk_lengths=chunk_lengths, causal=causal
    )
