"""combine_topk: the best of several lists are those of one ranking of all; the kernel equals torch."""

from __future__ import annotations

import pytest
import torch

from hsa_ultralong.ops import ChunkVisibility, ScoredChunks, chunk_topk, combine_topk
from hsa_ultralong.testing.factories import generator, random_tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def scored(widths, chunks, *, batch=2, tokens=3, heads=2, empty=0.3, seed=0, dtype=torch.float32):
    """Lists in the form of chunk_topk over memories of `chunks` chunks each, behind one another; scores have ties."""
    random, lists, offset = generator(seed), [], 0
    for width, count in zip(widths, chunks, strict=True):
        shape = (batch, tokens, heads, count)
        chosen = torch.rand(shape, generator=random).argsort(-1)[..., :width].sort(-1, descending=True).values
        dropped = torch.rand(chosen.shape, generator=random) < empty
        chosen = torch.where(dropped, -1, chosen).sort(-1, descending=True).values.to(torch.int32)
        values = torch.randint(-4, 5, chosen.shape, generator=random).to(dtype) / 3
        lists.append(ScoredChunks(chosen.to(DEVICE), values.masked_fill(chosen < 0, -torch.inf).to(DEVICE), offset))
        offset += count
    return lists


@pytest.mark.parametrize(
    ("widths", "chunks"),
    [((4, 4), (9, 7)), ((8, 1), (8, 5)), ((3, 5, 2), (6, 6, 6)), ((5, 5, 5, 5), (9,) * 4), ((2,) * 6, (4,) * 6)],
)
@pytest.mark.parametrize("topk", [1, 3, 8, 40])
def test_the_kernel_equals_torch(widths, chunks, topk):
    pytest.importorskip("triton")
    lists = scored(widths, chunks, seed=topk)
    expected = combine_topk(lists, topk=topk, impl="torch")
    found = combine_topk(lists, topk=topk, impl="triton")
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[2], expected[2], rtol=1e-6, atol=1e-7)
    assert found[0].dtype == torch.int32 and found[0].shape[-1] == min(topk, sum(widths))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_token_without_chunks_has_no_weights(impl):
    if impl == "triton":
        pytest.importorskip("triton")
    lists = scored((2, 3), (4, 4), empty=1.1)
    indices, scores, weights = combine_topk(lists, topk=4, impl=impl)
    assert (indices == -1).all() and (scores == -torch.inf).all() and (weights == 0).all()


def test_parts_of_a_memory_are_ranked_like_the_whole():
    query = random_tensor(2, 5, 2, 8, seed=1).round()
    landmarks = random_tensor(1, 23, 2, 8, seed=2).round()  # whole numbers: ties occur
    nobody = torch.zeros((2, 5), dtype=torch.int32)

    def best(first, last):
        chunks = torch.full((1, last - first), -1, dtype=torch.int32)
        visible = ChunkVisibility(nobody, nobody, chunks, torch.zeros_like(chunks))
        return ScoredChunks(*chunk_topk(query, landmarks[:, first:last], visible, topk=6), first)

    whole = best(0, 23)
    indices, scores, weights = combine_topk([best(0, 4), best(4, 9), best(9, 23)], topk=6)
    assert torch.equal(indices, whole.indices)
    torch.testing.assert_close(scores, whole.scores)
    torch.testing.assert_close(weights, whole.scores.softmax(-1))


def test_one_list_that_fits_stays_as_it_is():
    (only,) = scored((5,), (9,))
    indices, scores, weights = combine_topk([only._replace(offset=10)], topk=8)
    assert torch.equal(indices, torch.where(only.indices < 0, -1, only.indices + 10))
    assert torch.equal(scores, only.scores)
    assert torch.equal(weights > 0, only.indices >= 0)


def test_gradients_reach_the_kept_scores_only():
    lists = scored((4, 4), (9, 7), dtype=torch.float64, empty=0.0)
    leaves = [one.scores.clone().requires_grad_() for one in lists]
    lists = [one._replace(scores=leaf) for one, leaf in zip(lists, leaves, strict=True)]
    indices, scores, _ = combine_topk(lists, topk=3)
    scores.sum().backward()
    for one, leaf in zip(lists, leaves, strict=True):
        kept = ((one.indices + one.offset)[..., :, None] == indices[..., None, :]).any(-1)
        assert torch.equal(leaf.grad, kept.double())


def test_rankings_choose_and_scores_are_kept():
    lists = scored((4, 4), (9, 7), empty=0.0)
    rankings = [torch.rand(one.scores.shape, generator=generator(seed)).to(DEVICE) for seed, one in enumerate(lists)]
    indices, scores, _ = combine_topk(lists, topk=3, rankings=rankings)
    numbers = torch.cat([one.indices + one.offset for one in lists], -1)
    best = torch.cat(rankings, -1).topk(3).indices
    assert torch.equal(indices, numbers.gather(-1, best).sort(-1, descending=True).values)
    every = torch.cat([one.scores for one in lists], -1)
    place = (numbers[..., None, :] == indices[..., :, None]).int().argmax(-1)
    assert torch.equal(scores, every.gather(-1, place))


def test_what_the_kernel_does_not_take_is_refused():
    lists = scored((4,), (9,))
    with pytest.raises(ValueError, match="without gradients or rankings"):
        combine_topk(lists, topk=2, rankings=[lists[0].scores], impl="triton")
    with pytest.raises(ValueError, match="one tensor for each"):
        combine_topk([*lists, lists[0]], topk=2, rankings=[lists[0].scores])
    with pytest.raises(ValueError, match="at least one list"):
        combine_topk([], topk=2)
