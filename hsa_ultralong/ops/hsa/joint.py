"""One softmax over the keys of all retrieved chunks, which the paper's design is compared with (docs/report.md).

hsa_attention has a softmax of its own for each chunk. By fact 3 of docs/architecture.md the joint one is hsa_attention
with the weights w_i exp(lse_i), normalised for every query head. Called by nn/reading_variants.py.
"""

from __future__ import annotations

import torch

from hsa_ultralong.ops._common import accumulation_dtype
from hsa_ultralong.ops.hsa.indices import within
from hsa_ultralong.ops.hsa.operands import require_operands
from hsa_ultralong.ops.hsa.torch_joint import joint_attention_torch

# the logarithm of a weight ends here, so that its gradient stays finite
_LEAST_WEIGHT = 1e-30


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """O_t = sum_j a_j v_j over keys j of all chosen chunks, a = softmax of q_t k_j^T / sqrt(D) + log w of the chunk.

    With equal weights this is plain attention over the union of the chunks. A weight below 1e-30 counts as 1e-30 and
    gets no gradient.

    Args:
        q, k, v, indices, weights, chunk_size, chunk_lengths, first_chunk, causal: as in hsa_attention.

    Returns:
        (B, T, Hq, D) in the dtype of q, 0 for a token with no chosen chunk; and (B, T, Hq), fp32 (fp64 kept): the
        logsumexp of the logits, -inf for such a token, by which outputs of several memories are joined. Both have
        gradients.

    Raises:
        ValueError: on shapes that do not fit.
    """
    require_operands(q, k, v, indices, weights, chunk_size, chunk_lengths)
    num_chunks, wide = k.shape[1] // chunk_size, accumulation_dtype(q.dtype)
    if indices.numel() == 0 or num_chunks == 0:
        return q * 0, q.new_full(q.shape[:3], -torch.inf, dtype=wide)
    indices = within(indices, first_chunk, num_chunks)
    bias = weights.to(wide).clamp_min(_LEAST_WEIGHT).log().masked_fill(indices < 0, -torch.inf)
    return joint_attention_torch(
        q, k, v, indices, bias, chunk_size=chunk_size, chunk_lengths=chunk_lengths, causal=causal
    )
