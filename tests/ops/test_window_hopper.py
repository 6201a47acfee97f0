"""The sliding window's forward in Gluon (kernel_window_hopper.py): on the CPU in a stand-in for the language, which
knows no layouts and no assembly; on a Hopper card against fp64, repeated bit for bit, with numbers that are not finite.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hsa_ultralong.ops import sliding_window_attention
from hsa_ultralong.ops._triton import runs_hopper_kernels
from hsa_ultralong.ops.sliding_window.mask import window_mask
from hsa_ultralong.testing.factories import random_tensor
from hsa_ultralong.testing.gluon import GluonStandIn

pytest.importorskip("triton")
from hsa_ultralong.ops.sliding_window import triton_window

HAS_HOPPER = torch.cuda.is_available() and runs_hopper_kernels(torch.cuda.current_device())
DEVICE = "cuda" if HAS_HOPPER else "cpu"
on_hopper = [pytest.mark.gpu, pytest.mark.skipif(not HAS_HOPPER, reason="needs Hopper")]
NAMES = ("window", "query_segments", "key_segments")
FOLDER, PACKAGE = Path(triton_window.__file__).parent, "hsa_ultralong.ops.sliding_window"
# rows, queries, keys, group, key heads, window
SHAPES = {
    "a_part_of_a_tile": (1, 5, 60, 8, 1, 20),
    "rows_and_heads": (2, 70, 130, 8, 2, 37),
    "group_16": (1, 150, 333, 16, 1, 128),
    "group_4_all_keys": (1, 150, 150, 4, 2, 1000),
    "group_2_own_key_alone": (2, 250, 270, 2, 1, 1),
    "group_1": (1, 300, 300, 1, 2, 100),
    "group_1_narrow": (1, 260, 260, 1, 1, 37),
    "wide_window": (1, 100, 700, 8, 1, 512),
}
LARGE = {
    "of_training": (2, 2048, 2048, 8, 2, 512),
    "ragged": (2, 1999, 3001, 8, 2, 500),
    "one_head": (1, 3000, 3000, 16, 1, 512),
    "equal_heads": (1, 2500, 2500, 1, 16, 128),
}


def raised(top, local, scale):
    highest = (local * scale).amax(1, keepdim=True)
    new = torch.where(highest > top + 8, highest, top)
    return new, torch.exp2(top - new)


ASSEMBLY = {
    "_exp2": torch.exp2,
    "_log2": torch.log2,
    "_reciprocal": torch.reciprocal,
    "_raise": raised,
    "_shrink": lambda acc, factor: acc * factor,
    "_where_equal": lambda logits, left, right: torch.where(left == right, logits, float("-inf")),
    "_where_ordered": lambda logits, low, high: torch.where(low <= high, logits, float("-inf")),
}


@pytest.fixture
def stand_in(monkeypatch):
    """The kernel takes all calls on the CPU, by two programs."""
    names = GluonStandIn(FOLDER / "kernel_window_hopper.py", ASSEMBLY).names
    monkeypatch.setitem(sys.modules, f"{PACKAGE}.kernel_window_hopper", SimpleNamespace(**names))
    spec = importlib.util.spec_from_file_location(f"{PACKAGE}.hopper_window", FOLDER / "hopper_window.py")
    host = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(host)
    monkeypatch.setitem(sys.modules, spec.name, host)
    monkeypatch.setattr(host, "num_processors", lambda index: 2)
    monkeypatch.setattr(host, "_MENDED_ROWS", 64)
    monkeypatch.setattr(triton_window, "runs_hopper_kernels", lambda index: True)
    monkeypatch.setattr(triton_window, "_HOPPER_ROWS", 0)
    return host


def operands(shape, dtype, *, documents, sharpness=1.0):
    rows, num_queries, num_keys, group, kv_heads, window = shape
    q = random_tensor(rows, num_queries, kv_heads * group, 64, seed=0).to(DEVICE) * sharpness
    k, v = (random_tensor(rows, num_keys, kv_heads, 64, seed=seed).to(DEVICE) for seed in (1, 2))
    places = {}
    if documents:
        # padding before the first
        owner = (torch.arange(num_keys, device=DEVICE) // 67 - 1).to(torch.int32).expand(rows, -1).contiguous()
        places = {"query_segments": owner[:, num_keys - num_queries :].contiguous(), "key_segments": owner}
    return (q.to(dtype), k.to(dtype), v.to(dtype)), {"window": window, **places}


def truth(q, k, v, *, window, query_segments=None, key_segments=None):
    """out and lse to base 2, fp64."""
    mask = window_mask(q.shape[1], k.shape[1], window, query_segments, key_segments, q.device)
    k, v = (part.double().repeat_interleave(q.shape[2] // k.shape[2], 2) for part in (k, v))
    logits = torch.einsum("bihd,bjhd->bhij", q.double(), k) / 8
    logits = logits.masked_fill(~mask[:, None], float("-inf"))
    out = torch.einsum("bhij,bjhd->bihd", logits.softmax(-1), v)
    return out, logits.logsumexp(-1).transpose(1, 2) / torch.log(torch.tensor(2.0, dtype=torch.float64))


def forward(q, k, v, *, window, query_segments=None, key_segments=None):
    return triton_window._forward(q, k, v, query_segments, key_segments, min(window, k.shape[1]), 0.125)


def check(shape, dtype, **options):
    inputs, places = operands(shape, dtype, **options)
    out, lse = forward(*inputs, **places)
    right, right_lse = truth(*inputs, **places)
    budget = sliding_window_attention(*inputs, **places, impl="reference")
    error, limit = ((x.double() - right).norm() for x in (out, budget))
    assert error <= 2 * limit + 1e-6 * right.norm()
    torch.testing.assert_close(lse.double(), right_lse, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_in_a_stand_in_it_is_the_windows_attention(stand_in, shape, documents):
    check(SHAPES[shape], torch.float16, documents=documents)


def test_in_a_ring_of_two_places_it_is_the_same(stand_in, monkeypatch):
    # logits so far apart that references of weights are raised again and again
    monkeypatch.setattr(stand_in, "OPTIONS", {**stand_in.OPTIONS, "STAGES": 2})
    check((1, 130, 300, 8, 1, 200), torch.float16, documents=False, sharpness=10.0)


def contain(shape, dtype):
    """What is not finite stays in the rows whose window holds it."""
    (q, k, v), places = operands(shape, dtype, documents=True)
    expected = forward(q, k, v, **places)
    q, k, v = (part.clone() for part in (q, k, v))
    middle = k.shape[1] - q.shape[1] // 2
    bad = torch.zeros(k.shape[:2], dtype=torch.bool, device=DEVICE)
    k[0, middle, 0, 5] = v[0, middle + 9, 0, 3] = float("nan")
    v[0, middle - 30, 0, 7] = float("inf")
    bad[0, [middle, middle + 9, middle - 30]] = True
    mask = window_mask(q.shape[1], k.shape[1], *(places[name] for name in NAMES), DEVICE)
    met = (mask & bad[:, None]).any(-1)
    q[0, -1] = float("inf")
    met[0, -1] = True
    assert met.any() and not met.all()
    group = q.shape[2] // k.shape[2]
    for found, clean in zip(forward(q, k, v, **places), expected, strict=True):
        torch.testing.assert_close(found[~met], clean[~met], rtol=1.6e-2, atol=1e-2)
    found = forward(q, k, v, **places)[0][:, :, :group]
    assert (~found[met].isfinite()).flatten(1).any(1).all()


def test_in_a_stand_in_what_is_not_finite_stays_in_its_rows(stand_in):
    contain((2, 40, 64, 2, 1, 12), torch.float16)


def test_only_a_hopper_card_and_what_fits_take_it(monkeypatch):
    def takes(dtype=torch.bfloat16, rows=8192, group=8, dim=64):
        q, k = (torch.zeros(1, rows, heads, dim, dtype=dtype) for heads in (group, 1))
        return triton_window._Problem(q, k, k, None, None, 512, 0.125).takes_hopper_forward()

    assert not takes()
    monkeypatch.setattr(triton_window, "runs_hopper_kernels", lambda index: True)
    assert takes() and takes(torch.float16) and takes(group=16)
    assert not (takes(torch.float32) or takes(dim=128) or takes(group=12) or takes(rows=128))
    monkeypatch.setattr(triton_window, "_HOPPER_ROWS", None)
    assert not takes()


@pytest.fixture
def gluon_alone(monkeypatch):
    """Rows of any length take the kernel, and none the other."""
    monkeypatch.setattr(triton_window, "_HOPPER_ROWS", 0)
    monkeypatch.setattr(triton_window.kernel_window, "forward_kernel", None)


class TestOnHopper:
    pytestmark = on_hopper

    @pytest.mark.parametrize("documents", [False, True])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("shape", {**SHAPES, **LARGE})
    def test_error_is_at_most_twice_that_of_the_reference(self, gluon_alone, shape, dtype, documents):
        check({**SHAPES, **LARGE}[shape], dtype, documents=documents)

    @pytest.mark.parametrize("shape", ["of_training", "equal_heads"])
    def test_references_of_weights_that_rise(self, gluon_alone, shape):
        check(LARGE[shape], torch.bfloat16, documents=False, sharpness=10.0)

    @pytest.mark.parametrize("documents", [False, True])
    def test_repeats_are_bit_identical(self, gluon_alone, documents):
        inputs, places = operands((4, 4096, 4096, 8, 2, 512), torch.bfloat16, documents=documents)
        first = forward(*inputs, **places)
        for _ in range(50):
            for left, right in zip(forward(*inputs, **places), first, strict=True):
                assert torch.equal(left, right)

    @pytest.mark.parametrize("shape", [(2, 60, 90, 4, 1, 20), (2, 1500, 2000, 8, 2, 300), (1, 900, 900, 1, 2, 64)])
    def test_what_is_not_finite_stays_in_its_rows(self, gluon_alone, shape):
        contain(shape, torch.bfloat16)
