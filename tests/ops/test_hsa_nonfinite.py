"""What is not finite stays in the rows of hsa_attention that read it, forward and backward, in every backend."""

from __future__ import annotations

from importlib.util import find_spec

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
    pytest.param("triton", marks=pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")),
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
    has_triton = find_spec("triton") is not None
    monkeypatch.setattr(torch_gather, "_BLOCK_ELEMENTS", {"cpu": 30_000})
    monkeypatch.setattr(torch_dense, "_TILE_ELEMENTS", {"cpu": 3000})
    if has_triton:
        from hsa_ultralong.ops.hsa import kernel_lists, plan, triton_attention

        # the interpreter walks over keys one by one
        monkeypatch.setattr(kernel_lists, "_COUNTED_KEYS", (32, 32))
        # tiles of two parts, as the second pass sees them
        monkeypatch.setattr(plan, "launch_options", lambda *_: plan.HSALaunch(32, 4, 1))
        monkeypatch.setattr(triton_attention, "_DECODE_TOKENS", 0)
        # shapes that were seen with other sizes
        plan.plan_of.cache_clear()
    yield
    if has_triton:
        plan.plan_of.cache_clear()


def problem(shape):
    inputs = random_attention(num_tokens=TOKENS, chunk_size=SIZE, dim=16, **SHAPES[shape])
    inputs.indices[:, LONE] = -1
    return AttentionInputs(*(None if x is None else x.to(DEVICE) for x in inputs))


def run(inputs, impl, slope, **options):
    dtype = torch.float32 if impl == "triton" else torch.float64
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


def cases():
    """Under the interpreter a kernel takes long: most of its cases are for a GPU and for slow runs."""
    for impl in IMPLS:
        for shape, number in [*((shape, float("nan")) for shape in SHAPES), ("short_chunks", float("inf"))]:
            is_slow = not isinstance(impl, str) and DEVICE == "cpu" and shape not in ("coverage", "sparse")
            name, marks = (impl, ()) if isinstance(impl, str) else (impl.values[0], impl.marks)
            yield pytest.param(name, shape, number, marks=(*marks, *((pytest.mark.slow,) if is_slow else ())))


@pytest.mark.parametrize(("impl", "shape", "number"), cases())
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


@pytest.mark.skipif(DEVICE != "cpu", reason="on a CPU alone")
@pytest.mark.parametrize("shape", SHAPES)
def test_nor_does_it_where_a_chunk_is_gathered_once_for_many_tokens(shape, monkeypatch):
    for name, value in {"_FEWEST_PAIRS": 1, "_FEWEST_SHARED": 0, "_LARGEST_TILE": 4}.items():
        monkeypatch.setattr(torch_gather, name, value)
    test_what_is_not_finite_stays_in_the_rows_that_read_it("torch_gather", shape, float("nan"))


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


@pytest.mark.parametrize("impl", IMPLS)
def test_few_tokens_without_gradients_keep_it_too(impl, monkeypatch):
    if impl == "triton":
        from hsa_ultralong.ops.hsa import triton_attention

        monkeypatch.setattr(triton_attention, "_DECODE_TOKENS", 64)
        monkeypatch.setattr(triton_attention, "_forward", None)
    inputs = problem("short_chunks")
    bad, _, _ = poisoned(inputs, float("nan"))
    rows, _ = reached(bad, is_backward=False)
    dtype = torch.float32 if impl == "triton" else torch.float64
    found, expected = (
        hsa_attention(
            x.q.to(dtype), x.k.to(dtype), x.v.to(dtype), x.indices, x.weights.to(dtype), chunk_size=SIZE,
            chunk_lengths=x.chunk_lengths, impl=impl,
        )
        for x in (bad, inputs)
    )  # fmt: skip
    torch.testing.assert_close(found[~rows], expected[~rows], rtol=1e-5, atol=1e-5)
    assert (~found[rows].isfinite()).flatten(1).any(1).all()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("slots", [6, 30])
@pytest.mark.parametrize("dim", [64, 128])
def test_kernels_of_full_size_keep_it_in_the_rows_that_read_it(slots, dim, monkeypatch):
    monkeypatch.undo()
    tokens, size, steep = 700, dim, 50
    inputs = random_attention(
        num_tokens=tokens, group=4, kv_heads=1, num_chunks=40, slots=slots, chunk_size=size, dim=dim, is_short=True
    )
    inputs = AttentionInputs(*(None if x is None else x.cuda() for x in inputs))
    # every chunk but these has readers that read none of them
    indices = inputs.indices.clone()
    indices[(indices == BAD_CHUNK) & (torch.arange(tokens, device="cuda") % 16 > 0)[None, :, None, None]] = -1
    indices[:, 300:304] = -1
    inputs = inputs._replace(indices=indices)
    q, k, v = (x.bfloat16() for x in (inputs.q, inputs.k, inputs.v))
    slope = random_tensor(*q.shape, seed=77).to(q)
    dirty_k, dirty_v, dirty_q, dirty_slope = k.clone(), v.clone(), q.clone(), slope.clone()
    dirty_k[0, BAD_CHUNK * size + 2, 0, 3] = dirty_v[1, BAD_CHUNK * size + 1, 0, 5] = float("nan")
    beyond = (torch.arange(size, device="cuda") >= inputs.chunk_lengths[..., None]).flatten(1)
    dirty_k[beyond], dirty_v[beyond] = float("inf"), float("nan")
    dirty_q[:, 301], dirty_slope[:, 302] = float("nan"), float("nan")
    dirty_slope[0, steep, 1, 7] = float("inf")
    dirty = inputs._replace(q=dirty_q, k=dirty_k, v=dirty_v)
    results = []
    for part, up in ((dirty, dirty_slope), (inputs._replace(q=q, k=k, v=v), slope)):
        leaves = [x.detach().clone().requires_grad_() for x in (part.q, part.k, part.v, part.weights.float())]
        out = hsa_attention(
            *leaves[:3], indices, leaves[3], chunk_size=size, chunk_lengths=inputs.chunk_lengths, impl="triton"
        )
        out.backward(up)
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    found, expected = results
    rows = (indices == BAD_CHUNK).flatten(2).any(-1)
    torch.testing.assert_close(found[0][~rows], expected[0][~rows], rtol=2e-2, atol=2e-2)
    assert (~found[0][rows].isfinite()).flatten(1).any(1).all()
    rows[0, steep] = True
    for number in (1, 4):
        torch.testing.assert_close(found[number][~rows], expected[number][~rows], rtol=2e-2, atol=2e-2)
    chunks = torch.zeros((2, 40), dtype=torch.bool, device="cuda")
    chunks[:, BAD_CHUNK] = True
    chunks[0, indices[0, steep][indices[0, steep] >= 0].long()] = True
    assert not chunks.all()
    clear = ~chunks.repeat_interleave(size, 1)
    for number in (2, 3):
        torch.testing.assert_close(found[number][clear], expected[number][clear], rtol=2e-2, atol=5e-2)
