"""The index against the exact scan: equal where landmarks fill few dimensions."""

from __future__ import annotations

import pytest
import torch

from hsa_ultralong.memory.landmark_index import LandmarkIndex
from hsa_ultralong.memory.quantization import decode, encode
from hsa_ultralong.ops import ChunkVisibility, chunk_topk


def exact(query: torch.Tensor, landmarks: torch.Tensor, topk: int, **options) -> tuple[torch.Tensor, torch.Tensor]:
    batch, num_tokens = query.shape[:2]
    zeros = torch.zeros(batch, num_tokens, dtype=torch.int32)
    ends = torch.zeros(1, landmarks.shape[0], dtype=torch.int32)
    visible = ChunkVisibility(zeros, zeros, torch.full_like(ends, -1), ends)
    return chunk_topk(query, landmarks[None], visible, topk=topk, **options)


def recall(found: torch.Tensor, expected: torch.Tensor) -> float:
    return (expected[..., :, None] == found[..., None, :]).any(-1).float().mean().item()


def flat(num_chunks: int, heads: int = 1, dim: int = 64, rank: int = 16, noise: float = 0.01) -> torch.Tensor:
    """Landmarks (C, Hr, R) that fill `rank` dimensions but for a little noise, as trained ones do."""
    directions = torch.linalg.qr(torch.randn(heads, dim, rank)).Q  # (Hr, R, rank)
    coordinates = torch.randn(heads, num_chunks, rank)
    clean = (coordinates @ directions.transpose(1, 2)).transpose(0, 1)  # (C, Hr, R)
    return clean + noise * torch.randn(num_chunks, heads, dim) + torch.randn(heads, dim)


@pytest.mark.parametrize(("num_chunks", "heads", "dim"), [(4096, 1, 64), (5003, 2, 37), (8200, 3, 40)])
@pytest.mark.parametrize("topk", [1, 32])
def test_scoring_everything_equals_the_exact_scan(num_chunks, heads, dim, topk):
    landmarks = flat(num_chunks, heads, dim)
    index = LandmarkIndex.build(landmarks, num_dims=3)
    query = torch.randn(2, 3, heads, dim)
    found, scores = index.search(query, topk, num_scored=num_chunks)
    expected, expected_scores = exact(query, landmarks, topk)
    assert torch.equal(found, expected) and found.dtype == torch.int32
    torch.testing.assert_close(scores, expected_scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads", [1, 2])
def test_few_dimensions_find_what_the_exact_scan_finds(heads):
    landmarks, query = flat(6000, heads), torch.randn(2, 16, heads, 64)
    index = LandmarkIndex.build(landmarks)
    assert index.basis is not None and index.basis.shape == (heads, 64, 16)
    found, scores = index.search(query, 32)
    expected, expected_scores = exact(query, landmarks, 32)
    assert recall(found, expected) > 0.999
    same = found == expected
    torch.testing.assert_close(scores[same], expected_scores[same], rtol=1e-5, atol=1e-5)


def test_a_rare_chunk_is_found_among_alike_ones():
    landmarks = flat(8192, noise=0.0)
    rare = landmarks[:4096].mean(0) + 6 * (landmarks[7] - landmarks[:4096].mean(0))
    query = rare[None, None] - landmarks.mean(0)
    landmarks[5000] = rare
    found, _ = LandmarkIndex.build(landmarks).search(query, 1)
    assert found.item() == 5000


def test_more_candidates_find_more():
    landmarks, query = flat(5000, rank=48, dim=64), torch.randn(1, 64, 1, 64)
    index = LandmarkIndex.build(landmarks, num_dims=24)
    expected, _ = exact(query, landmarks, 16)
    recalls = [recall(index.search(query, 16, num_scored=n)[0], expected) for n in (16, 128, 1024, 5000)]
    assert recalls == sorted(recalls) and recalls[0] < 0.9 and recalls[3] == 1.0


@pytest.mark.parametrize("num_chunks", [0, 1, 31, 300, 4095])
def test_a_small_index_is_an_exact_scan(num_chunks):
    landmarks = flat(num_chunks, heads=2)
    index = LandmarkIndex.build(landmarks)
    query = torch.randn(2, 5, 2, 64)
    found, scores = index.search(query, 32, num_scored=1)
    expected, expected_scores = exact(query, landmarks, 32)
    assert index.basis is None and index.num_bytes == 0 and found.shape == (2, 5, 2, min(32, num_chunks))
    assert torch.equal(found, expected) and torch.equal(scores, expected_scores)


def test_landmarks_that_fill_all_dimensions_are_searched_exactly():
    landmarks, query = torch.randn(4500, 1, 32), torch.randn(1, 8, 1, 32)
    index = LandmarkIndex.build(landmarks)
    assert index.basis is None
    assert torch.equal(index.search(query, 32)[0], exact(query, landmarks, 32)[0])


def test_the_dimension_of_the_sketch_follows_the_landmarks():
    for rank, dims in ((1, 16), (16, 16), (17, 32), (31, 32)):
        index = LandmarkIndex.build(flat(4096, rank=rank, dim=128, noise=0.001))
        assert index.basis is not None and index.basis.shape[-1] == dims
    landmarks = flat(4096, rank=16, dim=128, noise=0.001)
    rounded = LandmarkIndex.build(decode(*encode(landmarks, "int8"), torch.float32))
    assert rounded.basis is not None and rounded.basis.shape[-1] == 16


def test_the_scale_is_that_of_chunk_topk():
    landmarks, query = flat(4096, heads=2), torch.randn(1, 4, 2, 64)
    index = LandmarkIndex.build(landmarks)
    for options in ({}, {"scale": 0.3}, {"scale": torch.tensor([0.5, 3.0])}):
        found, scores = index.search(query, 8, **options)
        expected, expected_scores = exact(query, landmarks, 8, **options)
        assert torch.equal(found, expected)
        torch.testing.assert_close(scores, expected_scores, rtol=1e-5, atol=1e-5)


def test_ties_among_the_candidates_go_to_the_lower_chunk():
    landmarks = flat(4200, noise=0.0)
    landmarks[2100:] = landmarks[:2100]
    query = torch.randn(1, 20, 1, 64)
    found, _ = LandmarkIndex.build(landmarks).search(query, 1, num_scored=64)
    assert int(found.max()) < 2100 and torch.equal(found, exact(query, landmarks, 1)[0])


def test_equal_landmarks_need_no_special_case():
    index = LandmarkIndex.build(torch.ones(4096, 1, 64))
    found, scores = index.search(torch.ones(1, 1, 1, 64), 4)
    assert len(set(found.flatten().tolist())) == 4 and int(found.min()) >= 0
    torch.testing.assert_close(scores, torch.full_like(scores, 8.0))


def test_the_order_is_descending_and_the_scores_exact():
    landmarks, query = flat(4096, heads=2), torch.randn(3, 5, 2, 64)
    found, scores = LandmarkIndex.build(landmarks, num_dims=4).search(query, 16)
    assert bool((found[..., 1:] < found[..., :-1]).all())
    picked = landmarks[found.long(), torch.arange(2)[:, None]]  # (3, 5, 2, K, R)
    torch.testing.assert_close(scores, (picked * query[..., None, :]).sum(-1) / 8, rtol=1e-5, atol=1e-5)


def test_building_twice_gives_the_same_index():
    landmarks = flat(4500, heads=2)
    first, second = LandmarkIndex.build(landmarks), LandmarkIndex.build(landmarks)
    assert torch.equal(first.basis, second.basis) and torch.equal(first.sketches, second.sketches)


def test_landmarks_outside_of_the_directions_bring_new_ones():
    parts = [flat(count, dim=128, noise=0.001) for count in (4500, 3000)]
    landmarks, query = torch.cat(parts), torch.randn(1, 32, 1, 128)
    index = LandmarkIndex.build(parts[0])
    assert index.basis is not None and index.basis.shape[-1] == 16
    index = LandmarkIndex.build(landmarks)
    assert index.basis is not None and index.basis.shape[-1] > 16
    assert recall(index.search(query, 16)[0], exact(query, landmarks, 16)[0]) > 0.999
    # nothing is gained where the later landmarks fill everything
    landmarks = torch.cat((landmarks, torch.randn(6000, 1, 128)))
    index = LandmarkIndex.build(landmarks)
    assert index.basis is None and index.num_chunks == 13500
    assert torch.equal(index.search(query, 16)[0], exact(query, landmarks, 16)[0])


def test_landmarks_and_queries_may_be_bf16():
    landmarks, query = flat(4200).bfloat16(), torch.randn(1, 4, 1, 64).bfloat16()
    index = LandmarkIndex.build(landmarks)
    found, scores = index.search(query, 8)
    expected, expected_scores = exact(query, landmarks, 8)
    assert index.sketches.dtype == torch.bfloat16
    assert torch.equal(found, expected) and scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected_scores, rtol=1e-5, atol=1e-5)


def test_wrong_calls_are_refused():
    index = LandmarkIndex.build(torch.randn(10, 1, 4))
    with pytest.raises(ValueError, match="landmarks must have shape"):
        LandmarkIndex.build(torch.randn(10, 4))
    with pytest.raises(ValueError, match=r"num_dims must be within 1\.\.4"):
        LandmarkIndex.build(torch.randn(10, 1, 4), num_dims=5)
    with pytest.raises(ValueError, match="query must have shape"):
        index.search(torch.randn(1, 1, 2, 4), 4)
    with pytest.raises(ValueError, match="topk and num_scored"):
        index.search(torch.randn(1, 1, 1, 4), 0)
    with pytest.raises(ValueError, match="scale must be positive"):
        index.search(torch.randn(1, 1, 1, 4), 4, scale=-1.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_index_finds_the_same_chunks():
    landmarks, query = flat(8192, heads=2), torch.randn(2, 5, 2, 64)
    found, scores = LandmarkIndex.build(landmarks.cuda()).search(query.cuda(), 16)
    expected, expected_scores = LandmarkIndex.build(landmarks).search(query, 16)
    assert recall(found.cpu(), expected) > 0.999
    torch.testing.assert_close(scores.cpu().sort(-1).values, expected_scores.sort(-1).values, rtol=1e-3, atol=1e-3)
