"""Operators on a GPU: error at most twice that of the reference run in bf16, memory of the long dense path."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hsa_ultralong.ops import (
    ChunkVisibility,
    chunk_topk,
    hsa_attention,
    linear_cross_entropy,
    sliding_window_attention,
)
from hsa_ultralong.testing.factories import AttentionInputs, random_attention, random_tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def relative_errors(outputs, exact):
    return [((a.double().cpu() - b).norm() / b.norm()).item() for a, b in zip(outputs, exact, strict=True)]


def assert_within_twice(outputs, reference, exact):
    for error, budget in zip(relative_errors(outputs, exact), relative_errors(reference, exact), strict=True):
        assert error <= 2 * budget + 1e-6


def random_inputs(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).bfloat16().double() for shape in shapes]


@pytest.mark.parametrize("slots", [5, 15])
@pytest.mark.parametrize("impl", ["torch_gather", "torch_dense", "triton"])
def test_hsa_error_is_at_most_twice_that_of_the_reference_in_bf16(impl, slots):
    size, chunks, tokens = 64, 15, 1000
    inputs = random_inputs((2, tokens, 4, 64), (2, chunks * size, 1, 64), (2, chunks * size, 1, 64))
    visible = ChunkVisibility.causal(2, tokens, chunks, size)
    query, landmarks = random_inputs((2, tokens, 1, 32), (2, chunks, 1, 32), seed=1)
    indices, scores = chunk_topk(query, landmarks, visible, topk=slots)
    weights = torch.nan_to_num(scores.softmax(-1))
    upward = random_inputs((2, tokens, 4, 64), seed=2)[0]

    def run(backend, device, dtype):
        leaves = [x.detach().clone().to(device, dtype).requires_grad_() for x in inputs]
        fused = weights.clone().to(device, torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
        out = hsa_attention(*leaves, indices.to(device), fused, chunk_size=size, causal=True, impl=backend)
        out.backward(upward.to(device, dtype))
        return [out.detach(), *(x.grad for x in leaves), fused.grad]

    exact = run("reference", "cpu", torch.float64)
    assert_within_twice(run(impl, "cuda", torch.bfloat16), run("reference", "cuda", torch.bfloat16), exact)


def run_kernels(inputs: AttentionInputs, impl, dtype, chunk_size):
    """Output and the gradients of q, k, v, weights."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [x.detach().clone().cuda().to(dtype).requires_grad_() for x in inputs[:3]]
    leaves.append(inputs.weights.clone().cuda().to(wide).requires_grad_())
    lengths = None if inputs.chunk_lengths is None else inputs.chunk_lengths.cuda()
    out = hsa_attention(
        *leaves[:3], inputs.indices.cuda(), leaves[3], chunk_size=chunk_size, chunk_lengths=lengths, impl=impl
    )
    out.backward(random_tensor(*out.shape, seed=77).to(out))
    return [out.detach(), *(x.grad for x in leaves)]


@settings(max_examples=25)
@given(
    st.integers(1, 3), st.integers(1, 300), st.sampled_from([1, 2, 3, 4, 8, 16, 32]), st.integers(1, 2), st.booleans(),
    st.integers(1, 40), st.integers(1, 20), st.sampled_from([32, 64, 128]), st.sampled_from([32, 64, 128]),
    st.booleans(), st.booleans(), st.sampled_from([torch.bfloat16, torch.float16]), st.integers(0, 10**6),
)  # fmt: skip
def test_kernel_error_is_at_most_twice_the_references_for_any_shape(
    batch, tokens, group, kv, per_head, chunks, slots, size, dim, shared, short, dtype, seed
):
    inputs = random_attention(
        batch=batch, num_tokens=tokens, group=group, kv_heads=kv, heads=kv if per_head else 1, num_chunks=chunks,
        slots=slots, chunk_size=size, dim=dim, kv_batch=1 if shared else None, is_short=short, seed=seed,
    )  # fmt: skip
    rounded = inputs._replace(**{name: getattr(inputs, name).to(dtype).double() for name in "qkv"})
    exact = run_kernels(rounded, "reference", torch.float64, size)
    budget = run_kernels(rounded, "reference", dtype, size)
    for actual, allowed, truth in zip(run_kernels(rounded, "triton", dtype, size), budget, exact, strict=True):
        error, limit = ((x.double() - truth).norm() for x in (actual, allowed))
        assert error <= 2 * limit + 1e-6 * (1 + truth.norm())


@pytest.mark.parametrize("slots", [6, 40])
def test_a_hundred_repeats_are_bit_identical(slots):
    inputs = random_attention(num_tokens=700, group=4, kv_heads=1, num_chunks=40, slots=slots, chunk_size=64, dim=64)
    first = run_kernels(inputs, "triton", torch.bfloat16, 64)
    for _ in range(100):
        for left, right in zip(first, run_kernels(inputs, "triton", torch.bfloat16, 64), strict=True):
            assert torch.equal(left, right)


def test_topk_selects_like_the_reference_and_scores_stay_fp32():
    tokens, chunks, size = 700, 10, 64
    query, landmarks = random_inputs((2, tokens, 2, 64), (2, chunks, 2, 64))
    exact = chunk_topk(query, landmarks, ChunkVisibility.causal(2, tokens, chunks, size), topk=4, impl="reference")
    visible = ChunkVisibility.causal(2, tokens, chunks, size, device="cuda")
    indices, scores = chunk_topk(query.cuda().bfloat16(), landmarks.cuda().bfloat16(), visible, topk=4)
    assert scores.dtype == torch.float32
    kept = exact[0] >= 0
    assert (indices.cpu() == exact[0]).double().mean() > 0.999
    same = (indices.cpu() == exact[0]) & kept
    torch.testing.assert_close(scores.cpu()[same].double(), exact[1][same], rtol=1e-5, atol=1e-5)


def test_noise_is_the_same_on_gpu_and_cpu():
    query, landmarks = random_inputs((1, 300, 1, 32), (1, 40, 1, 32))
    results = []
    for device in ("cpu", "cuda"):
        visible = ChunkVisibility.causal(1, 300, 40, 7, device=device)
        results.append(chunk_topk(query.to(device), landmarks.to(device), visible, topk=6, noise_seed=3)[0].cpu())
    assert torch.equal(*results)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_window_error_is_at_most_twice_that_of_the_reference_in_bf16(impl):
    inputs = random_inputs((2, 1500, 4, 64), (2, 1500, 2, 64), (2, 1500, 2, 64))
    segments = (torch.arange(1500) // 700).int().expand(2, -1)

    def run(backend, device, dtype):
        leaves = [x.detach().clone().to(device, dtype).requires_grad_() for x in inputs]
        mine = segments.to(device)
        out = sliding_window_attention(*leaves, window=128, query_segments=mine, key_segments=mine, impl=backend)
        out.square().sum().backward()
        return [out.detach(), *(x.grad for x in leaves)]

    exact = run("reference", "cpu", torch.float64)
    assert_within_twice(run(impl, "cuda", torch.bfloat16), run("reference", "cuda", torch.bfloat16), exact)


def test_loss_error_is_at_most_twice_that_of_the_reference_in_bf16():
    hidden, weight = random_inputs((3000, 256), (8192, 256))
    labels = torch.randint(0, 8192, (3000,), generator=torch.Generator().manual_seed(3))

    def run(backend, device, dtype):
        leaves = [x.clone().to(device, dtype).requires_grad_() for x in (hidden, 0.05 * weight)]
        loss = linear_cross_entropy(*leaves, labels.to(device), impl=backend)
        loss.backward()
        return [loss.detach(), *(x.grad for x in leaves)]

    exact = run("reference", "cpu", torch.float64)
    assert_within_twice(run("torch", "cuda", torch.bfloat16), run("reference", "cuda", torch.bfloat16), exact)


def test_nano_trains_at_32k_within_40_gb():
    from hsa_ultralong.models import HSAForCausalLM
    from hsa_ultralong.models.presets import preset

    torch.manual_seed(0)
    model = HSAForCausalLM(preset("nano", chunk_topk=512)).cuda().train()
    tokens = torch.randint(0, 8192, (1, 32_768), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    with torch.autocast("cuda", torch.bfloat16):
        model(tokens, labels=tokens).loss.backward()
    assert torch.isfinite(model.model.chunk_encoder.landmark_proj.weight.grad).all()
    assert torch.cuda.max_memory_allocated() < 40e9


@pytest.mark.slow
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.mem_get_info()[1] < 100 * 2**30, reason="needs 100 GiB on the device"
)
def test_addresses_past_two_to_the_31_elements():
    """The last tokens of more than 2^31 elements get what they get alone, and gradients land where they belong."""
    size, dim, heads, kept = 64, 64, 16, 4
    tokens, chunks = 2**21 + 640, 2**19 + 320
    q = torch.randn(1, tokens, heads, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    k, v = (
        torch.randn(1, chunks * size, 1, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2)
    )
    assert min(q.numel(), k.numel()) > 2**31
    indices = torch.full((1, tokens, 1, kept), -1, dtype=torch.int32, device="cuda")
    indices[:, -300:] = torch.arange(chunks - 1, chunks - 1 - kept, -1, dtype=torch.int32, device="cuda")
    weights = torch.rand(indices.shape, device="cuda").masked_fill(indices < 0, 0.0)
    out = hsa_attention(q, k, v, indices, weights, chunk_size=size, impl="triton")
    last = [q[:, -300:].detach(), *(x[:, -kept * size :].detach() for x in (k, v))]
    last = [x.clone().requires_grad_() for x in last]
    own = torch.where(indices[:, -300:] < 0, -1, indices[:, -300:] - (chunks - kept))
    alone = hsa_attention(*last, own, weights[:, -300:], chunk_size=size, impl="triton")
    assert torch.equal(out[:, -300:], alone) and not out[:, :-300].any()
    upward = torch.randn_like(alone)
    alone.backward(upward)
    out.backward(torch.cat((torch.zeros_like(out[:, :-300]), upward), 1))
    for whole, part in zip((q, k, v), last, strict=True):
        count = part.shape[1]
        assert torch.equal(whole.grad[:, -count:], part.grad) and not whole.grad[:, :-count].any()
    query, landmarks = (torch.randn(1, n, 1, 256, device="cuda", dtype=torch.bfloat16) for n in (3, 2**23 + 64))
    zero = torch.zeros(1, 3, dtype=torch.int32, device="cuda")
    everyone = torch.full((1, landmarks.shape[1]), -1, dtype=torch.int32, device="cuda")
    visible = ChunkVisibility(zero, zero, everyone, torch.zeros_like(everyone))
    found, scores = chunk_topk(query, landmarks, visible, topk=32, impl="triton")
    exact = (query[0, :, 0].float() @ landmarks[0, :, 0].float().T) / 16  # (3, C)
    assert torch.equal(found[0, :, 0], exact.topk(32).indices.sort(-1, descending=True).values.int())
    torch.testing.assert_close(scores[0, :, 0], exact.gather(1, found[0, :, 0].long()), rtol=1e-4, atol=1e-4)
