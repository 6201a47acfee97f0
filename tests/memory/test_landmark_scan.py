"""The exact lookup by 16-bit products finds what chunk_topk finds: near ties, duplicates, what is not finite too."""

from __future__ import annotations

import pytest
import torch

from hsa_ultralong.memory import landmark_scan
from hsa_ultralong.memory.landmark_scan import LandmarkScan
from hsa_ultralong.ops import ChunkVisibility, chunk_topk

CHUNKS, DIM = 5000, 64


def visibility(query, chunks, segment=0):
    segments = torch.full(query.shape[:2], segment, dtype=torch.int32)
    ends = torch.zeros(1, chunks, dtype=torch.int32)
    return ChunkVisibility(segments, torch.zeros_like(segments), torch.full_like(ends, -1), ends)


def landmarks_of(kind, heads):
    torch.manual_seed(0)
    found = torch.randn(CHUNKS, heads, DIM)
    if kind == "near ties":
        found = found[:1] + 1e-3 * found
    elif kind == "duplicates":
        found = found[torch.arange(CHUNKS) % 7]
    elif kind == "one is huge":
        found[17] *= 1e4
    elif kind == "not finite":
        found[5], found[CHUNKS - 1, :, 3], found[9] = torch.nan, torch.inf, -torch.inf
    elif kind == "zero":
        found[:] = 0
    return found.bfloat16()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("kind", ["random", "near ties", "duplicates", "one is huge", "not finite", "zero"])
def test_a_search_finds_what_the_scan_in_fp32_finds(kind, heads, dtype):
    landmarks = landmarks_of(kind, heads)
    query = torch.randn(2, 3, heads, DIM).to(dtype)
    visible, scale = visibility(query, CHUNKS), torch.rand(heads) + 0.5
    found, scores = LandmarkScan(landmarks).search(query, 8, visible=visible, scale=scale)
    # sums of one order for both: fp64 of the same numbers
    truth, exact = chunk_topk(query.double(), landmarks.double()[None], visible, topk=8, scale=scale.double())
    torch.testing.assert_close(scores, exact.float(), rtol=1e-5, atol=1e-5)
    assert found.dtype == torch.int32 and ((found >= 0) == (truth >= 0)).all()
    if kind == "duplicates":
        # equal rows of a product may differ in their last bit
        found, truth = (torch.where(x >= 0, x % 7, x).sort(-1).values for x in (found, truth))
    same = (found == truth).float().mean()
    assert same > 0.9 if kind == "near ties" else same == 1


def test_few_chunks_are_scored_exactly_where_products_are_apart():
    scan, seen = LandmarkScan(landmarks_of("random", 1)), []
    candidates = scan._candidates
    scan._candidates = lambda *a: (seen.append(candidates(*a)), seen[-1])[1]
    query = torch.randn(1, 1, 1, DIM).bfloat16()
    scan.search(query, 8, visible=visibility(query, CHUNKS))
    assert 8 <= len(seen[0]) < 64


def test_many_chunks_alike_are_left_to_the_scan_and_gradients_too(monkeypatch):
    scan, seen = LandmarkScan(landmarks_of("zero", 1)), []
    plain = landmark_scan.chunk_topk
    monkeypatch.setattr(landmark_scan, "chunk_topk", lambda *a, **k: (seen.append(1), plain(*a, **k))[1])
    query = torch.randn(1, 1, 1, DIM).bfloat16()
    found, _ = scan.search(query, 8, visible=visibility(query, CHUNKS))
    assert found.flatten().tolist() == [*range(7, -1, -1)] and seen == [1]
    query = query.float().requires_grad_()
    LandmarkScan(landmarks_of("random", 1)).search(query, 8, visible=visibility(query, CHUNKS))[1].sum().backward()
    assert query.grad.norm() > 0 and seen == [1, 1]


def test_the_norm_is_not_too_small_and_tokens_that_read_nothing_find_nothing():
    landmarks = landmarks_of("one is huge", 2)
    landmarks[3] *= 1e20
    scan = LandmarkScan(landmarks)
    assert scan._norm.isfinite().all()
    assert (scan._norm[:, 0].double() >= landmarks.double().norm(dim=-1).amax(0)).all()
    query = torch.randn(1, 2, 2, DIM)
    found, scores = scan.search(query, 8, visible=visibility(query, CHUNKS, -1))
    assert (found == -1).all() and (scores == -torch.inf).all()


def test_operands_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"must be bf16, got torch\.float32"):
        LandmarkScan(torch.zeros(4, 1, 8))
    scan, query = LandmarkScan(torch.zeros(40, 1, 8).bfloat16()), torch.zeros(1, 1, 1, 8)
    for options, message in (
        ({"topk": 0}, "topk must be >= 1"),
        ({"topk": 2, "scale": -1.0}, "scale must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            scan.search(query, visible=visibility(query, 40), **options)
