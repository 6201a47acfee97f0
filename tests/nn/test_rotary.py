"""Rotary positions: relative, from fp64 angles, local to the window (fact 8)."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hsa_ultralong.nn.rotary import apply_rotary, rotary_at, rotary_frequencies, rotary_table, tail
from hsa_ultralong.nn.window_attention import WindowAttention, WindowState
from hsa_ultralong.testing.factories import random_tensor, randomize

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}
# as Llama 3.1 and 3.2, Qwen2.5 and others have them: head dimension, theta, scaling
SCALINGS = {
    "Llama 3.1": (128, 5e5, LLAMA3),
    "Llama 3.2": (64, 5e5, {**LLAMA3, "factor": 32.0}),
    "linear": (128, 1e4, {"rope_type": "linear", "factor": 2.5}),
    "Qwen2.5": (128, 1e6, YARN),
    "small base": (128, 1e4, {**YARN, "factor": 16.0, "original_max_position_embeddings": 4096}),
    "own ramp": (64, 1e4, {**YARN, "beta_fast": 20.0, "beta_slow": 2.0, "truncate": False}),
    "own factor": (64, 1e4, {**YARN, "attention_factor": 1.5}),
    "two scales": (64, 1e4, {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7}),
    "no ramp": (64, 1e4, {**YARN, "original_max_position_embeddings": 6}),
}


def table(length, dtype=torch.float64, dim=8):
    return rotary_table(length, dim, 10_000.0, torch.device("cpu"), dtype)


def window_attention(dtype=torch.float64):
    module = WindowAttention(
        hidden_size=16, num_attention_heads=4, num_key_value_heads=2, head_dim=8, window=5, use_qk_norm=True,
        rms_norm_eps=1e-6,
    )  # fmt: skip
    randomize(module)
    return module.to(dtype).eval()


def test_products_depend_on_the_difference_of_positions_only():
    q, k = random_tensor(1, 8).expand(40, 1, 8), random_tensor(1, 8, seed=1).expand(40, 1, 8)
    products = apply_rotary(q, table(40))[:, 0] @ apply_rotary(k, table(40))[:, 0].T
    for distance in range(-39, 40):
        line = products.diagonal(distance)
        torch.testing.assert_close(line, line[:1].expand_as(line), rtol=1e-12, atol=1e-12)


def test_rotation_keeps_norms_and_position_0_rotates_nothing():
    x = random_tensor(2, 9, 3, 8)
    turned = apply_rotary(x, table(9))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(turned[:, 0], x[:, 0], rtol=0, atol=0)


def test_fp32_tables_at_position_one_million_are_rounded_fp64_angles():
    start = 1_000_000
    exact = (
        torch.arange(start, start + 4, dtype=torch.float64)[:, None] * 10_000.0 ** (-torch.arange(0, 8, 2) / 8).double()
    )
    stored = tail(table(start + 4, torch.float32), start)
    assert stored.cos.dtype == torch.float32
    assert float((stored.cos.double() - exact.cos()).abs().max()) < 1e-6
    assert float((stored.sin.double() - exact.sin()).abs().max()) < 1e-6


@pytest.mark.parametrize("name", SCALINGS)
def test_scaled_frequencies_are_those_of_transformers(name):
    dim, theta, scaling = SCALINGS[name]
    config = LlamaConfig(
        hidden_size=4 * dim, num_attention_heads=4, rope_parameters={**scaling, "rope_theta": theta},
        max_position_embeddings=131_072,
    )  # fmt: skip
    expected, expected_factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, torch.device("cpu"))
    found, factor = rotary_frequencies(dim, theta, scaling)
    torch.testing.assert_close(found.float(), expected, rtol=1e-5, atol=0)
    assert factor == pytest.approx(expected_factor, rel=1e-12)
    assert not torch.allclose(found, rotary_frequencies(dim, theta)[0], rtol=1e-2, atol=0)


@pytest.mark.parametrize("scaling", [None, LLAMA3, YARN])
def test_tables_of_places_are_rows_of_the_table(scaling):
    places = torch.tensor([3, 0, 1000, 7])
    whole = rotary_table(1001, 8, 1e4, torch.device("cpu"), torch.float64, scaling)
    part = rotary_at(places, 8, 1e4, torch.float64, scaling)
    assert torch.equal(part.cos, whole.cos[places]) and torch.equal(part.sin, whole.sin[places])


def test_yarn_multiplies_products_by_its_factor_squared():
    q, k = random_tensor(6, 1, 8), random_tensor(6, 1, 8, seed=1)
    scaled = rotary_table(6, 8, 1e4, torch.device("cpu"), torch.float64, {**YARN, "attention_factor": 1.5})
    products = [(apply_rotary(q, part) * apply_rotary(k, part)).sum(-1) for part in (scaled, table(6))]
    # at equal places rotation cancels
    torch.testing.assert_close(products[0], 1.5**2 * products[1])


def test_tables_keep_fp64_for_fp64_models_only():
    assert table(3, torch.float64).cos.dtype == torch.float64
    assert table(3, torch.bfloat16).cos.dtype == table(3, torch.float32).cos.dtype == torch.float32


def test_a_window_state_forgets_the_absolute_position():
    # the same 12 tokens after 20 and after 420 others: the angles come from the index among the kept keys
    module, x = window_attention(), random_tensor(1, 12, 16)
    outputs = []
    for before in (20, 420):
        state = WindowState(keep=4)
        old = random_tensor(1, before, 16, seed=before)
        module(old, table(before), None, state)
        module(x[:, :6], table(4 + 6), None, state)
        outputs.append(module(x[:, 6:], table(4 + 6), None, state))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_fp32_window_attention_is_as_exact_at_token_one_million_as_at_token_0():
    low, high = window_attention(torch.float32), window_attention()
    x = random_tensor(1, 30, 16)
    state = WindowState(keep=4)
    # local indices: after a million tokens the state still holds 4 keys, and the table has 4 + T entries
    for start in range(0, 30, 5):
        part = low(x[:, start : start + 5].float(), table(state.length + 5, torch.float32), None, state)
        exact = high(x[:, : start + 5], table(start + 5))[:, -5:]
        assert state.length == min(4, start + 5)
        assert float((part.double() - exact).abs().max()) < 1e-5


@torch.no_grad()
def test_window_attention_in_pieces_equals_whole_with_documents():
    module, x = window_attention(), random_tensor(2, 14, 16)
    segments = torch.tensor([[0] * 6 + [1] * 8, [-1] * 3 + [0] * 11], dtype=torch.int32)
    whole = module(x, table(14), segments)
    state, parts = WindowState(keep=9), []
    for start, stop in ((0, 3), (3, 4), (4, 11), (11, 14)):
        known = segments[:, start - state.length : stop]
        parts.append(module(x[:, start:stop], table(state.length + stop - start), known, state))
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-11, atol=1e-11)


def test_a_window_state_keeps_the_last_tokens_detached():
    state = WindowState(keep=3)
    keys = random_tensor(1, 5, 2, 4).requires_grad_()
    full, _ = state.extend(keys, keys * 2)
    assert torch.equal(full, keys) and state.length == 3
    assert torch.equal(state.keys, keys[:, -3:]) and not state.keys.requires_grad
    full, values = state.extend(keys[:, :1], keys[:, :1])
    assert full.shape[1] == values.shape[1] == 4 and state.length == 3
