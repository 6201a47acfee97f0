"""chunk_topk: selection, scores, gradients, noise and the visibility rule."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hsa_ultralong.ops import ChunkVisibility, chunk_topk
from hsa_ultralong.ops.chunk_topk import gradients, torch_blocked
from hsa_ultralong.ops.chunk_topk import noise as noise_module
from hsa_ultralong.ops.chunk_topk.noise import gumbel_noise
from hsa_ultralong.testing.factories import generator, random_tensor, random_visibility
from hsa_ultralong.testing.oracles import is_chunk_visible

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def inputs(batch=2, tokens=9, chunks=7, heads=2, dim=5, shared=False, seed=0, dtype=torch.float64):
    query = random_tensor(batch, tokens, heads, dim, seed=seed, dtype=dtype)
    landmarks = random_tensor(1 if shared else batch, chunks, heads, dim, seed=seed + 1, dtype=dtype)
    return query, landmarks


def both(query, landmarks, visible, **options):
    return [chunk_topk(query, landmarks, visible, impl=impl, **options) for impl in ("reference", "torch")]


def small_blocks(monkeypatch, elements):
    monkeypatch.setattr(torch_blocked, "_BLOCK_ELEMENTS", elements)
    monkeypatch.setattr(gradients, "BLOCK_ELEMENTS", elements)


@pytest.mark.parametrize("topk", [1, 3, 7, 100])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_equals_reference(topk, shared, heads, dtype):
    query, landmarks = inputs(heads=heads, shared=shared, dtype=dtype)
    visible = random_visibility(2, 9, 7)
    (indices, scores), (other_indices, other_scores) = both(query, landmarks, visible, topk=topk, scale=0.7)
    assert indices.dtype == other_indices.dtype == torch.int32 and scores.dtype == other_scores.dtype == dtype
    assert indices.shape == scores.shape == (2, 9, heads, min(topk, 7))
    assert torch.equal(indices, other_indices)
    torch.testing.assert_close(other_scores, scores)


@given(
    st.integers(1, 3), st.integers(1, 12), st.integers(0, 9), st.integers(1, 10),
    st.sampled_from(["hidden", "past"]), st.integers(0, 10**6),
)  # fmt: skip
def test_torch_equals_reference_for_any_shape(batch, tokens, chunks, topk, foreign, seed):
    query, landmarks = inputs(batch, tokens, chunks, seed=seed)
    visible = random_visibility(batch, tokens, chunks, foreign=foreign, seed=seed)
    noise_seed = seed if seed % 2 else None
    (indices, scores), (other_indices, other_scores) = both(query, landmarks, visible, topk=topk, noise_seed=noise_seed)
    assert torch.equal(indices, other_indices)
    torch.testing.assert_close(other_scores, scores, **EXACT)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_slots_are_newest_first_and_empty_slots_last(impl):
    query, landmarks = inputs(tokens=20, chunks=9)
    visible = random_visibility(2, 20, 9)
    indices, scores = chunk_topk(query, landmarks, visible, topk=4, impl=impl)
    assert bool((indices[..., :-1] >= indices[..., 1:]).all())
    assert bool(((indices[..., :-1] > indices[..., 1:]) | (indices[..., 1:] == -1)).all())
    assert torch.equal(indices == -1, scores == -torch.inf)
    count = visible.mask().sum(-1).clamp_max(4)[:, :, None]
    assert torch.equal((indices >= 0).sum(-1), count.expand(-1, -1, 2))


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_scores_are_the_scaled_products_of_the_best_visible_chunks(impl):
    query, landmarks = inputs(batch=1, tokens=5, chunks=6, heads=1, dim=4)
    visible = ChunkVisibility.causal(1, 5, 6, 1)
    indices, scores = chunk_topk(query, landmarks, visible, topk=2, scale=0.25, impl=impl)
    for t in range(5):
        products = {i: float(query[0, t, 0] @ landmarks[0, i, 0]) / math.sqrt(4) / 2 for i in range(t)}
        best = sorted(sorted(products, key=lambda i: -products[i])[:2], reverse=True)
        expected = best + [-1] * (2 - len(best))
        assert indices[0, t, 0].tolist() == expected
        for slot, chunk in enumerate(best):
            assert abs(float(scores[0, t, 0, slot]) - products[chunk]) < 1e-12


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("noise_seed", [None, 5])
def test_gradients_equal_autograd_through_the_reference(shared, noise_seed):
    results = []
    visible = random_visibility(2, 9, 7)
    for impl in ("reference", "torch"):
        query, landmarks = (x.requires_grad_() for x in inputs(shared=shared))
        scale = torch.tensor([0.5, 1.5], dtype=torch.float64, requires_grad=True)
        _, scores = chunk_topk(query, landmarks, visible, topk=3, scale=scale, noise_seed=noise_seed, impl=impl)
        slope = random_tensor(*scores.shape, seed=9)
        (scores.masked_fill(scores == -torch.inf, 0.0) * slope).sum().backward()
        results.append((query.grad, landmarks.grad, scale.grad))
    for reference, other in zip(*results):
        assert float(reference.abs().max()) > 0
        torch.testing.assert_close(other, reference, **EXACT)


@pytest.mark.parametrize("shared", [False, True])
def test_gradients_pass_gradcheck(shared):
    query, landmarks = (x.requires_grad_() for x in inputs(2, 3, 4, shared=shared))
    scale = torch.tensor([0.5, 1.5], dtype=torch.float64, requires_grad=True)
    visible = random_visibility(2, 3, 4)

    def kept_scores(query, landmarks, scale):
        _, scores = chunk_topk(query, landmarks, visible, topk=2, scale=scale, impl="torch")
        return scores[scores > -torch.inf]

    assert torch.autograd.gradcheck(kept_scores, (query, landmarks, scale))


def test_a_scale_per_head_multiplies_the_scores_and_receives_its_gradient():
    query, landmarks = inputs()
    visible, factors = random_visibility(2, 9, 7), torch.tensor([2.0, 0.7], dtype=torch.float64)
    expected = chunk_topk(query, landmarks, visible, topk=3)
    scale = (query.shape[-1] ** -0.5 * factors).requires_grad_()
    indices, scores = chunk_topk(query, landmarks, visible, topk=3, scale=scale)
    assert torch.equal(indices, expected[0])
    torch.testing.assert_close(scores, expected[1] * factors[:, None], **EXACT)
    scores[scores > -torch.inf].sum().backward()
    assert (scale.grad != 0).all()
    with pytest.raises(ValueError, match="scale must be a scalar or"):
        chunk_topk(query, landmarks, visible, topk=3, scale=torch.ones(3))


def test_a_scalar_scale_tensor_receives_its_gradient():
    query, landmarks = inputs()
    grads = []
    for impl in ("reference", "torch"):
        scale = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
        visible = random_visibility(2, 9, 7)
        _, scores = chunk_topk(query, landmarks, visible, topk=3, scale=scale, impl=impl)
        scores[scores > -torch.inf].sum().backward()
        grads.append(scale.grad)
    torch.testing.assert_close(grads[1], grads[0], **EXACT)


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_ties_go_to_the_lower_index(impl, dtype):
    source = generator(0)
    query = torch.randint(-1, 2, (2, 12, 1, 3), generator=source).to(dtype)
    landmarks = torch.randint(-1, 2, (2, 16, 1, 3), generator=source).to(dtype)
    visible = ChunkVisibility.causal(2, 12, 16, 1)
    indices, _ = chunk_topk(query, landmarks, visible, topk=4, scale=1.0, impl=impl)
    for b in range(2):
        for t in range(12):
            score = {i: float(query[b, t, 0].double() @ landmarks[b, i, 0].double()) for i in range(t)}
            best = sorted(score, key=lambda i: (-score[i], i))[:4]
            assert [i for i in indices[b, t, 0].tolist() if i >= 0] == sorted(best, reverse=True)


@pytest.mark.parametrize("elements", [1, 30, 60, 1 << 24])
@pytest.mark.parametrize("shared", [False, True])
def test_result_and_gradients_do_not_depend_on_the_block_size(monkeypatch, elements, shared):
    visible = random_visibility(2, 9, 7)

    def run():
        query, landmarks = (x.requires_grad_() for x in inputs(shared=shared))
        indices, scores = chunk_topk(query, landmarks, visible, topk=3, noise_seed=3, impl="torch")
        scores.masked_fill(scores == -torch.inf, 0.0).square().sum().backward()
        return indices, scores, query.grad, landmarks.grad

    whole = run()
    small_blocks(monkeypatch, elements)
    for expected, actual in zip(whole, run()):
        torch.testing.assert_close(actual, expected, **EXACT)


def test_noise_is_a_function_of_seed_and_coordinates_only():
    whole = gumbel_noise(11, 3, 0, 20, 2, 9, "cpu")
    assert torch.equal(whole, gumbel_noise(11, 3, 0, 20, 2, 9, "cpu"))
    assert torch.equal(whole[:, 6:15], gumbel_noise(11, 3, 6, 15, 2, 9, "cpu"))
    assert torch.equal(whole[:2, :, :1, :4], gumbel_noise(11, 2, 0, 20, 1, 4, "cpu"))
    assert not torch.equal(whole, gumbel_noise(12, 3, 0, 20, 2, 9, "cpu"))


@pytest.mark.parametrize("seed", [11, 2**31 + 5, 2**32 - 1, -1, -(2**40) + 3])
def test_a_seed_counts_by_its_low_32_bits_as_a_number_and_on_the_device(seed):
    low = gumbel_noise(seed % 2**32, 3, 0, 20, 2, 9, "cpu")
    assert torch.equal(low, gumbel_noise(seed, 3, 0, 20, 2, 9, "cpu"))
    assert torch.equal(low, gumbel_noise(torch.tensor(seed), 3, 0, 20, 2, 9, "cpu"))
    # a row's own state wraps as that of the next seed
    assert torch.equal(low[1:], gumbel_noise((seed + 1) % 2**32, 2, 0, 20, 2, 9, "cpu"))


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_retrieval_by_a_seed_on_the_device_is_that_by_its_number(impl):
    found = []
    for seed in (2**31 + 5, torch.tensor(2**31 + 5)):
        query, landmarks = (x.requires_grad_() for x in inputs(tokens=30, chunks=20))
        visible = ChunkVisibility.causal(2, 30, 20, 1)
        indices, scores = chunk_topk(query, landmarks, visible, topk=4, noise_seed=seed, impl=impl)
        scores.masked_fill(scores == -torch.inf, 0.0).square().sum().backward()
        found.append((indices, scores, query.grad, landmarks.grad))
    for left, right in zip(*found, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("seed", [torch.zeros(1).long(), torch.tensor(1.0), torch.zeros((), device="meta").long()])
def test_a_seed_of_another_kind_is_refused(seed):
    query, landmarks = inputs()
    with pytest.raises(ValueError, match=r"noise_seed must be a number or an int64 tensor \(\) on cpu, got"):
        chunk_topk(query, landmarks, random_visibility(2, 9, 7), topk=3, noise_seed=seed)


def test_noise_has_the_gumbel_distribution_and_no_correlation():
    sample = gumbel_noise(1, 2, 0, 100, 2, 250, "cpu").double()
    count = sample.numel()
    assert abs(float(sample.mean()) - 0.5772157) < 5 * math.pi / math.sqrt(6 * count)
    assert abs(float(sample.var()) / (math.pi**2 / 6) - 1) < 0.05
    uniform = torch.exp(-torch.exp(-sample))
    counts = torch.histc(uniform, 10, 0, 1) / count
    assert float((counts - 0.1).abs().max()) < 0.005
    centred = uniform - 0.5
    for axis in range(4):
        first, second = centred.narrow(axis, 0, sample.shape[axis] - 1), centred.narrow(axis, 1, sample.shape[axis] - 1)
        correlation = float((first * second).mean() * 12)
        assert abs(correlation) < 5 / math.sqrt(first.numel())


def test_noise_is_finite_for_the_extreme_states(monkeypatch):
    for state in (0, 2**32 - 1):
        monkeypatch.setattr(noise_module, "_mix", lambda x, state=state: torch.full_like(x, state))
        assert bool(gumbel_noise(0, 1, 0, 1, 1, 1, "cpu").isfinite().all())


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_pieces_of_a_row_draw_its_noise(impl):
    query, landmarks = inputs(tokens=30, chunks=20)
    visible = ChunkVisibility.causal(2, 30, 20, 1)
    whole = chunk_topk(query, landmarks, visible, topk=4, noise_seed=1, impl=impl)
    for start, stop in ((0, 7), (7, 30)):
        places = {name: getattr(visible, name)[:, start:stop] for name in ("query_segment", "query_position")}
        seen = replace(visible, **places)
        options = {"topk": 4, "noise_seed": 1, "noise_start": start, "impl": impl}
        part = chunk_topk(query[:, start:stop], landmarks, seen, **options)
        assert torch.equal(part[0], whole[0][:, start:stop])
        torch.testing.assert_close(part[1], whole[1][:, start:stop], **EXACT)


def test_noise_changes_the_choice_and_never_the_scores():
    query, landmarks = inputs(tokens=30, chunks=20)
    visible = ChunkVisibility.causal(2, 30, 20, 1)
    plain, _ = chunk_topk(query, landmarks, visible, topk=4)
    indices, scores = chunk_topk(query, landmarks, visible, topk=4, noise_seed=1)
    assert not torch.equal(plain, indices)
    products = torch.einsum("bthr,bchr->bthc", query, landmarks) / math.sqrt(5)
    expected = products.gather(-1, indices.long().clamp_min(0)).masked_fill(indices < 0, -torch.inf)
    torch.testing.assert_close(scores, expected, **EXACT)


@pytest.mark.parametrize("foreign", ["hidden", "past"])
@pytest.mark.parametrize("segment", [-1, 0, 1, 2])
@pytest.mark.parametrize("chunk_segment", [-2, -1, 0, 1, 2])
def test_visibility_follows_the_rule_in_every_case(foreign, segment, chunk_segment):
    positions = torch.arange(4, dtype=torch.int32)[None]
    ends = torch.arange(5, dtype=torch.int32)[None]
    visible = ChunkVisibility(
        torch.full_like(positions, segment), positions, torch.full_like(ends, chunk_segment), ends, foreign
    )
    expected = [[is_chunk_visible(segment, t, chunk_segment, end, foreign) for end in range(5)] for t in range(4)]
    assert visible.mask()[0].tolist() == expected
    assert visible.mask(1, 3)[0].tolist() == expected[1:3]


def test_token_64_is_the_first_to_see_chunk_0():
    visible = ChunkVisibility.causal(1, 130, 3, 64)
    mask = visible.mask()[0]
    assert not bool(mask[:64].any())
    assert mask[64].tolist() == [True, False, False]
    assert mask[127].tolist() == [True, False, False] and mask[128].tolist() == [True, True, False]
    query, landmarks = inputs(1, 130, 3)
    indices, _ = chunk_topk(query, landmarks, visible, topk=2)
    assert bool((indices[:, :64] == -1).all()) and bool((indices[:, 64:, :, 0] >= 0).all())


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_one_memory_shared_by_the_batch_equals_its_copies(impl):
    query, landmarks = inputs(shared=True)
    one = random_visibility(1, 9, 7)
    visible = ChunkVisibility(
        one.query_segment.expand(2, -1), one.query_position.expand(2, -1), one.chunk_segment, one.chunk_end, "past"
    )
    shared = chunk_topk(query, landmarks, visible, topk=3, impl=impl)
    copied = chunk_topk(query, landmarks.expand(2, -1, -1, -1), visible, topk=3, impl=impl)
    assert torch.equal(shared[0], copied[0])
    torch.testing.assert_close(shared[1], copied[1], **EXACT)


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_scores_of_magnitude_2000_keep_fp32_precision(impl, autocast, shared):
    query, landmarks = inputs(2, 16, 64, heads=1, dim=64, shared=shared)
    query, landmarks = ((x * 10 + 14).bfloat16() for x in (query, landmarks))
    visible = ChunkVisibility.causal(2, 16, 64, 0)
    exact = torch.einsum("bthr,bchr->bthc", query.double(), landmarks.expand(2, -1, -1, -1).double()) / 8
    assert float(exact.abs().mean()) > 1_000
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        indices, scores = chunk_topk(query, landmarks, visible, topk=8, impl=impl)
    assert scores.dtype == torch.float32
    # one bf16 step is 8 at 2,000, and 16 above
    assert float((scores.double() - exact.gather(-1, indices.long())).abs().max()) < 0.01
    best = exact.topk(8, dim=-1).indices.sort(-1, descending=True).values
    assert torch.equal(indices.long(), best)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_no_chunks_give_no_slots(impl):
    query, landmarks = (x.requires_grad_() for x in inputs(chunks=0))
    indices, scores = chunk_topk(query, landmarks, random_visibility(2, 9, 0), topk=3, impl=impl)
    assert indices.shape == scores.shape == (2, 9, 2, 0)
    scores.sum().backward()
    assert float(query.grad.abs().max()) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topk": 0}, "topk must be an integer >= 1"),
        ({"topk": True}, "topk must be an integer >= 1"),
        ({"topk": 2.0}, "topk must be an integer >= 1"),
        ({"impl": "cuda"}, "impl='cuda' is not available"),
        ({"query": torch.zeros(2, 9, 5)}, "query must be"),
        ({"landmarks": torch.zeros(2, 7, 1, 5)}, "landmarks must have shape"),
        ({"landmarks": torch.zeros(3, 7, 2, 5)}, "landmarks have batch 3"),
        ({"visible": random_visibility(2, 8, 7)}, "visible.query_segment"),
        ({"visible": random_visibility(2, 9, 6)}, "visible.chunk_segment"),
    ],
)
def test_bad_arguments_raise_one_clear_error(change, message):
    query, landmarks = inputs()
    arguments = {"query": query, "landmarks": landmarks, "visible": random_visibility(2, 9, 7), "topk": 3, **change}
    with pytest.raises(ValueError, match=message):
        chunk_topk(arguments.pop("query"), arguments.pop("landmarks"), arguments.pop("visible"), **arguments)


def test_visibility_refuses_shapes_that_do_not_fit():
    good = torch.zeros(2, 3, dtype=torch.int32)
    for bad in (
        (good[0], good[0], good, good),
        (good, good[:, :2], good, good),
        (good, good, good, good[:, :2]),
        (good, good, torch.cat((good, good)), torch.cat((good, good))),
    ):
        with pytest.raises(ValueError, match=r"must both be|has batch"):
            ChunkVisibility(*bad)
    with pytest.raises(ValueError, match="foreign must be one of"):
        ChunkVisibility(good, good, good, good, "all")


@pytest.mark.parametrize("foreign", ["hidden", "past"])
def test_the_count_of_visible_chunks_is_that_of_the_mask(foreign):
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        segment = torch.randint(-1, 4, (2, 9), generator=generator).int()
        position = torch.randint(-2, 40, (2, 9), generator=generator).int()
        chunks = torch.randint(-2, 4, (2, 13), generator=generator).int()
        ends = torch.randint(1, 40, (2, 13), generator=generator).int()
        for part in (slice(None), slice(0, 1)):
            visible = ChunkVisibility(segment, position, chunks[part], ends[part], foreign)
            assert torch.equal(visible.count(), visible.mask().sum(-1))
