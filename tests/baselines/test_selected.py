"""Attention in chosen chunks: gathered or under a mask, the same."""

import pytest
import torch

from hsa_ultralong.baselines import selected
from hsa_ultralong.baselines.selected import selected_attention
from hsa_ultralong.baselines.state import block_means, num_blocks


def inputs(heads, kv_heads, chooser_heads, *, new=9, total=23, size=4, slots=3):
    source = torch.Generator().manual_seed(0)
    q = torch.randn(2, new, heads, 4, generator=source, dtype=torch.float64)
    k, v = (torch.randn(2, total, kv_heads, 4, generator=source, dtype=torch.float64) for _ in range(2))
    own = (torch.arange(total - new, total) // size).view(1, -1, 1, 1).expand(2, -1, chooser_heads, -1)
    others = torch.rand(2, new, chooser_heads, -(-total // size), generator=source).argsort(-1)[..., : slots - 1]
    return q, k, v, torch.cat((own, torch.where(others < own, others, -1)), -1)


@pytest.mark.parametrize("heads", [(4, 2, 1), (4, 2, 2), (4, 2, 4), (4, 1, 4), (2, 2, 2)])
def test_gathered_and_masked_keys_give_the_same_in_pieces_or_at_once(heads, monkeypatch):
    q, k, v, chosen = inputs(*heads)
    masked = selected_attention(q.requires_grad_(), k, v, chosen, chunk_size=4)
    with torch.no_grad():
        monkeypatch.setattr(selected, "_DENSE_MIN_TOKENS", 1000)
        torch.testing.assert_close(selected_attention(q, k, v, chosen, chunk_size=4), masked)
        monkeypatch.setattr(selected, "_ELEMENTS", 1)
        torch.testing.assert_close(selected_attention(q, k, v, chosen, chunk_size=4), masked)


def test_the_mask_is_of_the_chosen_chunks_up_to_the_token():
    q, k, v, chosen = inputs(2, 1, 2)
    out = selected_attention(q, k, v, chosen, chunk_size=4)
    for t in range(9):
        read = [j for c in chosen[1, t, 1].tolist() if c >= 0 for j in range(4 * c, 4 * c + 4) if j <= 14 + t]
        weights = (k[1, read, 0] @ q[1, t, 1] / 2).softmax(0)
        torch.testing.assert_close(out[1, t, 1], weights @ v[1, read, 0])


@pytest.mark.parametrize(("size", "stride"), [(4, 4), (4, 2), (6, 2)])
@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 6, 7, 13])
def test_block_means_are_those_of_whole_blocks(size, stride, length):
    x = torch.randn(1, length, 1, 2, dtype=torch.float64)
    wanted = [x[:, i : i + size].mean(1) for i in range(0, length - size + 1, stride)]
    found = block_means(x, size, stride)
    assert found.shape[1] == len(wanted) == num_blocks(length, size, stride)
    if wanted:
        torch.testing.assert_close(found, torch.stack(wanted, 1))
