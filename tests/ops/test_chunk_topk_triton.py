"""chunk_topk's Triton kernels against the reference; without a GPU they run under the interpreter, in fp32.

Inputs are small integers where index sets must be equal: their scores are exact, ties included.
"""

from __future__ import annotations

import itertools
import sys
from types import SimpleNamespace

import pytest
import torch

from hsa_ultralong.ops import ChunkVisibility, chunk_topk
from hsa_ultralong.testing.factories import generator, random_tensor, random_visibility

pytest.importorskip("triton")
from hsa_ultralong.ops.chunk_topk import kernel_gradients, plan, triton_topk
from hsa_ultralong.ops.chunk_topk.gradients import product_gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles and blocks from few tokens and chunks; no path for few queries unless a test asks for it."""
    monkeypatch.setattr(plan, "tile_options", lambda *_: plan.TileOptions(16, 16, 4))
    monkeypatch.setattr(triton_topk, "_DECODE_QUERIES", 0)
    # shapes that were seen with other sizes
    plan.plan_of.cache_clear()
    yield
    plan.plan_of.cache_clear()


def integers(*shape, seed=0):
    return torch.randint(-3, 4, shape, generator=generator(seed)).to(DEVICE, torch.float32)


def places(batch, tokens, chunks, foreign="past"):
    visible = random_visibility(batch, tokens, chunks, foreign=foreign, seed=tokens)
    parts = (visible.query_segment, visible.query_position, visible.chunk_segment, visible.chunk_end)
    return ChunkVisibility(*(x.to(DEVICE) for x in parts), foreign)


def run(impl, dtype, query, landmarks, visible, topk, **noise):
    """Indices, scores, gradients of query, landmarks and scale."""
    scale = 0.5 + torch.rand(query.shape[2], generator=generator(9))
    leaves = [x.detach().clone().to(DEVICE, dtype).requires_grad_() for x in (query, landmarks, scale)]
    indices, scores = chunk_topk(leaves[0], leaves[1], visible, topk=topk, scale=leaves[2], impl=impl, **noise)
    slope = random_tensor(*scores.shape, seed=5).to(scores)
    torch.where(indices >= 0, scores, 0.0).mul(slope).sum().backward()
    return indices, scores, [x.grad for x in leaves]


def assert_same(query, landmarks, visible, topk, **options):
    expected = run("reference", torch.float64, query, landmarks, visible, topk, **options)
    actual = run("triton", torch.float32, query, landmarks, visible, topk, **options)
    assert actual[0].dtype == torch.int32 and actual[1].dtype == torch.float32
    assert torch.equal(actual[0], expected[0])
    torch.testing.assert_close(actual[1].double(), expected[1], rtol=1e-5, atol=1e-5)
    for left, right in zip(actual[2], expected[2], strict=True):
        torch.testing.assert_close(left.double(), right.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("foreign", ["hidden", "past"])
@pytest.mark.parametrize("topk", [1, 3, 8])
def test_kernels_equal_reference(topk, foreign):
    visible = places(2, 20, 40, foreign)
    assert_same(random_tensor(2, 20, 1, 8), random_tensor(2, 40, 1, 8, seed=1), visible, topk)


@pytest.mark.parametrize("topk", [23, 99])
@pytest.mark.parametrize(("heads", "rows"), [(1, 2), (2, 1)])
def test_full_coverage_equals_reference(topk, heads, rows):
    visible = places(2, 20, 23)
    assert_same(random_tensor(2, 20, heads, 8), random_tensor(rows, 23, heads, 8, seed=1), visible, topk)


@pytest.mark.parametrize("rows", [1, 2])
def test_retrieval_heads_odd_sizes_and_a_shared_memory(rows):
    visible = places(2, 9, 37)
    assert_same(random_tensor(2, 9, 2, 24), random_tensor(rows, 37, 2, 24, seed=1), visible, 12)


def test_ties_go_to_the_lower_index():
    visible = ChunkVisibility.causal(1, 40, 60, 0, device=DEVICE)
    query, landmarks = integers(1, 40, 1, 4), integers(1, 60, 1, 4, seed=1)
    expected = chunk_topk(query, landmarks, visible, topk=8, impl="reference")
    actual = chunk_topk(query, landmarks, visible, topk=8, impl="triton")
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


def test_noise_is_that_of_the_other_backends_and_stays_out_of_the_scores():
    visible = places(2, 18, 20, "past")
    for seed, start, heads in ((7, 0, 2), (2**31 + 5, 1, 1), (7, 2**20, 1), (-1, 0, 1)):
        query, landmarks = random_tensor(2, 18, heads, 8), random_tensor(2, 20, heads, 8, seed=1)
        assert_same(query, landmarks, visible, 4, noise_seed=seed, noise_start=start)


@pytest.mark.parametrize("most_inserted", [32, 0])
def test_a_seed_on_the_device_draws_the_noise_of_its_number(monkeypatch, most_inserted):
    """By both streaming kernels, at one address."""
    monkeypatch.setattr(plan, "_MOST_INSERTED", most_inserted)
    visible = ChunkVisibility.causal(2, 9, 20, 0, device=DEVICE)
    stored = torch.zeros((), dtype=torch.int64, device=DEVICE)
    arguments = (random_tensor(2, 9, 1, 8), random_tensor(2, 20, 1, 8, seed=1), visible, 4)
    found = []
    for seed in (7, 2**31 + 5, -1, 3 * 2**32 + 7):
        stored.fill_(seed)
        given, read = (run("triton", torch.float32, *arguments, noise_seed=one) for one in (seed, stored))
        for left, right in zip([*given[:2], *given[2]], [*read[:2], *read[2]], strict=True):
            assert torch.equal(left, right)
        found.append(read[0])
    assert torch.equal(found[0], found[3]) and not torch.equal(found[0], found[1])


def test_the_set_is_that_of_topk_over_the_kernels_own_scores():
    visible = ChunkVisibility.causal(1, 30, 40, 0, device=DEVICE)
    query, landmarks = (random_tensor(1, n, 1, 16, seed=n).to(DEVICE, torch.bfloat16) for n in (30, 40))
    indices, _ = chunk_topk(query, landmarks, visible, topk=5, impl="triton")
    every, scores = chunk_topk(query, landmarks, visible, topk=40, impl="triton")  # full coverage, newest first
    best = every.gather(-1, scores.topk(5).indices).sort(-1, descending=True).values
    assert torch.equal(indices, best)


@pytest.mark.parametrize(
    ("rows", "heads", "topk", "chunks", "share"),
    [(1, 1, 5, 150, 64), (2, 2, 4, 150, 64), (1, 1, 32, 150, 64), (1, 1, 70, 150, 64), (1, 1, 32, 33, 512),
     (2, 1, 1, 2, 512), (1, 2, 7, 600, 512)],
)  # fmt: skip
def test_the_decoding_scan_equals_the_reference(monkeypatch, rows, heads, topk, chunks, share):
    monkeypatch.setattr(triton_topk, "_DECODE_QUERIES", 64)
    chosen = plan.decode_options
    monkeypatch.setattr(plan, "decode_options", lambda *case: chosen(*case)._replace(share=share))
    monkeypatch.setattr(triton_topk, "_solve", None)
    visible = places(2, 2, chunks, "past")
    query, landmarks = integers(2, 2, heads, 8), integers(rows, chunks, heads, 8, seed=1)
    expected = chunk_topk(query, landmarks, visible, topk=topk, impl="reference")
    actual = chunk_topk(query, landmarks, visible, topk=topk, impl="triton")
    assert torch.equal(actual[0], expected[0])
    torch.testing.assert_close(actual[1], expected[1])


class StreamStandIn:
    """Does in torch what kernel_hopper.stream_scan_kernel does; that runs on a card alone (test_decode_hopper.py)."""

    def __getitem__(self, grid):
        return lambda *operands, **constants: self.run(operands, constants)

    def run(self, operands, constants):
        landmarks, segments, ends, query, segment, position, factor, keys, lane_tops, share_tops, chunks = operands[:11]
        heads, queries, padded, tiles = operands[11:]
        shares, lanes, listed = (constants[name] for name in ("SHARES", "TILE", "LISTED"))
        rows = keys.shape[0] // (heads * queries)
        query = query.view(rows, queries, heads, -1)
        scores = torch.einsum("bqhr,bchr->bhqc", query, landmarks.expand(rows, -1, -1, -1)) * factor[:, None, None]
        foreign = "past" if constants["FOREIGN"] else "hidden"
        seen = ChunkVisibility(segment.view(rows, -1), position.view(rows, -1), segments, ends, foreign).mask()[:, None]
        bits = scores.view(torch.int32)
        ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) + 0x00800000
        ordered = torch.where(seen, ordered, -(2**31)).long()
        found = (ordered << 32) | (torch.arange(chunks, device=DEVICE) ^ 0x7FFFFFFF)
        keys.fill_(2**62)  # behind the last chunk lies what was there before
        keys.view(rows, heads, queries, padded)[..., :chunks] = found
        steps = -(-tiles // shares)
        wide = torch.full((keys.shape[0], (steps + 1) * shares * lanes), -(2**63), device=DEVICE)
        wide[:, :chunks] = found.flatten(0, 2)
        best, second = wide.view(-1, steps + 1, shares, lanes).topk(2, 1).values.unbind(1)
        lane_tops.copy_(best.flatten(1))
        places, taken, others = (
            share_tops.view(-1, listed + 1, shares),
            torch.zeros_like(best, dtype=torch.bool),
            second,
        )
        others = torch.full_like(second, -(2**63))
        for place in range(listed):
            places[:, place] = best.amax(-1)
            is_top = best == best.amax(-1, keepdim=True)
            others = torch.where(is_top & taken, best, others)
            best = torch.where(is_top, torch.where(taken, -(2**63), second), best)
            taken = taken | is_top
        places[:, listed] = torch.maximum(best, others).amax(-1)


@pytest.mark.skipif(DEVICE != "cpu", reason="a stand-in for a kernel")
@pytest.mark.parametrize("place", ["everywhere", "one_share", "one_lane", "few_shares", "one"])
@pytest.mark.parametrize(("rows", "heads", "topk", "chunks"), [(1, 1, 5, 515), (2, 2, 32, 1300)])
def test_the_last_kernel_after_a_stream_equals_the_reference(monkeypatch, rows, heads, topk, chunks, place):
    """Wherever the best candidates lie: with many in one share or lane the lanes are looked through, and where too few
    shares have one, all of the few are ranked from the shares down."""
    kernels = SimpleNamespace(stream_scan_kernel=StreamStandIn(), described=lambda *tensors: tensors[:3])
    monkeypatch.setitem(sys.modules, "hsa_ultralong.ops.chunk_topk.kernel_hopper", kernels)
    for name, value in {"_STREAM_SHARES": 32, "_STREAM_TILE": 16}.items():
        monkeypatch.setattr(plan, name, value)
    monkeypatch.setattr(plan.TopkPlan, "takes_stream", True)
    monkeypatch.setattr(triton_topk, "_DECODE_QUERIES", 64)
    monkeypatch.setattr(triton_topk, "_solve", None)
    visible = places(2, 2, chunks, "past")
    chunk = torch.arange(chunks)
    favoured = {
        "everywhere": chunk >= 0,
        "one_share": chunk // 16 % 32 == 3,
        "one_lane": chunk % 512 == 77,
        "few_shares": chunk // 16 % 32 < 5,
        "one": chunk == chunks - 1,
    }[place]
    query, landmarks = integers(2, 2, heads, 8), integers(rows, chunks, heads, 8, seed=1)
    if place in ("few_shares", "one"):
        visible.chunk_segment[:, ~favoured] = -2
    query[..., 0] = 1
    landmarks[..., 0] += 40 * favoured[:, None]
    expected = chunk_topk(query, landmarks, visible, topk=topk, impl="reference")
    actual = chunk_topk(query, landmarks, visible, topk=topk, impl="triton")
    assert torch.equal(actual[0], expected[0])
    torch.testing.assert_close(actual[1], expected[1])


def test_which_scans_are_streams(monkeypatch):
    def streams(
        chunks=16_384, dim=256, keep=32, dtype=torch.bfloat16, scales=None, kind=torch.int32, is_aligned=True, rows=1
    ):  # fmt: skip
        sizes = torch.Size((rows, 1, 1, dim)), torch.Size((1, chunks, 1, dim))
        dtypes = (torch.bfloat16, dtype, scales, *[kind] * 4)
        return plan.TopkPlan(
            plan.TopkShapes(*sizes, rows, "past", dtypes, keep, torch.device("cpu"), is_aligned)
        ).takes_stream  # fmt: skip

    assert not streams()  # not on this machine
    monkeypatch.setattr(plan, "runs_hopper_kernels", lambda index: True)
    assert streams() and streams(8192) and streams(4096, 1024, 31, torch.float16) and streams(1 << 21)
    assert not streams(8191) and not streams(dim=128) and not streams(dim=384) and not streams(keep=33)
    # owners of several rows: where a row of them begins, and how far the last reaches
    assert streams(9004, rows=2) and not streams(9001, rows=2) and streams(1 << 25) and not streams(1 << 25, rows=64)
    assert not streams(dtype=torch.float32) and not streams(dtype=torch.int8, scales=torch.bfloat16)
    assert not streams(kind=torch.int64) and not streams(is_aligned=False)


@pytest.mark.parametrize("memory", [101_376, 166_912, 232_448])
def test_tiles_are_those_of_a_hopper_card_or_fit_a_smaller_one(memory, monkeypatch):
    monkeypatch.undo()
    for width, dim, kept in itertools.product((1, 2, 4), (16, 256, 512, 1024), (32, 64, 256)):
        scan = plan.decode_options(kept, dim, width, memory)
        assert scan.tile >= 16 and scan.stages >= 2
        # landmarks of 4 KiB fit a card of 99 KiB in no tile: fp32 with R = 1,024, which "auto" does not choose
        if dim * width < 4096 or memory > 101_376:
            assert plan._scan_bytes(scan.tile, scan.stages, dim, width) <= memory
        for queries in (1000, 20_000):
            stream = plan.tile_options("stream", kept, queries, dim, width, memory)
            assert (stream.tokens + stream.chunks) * stream.slab * width <= memory
    assert plan.decode_options(32, 256, 2, memory).tile == 64
    assert plan.decode_options(32, 256, 2, memory).stages == (3 if memory < 112_128 else 4)
    assert plan.decode_options(32, 1024, 2, memory).stages == (3 if memory > 190_976 else 2)
    assert plan.decode_options(32, 1024, 2, memory).tile == 32
    merge = plan.tile_options("merge", 32, 0, 1024, 2, memory)
    assert merge[:3] == ((64, 32, 4) if memory > 135_168 else (32, 32, 2))
    sizes = plan.chunks_of_all_forms(32, 256, 2, memory)
    assert sizes == plan.chunks_of_all_forms(32, 256, 2, 232_448)


def test_wide_fp32_landmarks_are_refused_where_no_tile_fits(monkeypatch):
    monkeypatch.setattr(triton_topk, "_DECODE_QUERIES", 64)
    plan.plan_of.cache_clear()
    monkeypatch.setattr(plan, "shared_memory", lambda index: 101_376)
    query, landmarks = (torch.zeros(1, count, 1, 1024, device=DEVICE) for count in (1, 40))
    with pytest.raises(ValueError, match="bytes of shared memory, this card has 101,376; use bf16"):
        chunk_topk(query, landmarks, places(1, 1, 40), topk=4, impl="triton")


@pytest.mark.parametrize("topk", [4, 40])
def test_repeats_are_bit_identical_and_every_element_is_written(monkeypatch, topk):
    visible = places(1, 20, 40)
    arguments = (random_tensor(1, 20, 1, 8), random_tensor(1, 40, 1, 8, seed=1), visible, topk)
    expected = run("triton", torch.float32, *arguments)
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 12345)

    monkeypatch.setattr(torch, "empty", poisoned)
    again = run("triton", torch.float32, *arguments)
    for left, right in zip([*expected[:2], *expected[2]], [*again[:2], *again[2]], strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize(("rows", "heads", "chunks"), [(1, 1, 40), (1, 2, 19), (2, 2, 37)])
def test_gradients_in_two_parts_equal_exact_ones_of_the_same_inputs(monkeypatch, rows, heads, chunks):
    monkeypatch.setattr(kernel_gradients, "BLOCK_ELEMENTS", 300 * heads)
    query = random_tensor(2, 20, heads, 8).to(DEVICE, torch.bfloat16)
    landmarks = (3 + random_tensor(rows, chunks, heads, 8, seed=1)).to(DEVICE, torch.bfloat16)
    indices, scores = chunk_topk(query, landmarks, places(2, 20, chunks), topk=4, impl="torch")
    grad = random_tensor(*scores.shape, seed=2).to(DEVICE, torch.float32)
    factor = torch.arange(1, heads + 1, device=DEVICE, dtype=torch.float32)
    found = kernel_gradients.spread_gradients(query, landmarks, indices, grad, factor)
    slopes = grad.double().masked_fill(indices < 0, 0.0) * factor[:, None]
    exact = product_gradients(query.double(), landmarks.double(), indices, slopes)
    for actual, expected in zip(found, exact, strict=True):
        assert (actual.double() - expected).norm() <= 3e-3 * expected.norm()


def test_unsupported_operands_are_named():
    visible = places(1, 3, 400)
    query, landmarks = random_tensor(1, 3, 1, 4, dtype=torch.float32), random_tensor(1, 400, 1, 4, dtype=torch.float32)
    query, landmarks = query.to(DEVICE), landmarks.to(DEVICE)
    with pytest.raises(ValueError, match="K up to 256 or at least C"):
        chunk_topk(query, landmarks, visible, topk=300, impl="triton")
    with pytest.raises(ValueError, match="bfloat16, float16, float32"):
        chunk_topk(query.double(), landmarks.double(), visible, topk=3, impl="triton")
