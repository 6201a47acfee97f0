"""On a GPU: joint_attention's kernels in bf16, bit for bit again and in a graph."""

import pytest
import torch

from hsa_ultralong.ops import ChunkVisibility, joint_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SIZE, DIM = 64, 64
# rows that read few chunks, all, by a retrieval head for each memory head
CASES = {"sparse": (8, 1, 1), "coverage": (32, 1, 1), "per_head": (8, 2, 2), "shared_selection": (8, 2, 1)}


def problem(name, seed=0, tokens=2000, batch=2, heads=4):
    """Indices, q, k, v, weights, and the gradients of output and mass."""
    slots, kv_heads, retrieval_heads = CASES[name]
    generator = torch.Generator("cuda").manual_seed(seed)

    def noise(*shape):
        return torch.randn(shape, generator=generator, device="cuda")

    chunks = -(-tokens // SIZE)
    seen = ChunkVisibility.causal(batch, tokens, chunks, SIZE, device="cuda").mask()[:, :, None]  # (B, T, 1, C)
    order = noise(batch, tokens, retrieval_heads, chunks).masked_fill(~seen, -torch.inf)
    scores, indices = order.topk(min(slots, chunks), -1)
    indices = torch.where(scores == -torch.inf, -1, indices).int()
    weights = noise(*indices.shape).softmax(-1).masked_fill(indices < 0, 0.0)
    shapes = ((batch, tokens, heads, DIM), *[(batch, chunks * SIZE, kv_heads, DIM)] * 2)
    q, k, v = (noise(*shape).bfloat16() for shape in shapes)
    return indices, [q, k, v, weights], (noise(*q.shape).bfloat16(), noise(*q.shape[:3]))


def attend(case, impl="auto", dtype=torch.bfloat16):
    """Output, mass and the gradients of q, k, v, weights."""
    indices, inputs, upward = case
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [x.detach().to(dtype if i < 3 else wide).requires_grad_() for i, x in enumerate(inputs)]
    q, k, v, weights = leaves
    out, mass = joint_attention(q, k, v, indices, weights, chunk_size=SIZE, causal=True, impl=impl)
    slopes = [x.to(y.dtype) for x, y in zip(upward, (out, mass), strict=True)]
    # without chunks the mass is -inf
    slopes[1] = slopes[1].masked_fill(mass == -torch.inf, 0.0)
    return [out.detach(), mass.detach(), *torch.autograd.grad((out, mass), leaves, slopes)]


@pytest.mark.parametrize("name", CASES)
def test_kernels_are_near_exact_numbers_in_bf16(name):
    case = problem(name)
    for found, exact in zip(attend(case), attend(case, "torch", torch.float64), strict=True):
        assert torch.equal(found == -torch.inf, exact == -torch.inf)
        found, exact = (x.double().nan_to_num(neginf=0.0) for x in (found, exact))
        assert (found - exact).norm() <= 0.02 * exact.norm()


@pytest.mark.parametrize("name", CASES)
def test_repeats_and_graphs_on_other_numbers_give_the_same_bits(name):
    case = problem(name)
    first, again = attend(case), attend(case)
    assert all(torch.equal(left, right) for left, right in zip(first, again, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend(case)
    other = problem(name, seed=1)
    case[0].copy_(other[0])
    for mine, new in zip((*case[1], *case[2]), (*other[1], *other[2]), strict=True):
        mine.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(left, right) for left, right in zip(captured, attend(other), strict=True))


def test_a_compiled_caller_reads_by_the_kernels():
    indices, inputs, upward = problem("sparse")

    def read(q, k, v, weights):
        out, mass = joint_attention(2 * q, k, v, indices, weights, chunk_size=SIZE, causal=True)
        return 2 * out, mass

    found = []
    for function in (read, torch.compile(read, dynamic=False)):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out, mass = function(*leaves)
        found.append([out.detach(), mass.detach(), *torch.autograd.grad(out, leaves, upward[0])])
    for plain, compiled in zip(*found, strict=True):
        # the compiler's logarithms differ
        assert (plain.double() - compiled.double()).norm() <= 1e-2 * plain.double().norm()
