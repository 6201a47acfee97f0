"""The sliding window's Triton kernels against the reference; without a GPU they run under the interpreter, in fp32."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from hsa_ultralong.ops import sliding_window_attention
from hsa_ultralong.ops._triton import on_own_device
from hsa_ultralong.testing.factories import random_tensor

pytest.importorskip("triton")
from hsa_ultralong.ops.sliding_window import triton_window

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run(impl, dtype, sizes, window, *, has_documents, dim=16):
    """Output and the gradients of q, k, v."""
    num_queries, num_keys, heads, kv_heads = sizes
    shapes = [(num_queries, heads), (num_keys, kv_heads), (num_keys, kv_heads)]
    leaves = [random_tensor(2, *shape, dim, seed=seed).to(DEVICE, dtype) for seed, shape in enumerate(shapes)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    segments = None
    if has_documents:
        # padding before the first document
        segments = (torch.arange(num_keys, device=DEVICE) // 17 - 1).to(torch.int32).expand(2, -1)
    mine = None if segments is None else segments[:, num_keys - num_queries :]
    out = sliding_window_attention(*leaves, window=window, query_segments=mine, key_segments=segments, impl=impl)
    out.backward(random_tensor(*out.shape, seed=9).to(out))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("has_documents", [False, True])
@pytest.mark.parametrize(
    ("sizes", "window"),
    [
        ((50, 50, 4, 2), 20),
        ((30, 75, 3, 1), 7),
        ((5, 60, 4, 4), 100),
        ((70, 70, 2, 1), 1),
        ((40, 90, 16, 1), 33),
        ((1, 40, 8, 2), 24),
    ],
)
def test_kernels_equal_reference_in_output_and_every_gradient(sizes, window, has_documents):
    found = run("triton", torch.float32, sizes, window, has_documents=has_documents)
    expected = run("reference", torch.float64, sizes, window, has_documents=has_documents)
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left.double(), right, rtol=1e-5, atol=1e-5)


def test_shares_of_the_heads_change_nothing(monkeypatch):
    sizes = (40, 40, 8, 1)
    monkeypatch.setattr(triton_window._Problem, "_splits", lambda self, programs: 1)
    whole = run("triton", torch.float32, sizes, 9, has_documents=False)
    monkeypatch.setattr(triton_window._Problem, "_splits", lambda self, programs: 4)
    for left, right in zip(run("triton", torch.float32, sizes, 9, has_documents=False), whole, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


def test_what_the_kernels_do_not_take_is_refused_in_one_line():
    q = torch.zeros(1, 4, 2, 24, device=DEVICE)
    with pytest.raises(ValueError, match='impl="triton" takes head dimensions in'):
        sliding_window_attention(q, q, q, window=2, impl="triton")


@pytest.mark.filterwarnings("error:Dynamo")
@pytest.mark.parametrize("has_documents", [False, True])
def test_a_compiled_graph_holds_the_kernels_whole(has_documents):
    """fullgraph: nothing breaks the graph; output and gradients are those of the plain call."""
    leaves = [random_tensor(1, 40, heads, 16, seed=heads).float().to(DEVICE).requires_grad_() for heads in (4, 2)]
    segments = (torch.arange(40, device=DEVICE) // 17).to(torch.int32)[None] if has_documents else None

    def attend(q, k):
        parts = {"query_segments": segments, "key_segments": segments}
        return sliding_window_attention(q * 2, k, k + 1, window=9, **parts, impl="triton").square()

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True, dynamic=False)
    expected, found = attend(*leaves), compiled(*leaves)
    torch.testing.assert_close(found, expected)
    for left, right in zip(*(torch.autograd.grad(x.sum(), leaves) for x in (found, expected)), strict=True):
        torch.testing.assert_close(left, right)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*leaves), expected)


def test_the_operators_say_truly_what_they_return():
    q, k = (random_tensor(2, 30, heads, 16, seed=heads).float().to(DEVICE).requires_grad_() for heads in (4, 2))
    out, lse = triton_window._operator(q, k, k, None, None, 7, 0.25)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(triton_window._operator, (q, k, k, None, None, 7, 0.25), test_utils=checks)
    leaves = [x.detach() for x in (q, k, k)]
    arguments = (*leaves, None, None, out.detach(), lse.detach(), torch.ones_like(out), 7, 0.25)
    torch.library.opcheck(triton_window._gradient_operator, arguments, test_utils=checks)


def test_kernels_run_with_the_device_of_their_operands_as_the_current_one(monkeypatch):
    """A stand-in for a tensor on a second card."""
    entered = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or contextlib.nullcontext())
    run = on_own_device(lambda first, number, scale: number * scale)
    for index, found in ((0, []), (1, [torch.device("cuda", 1)])):
        first = SimpleNamespace(is_cuda=True, device=torch.device("cuda", index))
        assert run(first, 3, scale=2) == 6 and entered == found


def test_logsumexp_has_no_gradient_to_lose():
    q = random_tensor(1, 20, 2, 16, seed=0).float().to(DEVICE).requires_grad_()
    out, lse = triton_window._operator(q, q, q, None, None, 5, 0.25)
    assert out.requires_grad and not lse.requires_grad


def test_second_derivatives_are_refused_and_another_way_is_named():
    q = random_tensor(1, 20, 2, 16, seed=0).float().to(DEVICE).requires_grad_()
    out = sliding_window_attention(q, q, q, window=5, impl="triton")
    with pytest.raises(RuntimeError, match='create_graph=True needs second ones: use impl="torch"'):
        torch.autograd.grad(out.sum(), q, create_graph=True)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("has_documents", [False, True])
@pytest.mark.parametrize(
    ("sizes", "window", "dim"),
    [((1500, 1500, 16, 1), 512, 64), ((700, 1000, 4, 1), 128, 64), ((600, 600, 4, 2), 100, 128)],
)
def test_bf16_error_is_at_most_twice_that_of_the_reference(sizes, window, dim, has_documents):
    options = {"has_documents": has_documents, "dim": dim}
    exact = run("reference", torch.float64, sizes, window, **options)
    budget = run("reference", torch.bfloat16, sizes, window, **options)
    found = run("triton", torch.bfloat16, sizes, window, **options)
    for left, allowed, right in zip(found, budget, exact, strict=True):
        error, limit = ((part.double() - right).norm() for part in (left, allowed))
        assert error <= 2 * limit + 1e-6 * (1 + right.norm())


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_repeats_are_bit_identical():
    arguments = ("triton", torch.bfloat16, (900, 900, 8, 2), 128)
    first = run(*arguments, has_documents=True, dim=64)
    for _ in range(20):
        for left, right in zip(first, run(*arguments, has_documents=True, dim=64), strict=True):
            assert torch.equal(left, right)
