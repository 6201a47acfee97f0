"""A landmark or query that is not finite is never retrieved and reaches no other token or chunk, in every backend."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from hsa_ultralong.memory.landmark_index import LandmarkIndex
from hsa_ultralong.memory.quantization import encode
from hsa_ultralong.ops import ChunkVisibility, ScoredChunks, chunk_topk, combine_topk
from hsa_ultralong.ops.chunk_topk import torch_blocked
from hsa_ultralong.ops.chunk_topk.quantized import chunk_topk_quantized
from hsa_ultralong.testing.factories import random_tensor, random_visibility

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH, TOKENS, CHUNKS, HEADS, DIM = 2, 9, 23, 2, 8
# what stands where in row 0: a whole landmark, one of its numbers, a query
BAD_CHUNKS = {3: float("nan"), 7: float("inf"), 11: float("-inf")}
BAD_TOKEN = 5
IMPLS = [
    "reference",
    "torch",
    pytest.param("triton", marks=pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")),
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    has_triton = find_spec("triton") is not None
    monkeypatch.setattr(torch_blocked, "_BLOCK_ELEMENTS", 200)
    if has_triton:
        from hsa_ultralong.ops.chunk_topk import plan, triton_topk

        monkeypatch.setattr(plan, "tile_options", lambda *_: plan.TileOptions(16, 16, 4))
        monkeypatch.setattr(triton_topk, "_DECODE_QUERIES", 0)
        # shapes that were seen with other sizes
        plan.plan_of.cache_clear()
    yield
    if has_triton:
        plan.plan_of.cache_clear()


def places(*, bad_chunks=()):
    """Every rule of visibility; `bad_chunks` of all rows are unused."""
    visible = random_visibility(BATCH, TOKENS, CHUNKS, foreign="past", seed=3)
    segment = visible.chunk_segment.clone()
    segment[:, list(bad_chunks)] = -2
    parts = (visible.query_segment, visible.query_position, segment, visible.chunk_end)
    return ChunkVisibility(*(part.to(DEVICE) for part in parts), "past")


def inputs(rows=BATCH):
    query = random_tensor(BATCH, TOKENS, HEADS, DIM).to(DEVICE, torch.float32)
    landmarks = random_tensor(rows, CHUNKS, HEADS, DIM, seed=1).to(DEVICE, torch.float32)
    return query, landmarks


def poisoned(query, landmarks):
    query, landmarks = query.clone(), landmarks.clone()
    for place, (chunk, number) in enumerate(BAD_CHUNKS.items()):
        landmarks[:, chunk, :, place] = number
    query[0, BAD_TOKEN, :, 2] = float("nan")
    query[1, BAD_TOKEN, :, 2] = float("inf")
    return query, landmarks


def run(impl, query, landmarks, visible, topk, **options):
    query, landmarks = (part.detach().clone().requires_grad_() for part in (query, landmarks))
    factor = torch.full((HEADS,), 0.3, device=DEVICE, requires_grad=True)
    indices, scores = chunk_topk(query, landmarks, visible, topk=topk, scale=factor, impl=impl, **options)
    slope = random_tensor(*scores.shape, seed=5).to(scores)
    torch.where(indices >= 0, scores, 0.0).mul(slope).sum().backward()
    return indices, scores, query.grad, landmarks.grad, factor.grad


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("topk", [4, 40])
@pytest.mark.parametrize("rows", [1, BATCH])
@pytest.mark.parametrize("seed", [None, 7])
def test_a_landmark_that_is_not_finite_is_as_if_it_were_unused(impl, topk, rows, seed):
    query, landmarks = inputs(rows)
    found = run(impl, *poisoned(query, landmarks), places(), topk, noise_seed=seed)
    # the same numbers of the same tokens, without the bad chunks; the bad tokens are padding
    clean = places(bad_chunks=BAD_CHUNKS)
    clean.query_segment[:, BAD_TOKEN] = -1
    expected = run(impl, query, landmarks, clean, topk, noise_seed=seed)
    assert (found[0][:, BAD_TOKEN] == -1).all() and (found[1][:, BAD_TOKEN] == -torch.inf).all()
    assert (expected[0] >= 0).any()
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)
    reference = run("reference", *poisoned(query, landmarks), places(), topk, noise_seed=seed)
    assert torch.equal(found[0], reference[0])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("topk", [4, 20])
def test_few_queries_never_retrieve_a_landmark_that_is_not_finite(impl, topk, monkeypatch):
    if impl == "triton":
        from hsa_ultralong.ops.chunk_topk import triton_topk

        monkeypatch.setattr(triton_topk, "_DECODE_QUERIES", 64)
    # one row and head, as the interpreter takes seconds for each
    query, landmarks = (part[:1, :, :1].contiguous() for part in poisoned(*inputs()))
    every = places()
    parts = (every.query_segment, every.query_position, every.chunk_segment, every.chunk_end)
    visible = ChunkVisibility(*(part[:1] for part in parts), "past")
    with torch.no_grad():
        indices, scores = chunk_topk(query, landmarks, visible, topk=topk, impl=impl)
        expected = chunk_topk(query, landmarks, visible, topk=topk, impl="reference")
    assert torch.equal(indices, expected[0])
    torch.testing.assert_close(scores, expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("rows", [1, BATCH])
@pytest.mark.parametrize("heads", [1, HEADS])
def test_the_gradients_of_the_kernels_meet_neither_bad_queries_nor_bad_landmarks(rows, heads, monkeypatch):
    from hsa_ultralong.ops.chunk_topk import kernel_gradients
    from hsa_ultralong.ops.chunk_topk.gradients import product_gradients

    monkeypatch.setattr(kernel_gradients, "BLOCK_ELEMENTS", 4 * CHUNKS * heads)
    # the kernels take bf16, which the interpreter cannot multiply
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    query, landmarks = (part[:, :, :heads].to(dtype).contiguous() for part in poisoned(*inputs(rows)))
    indices, _ = chunk_topk(query, landmarks, places(), topk=4, impl="reference")
    grad = random_tensor(*indices.shape, seed=5).to(query)
    grad = grad.float()
    factor = torch.full((heads,), 0.3, device=DEVICE)
    found = kernel_gradients.spread_gradients(query, landmarks, indices, grad, factor)
    slopes = grad.masked_fill(indices < 0, 0.0) * 0.3
    expected = product_gradients(query.float(), landmarks.float(), indices, slopes)
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left.float(), right, rtol=2e-2, atol=2e-2)
        assert left.isfinite().all() and left.any()


@pytest.mark.parametrize("impl", IMPLS[1:])
def test_landmarks_in_8_bits_with_scales_that_are_not_finite_are_never_retrieved(impl):
    query, landmarks = inputs(1)
    payload, scales = encode(landmarks, "int8")
    visible = places()
    for chunk, number in BAD_CHUNKS.items():
        scales[:, chunk] = number
    query = poisoned(query, landmarks)[0]
    indices, scores = chunk_topk_quantized(query, payload, scales, visible, topk=4, impl=impl)
    assert not torch.isin(indices, torch.tensor(list(BAD_CHUNKS), device=DEVICE, dtype=torch.int32)).any()
    assert (indices[:, BAD_TOKEN] == -1).all() and (indices >= 0).any()
    assert not scores.isnan().any() and (scores < torch.inf).all()


@pytest.mark.parametrize("impl", IMPLS[1:])
def test_an_entry_without_a_finite_score_is_an_empty_slot_of_the_combination(impl):
    indices = torch.tensor([4, 3, 2, -1], dtype=torch.int32, device=DEVICE).view(1, 1, 1, 4)
    scores = torch.tensor([1.0, float("nan"), float("inf"), -torch.inf], device=DEVICE).view(1, 1, 1, 4)
    other = ScoredChunks(indices, scores.nan_to_num(0.5, 0.25, -torch.inf), 10)
    found, values, weights = combine_topk([ScoredChunks(indices, scores), other], topk=8, impl=impl)
    assert found.flatten().tolist() == [14, 13, 12, 4, -1, -1, -1, -1]
    assert values.flatten()[:4].tolist() == [1.0, 0.5, 0.25, 1.0] and (values.flatten()[4:] == -torch.inf).all()
    torch.testing.assert_close(weights.sum(), torch.ones((), device=DEVICE))


def test_the_landmark_index_never_finds_a_landmark_that_is_not_finite(monkeypatch):
    from hsa_ultralong.memory import landmark_index

    monkeypatch.setattr(landmark_index, "_FIT_CHUNKS", 32)
    basis = random_tensor(4, 64, seed=2)
    landmarks = (random_tensor(200, 1, 4, seed=3) @ basis).float()
    query = (random_tensor(1, 5, 1, 4, seed=4) @ basis).float()
    clean = LandmarkIndex.build(landmarks.clone(), num_dims=16)
    alone, _ = clean.search(query, 3)
    best = alone.flatten().unique()[:2].tolist()
    landmarks[best[0]], landmarks[best[1], 0, 1] = float("nan"), float("inf")
    for exact in (16, 200):
        index = LandmarkIndex.build(landmarks.clone(), num_dims=16)
        indices, scores = index.search(query, 3, num_scored=exact)
        assert not torch.isin(indices, torch.tensor(best, dtype=torch.int32)).any()
        assert (indices >= 0).all() and scores.isfinite().all()
