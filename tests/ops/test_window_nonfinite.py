"""What is not finite stays in the rows whose window holds it: not in earlier tokens, other documents, other rows."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from hsa_ultralong.ops import sliding_window_attention
from hsa_ultralong.ops.sliding_window.mask import window_mask
from hsa_ultralong.testing.factories import random_tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN, INF = float("nan"), float("inf")


def operands(num_queries, num_keys, dtype, *, documents, dim=8):
    q = random_tensor(2, num_queries, 4, dim, seed=1, dtype=dtype).to(DEVICE)
    k, v = (random_tensor(2, num_keys, 2, dim, seed=seed, dtype=dtype).to(DEVICE) for seed in (2, 3))
    segments = None
    if documents:
        # documents of 37 tokens, padding before the first
        segments = (torch.arange(num_keys, device=DEVICE) // 37 - 1).to(torch.int32).expand(2, -1).contiguous()
    places = {
        "query_segments": None if segments is None else segments[:, num_keys - num_queries :],
        "key_segments": segments,
    }
    return q, k, v, places


def poisoned(q, k, v, *, padding=True):
    """A key, a value, a query, all of the padding; and which rows read any of it, given who sees whom."""
    q, k, v = (part.clone() for part in (q, k, v))
    late, middle = k.shape[1] - 9, k.shape[1] // 2
    k[0, middle, 1, 2], v[1, late, 0, 3], q[1, -3, 0, 0] = NAN, INF, NAN
    bad = torch.zeros(k.shape[:2], dtype=torch.bool, device=DEVICE)
    bad[0, middle] = bad[1, late] = True
    if padding:
        k[:, :37], v[:, :37], bad[:, :37] = NAN, NAN, True
    return q, k, v, bad


def rows_of(q, k, bad, window, places):
    mask = window_mask(q.shape[1], k.shape[1], window, places["query_segments"], places["key_segments"], DEVICE)
    return (mask & bad[:, None]).any(-1)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(150, 150), (400, 400), (300, 450), (5, 60)])
@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_rows_that_do_not_read_it_are_unchanged_forward_and_backward(impl, num_queries, num_keys, documents):
    check(impl, num_queries, num_keys, documents, torch.float64, 8, rtol=1e-7, atol=1e-7)


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("num_queries", "num_keys"), [pytest.param(90, 90, marks=pytest.mark.slow), (40, 40), (5, 60)])
def test_so_it_is_with_the_kernels(num_queries, num_keys, documents):
    check("triton", num_queries, num_keys, documents, torch.float32, 16, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("documents", [False, True])
def test_so_it_is_with_kernels_of_full_size(documents):
    check("triton", 1000, 1500, documents, torch.bfloat16, 64, rtol=2e-2, atol=2e-2)


def check(impl, num_queries, num_keys, documents, dtype, dim, **tolerance):
    window = 20
    q, k, v, places = operands(num_queries, num_keys, dtype, documents=documents, dim=dim)
    bad_q, bad_k, bad_v, bad = poisoned(q, k, v, padding=documents)
    rows = rows_of(q, k, bad, window, places)
    rows[1, -3] = True
    assert rows.any() and not rows.all()
    slope = random_tensor(*q.shape, seed=9).to(q)
    steep = slope.clone()
    steep[rows] = NAN
    results = []
    flat = slope.masked_fill(rows[..., None, None], 0.0)
    for operands_of, gradient in (((bad_q, bad_k, bad_v), steep), ((q, k, v), flat)):
        leaves = [part.detach().clone().requires_grad_() for part in operands_of]
        out = sliding_window_attention(*leaves, window=window, **places, impl=impl)
        out.backward(gradient)
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    found, expected = results
    assert (~found[0][rows].isfinite()).flatten(1).any(1).all()
    torch.testing.assert_close(found[0][~rows], expected[0][~rows], **tolerance)
    torch.testing.assert_close(found[1][~rows], expected[1][~rows], **tolerance)
    # keys that no such row reads
    mask = window_mask(num_queries, num_keys, window, places["query_segments"], places["key_segments"], DEVICE)
    clear = ~((mask & rows[..., None]).any(1) | bad)
    assert clear.any()
    for left, right in zip(found[2:], expected[2:], strict=True):
        torch.testing.assert_close(left[clear], right[clear], **tolerance)
