"""hsa_attention's forward on Hopper (kernel_hopper_forward.py), on such a card alone: against fp64, repeated bit for
bit, with logits of any size, and with numbers that are not finite. What its host code does is tested with a stand-in
(test_hsa_triton.py)."""

from __future__ import annotations

import pytest
import torch

from hsa_ultralong.ops import hsa_attention
from hsa_ultralong.ops._triton import runs_hopper_kernels

pytest.importorskip("triton")
from hsa_ultralong.ops.hsa import plan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not runs_hopper_kernels(torch.cuda.current_device()), reason="needs Hopper"
    ),
]
SIZE = DIM = 64
# rows, rows of the memory, memory heads, retrieval heads, tokens, chunks, slots
SHAPES = {
    "many_chunks": (1, 1, 1, 1, 1000, 300, 32),
    "few_chunks": (1, 1, 1, 1, 1000, 15, 8),
    "memories_of_their_own": (2, 2, 1, 1, 700, 15, 8),
    "shared_memory": (2, 1, 1, 1, 700, 15, 8),
    "two_memory_heads": (1, 1, 2, 1, 512, 20, 8),
    "retrieval_per_head": (1, 1, 2, 2, 512, 20, 7),
    "all_at_once": (2, 2, 2, 2, 515, 20, 7),
    "few_tokens": (1, 1, 1, 1, 65, 40, 3),
    # groups pass by many chunks of others
    "far_apart": (1, 1, 1, 1, 515, 300, 2),
}


@pytest.fixture(autouse=True)
def own_kernel_alone(monkeypatch):
    """Rows of any length take it."""
    monkeypatch.setattr(plan, "HOPPER_FORWARD", True)
    monkeypatch.setattr(plan, "_HOPPER_PAIRS", 0)
    plan.plan_of.cache_clear()
    yield
    plan.plan_of.cache_clear()


def operands(shape, dtype, seed=0, size=1.0):
    """q, k, v, weights and indices; numbers of `dtype` in fp64. `size`: of q."""
    rows, memory_rows, heads, lists, tokens, chunks, slots = shape
    generator = torch.Generator("cuda").manual_seed(seed)

    def draw(*sizes, times=1.0):
        return (torch.randn(sizes, generator=generator, device="cuda") * times).to(dtype).double()

    q = draw(rows, tokens, heads * 16, DIM, times=size)
    k, v = draw(memory_rows, chunks * SIZE, heads, DIM), draw(memory_rows, chunks * SIZE, heads, DIM)
    scores = torch.rand(rows, tokens, lists, chunks, generator=generator, device="cuda")
    indices = scores.topk(slots).indices.to(torch.int32)
    indices[torch.rand(indices.shape, generator=generator, device="cuda") < 0.2] = -1
    weights = torch.rand(indices.shape, generator=generator, device="cuda")
    weights[torch.rand(indices.shape, generator=generator, device="cuda") < 0.1] = 0
    return q, k, v, weights.double(), indices


def forward(inputs, dtype, impl="triton"):
    q, k, v, weights, indices = inputs
    weights = weights.to(torch.float64 if dtype == torch.float64 else torch.float32)
    return hsa_attention(*(x.to(dtype) for x in (q, k, v)), indices, weights, chunk_size=SIZE, impl=impl)


def assert_error_is_small(inputs, dtype):
    found = forward(inputs, dtype)
    allowed, right = forward(inputs, dtype, "reference"), forward(inputs, torch.float64, "reference")
    error, limit = ((x.double() - right).norm() for x in (found, allowed))
    assert error <= 2 * limit + 1e-6 * right.norm()
    # no row is lost either
    worst, most = ((x.double() - right).norm(dim=-1).max() for x in (found, allowed))
    assert worst <= 4 * most + 1e-6 * right.norm(dim=-1).max()
    assert bool((forward(inputs, dtype) == found).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_is_at_most_twice_that_of_the_reference_and_repeats(shape, dtype):
    assert_error_is_small(operands(SHAPES[shape], dtype), dtype)


@pytest.mark.parametrize("size", [1e-6, 1.0, 30.0, 1000.0])
def test_no_row_is_lost_whatever_the_size_of_its_logits(size):
    """Logits of up to 5,000; from 30 on some sums lie outside of what the kernel takes."""
    inputs = operands((1, 1, 1, 1, 48, 40, 8), torch.bfloat16, size=size)
    assert_error_is_small(inputs, torch.bfloat16)


def test_a_chunk_far_from_the_first_is_not_lost():
    """Every sum of chunk 1 is 2**-200 or 2**200 by the bound that chunk 0 gives."""
    for sign in (1, -1):
        q, k, v, weights, indices = operands((1, 1, 1, 1, 64, 8, 4), torch.bfloat16, seed=1)
        q, k = torch.ones_like(q), k * 1e-2
        k[:, SIZE : 2 * SIZE] += sign * 17.5
        indices = torch.arange(4, dtype=torch.int32, device="cuda").expand_as(indices).contiguous()
        assert_error_is_small((q, k, v, weights, indices), torch.bfloat16)


def test_many_repeats_are_the_same_bit_for_bit():
    *leaves, weights, indices = operands((1, 1, 1, 1, 4096, 128, 32), torch.bfloat16)
    leaves, weights = [x.to(torch.bfloat16) for x in leaves], weights.float()
    first = hsa_attention(*leaves, indices, weights, chunk_size=SIZE, impl="triton")
    right = hsa_attention(*leaves, indices, weights, chunk_size=SIZE, impl="torch_gather")
    assert float((first.float() - right.float()).norm() / right.float().norm()) < 0.01
    differ = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        again = hsa_attention(*leaves, indices, weights, chunk_size=SIZE, impl="triton")
        differ += (again != first).sum()
    assert int(differ) == 0


def test_a_row_without_chunks_is_zero():
    q, k, v, weights, indices = operands((1, 1, 1, 1, 100, 20, 4), torch.bfloat16)
    indices[:, 20:60] = -1
    out = forward((q, k, v, weights, indices), torch.bfloat16)
    assert not out[:, 20:60].any() and out[:, :20].any() and out.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [0, 1, 2, 3])
def test_what_is_not_finite_stays_with_the_tokens_that_meet_it(where, bad):
    inputs = operands(SHAPES["memories_of_their_own"], torch.bfloat16)
    expected = forward(inputs, torch.bfloat16)
    spoiled = [x.clone() for x in inputs]
    spoiled[where][0, 200] = bad
    found = forward(spoiled, torch.bfloat16)
    indices, tokens = inputs[4][:, :, 0].long(), inputs[0].shape[1]
    met = torch.zeros(2, tokens, dtype=torch.bool, device="cuda")
    if where in (0, 3):
        met[0, 200] = True
    else:
        met[0] = (indices[0] == 200 // SIZE).any(-1)
    assert not found[met].isfinite().all()
    # rows of spoiled tiles are formed again, by other sums; the others differ by 0.003 where numbers are of size 1
    torch.testing.assert_close(found[~met], expected[~met], rtol=2e-2, atol=1e-2)
    right = forward(spoiled, torch.float64, "reference")
    assert bool((found.isfinite().all(-1) == right.isfinite().all(-1)).all())
