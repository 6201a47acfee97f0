"""sliding_window_attention: the banded path against the reference, and the reference against a loop."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hsa_ultralong.ops import sliding_window_attention
from hsa_ultralong.ops.sliding_window import torch_banded
from hsa_ultralong.testing.factories import random_tensor

EXACT = {"rtol": 1e-11, "atol": 1e-11}


def inputs(batch, queries, keys, heads=4, kv_heads=2, dim=4):
    return (
        random_tensor(batch, queries, heads, dim),
        random_tensor(batch, keys, kv_heads, dim, seed=1),
        random_tensor(batch, keys, kv_heads, dim, seed=2),
    )


def documents(batch, keys, lengths=(3, 5, 4, 9)):
    """(B, keys) int32: documents of changing lengths, the first tokens of every second row padding."""
    row = torch.repeat_interleave(torch.arange(200), torch.tensor(lengths * 50))[:keys]
    rows = torch.stack([row + b for b in range(batch)]).to(torch.int32)
    rows[1::2, :4] = -1
    return rows


def run(tensors, impl, **options):
    leaves = [x.clone().requires_grad_() for x in tensors]
    out = sliding_window_attention(*leaves, impl=impl, **options)
    (out * random_tensor(*out.shape, seed=7)).sum().backward()
    return [out.detach(), *(x.grad for x in leaves)]


def compare(tensors, **options):
    for expected, actual in zip(run(tensors, "reference", **options), run(tensors, "torch", **options)):
        torch.testing.assert_close(actual, expected, **EXACT)


def test_reference_equals_a_loop_over_tokens():
    q, k, v = inputs(2, 6, 9)
    segments = documents(2, 9)
    out = sliding_window_attention(
        q, k, v, window=4, query_segments=segments[:, 3:], key_segments=segments, impl="reference"
    )
    for b in range(2):
        for t in range(6):
            seen = [j for j in range(9) if 0 <= t + 3 - j < 4 and segments[b, j] == segments[b, t + 3]]
            for h in range(4):
                attention = (k[b, seen, h // 2] @ q[b, t, h] / math.sqrt(4)).softmax(0)
                torch.testing.assert_close(out[b, t, h], attention @ v[b, seen, h // 2], **EXACT)


@pytest.mark.parametrize("window", [1, 5, 17, 100])
@pytest.mark.parametrize("past", [0, 3, 30])
@pytest.mark.parametrize("has_segments", [False, True])
def test_short_calls_equal_reference_with_gradients(window, past, has_segments):
    segments = documents(2, 17 + past)
    options = {"query_segments": segments[:, past:], "key_segments": segments} if has_segments else {}
    compare(inputs(2, 17, 17 + past), window=window, **options)


@pytest.mark.parametrize("window", [1, 3, 8, 13, 200])
@pytest.mark.parametrize("past", [0, 5, 40])
@pytest.mark.parametrize("has_segments", [False, True])
def test_banded_path_equals_reference_with_gradients(monkeypatch, window, past, has_segments):
    monkeypatch.setattr(torch_banded, "_MIN_BLOCK", 8)
    monkeypatch.setattr(torch_banded, "_MAX_BLOCK", 16)
    segments = documents(2, 51 + past)
    options = {"query_segments": segments[:, past:], "key_segments": segments} if has_segments else {}
    compare(inputs(2, 51, 51 + past), window=window, **options)


@pytest.mark.parametrize("has_segments", [False, True])
def test_a_long_sequence_takes_the_banded_path_with_its_real_block(has_segments):
    segments = documents(1, 301)
    options = {"query_segments": segments, "key_segments": segments} if has_segments else {}
    compare(inputs(1, 301, 301, heads=2, kv_heads=1), window=70, **options)


@given(
    st.integers(1, 2), st.integers(1, 60), st.integers(0, 30), st.integers(1, 40), st.sampled_from([1, 2, 4]),
    st.booleans(),
)  # fmt: skip
def test_torch_equals_reference_for_any_shape(batch, queries, past, window, kv_heads, has_segments):
    tensors = inputs(batch, queries, queries + past, kv_heads=kv_heads)
    segments = documents(batch, queries + past)
    options = {"query_segments": segments[:, past:], "key_segments": segments} if has_segments else {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_banded, "_MIN_BLOCK", 4)
        compare(tensors, window=window, **options)


def test_cached_keys_give_the_same_as_the_whole_call():
    q, k, v = inputs(2, 20, 20)
    whole = sliding_window_attention(q, k, v, window=6)
    for start in (3, 15):
        part = sliding_window_attention(q[:, start:], k[:, max(0, start - 5) :], v[:, max(0, start - 5) :], window=6)
        torch.testing.assert_close(part, whole[:, start:], **EXACT)


def test_window_of_one_returns_the_own_value():
    q, k, v = inputs(2, 9, 9, heads=2)
    torch.testing.assert_close(sliding_window_attention(q, k, v, window=1), v, **EXACT)


def test_documents_never_see_each_other():
    q, k, v = inputs(1, 12, 12)
    segments = torch.tensor([[0] * 5 + [1] * 7], dtype=torch.int32)
    packed = sliding_window_attention(q, k, v, window=6, query_segments=segments, key_segments=segments)
    for part in (slice(0, 5), slice(5, 12)):
        alone = sliding_window_attention(q[:, part], k[:, part], v[:, part], window=6)
        torch.testing.assert_close(packed[:, part], alone, **EXACT)


def test_a_given_scale_is_used():
    compare(inputs(1, 9, 9), window=4, scale=0.9)
    q, k, v = inputs(1, 9, 9)
    scaled = sliding_window_attention(q * 0.9 * 2, k, v, window=4)
    torch.testing.assert_close(sliding_window_attention(q, k, v, window=4, scale=0.9), scaled, **EXACT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 5, 8)}, "q must be"),
        ({"k": torch.zeros(2, 5, 2, 3)}, "k must have shape"),
        ({"v": torch.zeros(2, 4, 2, 4)}, "v must have shape"),
        ({"k": torch.zeros(2, 4, 2, 4), "v": torch.zeros(2, 4, 2, 4)}, "keys must include"),
        ({"k": torch.zeros(2, 5, 3, 4), "v": torch.zeros(2, 5, 3, 4)}, "required a multiple of the 3 heads"),
        ({"window": 0}, "window must be >= 1"),
        ({"query_segments": torch.zeros(2, 5)}, "give both"),
        ({"query_segments": torch.zeros(2, 5), "key_segments": torch.zeros(2, 4)}, "key_segments must have"),
        ({"impl": "cuda"}, "impl='cuda' is not available"),
    ],
)
def test_bad_arguments_raise_one_clear_error(change, message):
    q, k, v = inputs(2, 5, 5)
    arguments = {"q": q, "k": k, "v": v, "window": 3, **change}
    with pytest.raises(ValueError, match=message):
        sliding_window_attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)
