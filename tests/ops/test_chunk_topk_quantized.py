"""chunk_topk over 8-bit landmarks: the ranking of the stored numbers, by torch and by the interpreted kernel."""

import pytest
import torch

from hsa_ultralong.ops import ChunkVisibility, chunk_topk
from hsa_ultralong.ops._triton import is_interpreted
from hsa_ultralong.ops.chunk_topk.quantized import chunk_topk_quantized


def case(batch=2, tokens=3, heads=1, chunks=600, dim=32, seed=0, rows=1):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, tokens, heads, dim, generator=generator)
    payload = torch.randint(-127, 128, (rows, chunks, heads, dim), generator=generator, dtype=torch.int8)
    scales = torch.rand(rows, chunks, heads, generator=generator) + 0.1
    segments = torch.randint(-2, 3, (rows, chunks), generator=generator, dtype=torch.int32)
    ends = torch.randint(1, 50, (rows, chunks), generator=generator, dtype=torch.int32)
    query_segment = torch.randint(-1, 3, (batch, tokens), generator=generator, dtype=torch.int32)
    position = torch.randint(1, 60, (batch, tokens), generator=generator, dtype=torch.int32)
    return query, payload, scales, ChunkVisibility(query_segment, position, segments, ends)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("topk", [1, 7, 1000])
def test_equals_the_scan_of_the_decoded_landmarks(heads, rows, topk):
    query, payload, scales, visible = case(heads=heads, rows=rows, chunks=90)
    scale = torch.rand(heads, generator=torch.Generator().manual_seed(1)) + 0.5
    wide = payload.double() * scales.double()[..., None]
    expected = chunk_topk(query.double(), wide, visible, topk=topk, scale=scale.double(), impl="reference")
    indices, scores = chunk_topk_quantized(query, payload, scales, visible, topk=topk, scale=scale)
    assert torch.equal(indices, expected[0])
    torch.testing.assert_close(scores, expected[1].float(), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not is_interpreted(), reason="kernels are interpreted only under TRITON_INTERPRET=1")
@pytest.mark.parametrize(
    ("heads", "rows", "dim", "chunks"), [(1, 1, 32, 600), (2, 1, 20, 150), (1, 1, 300, 200), (1, 2, 8, 200)]
)
def test_kernel_equals_torch(heads, rows, dim, chunks, monkeypatch):
    from hsa_ultralong.ops.chunk_topk import triton_topk

    # so that the queries go in several calls
    monkeypatch.setattr(triton_topk, "_SCAN_CANDIDATES", 2 * 2 * chunks)
    query, payload, scales, visible = case(heads=heads, rows=rows, dim=dim, chunks=chunks)
    query[0, 0] = 0.0
    expected = chunk_topk_quantized(query, payload, scales, visible, topk=chunks, impl="torch")
    indices, scores = chunk_topk_quantized(query, payload, scales, visible, topk=5, impl="triton")
    kept = (indices[..., :, None] == expected[0][..., None, :]) & (indices >= 0)[..., None]
    exact = torch.where(kept, expected[1][..., None, :], 0.0).sum(-1)
    # an element of a query is off by half a step of 16 bits at most
    largest = query.abs().amax(-1, keepdim=True) / 65_024 * payload.abs().sum(-1).max() * scales.max() / dim**0.5
    assert ((torch.where(indices >= 0, scores, 0.0) - exact).abs() <= largest + 1e-5 * exact.abs()).all()
    best = expected[1].sort(-1, descending=True).values[..., :5]
    found = scores.sort(-1, descending=True).values
    assert torch.equal(found.isinf(), best.isinf())
    assert ((found - best).abs().nan_to_num(0.0) <= largest + 1e-5 * best.abs().nan_to_num(0.0, 0.0, 0.0)).all()


def test_refusals():
    query, payload, scales, visible = case(chunks=20)
    with pytest.raises(ValueError, match="payload must be int8"):
        chunk_topk_quantized(query, payload.float(), scales, visible, topk=2)
    with pytest.raises(ValueError, match="scales"):
        chunk_topk_quantized(query, payload, scales[:, 1:], visible, topk=2)
    with pytest.raises(ValueError, match="topk"):
        chunk_topk_quantized(query, payload, scales, visible, topk=0)
