"""joint_attention: one softmax over all chosen chunks, against plain attention and against hsa_attention."""

from __future__ import annotations

import pytest
import torch

from hsa_ultralong.ops import hsa_attention, joint_attention
from hsa_ultralong.ops.hsa import torch_joint
from hsa_ultralong.testing.factories import random_attention
from hsa_ultralong.testing.oracles import chunk_logsumexp

EXACT = {"rtol": 1e-11, "atol": 1e-11}
SHAPES = {
    "group_1": {"group": 1},
    "group_16": {"group": 16, "kv_heads": 1},
    "retrieval_per_head": {"kv_heads": 2, "heads": 2, "group": 2},
    "short_chunks": {"is_short": True},
    "shared_memory": {"kv_batch": 1, "is_short": True},
    "batch_3": {"batch": 3},
}


def by_fact_3(given, size=4):
    """hsa_attention, one query head at a time, with the weights w_i exp(lse_i) of that head, normalised."""
    q, k, v, indices, weights, lengths = given
    kv_heads = k.shape[2]
    if lengths is not None:
        # slots without a token have no mass
        slots = torch.arange(size) < lengths[..., None]
        keys = k.masked_fill(~slots.flatten(1)[..., None, None], 0.0)
        logits = torch.einsum("bthd,bnhd->bthn", q, keys.expand(q.shape[0], -1, -1, -1).repeat_interleave(
            q.shape[2] // kv_heads, 2)) / q.shape[-1] ** 0.5  # fmt: skip
        logits = logits.masked_fill(~slots.flatten(1)[:, None, None], -torch.inf)
        mass = logits.unflatten(-1, (-1, size)).logsumexp(-1)
    else:
        mass = chunk_logsumexp(q, k.expand(q.shape[0], -1, -1, -1), size)
    parts = []
    for head in range(q.shape[2]):
        own = head // (q.shape[2] // kv_heads)
        row = 0 if indices.shape[2] == 1 else own
        chosen, share = indices[:, :, row], weights[:, :, row]
        lse = mass[:, :, head].gather(-1, chosen.long().clamp_min(0))
        raw = (share.log() + lse).masked_fill(chosen < 0, -torch.inf)
        part = raw.softmax(-1).nan_to_num(0.0)
        operands = q[:, :, [head]], k[:, :, [own]], v[:, :, [own]], chosen[:, :, None], part[:, :, None]
        parts.append(hsa_attention(*operands, chunk_size=size, chunk_lengths=lengths, impl="reference"))
    return torch.cat(parts, 2)


@pytest.mark.parametrize("ratio", [0, 8], ids=["gathered", "dense"])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_hsa_with_weights_by_the_mass_of_each_chunk(shape, ratio, monkeypatch):
    monkeypatch.setattr(torch_joint, "_DENSE_RATIO", ratio)
    given = random_attention(**SHAPES[shape], empty=0.7)
    q, k, v, indices, weights, lengths = given
    output, mass = joint_attention(q, k, v, indices, weights, chunk_size=4, chunk_lengths=lengths)
    torch.testing.assert_close(output, by_fact_3(given), **EXACT)
    is_lone = (indices < 0).all(-1).all(-1)
    assert is_lone.any() and output[is_lone].eq(0).all() and mass[is_lone].eq(-torch.inf).all()


@pytest.mark.parametrize("ratio", [0, 8], ids=["gathered", "dense"])
def test_equal_weights_are_plain_attention_over_the_union(ratio, monkeypatch):
    monkeypatch.setattr(torch_joint, "_DENSE_RATIO", ratio)
    q, k, v, indices, weights, _ = random_attention(group=2)
    output, _ = joint_attention(q, k, v, indices, torch.full_like(weights, 0.25), chunk_size=4)
    b, t = (indices[..., 0, 1] >= 0).nonzero()[-1].tolist()
    chosen = indices[b, t, 0][indices[b, t, 0] >= 0].long()
    keys, values = (part[b].unflatten(0, (-1, 4))[chosen].flatten(0, 1) for part in (k, v))
    keys, values = (part.repeat_interleave(q.shape[2] // k.shape[2], 1) for part in (keys, values))
    attention = (torch.einsum("hd,nhd->hn", q[b, t], keys) / q.shape[-1] ** 0.5).softmax(-1)
    torch.testing.assert_close(output[b, t], torch.einsum("hn,nhd->hd", attention, values), **EXACT)


def test_causal_tokens_skip_chunks_that_they_cannot_have_chosen(monkeypatch):
    monkeypatch.setitem(torch_joint._BLOCK_ELEMENTS, "cpu", 1)
    q, k, v, indices, weights, lengths = random_attention(num_tokens=19, num_chunks=4, is_short=True)
    past = torch.arange(19)[:, None, None] // 4
    indices = torch.where(indices < past, indices, -1)
    options = {"chunk_size": 4, "chunk_lengths": lengths}
    whole, less = (joint_attention(q, k, v, indices, weights, **options, causal=causal) for causal in (False, True))
    for one, other in zip(whole, less, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_both_ways_give_the_same_gradients_in_blocks_of_any_size(monkeypatch):
    found = []
    for ratio, elements in ((0, 1), (8, 1), (8, 1 << 22)):
        monkeypatch.setattr(torch_joint, "_DENSE_RATIO", ratio)
        monkeypatch.setitem(torch_joint._BLOCK_ELEMENTS, "cpu", elements)
        q, k, v, indices, weights, lengths = random_attention(is_short=True)
        leaves = [part.clone().requires_grad_() for part in (q, k, v, weights)]
        output, _ = joint_attention(*leaves[:3], indices, leaves[3], chunk_size=4, chunk_lengths=lengths)
        found.append(torch.autograd.grad(output.square().sum(), leaves))
    assert all(part.isfinite().all() for parts in found for part in parts)
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, two, **EXACT)
