"""The sliding window's gradients on Hopper (kernel_window_hopper_gradients.py, kernel_window_hopper_keys.py), on such a
card alone: against fp64, repeated bit for bit, with numbers that are not finite; the kernel that mends these; and that
rows with segments take the other kernels."""

from __future__ import annotations

import pytest
import torch

from hsa_ultralong.ops import sliding_window_attention
from hsa_ultralong.ops._triton import runs_hopper_kernels
from hsa_ultralong.ops.sliding_window.mask import window_mask

pytest.importorskip("triton")
from hsa_ultralong.ops.sliding_window import hopper_gradients, triton_window

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
on_hopper = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not runs_hopper_kernels(torch.cuda.current_device()), reason="needs Hopper"
    ),
]
# rows, queries, keys, query heads, key heads, window
SHAPES = {
    "group_8": (2, 700, 700, 16, 2, 512),
    "group_16": (1, 517, 517, 16, 1, 100),
    "group_1": (2, 300, 300, 3, 3, 37),
    "group_2": (1, 333, 400, 4, 2, 64),
    "group_4": (3, 129, 129, 4, 1, 65),
    "cache": (2, 70, 900, 8, 1, 512),
    "keys_that_no_query_sees": (1, 20, 600, 16, 2, 37),
    "window_1": (2, 200, 200, 8, 2, 1),
    "all_keys": (2, 260, 300, 16, 2, 1000),
    "one_query": (2, 1, 90, 8, 1, 50),
    "many_tiles": (1, 5000, 5000, 8, 1, 130),
}


@pytest.fixture
def every_size(monkeypatch):
    """Few rows take these kernels too, and all must."""
    monkeypatch.setattr(hopper_gradients, "QUERY_UNITS", 0)
    monkeypatch.setattr(hopper_gradients, "KEY_UNITS", 0)
    monkeypatch.setattr(triton_window._Problem, "_query_gradient", None)
    monkeypatch.setattr(triton_window._Problem, "_key_gradients", None)


def operands(shape):
    """q, k, v, gradient in fp64, numbers of bf16."""
    batch, num_queries, num_keys, heads, kv_heads, _ = SHAPES[shape]
    generator = torch.Generator(DEVICE).manual_seed(0)

    def draw(tokens, count):
        made = torch.randn(batch, tokens, count, 64, generator=generator, device=DEVICE)
        return made.bfloat16().double()

    return draw(num_queries, heads), draw(num_keys, kv_heads), draw(num_keys, kv_heads), draw(num_queries, heads)


def gradients(shape, tensors, dtype, impl="triton"):
    leaves = [x.to(dtype).requires_grad_() for x in tensors[:3]]
    out = sliding_window_attention(*leaves, window=SHAPES[shape][-1], impl=impl)
    return torch.autograd.grad(out, leaves, tensors[3].to(dtype))


class TestOnHopper:
    pytestmark = on_hopper

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_the_error_is_at_most_twice_that_of_the_reference_and_repeats(self, every_size, shape, dtype):
        tensors = operands(shape)
        found, again = (gradients(shape, tensors, dtype) for _ in range(2))
        budget = gradients(shape, tensors, dtype, "reference")
        truth = gradients(shape, tensors, torch.float64, "reference")
        for left, twin, allowed, right in zip(found, again, budget, truth, strict=True):
            assert torch.equal(left, twin)
            error, limit = ((x.double() - right).norm() for x in (left, allowed))
            # with one key for a row, dq is zero but for rounding
            assert error <= 2 * limit + 1e-5 * (1 + tensors[3].norm())

    def test_many_repeats_are_equal_bit_for_bit(self, every_size):
        tensors = operands("group_8")
        first = gradients("group_8", tensors, torch.bfloat16)
        for _ in range(50):
            for left, right in zip(first, gradients("group_8", tensors, torch.bfloat16), strict=True):
                assert torch.equal(left, right)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    @pytest.mark.parametrize("where", ["q", "k", "v"])
    @pytest.mark.parametrize("shape", ["group_1", "group_4", "cache", "all_keys"])
    def test_what_is_not_finite_stays_with_the_rows_and_keys_that_meet_it(self, every_size, shape, where, bad):
        """One number of a key or of a query; who meets it follows from the mask."""
        tensors = operands(shape)
        batch, num_queries, num_keys, heads, kv_heads, window = SHAPES[shape]
        spoiled = [x.clone() for x in tensors]
        place = num_queries // 2 if where == "q" else num_keys - num_queries // 2 - 1
        spoiled["qkv".index(where)][0, place, 0, 5] = bad
        mask = window_mask(num_queries, num_keys, window, None, None, DEVICE)[0]
        rows = torch.zeros(num_queries, heads, dtype=torch.bool, device=DEVICE)
        if where == "q":
            rows[place, 0] = True
        else:
            rows[:, : heads // kv_heads] = mask[:, place, None]
        # keys that a bad row sees; a key that is itself bad is seen by such rows alone
        keys = torch.zeros(num_keys, kv_heads, dtype=torch.bool, device=DEVICE)
        keys[:, 0] = (mask & rows[:, :1]).any(0)
        found = gradients(shape, spoiled, torch.bfloat16)
        expected = gradients(shape, tensors, torch.bfloat16)
        bad_rows, bad_keys = (torch.cat([x[None], x[None].new_zeros(batch - 1, *x.shape)]) for x in (rows, keys))
        assert not found[0][bad_rows].isfinite().all()
        for left, right, met in zip(found, expected, (bad_rows, bad_keys, bad_keys), strict=True):
            assert bool(left[~met].isfinite().all())
            torch.testing.assert_close(left[~met], right[~met], rtol=2e-2, atol=2e-2)

    def test_few_keys_take_the_other_kernel_for_keys(self, monkeypatch):
        monkeypatch.setattr(hopper_gradients, "QUERY_UNITS", 0)
        monkeypatch.setattr(hopper_gradients, "KEY_UNITS", 10**9)
        tensors = operands("group_8")
        found = gradients("group_8", tensors, torch.bfloat16)
        truth = gradients("group_8", tensors, torch.float64, "reference")
        for left, right in zip(found, truth, strict=True):
            assert (left.double() - right).norm() <= 1e-2 * right.norm()


@pytest.mark.parametrize("has_documents", [False, True])
def test_rows_with_segments_take_the_other_kernels(monkeypatch, has_documents):
    monkeypatch.setattr(hopper_gradients, "QUERY_UNITS", 0)
    monkeypatch.setattr(hopper_gradients, "runs_hopper_kernels", lambda index: True)
    q, k, v = (torch.zeros(1, 200, heads, 64, dtype=torch.bfloat16) for heads in (8, 1, 1))
    segments = torch.zeros(1, 200, dtype=torch.int32) if has_documents else None
    problem = triton_window._Problem(q, k, v, segments, segments, 100, 0.125)
    assert hopper_gradients.takes(problem, q, q) is not has_documents


def test_flagged_tiles_and_blocks_are_formed_again():
    """The mending kernel alone, of fp32, interpreted where there is no GPU."""
    batch, num_queries, num_keys, heads, kv_heads, window = 2, 12, 70, 16, 2, 30
    generator = torch.Generator().manual_seed(0)
    q, k, v, up = (
        torch.randn(batch, tokens, count, 64, generator=generator).to(DEVICE)
        for tokens, count in ((num_queries, heads), (num_keys, kv_heads), (num_keys, kv_heads), (num_queries, heads))
    )
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = sliding_window_attention(*leaves, window=window, impl="reference")
    expected = torch.autograd.grad(out, leaves, up)
    problem = triton_window._Problem(q, k, v, None, None, window, 0.125)
    logits = torch.einsum("bthd,bshd->bths", q, k.repeat_interleave(heads // kv_heads, 2)) * 0.125
    mask = window_mask(num_queries, num_keys, window, None, None, DEVICE)
    lse = logits.masked_fill(~mask[:, :, None], float("-inf")).logsumexp(-1).contiguous() * 1.4426950408889634
    launches = hopper_gradients.HopperGradients(problem, up, out.detach().contiguous(), lse)
    launches.blocks, launches.deltas = 8, (out.detach() * up).sum(-1)
    launches.flags = torch.zeros(8 + 8, 4, dtype=torch.int32, device=DEVICE)
    launches.grad_q, launches.grad_k, launches.grad_v = (torch.full_like(x, 7.0) for x in (q, k, v))
    # of the second row: the first head's second tile of tokens, the second head's first block of keys
    launches.flags[5, 3] = launches.flags[8 + 6, 0] = 1
    assert launches.tiles == 8
    launches.mend()
    changed = torch.zeros_like(launches.grad_q, dtype=torch.bool)
    changed[1, 8:, :8] = True
    torch.testing.assert_close(launches.grad_q[changed], expected[0][changed], rtol=1e-4, atol=1e-5)
    assert bool((launches.grad_q[~changed] == 7.0).all())
    changed = torch.zeros_like(launches.grad_k, dtype=torch.bool)
    changed[1, :64, 1] = True
    for left, right in ((launches.grad_k, expected[1]), (launches.grad_v, expected[2])):
        torch.testing.assert_close(left[changed], right[changed], rtol=1e-4, atol=1e-5)
        assert bool((left[~changed] == 7.0).all())
