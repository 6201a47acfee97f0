"""Operators on a GPU: error at most twice that of the reference run in bf16, memory of the long dense path."""

import pytest
import torch

from hsa_ultralong.ops import (
    ChunkVisibility,
    chunk_topk,
    hsa_attention,
    linear_cross_entropy,
    sliding_window_attention,
)

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
@pytest.mark.parametrize("impl", ["torch_gather", "torch_dense"])
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


def test_window_error_is_at_most_twice_that_of_the_reference_in_bf16():
    inputs = random_inputs((2, 1500, 4, 64), (2, 1500, 2, 64), (2, 1500, 2, 64))
    segments = (torch.arange(1500) // 700).int().expand(2, -1)

    def run(backend, device, dtype):
        leaves = [x.detach().clone().to(device, dtype).requires_grad_() for x in inputs]
        mine = segments.to(device)
        out = sliding_window_attention(*leaves, window=128, query_segments=mine, key_segments=mine, impl=backend)
        out.square().sum().backward()
        return [out.detach(), *(x.grad for x in leaves)]

    exact = run("reference", "cpu", torch.float64)
    assert_within_twice(run("torch", "cuda", torch.bfloat16), run("reference", "cuda", torch.bfloat16), exact)


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
