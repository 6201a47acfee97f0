"""Retrieval: fusion weights, several memories ranked together, temperature and decay."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hsa_ultralong.nn.chunk_retriever import ChunkRetriever
from hsa_ultralong.nn.fusion import softmax_fusion, stick_breaking_fusion
from hsa_ultralong.nn.views import ChunkTensors, GraphView
from hsa_ultralong.ops import ChunkVisibility
from hsa_ultralong.testing.factories import random_chunks, random_tensor, random_visibility, randomize
from hsa_ultralong.testing.oracles import stick_breaking_weights

EXACT = {"rtol": 1e-11, "atol": 1e-11}


def retriever(**options):
    fields = {
        "hidden_size": 16, "retrieval_dim": 8, "num_retrieval_heads": 1, "fusion": "softmax", "rms_norm_eps": 1e-6,
        "normalize_queries": True, "learned_temperature": True, "position_decay": False, "gumbel_noise": False,
    }  # fmt: skip
    module = ChunkRetriever(**{**fields, **options}).double()
    randomize(module, std=0.5)
    return module.eval()


def scores_with_gaps(seed=0):
    scores = random_tensor(3, 5, 2, 4, seed=seed) * 3
    scores = scores.masked_fill(random_tensor(3, 5, 2, 4, seed=seed + 1) > 0.5, -torch.inf)
    scores[0] = -torch.inf
    return scores


def visibility_of(chunks, tokens, foreign="hidden"):
    base = random_visibility(2, tokens, chunks, seed=3)
    return ChunkVisibility(base.query_segment, base.query_position, base.chunk_segment, base.chunk_end, foreign)


def views_of(counts, tokens=11):
    """One view per count, and one view of all chunks together."""
    total = sum(counts)
    chunks, whole = random_chunks(2, total), visibility_of(total, tokens, "past")
    views, first = [], 0
    for count in counts:
        last = first + count
        part = ChunkTensors(chunks.k[:, 4 * first : 4 * last], chunks.v[:, 4 * first : 4 * last],
                            *(x[:, first:last] for x in chunks[2:]))  # fmt: skip
        visible = ChunkVisibility(whole.query_segment, whole.query_position, whole.chunk_segment[:, first:last],
                                  whole.chunk_end[:, first:last], "past")  # fmt: skip
        views.append(GraphView(part, visible))
        first = last
    return views, GraphView(chunks, whole)


def test_softmax_rows_with_nothing_visible_are_exactly_zero_with_finite_gradients():
    scores = scores_with_gaps().requires_grad_()
    weights = softmax_fusion(scores)
    empty = scores == -torch.inf
    nothing = empty.all(-1)
    assert bool(nothing.any()) and bool((weights[nothing] == 0).all()) and bool((weights[empty] == 0).all())
    torch.testing.assert_close(weights.sum(-1)[~nothing], torch.ones_like(weights.sum(-1)[~nothing]), **EXACT)
    weights.square().sum().backward()
    assert bool(scores.grad.isfinite().all()) and float(scores.grad.abs().max()) > 0


@given(st.integers(0, 10**6))
def test_stick_breaking_equals_the_product_formula_and_sums_to_at_most_one(seed):
    # chunk_topk puts empty slots last; after the merge of views too
    scores = scores_with_gaps(seed).sort(-1, descending=True).values
    weights = stick_breaking_fusion(scores)
    torch.testing.assert_close(weights, stick_breaking_weights(scores), **EXACT)
    assert bool((weights.sum(-1) <= 1 + 1e-12).all())
    assert bool((weights[scores == -torch.inf] == 0).all())


def test_stick_breaking_stays_finite_for_extreme_scores():
    scores = torch.tensor([[200.0, -200.0, 90.0, -torch.inf]], requires_grad=True)
    weights = stick_breaking_fusion(scores)
    weights.sum().backward()
    assert bool(weights.isfinite().all()) and bool(scores.grad.isfinite().all())
    torch.testing.assert_close(weights, stick_breaking_weights(scores))


@pytest.mark.parametrize("fusion", ["softmax", "stick_breaking"])
@pytest.mark.parametrize("counts", [(3, 4), (1, 6), (0, 7), (2, 3, 2)])
@pytest.mark.parametrize("topk", [1, 3, 50])
def test_several_views_equal_one_view_of_all_chunks(fusion, counts, topk):
    module = retriever(fusion=fusion)
    x = random_tensor(2, 11, 16)
    views, whole = views_of(counts)
    several, one = module(x, views, topk=topk), module(x, [whole], topk=topk)
    assert several.offsets == tuple(sum(counts[:i]) for i in range(len(counts))) and one.offsets == (0,)
    assert several.indices.dtype == torch.int32
    assert torch.equal(several.indices, one.indices)
    torch.testing.assert_close(several.scores, one.scores, **EXACT)
    torch.testing.assert_close(several.weights, one.weights, **EXACT)


def test_several_views_give_the_same_gradients_as_one():
    x = random_tensor(2, 11, 16)
    views, whole = views_of((3, 4))
    grads = []
    for chosen in (views, [whole]):
        module = retriever()
        module(x, chosen, topk=3).weights.square().sum().backward()
        grads.append([p.grad for p in module.parameters()])
    for several, one in zip(*grads):
        torch.testing.assert_close(several, one, **EXACT)
        assert float(one.abs().max()) > 0


def test_temperature_divides_the_scores_and_never_changes_the_choice():
    module = retriever()
    x, whole = random_tensor(2, 11, 16), views_of((7,))[1]
    with torch.no_grad():
        module.log_temperature.fill_(0.0)
        cold = module(x, [whole], topk=3)
        module.log_temperature.fill_(1.3)
        warm = module(x, [whole], topk=3)
    assert torch.equal(cold.indices, warm.indices)
    torch.testing.assert_close(warm.scores, cold.scores / torch.tensor(1.3).double().exp(), rtol=1e-6, atol=1e-6)


def test_normalised_queries_do_not_depend_on_the_scale_of_the_input_projection():
    module, x, whole = retriever(), random_tensor(2, 11, 16), views_of((7,))[1]
    before = module(x, [whole], topk=3)
    with torch.no_grad():
        module.query_proj.weight *= 40
    torch.testing.assert_close(module(x, [whole], topk=3).weights, before.weights, rtol=1e-4, atol=1e-4)


def test_position_decay_adds_a_slope_over_the_recency_rank():
    plain, decayed = retriever(), retriever(position_decay=True)
    decayed.load_state_dict({**decayed.state_dict(), **plain.state_dict()})
    x, whole = random_tensor(2, 11, 16), views_of((7,))[1]
    first, second = plain(x, [whole], topk=3), decayed(x, [whole], topk=3)
    assert torch.equal(first.indices, second.indices)
    expected = first.scores + torch.arange(3, dtype=torch.float64) * decayed.position_decay
    torch.testing.assert_close(second.scores, expected, **EXACT)


def test_noise_is_added_in_training_of_a_noisy_model_with_a_seed_only():
    x, whole = random_tensor(2, 11, 16), views_of((40,))[1]
    clean = retriever()(x, [whole], topk=3).indices
    noisy = retriever(gumbel_noise=True)
    assert torch.equal(noisy(x, [whole], topk=3, noise_seed=1).indices, clean)
    assert torch.equal(retriever().train()(x, [whole], topk=3, noise_seed=1).indices, clean)
    noisy.train()
    assert torch.equal(noisy(x, [whole], topk=3).indices, clean)
    assert not torch.equal(noisy(x, [whole], topk=3, noise_seed=1).indices, clean)
    assert torch.equal(noisy(x, [whole], topk=3, noise_seed=1).indices, noisy(x, [whole], topk=3, noise_seed=1).indices)


def test_retrieval_heads_choose_on_their_own():
    module = retriever(num_retrieval_heads=2)
    chunks = random_chunks(2, 12)._replace(landmarks=random_tensor(2, 12, 2, 4))
    found = module(random_tensor(2, 11, 16), [GraphView(chunks, visibility_of(12, 11, "past"))], topk=3)
    assert found.indices.shape == found.weights.shape == (2, 11, 2, 3)
    assert not torch.equal(found.indices[:, :, 0], found.indices[:, :, 1])


def test_bf16_retrieval_keeps_scores_and_weights_in_fp32():
    module = retriever().bfloat16()
    chunks, visible = views_of((7,))[1][:2]
    chunks = chunks._replace(landmarks=chunks.landmarks.bfloat16())
    found = module(random_tensor(2, 11, 16).bfloat16(), [GraphView(chunks, visible)], topk=3)
    assert found.scores.dtype == found.weights.dtype == torch.float32


def test_scores_grow_with_the_logarithm_of_the_chunks_that_a_token_may_read():
    (view, other), _ = views_of([5, 4])
    plain, growing = retriever(), retriever(temperature_chunks=2)
    growing.load_state_dict(plain.state_dict())
    x = random_tensor(2, 11, 16, seed=9)
    before, after = (module(x, [view, other], topk=9) for module in (plain, growing))
    number = view.visible.mask().sum(-1) + other.visible.mask().sum(-1)  # (B, T)
    factor = (number.clamp_min(1).double().log() / math.log(2)).clamp_min(1)
    assert torch.equal(before.indices, after.indices) and number.max() > 4
    empty = before.indices < 0
    wanted = (before.scores * factor[..., None, None]).masked_fill(empty, 0)
    assert torch.allclose(after.scores.masked_fill(empty, 0), wanted, rtol=1e-6)
    assert torch.allclose(after.weights, softmax_fusion(after.scores), **EXACT)
