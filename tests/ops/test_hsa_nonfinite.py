"""What is not finite stays in the rows of hsa_attention that read it, forward and backward."""

from __future__ import annotations

import pytest
import torch

from hsa_ultralong.ops import hsa_attention
from hsa_ultralong.ops.hsa import torch_dense, torch_gather
from hsa_ultralong.testing.factories import AttentionInputs, random_attention, random_tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZE, TOKENS = 16, 8
IMPLS = [
    "reference",
    "torch_gather",
    "torch_dense",
]
SHAPES = {
    "sparse": {"num_chunks": 9, "slots": 3, "group": 4, "kv_heads": 1},
    "short_chunks": {"num_chunks": 9, "slots": 3, "is_short": True, "kv_heads": 2},
    "per_head": {"num_chunks": 7, "slots": 2, "kv_heads": 2, "heads": 2},
    "shared": {"num_chunks": 9, "slots": 3, "kv_batch": 1, "kv_heads": 1, "is_short": True},
    "coverage": {"num_chunks": 4, "slots": 3, "group": 2, "kv_heads": 1, "is_short": True},
}
# a chunk that some tokens read, a token that reads nothing, one whose gradient is not finite
BAD_CHUNK, LONE, STEEP = 1, 3, 6


@pytest.fixture(autouse=True)
def small_launches(monkeypatch):
    monkeypatch.setattr(torch_gather, "_BLOCK_ELEMENTS", {"cpu": 30_000})
    monkeypatch.setattr(torch_dense, "_TILE_ELEMENTS", {"cpu": 3000})


def problem(shape):
    inputs = random_attention(num_tokens=TOKENS, chunk_size=SIZE, dim=16, **SHAPES[shape])
    inputs.indices[:, LONE] = -1
    return AttentionInputs(*(None if x is None else x.to(DEVICE) for x in inputs))


def run(inputs, impl, slope, **options):
    dtype = torch.float64
    leaves = [x.detach().clone().to(dtype).requires_grad_() for x in (inputs.q, inputs.k, inputs.v, inputs.weights)]
    q, k, v, weights = leaves
    out = hsa_attention(
        q, k, v, inputs.indices, weights, chunk_size=SIZE, chunk_lengths=inputs.chunk_lengths, impl=impl, **options
    )
    out.backward(slope.to(out))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def poisoned(inputs, number):
    """A key, a value and, beyond the length of a short chunk, both; a query that reads nothing; a gradient."""
    q, k, v = (x.clone() for x in (inputs.q, inputs.k, inputs.v))
    k[0, BAD_CHUNK * SIZE, :, 3] = number
    v[-1, BAD_CHUNK * SIZE, :, 5] = number
    if inputs.chunk_lengths is not None:
        beyond = torch.arange(SIZE, device=DEVICE) >= inputs.chunk_lengths[..., None]
        k[beyond.flatten(1)], v[beyond.flatten(1)] = number, float("nan")
    q[:, LONE] = number
    slope = random_tensor(*q.shape, seed=77).to(DEVICE)
    steep = slope.clone()
    steep[0, STEEP], steep[:, LONE] = number, float("nan")
    return inputs._replace(q=q, k=k, v=v), slope, steep


def reached(inputs, *, is_backward):
    """Which tokens read something that is not finite, (B, T), and which chunks it reaches backward, (1 or B, C)."""
    indices = inputs.indices
    rows = (indices == BAD_CHUNK).flatten(2).any(-1)
    chunks = torch.zeros(inputs.k.shape[0], num_chunks(inputs), dtype=torch.bool, device=DEVICE)
    chunks[:, BAD_CHUNK] = True
    if is_backward:
        rows[0, STEEP] = True
        read = indices[0, STEEP]
        chunks[0, read[read >= 0].long()] = True
    return rows, chunks


def num_chunks(inputs):
    return inputs.k.shape[1] // SIZE


@pytest.mark.parametrize(
    ("shape", "number"), [*((shape, float("nan")) for shape in SHAPES), ("short_chunks", float("inf"))]
)
@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_not_finite_stays_in_the_rows_that_read_it(impl, shape, number):
    inputs = problem(shape)
    bad, slope, steep = poisoned(inputs, number)
    found, expected = run(bad, impl, steep), run(inputs, "reference", slope)
    rows, _ = reached(bad, is_backward=False)
    assert rows.any() and not rows.all()
    assert found[0][~rows].isfinite().all() and (found[0][:, LONE] == 0).all()
    if number != number:
        assert (~found[0][rows].isfinite()).flatten(1).any(1).all()
    torch.testing.assert_close(found[0][~rows].double(), expected[0][~rows], rtol=1e-5, atol=1e-5)
    rows, chunks = reached(bad, is_backward=True)
    assert not chunks.all()
    for left, right in zip((found[1], found[4]), (expected[1], expected[4]), strict=True):
        torch.testing.assert_close(left[~rows].double(), right[~rows], rtol=1e-4, atol=1e-5)
    clear = ~chunks.repeat_interleave(SIZE, 1)
    for left, right in zip(found[2:4], expected[2:4], strict=True):
        torch.testing.assert_close(left[clear].double(), right[clear], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_query_that_is_not_finite_touches_only_the_chunks_that_it_reads(impl):
    inputs = problem("sparse")
    q = inputs.q.clone()
    q[0, STEEP, 1] = float("nan")
    slope = random_tensor(*q.shape, seed=7).to(DEVICE)
    found, expected = run(inputs._replace(q=q), impl, slope), run(inputs, "reference", slope)
    others = torch.ones(q.shape[:2], dtype=torch.bool, device=DEVICE)
    others[0, STEEP] = False
    assert not found[0][0, STEEP, 1].isfinite().any()
    for left, right in zip((found[0], found[1]), (expected[0], expected[1]), strict=True):
        torch.testing.assert_close(left[others].double(), right[others], rtol=1e-4, atol=1e-5)
    read = inputs.indices[0, STEEP, 0]
    clear = torch.ones(q.shape[0], num_chunks(inputs), dtype=torch.bool, device=DEVICE)
    clear[0, read[read >= 0].long()] = False
    clear = clear.repeat_interleave(SIZE, 1)
    for left, right in zip(found[2:4], expected[2:4], strict=True):
        torch.testing.assert_close(left[clear].double(), right[clear], rtol=1e-4, atol=1e-5)
