"""chunk_topk for few queries over many landmarks on Hopper (chunk_topk/kernel_hopper.py), on such a card alone: equal
bit for bit to the scan of other cards, in graphs, over and over. The last kernel is tested everywhere, after a stand-in
(test_chunk_topk_triton.py)."""

from __future__ import annotations

import pytest
import torch

from hsa_ultralong.ops import ChunkVisibility, chunk_topk
from hsa_ultralong.ops._triton import runs_hopper_kernels

pytest.importorskip("triton")
from hsa_ultralong.ops.chunk_topk import plan, triton_topk

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not runs_hopper_kernels(torch.cuda.current_device()), reason="needs Hopper"
    ),
]


def draw(*shape, seed=0, dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def places(batch, tokens, rows, chunks, foreign):
    """Every case of the rule."""
    generator = torch.Generator("cuda").manual_seed(7)

    def whole(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator, device="cuda", dtype=torch.int32)

    return ChunkVisibility(
        whole(0, 3, batch, tokens), whole(0, 100, batch, tokens), whole(-2, 3, rows, chunks),
        whole(0, 100, rows, chunks), foreign,
    )  # fmt: skip


def both(monkeypatch, query, landmarks, visible, topk, **options):
    """By the stream and by the scan of other cards."""
    found, streamed = [], []
    decode = triton_topk._decode_stream
    monkeypatch.setattr(triton_topk, "_decode_stream", lambda *given: streamed.append(1) or decode(*given))
    for is_stream in (True, False):
        monkeypatch.setattr(plan, "_STREAMS", is_stream)
        plan.plan_of.cache_clear()
        found.append(chunk_topk(query, landmarks, visible, topk=topk, impl="triton", **options))
        assert len(streamed) == 1
    plan.plan_of.cache_clear()
    return found


def assert_equal(left, right):
    assert torch.equal(left[0], right[0])
    assert torch.equal(left[1], right[1])


# batch, tokens, heads, R, chunks, K, rows of the landmarks, rows of who owns chunks
SHAPES = {
    "one": (1, 1, 1, 256, 20_000, 32, 1, 1),
    "shipped": (1, 1, 1, 512, 16_384, 32, 1, 1),
    "wide": (1, 1, 1, 1024, 8_200, 32, 1, 1),
    "few_chunks": (1, 1, 1, 256, 8_192, 8, 1, 1),
    "two": (1, 2, 1, 256, 70_001, 31, 1, 1),
    "several": (2, 9, 2, 256, 9_001, 20, 1, 1),
    "own_rows": (2, 3, 2, 512, 9_004, 32, 2, 2),
    "own_landmarks": (2, 1, 1, 1024, 5_001, 1, 2, 1),
    "own_places": (2, 2, 1, 256, 9_016, 32, 1, 2),
    "around": (1, 1, 1, 512, 150_003, 32, 1, 1),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("foreign", ["hidden", "past"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_stream_equals_the_scan_of_other_cards_bit_for_bit(monkeypatch, shape, foreign, dtype):
    batch, tokens, heads, dim, chunks, topk, rows, owners = SHAPES[shape]
    query, landmarks = draw(batch, tokens, heads, dim, dtype=dtype), draw(rows, chunks, heads, dim, seed=1, dtype=dtype)
    factor = torch.rand(heads, device="cuda") + 0.5
    found, expected = both(
        monkeypatch, query, landmarks, places(batch, tokens, owners, chunks, foreign), topk, scale=factor
    )
    assert_equal(found, expected)
    assert (found[0] >= 0).any()


@pytest.mark.parametrize("place", ["one_share", "one_lane", "few_shares", "one", "ties", "ascending"])
def test_wherever_the_best_candidates_lie(monkeypatch, place):
    chunks, dim = 40_000, 256
    query, landmarks = draw(1, 1, 1, dim), draw(1, chunks, 1, dim, seed=1)
    chunk = torch.arange(chunks, device="cuda")
    reader = torch.zeros(1, 1, dtype=torch.int32, device="cuda")
    owners = torch.full((1, chunks), -1, dtype=torch.int32, device="cuda")
    everyone = ChunkVisibility(reader, reader, owners, torch.zeros_like(owners))
    favoured = {
        "one_share": chunk // 64 % 128 == 3,
        "one_lane": chunk % 8192 == 77,
        "few_shares": chunk // 64 % 128 < 5,
        "one": chunk == chunks - 1,
        "ties": chunk < 0,
        "ascending": chunk < 0,
    }[place]
    query[..., 0] = 8
    if place == "ties":
        landmarks = landmarks[:, :7].repeat(1, chunks // 7 + 1, 1, 1)[:, :chunks].contiguous()
    elif place == "ascending":
        landmarks[..., 0] = chunk[:, None] / 4096
    elif place in ("few_shares", "one"):
        everyone.chunk_segment[:, ~favoured] = -2
    landmarks[..., 0] += 32 * favoured[:, None]
    assert_equal(*both(monkeypatch, query, landmarks, everyone, 32))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_landmarks_that_are_not_finite_are_not_chosen_and_reach_no_others(monkeypatch, bad):
    query, landmarks = draw(1, 2, 1, 256), draw(1, 10_000, 1, 256, seed=1)
    landmarks[:, ::5, :, 3] = bad
    landmarks[:, -3:] = bad
    query[:, 1, :, 0] = bad
    found, expected = both(monkeypatch, query, landmarks, places(1, 2, 1, 10_000, "past"), 32)
    assert_equal(found, expected)
    assert (found[0][:, 0] >= 0).all() and not (found[0][:, 0] % 5 == 0).any() and (found[0][:, 1] == -1).all()


@pytest.mark.parametrize("dim", [256, 512, 1024])
def test_graphs_and_two_hundred_repeats_are_bit_identical(monkeypatch, dim):
    chunks = 65_536
    query, landmarks = draw(1, 1, 1, dim), draw(1, chunks, 1, dim, seed=1)
    visible = places(1, 1, 1, chunks, "past")
    expected = both(monkeypatch, query, landmarks, visible, 32)[1]
    monkeypatch.setattr(plan, "_STREAMS", True)

    def stream():
        return chunk_topk(query, landmarks, visible, topk=32, impl="triton")

    assert_equal(stream(), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [stream() for _ in range(4)]
    for _ in range(50):
        for indices, scores in captured:
            indices.fill_(-7)
            scores.fill_(float("nan"))
        graph.replay()
        for one in captured:
            assert_equal(one, expected)
