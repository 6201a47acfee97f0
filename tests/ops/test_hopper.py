"""hsa_attention's pass for all gradients on Hopper (kernel_hopper.py), on such a card alone: against fp64, repeated bit
for bit, and with numbers that are not finite. How rows come in parts is tested with a stand-in (test_hsa_triton.py)."""

from __future__ import annotations

import pytest
import torch

from hsa_ultralong.ops import hsa_attention
from hsa_ultralong.ops._triton import runs_hopper_kernels

pytest.importorskip("triton")
from hsa_ultralong.ops.hsa import plan, triton_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not runs_hopper_kernels(torch.cuda.current_device()), reason="needs Hopper"
    ),
]
SIZE = DIM = 64
# rows, rows of the memory, memory heads, retrieval heads, tokens, chunks, slots, tokens of a part
SHAPES = {
    "all_chunks_and_parts": (1, 1, 1, 1, 1000, 30, 15, 320),
    "one_part": (1, 1, 1, 1, 1000, 15, 8, 1024),
    "memories_of_their_own": (2, 2, 1, 1, 700, 15, 8, 320),
    "shared_memory": (2, 1, 1, 1, 700, 15, 8, 320),
    "two_memory_heads": (1, 1, 2, 1, 512, 20, 8, 192),
    "retrieval_per_head": (1, 1, 2, 2, 512, 20, 7, 192),
    "all_at_once": (2, 2, 2, 2, 512, 20, 7, 192),
    "few_tokens": (1, 1, 1, 1, 65, 40, 3, 64),
}


@pytest.fixture(autouse=True)
def one_pass_alone(monkeypatch):
    """Rows of any length take the one pass, and none the other two."""
    monkeypatch.setattr(triton_attention, "_query_gradients", None)
    monkeypatch.setattr(plan, "_PARTED_PAIRS", 0)
    monkeypatch.setattr(plan, "_PARTS_PAIRS", 0)
    plan.plan_of.cache_clear()
    yield
    plan.plan_of.cache_clear()


def operands(shape, dtype):
    rows, memory_rows, heads, lists, tokens, chunks, slots, _ = SHAPES[shape]
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*sizes):
        return torch.randn(sizes, generator=generator, device="cuda").to(dtype).double()

    q, up = draw(rows, tokens, heads * 16, DIM), draw(rows, tokens, heads * 16, DIM)
    k, v = draw(memory_rows, chunks * SIZE, heads, DIM), draw(memory_rows, chunks * SIZE, heads, DIM)
    scores = torch.rand(rows, tokens, lists, chunks, generator=generator, device="cuda")
    indices = scores.topk(slots).indices.to(torch.int32)
    indices[torch.rand(indices.shape, generator=generator, device="cuda") < 0.2] = -1
    weights = torch.rand(indices.shape, generator=generator, device="cuda")
    return q, k, v, weights.double(), indices, up


def gradients(monkeypatch, shape, dtype, inputs, impl="triton"):
    """Of q, k, v and weights."""
    *leaves, indices, up = inputs
    rows, _, heads, *_, slots, tokens = SHAPES[shape]
    monkeypatch.setattr(plan, "_PARTS_BYTES", tokens * rows * heads * slots * 16 * DIM * 2)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [x.to(wide if x is leaves[3] else dtype).requires_grad_() for x in leaves]
    out = hsa_attention(*leaves[:3], indices, leaves[3], chunk_size=SIZE, impl=impl)
    return torch.autograd.grad(out, leaves, up.to(out.dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_of_one_pass_is_at_most_twice_that_of_the_reference_and_repeats(monkeypatch, shape, dtype):
    inputs = operands(shape, dtype)
    found, again = (gradients(monkeypatch, shape, dtype, inputs) for _ in range(2))
    budget = gradients(monkeypatch, shape, dtype, inputs, "reference")
    truth = gradients(monkeypatch, shape, torch.float64, inputs, "reference")
    for left, twin, allowed, right in zip(found, again, budget, truth, strict=True):
        assert bool((left == twin).all())
        error, limit = ((x.double() - right).norm() for x in (left, allowed))
        assert error <= 2 * limit + 1e-6 * right.norm()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_what_is_not_finite_stays_with_the_tokens_and_chunks_that_meet_it(monkeypatch, where, bad):
    shape, dtype = "memories_of_their_own", torch.bfloat16
    inputs = operands(shape, dtype)
    expected = gradients(monkeypatch, shape, dtype, inputs)
    spoiled = [x.clone() for x in inputs]
    spoiled[where][0, 200] = bad
    found = gradients(monkeypatch, shape, dtype, spoiled)
    indices, tokens = inputs[4][:, :, 0].long(), inputs[0].shape[1]
    reads = torch.zeros(2, tokens, 16, dtype=torch.bool, device="cuda")
    reads.scatter_(2, torch.where(indices >= 0, indices, 15), True)
    reads = reads[..., :15]
    # tokens that meet it, and chunks that these meet
    met = torch.zeros(2, tokens, dtype=torch.bool, device="cuda")
    if where == 0:
        met[0, 200] = True
        chunks = (reads & met[..., None]).any(1)
    else:
        met[0] = reads[0, :, 200 // SIZE]
        chunks = torch.zeros(2, 15, dtype=torch.bool, device="cuda")
        chunks[0, 200 // SIZE] = True
    assert not found[0][met].isfinite().all()
    for name in (0, 3):
        torch.testing.assert_close(found[name][~met], expected[name][~met], rtol=0, atol=0)
    clear = ~chunks.repeat_interleave(SIZE, 1)
    for name in (1, 2):
        torch.testing.assert_close(found[name][clear], expected[name][clear], rtol=0, atol=0)
