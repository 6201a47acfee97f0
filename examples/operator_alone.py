"""Retrieval and attention inside chunks as plain operators, without a model: a second on a CPU.

    python examples/operator_alone.py

Letters as everywhere in the project: B rows, T tokens, Hq / Hkv heads of D, C chunks of S tokens, K of them read.
"""

from __future__ import annotations

import torch

from hsa_ultralong.ops import ChunkVisibility, chunk_topk, hsa_attention


def main(length: int = 1024) -> float:
    torch.manual_seed(0)
    B, T, Hq, Hkv, D, S, K = 1, length, 8, 2, 64, 64, 4
    C = T // S
    q = torch.randn(B, T, Hq, D, requires_grad=True)
    k, v = (torch.randn(B, T, Hkv, D, requires_grad=True) for _ in range(2))

    # A landmark describes a chunk. Here it is the mean of the keys; the model learns it with an encoder.
    landmarks = k.unflatten(1, (C, S)).mean(2)  # (B, C, Hkv, D)
    search = q.unflatten(2, (Hkv, Hq // Hkv)).mean(3)  # (B, T, Hkv, D)

    # Token t sees chunk i if the chunk lies wholly before it.
    visible = ChunkVisibility.causal(B, T, C, S)
    indices, scores = chunk_topk(search, landmarks, visible, topk=K)  # int32 and fp32, (B, T, Hkv, K)
    print("token", T - 1, "reads chunks", indices[0, -1].tolist())

    # One softmax inside each chunk, and one over the chunks: gradients reach the retriever through the weights.
    weights = scores.softmax(-1).nan_to_num(0)  # tokens that see no chunk have weights of 0
    out = hsa_attention(q, k, v, indices, weights, chunk_size=S, causal=True)  # (B, T, Hq, D)
    out.square().mean().backward()
    print("out", tuple(out.shape), "gradient of the queries", tuple(q.grad.shape))

    # With every visible chunk selected, and the chunks' logsumexp as scores, this is dense attention over them.
    everything, _ = chunk_topk(search, landmarks, visible, topk=C)
    grouped = q.detach().unflatten(2, (Hkv, -1)).mean(3).repeat_interleave(Hq // Hkv, 2)  # one query a group
    logits = torch.einsum("bthd,bshd->bhts", grouped, k.detach().repeat_interleave(Hq // Hkv, 2)) / D**0.5
    per_chunk = logits[:, :: Hq // Hkv].unflatten(-1, (C, S)).logsumexp(-1).transpose(1, 2)  # (B, T, Hkv, C)
    chosen = per_chunk.gather(-1, everything.long().clamp(min=0)).masked_fill(everything < 0, -torch.inf)
    sparse = hsa_attention(
        grouped, k.detach(), v.detach(), everything, chosen.softmax(-1).nan_to_num(0), chunk_size=S, causal=True
    )
    past = torch.arange(T)[:, None] // S > torch.arange(T)[None] // S  # (T, T), whole chunks of the past
    dense = logits.masked_fill(~past, -torch.inf).softmax(-1).nan_to_num(0)
    dense = torch.einsum("bhts,bshd->bthd", dense, v.detach().repeat_interleave(Hq // Hkv, 2))
    difference = float((sparse - dense).abs().max())
    print(f"largest difference to dense attention with full coverage: {difference:.1e}")
    return difference


if __name__ == "__main__":
    main()
