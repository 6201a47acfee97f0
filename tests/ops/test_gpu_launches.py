"""On a GPU: launches that bind no arguments give what bound ones gave, on streams, in graphs and for views, and a short
row's step takes few launches."""

from functools import lru_cache

import pytest
import torch

from hsa_ultralong.ops import ChunkVisibility, chunk_topk, hsa_attention

pytest.importorskip("triton")
from hsa_ultralong.ops.chunk_topk import plan, triton_topk

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOKENS, SIZE, HEADS, DIM = 2048, 64, 16, 64


def noise(*shape, seed, dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def attention(seed, slots=8, tokens=TOKENS):
    """Indices of visible chunks, then q, k, v, weights and the upward gradient."""
    chunks = tokens // SIZE
    seen = ChunkVisibility.causal(1, tokens, chunks, SIZE, device="cuda").mask()[:, :, None]  # (1, T, 1, C)
    order = noise(1, tokens, 1, chunks, seed=seed, dtype=torch.float32).masked_fill(~seen, -torch.inf)
    scores, indices = order.topk(slots, -1)
    indices = torch.where(scores == -torch.inf, -1, indices).sort(-1, descending=True).values.int()
    weights = noise(*indices.shape, seed=seed + 4, dtype=torch.float32).softmax(-1).masked_fill(indices < 0, 0.0)
    shapes = ((1, tokens, HEADS, DIM), (1, tokens, 1, DIM), (1, tokens, 1, DIM))
    q, k, v = (noise(*shape, seed=seed + i) for i, shape in enumerate(shapes, 1))
    return indices, [q, k, v, weights], noise(*q.shape, seed=seed + 9)


def attend(case, impl="triton", dtype=torch.bfloat16):
    indices, inputs, upward = case
    q, k, v, weights = (x.detach().to(dtype if i < 3 else x.dtype).requires_grad_() for i, x in enumerate(inputs))
    out = hsa_attention(q, k, v, indices, weights, chunk_size=SIZE, causal=True, impl=impl)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v, weights), upward.to(out.dtype))]


def retrieval(seed, tokens=TOKENS, chunks=128, **options):
    """A step of chunk_topk in integers, whose scores have ties and are exact."""
    generator = torch.Generator("cuda").manual_seed(seed)
    query, landmarks = (
        torch.randint(-2, 3, (1, count, 1, 64), generator=generator, device="cuda").bfloat16().requires_grad_()
        for count in (tokens, chunks)
    )
    visible = ChunkVisibility.causal(1, tokens, chunks, tokens // chunks, device="cuda")
    slope = noise(1, tokens, 1, 16, seed=seed, dtype=torch.float32)

    def step(impl):
        indices, scores = chunk_topk(query, landmarks, visible, topk=16, impl=impl, **options)
        kept = torch.where(indices >= 0, scores, 0.0)
        return [indices, scores.detach(), *torch.autograd.grad(kept, (query, landmarks), slope)]

    return step


def assert_near(found, exact, share=0.02):
    for left, right in zip(found, exact, strict=True):
        error, size = (left.double() - right.double()).norm(), right.double().norm()
        assert error <= share * size + 1e-6, (float(error), float(size))


@pytest.mark.parametrize("slots", [8, 32])
def test_calls_of_one_shape_on_other_numbers_equal_the_reference(slots):
    for seed in (0, 100, 200):
        case = attention(seed, slots)
        exact = attend(case, "reference", torch.float32)
        assert_near(attend(case), exact)


@pytest.mark.parametrize("options", [{}, {"noise_seed": 7}, {"noise_seed": 2**31 + 5, "noise_start": 2**31 + 64}])
def test_retrieval_of_one_shape_selects_like_the_reference_with_ties(options):
    for seed in (0, 100, 200):
        step = retrieval(seed, **options)
        found, expected = step("triton"), step("reference")
        if not options:
            assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
        assert (found[0] == expected[0]).double().mean() > 0.999
        assert_near(found[2:], expected[2:])


def test_views_that_are_not_aligned_give_the_same_bits():
    indices, inputs, upward = attention(0)
    expected = attend((indices, inputs, upward))
    shifted = []
    for x in (*inputs, upward):
        room = torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")
        room[1:] = x.flatten()
        shifted.append(room[1:].view(x.shape))
    assert all(x.data_ptr() % 16 for x in shifted)
    for left, right in zip(attend((indices, shifted[:4], shifted[4])), expected, strict=True):
        assert torch.equal(left, right)


def test_a_side_stream_and_a_graph_give_the_same_bits():
    case, step = attention(0), retrieval(0)
    expected = [*attend(case), *step("triton")]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        beside = [*attend(case), *step("triton")]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [*attend(case), *step("triton")]
    for x in captured:
        x.zero_()
    graph.replay()
    torch.cuda.synchronize()
    for first, second, third in zip(expected[:7], beside, captured, strict=False):
        assert torch.equal(first, second) and torch.equal(first, third)
    # products of cuBLAS, which may choose otherwise
    for others in (beside, captured):
        assert_near(others[7:], expected[7:], 1e-3)


@pytest.mark.parametrize("most_inserted", [32, 0])
def test_a_graph_draws_the_noise_of_the_seed_that_is_written_before_it(monkeypatch, most_inserted):
    """By both streaming kernels."""
    monkeypatch.setattr(plan, "_MOST_INSERTED", most_inserted)
    monkeypatch.setattr(triton_topk, "plan_of", lru_cache(plan.TopkPlan))
    stored = torch.zeros((), dtype=torch.int64, device="cuda")
    step = retrieval(0, noise_seed=stored)
    step("triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step("triton")
    for seed in (7, 2**31 + 5, -1):
        stored.fill_(seed)
        graph.replay()
        expected = retrieval(0, noise_seed=seed)("triton")
        assert torch.equal(captured[0], expected[0]) and torch.equal(captured[1], expected[1])
        # products of cuBLAS, which may choose otherwise
        assert_near(captured[2:], expected[2:], 1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_devices_have_launches_of_their_own():
    indices, inputs, upward = attention(0)
    expected = attend((indices, inputs, upward))
    with torch.cuda.device(1):
        moved = (indices.cuda(1), [x.cuda(1) for x in inputs], upward.cuda(1))
        for left, right in zip(attend(moved), expected, strict=True):
            assert torch.equal(left.cpu(), right.cpu())


def test_a_short_rows_step_takes_few_launches():
    case, step = attention(0, 8, 4096), retrieval(0, 4096)

    def launches(call):
        call()
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            call()
            torch.cuda.synchronize()
        return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]

    attending = launches(lambda: attend(case))
    assert len(attending) <= 12, attending
    retrieving = launches(lambda: step("triton"))
    # the selection, spread_kernel, two products, total_kernel, and what the test itself does with the scores
    assert len(retrieving) <= 14, retrieving
