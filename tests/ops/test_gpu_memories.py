"""On a GPU: retrieval of 1,024 dimensions, scans of 8-bit landmarks, chunks read out of pinned host memory, graphs."""

import pytest
import torch

from hsa_ultralong.memory.quantization import decode, encode
from hsa_ultralong.ops import ChunkVisibility, chunk_topk
from hsa_ultralong.ops.chunk_gather import ChunkBlocks, gather_chunks
from hsa_ultralong.ops.chunk_topk.quantized import chunk_topk_quantized

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def everyone(batch, tokens, chunks):
    zeros = torch.zeros((batch, tokens), dtype=torch.int32, device="cuda")
    segments = torch.full((1, chunks), -1, dtype=torch.int32, device="cuda")
    return ChunkVisibility(zeros, zeros, segments, torch.zeros_like(segments))


@pytest.mark.parametrize("noise_seed", [None, 5])
@pytest.mark.parametrize("topk", [8, 64, 100])
def test_retrieval_of_1024_dimensions_equals_torch(topk, noise_seed):
    """On integers both sum exactly: equal choices, and gradients to rounding. 100 chunks: full coverage at K = 100."""
    tokens, chunks = 6400, 100
    generator = torch.Generator("cuda").manual_seed(0)
    inputs = [
        torch.randint(-2, 3, (1, count, 1, 1024), generator=generator, device="cuda").bfloat16()
        for count in (tokens, chunks)
    ]
    visible = ChunkVisibility.causal(1, tokens, chunks, 64, device="cuda")
    found = []
    for impl in ("triton", "torch"):
        query, landmarks = (x.clone().requires_grad_() for x in inputs)
        indices, scores = chunk_topk(query, landmarks, visible, topk=topk, noise_seed=noise_seed, impl=impl)
        torch.where(indices >= 0, scores, 0.0).sin().sum().backward()
        found.append((indices, scores.detach(), query.grad, landmarks.grad))
    ours, theirs = found
    assert torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1])
    for left, right in zip(ours[2:], theirs[2:], strict=True):
        assert (left.float() - right.float()).norm() <= 0.02 * right.float().norm()


@pytest.mark.parametrize("dim", [256, 1024])
@pytest.mark.parametrize("tokens", [1, 3, 150])
def test_scans_of_8_bit_landmarks_equal_torch_and_fit_a_graph(dim, tokens):
    chunks, topk = 40_000, 32
    query = torch.randn(2, tokens, 1, dim, device="cuda").bfloat16()
    encoded = encode(torch.randn(1, chunks, 1, dim, device="cuda"), "int8")
    visible = everyone(2, tokens, chunks)

    def scan():
        return chunk_topk_quantized(query, *encoded, visible, topk=topk, impl="triton")

    indices, scores = scan()
    expected = chunk_topk_quantized(query, *encoded, visible, topk=topk, impl="torch")
    assert (indices == expected[0]).double().mean() > 0.99
    torch.testing.assert_close(scores.sort(-1).values, expected[1].sort(-1).values, rtol=1e-3, atol=1e-3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = scan()
    query.copy_(torch.randn_like(query))
    graph.replay()
    assert torch.equal(captured[0], scan()[0])


@pytest.mark.parametrize("form", ["bf16", "int8", "fp8"])
def test_chunks_lie_anywhere_and_are_read_in_place(form):
    shape, per_block = (2, 64, 1, 64), 8
    blocks, everything = ChunkBlocks(per_block, torch.device("cuda")), []
    for number in range(4):
        encoded = encode(torch.randn(per_block, *shape, device="cuda"), form)
        everything.append(decode(*encoded, torch.bfloat16))
        payload, scales = encoded
        if number % 2:
            payload = payload.cpu().pin_memory()
            scales = None if scales is None else scales.cpu().pin_memory()
        blocks.add(payload, scales)
    whole = torch.cat(everything)
    chunks = torch.tensor([31, 0, 9, 9, -1, 17], dtype=torch.int32, device="cuda")
    expected = whole[chunks.clamp_min(0).long()] * (chunks >= 0)[:, None, None, None, None]
    assert torch.equal(gather_chunks(blocks, chunks, torch.bfloat16), expected)
    assert torch.equal(gather_chunks(blocks, chunks, torch.bfloat16, impl="torch"), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gather_chunks(blocks, chunks, torch.bfloat16)
    chunks.copy_(chunks.flip(0))
    graph.replay()
    assert torch.equal(captured, expected.flip(0))
    with pytest.raises(ValueError, match="must be pinned"):
        blocks.add(torch.zeros(per_block, *shape, dtype=torch.bfloat16), None)
