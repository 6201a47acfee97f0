"""Lists of alike chunks against the exact scan: equal where all are read, and never without the odd chunks."""

from __future__ import annotations

import pytest
import torch

from hsa_ultralong.memory import landmark_index, landmark_lists
from hsa_ultralong.memory.landmark_index import LandmarkIndex
from hsa_ultralong.memory.landmark_lists import LandmarkLists
from hsa_ultralong.ops import ChunkVisibility, chunk_topk


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(landmark_index, "_FIT_CHUNKS", 256)
    monkeypatch.setattr(landmark_lists, "_LEAST_CHUNKS", 512)


def exact(query: torch.Tensor, landmarks: torch.Tensor, topk: int, **options) -> tuple[torch.Tensor, torch.Tensor]:
    zeros = torch.zeros(query.shape[:2], dtype=torch.int32)
    ends = torch.zeros(1, landmarks.shape[0], dtype=torch.int32)
    return chunk_topk(query, landmarks[None], ChunkVisibility(zeros, zeros, ends - 1, ends), topk=topk, **options)


def recall(found: torch.Tensor, expected: torch.Tensor) -> float:
    return (expected[..., :, None] == found[..., None, :]).any(-1).float().mean().item()


def topics(num_chunks: int, heads: int = 1, dim: int = 64, rank: int = 12, dtype=torch.float32) -> torch.Tensor:
    """Landmarks (C, Hr, R) in `rank` directions, gathered around 40 centres, with a little noise in all."""
    directions = torch.linalg.qr(torch.randn(heads, dim, rank, dtype=dtype)).Q  # (Hr, R, rank)
    centres = torch.randn(heads, 40, rank, dtype=dtype)[:, torch.randint(40, (num_chunks,))]
    points = centres + 0.3 * torch.randn(heads, num_chunks, rank, dtype=dtype)
    clean = (points @ directions.mT).transpose(0, 1)  # (C, Hr, R)
    return clean + 1e-3 * torch.randn(num_chunks, heads, dim, dtype=dtype) + torch.randn(heads, dim, dtype=dtype)


def listed(landmarks: torch.Tensor, **options) -> LandmarkLists:
    index = LandmarkLists.build(landmarks, **options)
    assert isinstance(index, LandmarkLists)
    return index


@pytest.mark.parametrize(("num_chunks", "heads"), [(512, 1), (2000, 2), (4097, 1)])
@pytest.mark.parametrize("topk", [1, 32])
def test_reading_all_lists_equals_the_exact_scan_in_fp64(num_chunks, heads, topk):
    landmarks = topics(num_chunks, heads, dtype=torch.float64)
    query = torch.randn(2, 3, heads, 64, dtype=torch.float64)
    expected, scores = exact(query, landmarks, topk)
    for options, scored in (({"num_read": num_chunks}, 8 * topk), ({}, num_chunks)):
        found = listed(landmarks, **options).search(query, topk, num_scored=scored)
        assert torch.equal(found[0], expected)
        torch.testing.assert_close(found[1].double(), scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_chunks", [512, 777, 3000])
def test_every_chunk_is_odd_or_in_one_list(num_chunks):
    index = listed(topics(num_chunks, heads=2))
    every = torch.arange(num_chunks, dtype=torch.int32)
    assert all(torch.equal(members.sort().values, every) for members in index.members)
    sizes = index.lists.bounds.diff()
    assert int(sizes.max()) <= landmark_lists._LIST_CHUNKS and int(sizes.max() - sizes.min()) <= 1
    assert index.num_odd == num_chunks // landmark_lists._ODD and int(sizes.sum()) == num_chunks - index.num_odd
    assert torch.equal(index.groups.bounds, index.lists.bounds[:: landmark_lists._GROUP])


def test_means_and_variances_are_those_of_the_chunks_of_a_list():
    index = listed(topics(1500, heads=2))
    for spans in (index.lists, index.groups):
        for number in (0, 7, len(spans.bounds) - 2):
            inside = slice(*(index.num_odd + spans.bounds[number : number + 2]).tolist())
            part = index.sketches[1, inside]
            torch.testing.assert_close(spans.mean[1, number], part.mean(0), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(spans.variance[1, number], part.var(0, correction=0), rtol=1e-3, atol=1e-5)


def test_lists_hold_alike_chunks():
    index = listed(topics(4000))
    within = index.lists.variance.sum(-1).mean()
    whole = index.sketches[0].var(0).sum()
    assert within < 0.2 * whole


def lone(landmarks: torch.Tensor, number: int) -> torch.Tensor:
    """Make a chunk like no other: a little of what no other has. Returns a query (1, 1, 1, R) for it."""
    strange = torch.linalg.eigh(torch.cov(landmarks[:, 0].T))[1][:, -12]  # least of the directions in use
    landmarks[number, 0] = landmarks.mean(0)[0] + 8 * strange
    return strange[None, None, None]


def test_a_chunk_like_no_other_is_found_however_little_is_read():
    landmarks = topics(4000)
    query = lone(landmarks, 1234)
    index = listed(landmarks, num_read=1)
    assert 1234 in index.members[0, : index.num_odd]
    assert index.search(query, 1)[0].item() == exact(query, landmarks, 1)[0].item() == 1234


def test_what_is_farther_than_the_least_odd_chunk_is_odd_once_it_is_a_chunk():
    landmarks = topics(4000, heads=2)
    index = listed(landmarks)
    others = 0.6 * torch.randn(24, 2, 64) + landmarks[:24]
    others = torch.cat((others, landmarks[100:108], landmarks[100:108] + 1e-4))
    is_far = index.distances(others) > index.odd_from
    assert int(is_far[:24].sum()) > 8 and not is_far[24:].all(0).any()
    for number in range(0, 24, 6):
        changed = landmarks.clone()
        changed[1000] = others[number]
        anew = listed(changed)
        for head in is_far[number].nonzero()[:, 0].tolist():
            assert 1000 in anew.members[head, : anew.num_odd]


def test_distances_are_from_the_fourth_nearest_in_units_of_the_spread():
    landmarks = topics(1200)
    index = listed(landmarks)
    others = torch.cat((landmarks[5:6], landmarks[7:8] + 0.1 * torch.randn(6, 1, 64)))
    white = (landmarks[:, 0] @ index.basis[0]) / index.spread[0]
    rows = (others[:, 0] @ index.basis[0]) / index.spread[0]
    squares = torch.cdist(rows, white).square()
    expected = squares.sort().values[:, 3]
    torch.testing.assert_close(index.distances(others)[:, 0], expected, rtol=1e-3, atol=1e-3)
    near = torch.zeros(7, 7, dtype=torch.bool)
    near[1:, 1:] = True
    beside = torch.cdist(rows, rows).square().masked_fill(~near | torch.eye(7, dtype=torch.bool), torch.inf)
    expected = torch.cat((squares, beside), 1).sort().values[:, 3]
    torch.testing.assert_close(index.distances(others, near)[:, 0], expected, rtol=1e-3, atol=1e-3)


def test_the_share_that_is_scanned_falls_with_the_number_of_chunks():
    shares = [listed(topics(n)).num_scanned(4) / n for n in (1000, 4000, 16000)]
    assert shares == sorted(shares, reverse=True) and shares[2] > 1 / landmark_lists._ODD


def test_reading_more_finds_more():
    landmarks, query = topics(6000), torch.randn(1, 64, 1, 64)
    expected, _ = exact(query, landmarks, 16)
    recalls = [recall(listed(landmarks, num_read=n).search(query, 16)[0], expected) for n in (64, 300, 1500, 6000)]
    assert recalls == sorted(recalls) and recalls[0] < 0.9 and recalls[3] == 1.0
    assert recall(listed(landmarks).search(query, 16)[0], expected) > 0.98


def test_few_chunks_and_landmarks_that_fill_all_dimensions_make_no_lists():
    for landmarks in (topics(511), torch.randn(4500, 1, 32)):
        index = LandmarkLists.build(landmarks)
        query = torch.randn(1, 4, 1, landmarks.shape[-1])
        assert type(index) is LandmarkIndex
        assert torch.equal(index.search(query, 8)[0], exact(query, landmarks, 8)[0])
    assert type(LandmarkLists.build(topics(511), least_chunks=511)) is LandmarkLists
    assert type(LandmarkLists.build(topics(600), least_chunks=601)) is LandmarkIndex


def test_scale_padding_order_and_ties_are_those_of_chunk_topk():
    landmarks, query = topics(2400, heads=2), torch.randn(2, 4, 2, 64)
    landmarks[1200:] = landmarks[:1200]
    index = listed(landmarks, num_read=2400)
    segments = torch.tensor([[0, -1, 0, 0], [0, 0, 0, -1]], dtype=torch.int32)
    ends = torch.zeros(1, 2400, dtype=torch.int32)
    visible = ChunkVisibility(segments, torch.zeros_like(segments), ends - 1, ends)
    for scale in (None, 0.3, torch.tensor([0.5, 3.0])):
        found, scores = index.search(query, 8, visible=visible, scale=scale)
        expected, expected_scores = exact(query, landmarks, 8, scale=scale)
        is_padding = (segments < 0)[..., None, None]
        assert torch.equal(found, expected.masked_fill(is_padding, -1))
        torch.testing.assert_close(scores, expected_scores.masked_fill(is_padding, -torch.inf), rtol=1e-5, atol=1e-5)


def test_landmarks_that_are_not_finite_are_never_found():
    landmarks, query = topics(2000), torch.randn(1, 16, 1, 64)
    landmarks[[3, 700, 1999]] = torch.tensor([torch.nan, torch.inf, -torch.inf])[:, None, None]
    found, scores = listed(landmarks, num_read=2000).search(query, 16)
    assert not torch.isin(found, torch.tensor([3, 700, 1999])).any() and bool(scores.isfinite().all())


def test_numbers_that_overflow_when_squared_cost_no_chunk_its_place():
    landmarks = topics(700)
    landmarks[:50] *= 1e25
    index = listed(landmarks)
    assert torch.equal(index.members[0].sort().values, torch.arange(700, dtype=torch.int32))


def test_landmarks_may_be_bf16_or_all_alike():
    landmarks, query = topics(3000).bfloat16(), torch.randn(1, 8, 1, 64).bfloat16()
    found, scores = listed(landmarks, num_read=3000).search(query, 8)
    expected, expected_scores = exact(query, landmarks, 8)
    assert torch.equal(found, expected)
    torch.testing.assert_close(scores, expected_scores, rtol=1e-5, atol=1e-5)
    found, _ = listed(torch.ones(1000, 1, 64)).search(torch.ones(1, 1, 1, 64), 4)
    assert len(set(found.flatten().tolist())) == 4 and int(found.min()) >= 0


def test_building_twice_gives_the_same_lists():
    landmarks = topics(3000, heads=2)
    first, second = listed(landmarks), listed(landmarks)
    assert torch.equal(first.members, second.members) and torch.equal(first.lists.mean, second.lists.mean)


def test_wrong_calls_are_refused():
    with pytest.raises(ValueError, match="num_read must be >= 1"):
        LandmarkLists.build(torch.randn(600, 1, 64), num_read=0)
    with pytest.raises(ValueError, match="landmarks must have shape"):
        LandmarkLists.build(torch.randn(600, 64))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_lists_find_the_same_chunks():
    landmarks, query = topics(8192, heads=2), torch.randn(2, 5, 2, 64)
    found, _ = listed(landmarks.cuda(), num_read=8192).search(query.cuda(), 16)
    assert recall(found.cpu(), exact(query, landmarks, 16)[0]) > 0.999
