"""Presets and key=value changes to them."""

from __future__ import annotations

import re

import pytest

from hsa_ultralong.models import HSAConfig
from hsa_ultralong.models.accounting import count_parameters
from hsa_ultralong.models.presets import PRESETS, parse_options, preset, replace_options, set_options

MIB = 2**20


def test_nano_is_the_default_configuration_and_fits_18_mib():
    config = preset("nano")
    assert config.to_dict() == HSAConfig().to_dict()
    assert 8_500_000 < count_parameters(config).total <= 9_400_000
    assert 2 * count_parameters(config).total <= 18 * MIB


def test_debug_is_tiny():
    assert 80_000 < count_parameters(preset("debug")).total < 150_000


def test_small_345m_has_the_parameters_of_the_released_configuration():
    counts = count_parameters(preset("small_345m"))
    # facts B.2: 341.8M of window layers and embedding, 43.3M more for HSA
    assert counts.total == pytest.approx(385.1e6, rel=2e-4)
    assert preset("small_345m").is_composable


def test_dense_0_5b_has_the_published_parameters():
    config = preset("dense_0_5b")
    assert round(count_parameters(config).total / 1e6, 1) == 537.7
    # the full-attention baseline: the same 24 layers without memory, P1 sec. 4.1
    window_layer = count_parameters(config).lower // config.num_lower_layers
    baseline = window_layer * config.num_hidden_layers + config.vocab_size * config.hidden_size + config.hidden_size
    assert round(baseline / 1e6, 1) == 519.6


def test_moe_is_about_8b_in_all_and_1b_active():
    counts = count_parameters(preset("moe_8b_a1b"))
    assert 7.5e9 < counts.total < 8.5e9
    assert 0.8e9 < counts.active < 1.3e9


@pytest.mark.parametrize("name", PRESETS)
def test_docstring_states_the_exact_parameter_counts(name):
    counts, text = count_parameters(preset(name)), PRESETS[name].__doc__ or ""
    stated = {int(number.replace(",", "")) for number in re.findall(r"\d+(?:,\d{3})+", text)}
    assert {counts.total, counts.active} <= stated


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in ("debug", "nano", "mini", "smol_135m")])
def test_published_sizes_have_sixteen_query_heads_to_a_memory_head(name):
    config = preset(name)
    assert config.num_attention_heads == 16 * config.num_memory_heads
    assert config.chunk_size == 64


def test_overrides_reach_the_configuration():
    assert preset("nano", chunk_topk=64, fusion="stick_breaking").chunk_topk == 64
    assert preset("small-345m").hidden_size == 1024


def test_unknown_names_and_options_name_the_closest():
    with pytest.raises(ValueError, match="unknown preset 'nanoo'; did you mean 'nano'"):
        preset("nanoo")
    with pytest.raises(ValueError, match="unknown option 'chunk_topkk'; did you mean 'chunk_topk'"):
        preset("nano", chunk_topkk=3)
    with pytest.raises(ValueError, match="unknown option 'model_type'"):
        preset("nano", model_type="x")


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("chunk_topk=64", 64),
        (" chunk_topk = 64 ", 64),
        ("vocab_size=8_192", 8192),
        ("rope_theta=5e5", 500_000.0),
        ("use_qk_norm=False", False),
        ("gumbel_noise=on", True),
        ("fusion=stick_breaking", "stick_breaking"),
        ("head_dim=none", None),
        ("head_dim=32", 32),
        ("eos_token_id=1,2", [1, 2]),
        ("eos_token_id=7", 7),
        ('rope_scaling={"rope_type": "linear", "factor": 2}', {"rope_type": "linear", "factor": 2}),
        ("rope_scaling=none", None),
    ],
)
def test_options_are_typed_by_their_field(option, expected):
    (value,) = parse_options([option]).values()
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    "option",
    [
        "chunk_topk",
        "=3",
        "chunk_topk=",
        "chunk_topk=1.5",
        "chunk_topk=none",
        "use_qk_norm=2",
        "rope_theta=x",
        "foo=1",
        "rope_scaling=linear",
        "rope_scaling=2",
    ],
)
def test_malformed_options_are_refused(option):
    with pytest.raises(ValueError):
        parse_options([option])


def test_a_key_given_twice_is_refused():
    with pytest.raises(ValueError, match="chunk_topk is set twice"):
        parse_options(["chunk_topk=1", "chunk_topk=2"])


@pytest.mark.parametrize(
    "overrides",
    [
        {"chunk_topk": 3.5},
        {"chunk_topk": True},
        {"use_qk_norm": 1},
        {"fusion": "other"},
        {"hidden_size": 0},
        {"num_attention_heads": 0},
        {"head_dim": 63},
    ],
)
def test_values_that_do_not_fit_are_refused(overrides):
    with pytest.raises(ValueError, match=next(iter(overrides))):
        preset("nano", **overrides)


def test_derived_options_follow_unless_they_were_set():
    wide = set_options(preset("nano"), ["hidden_size=512", "intermediate_size=1408"])
    assert (wide.head_dim, wide.encoder_intermediate_size) == (128, 1408)
    assert set_options(preset("nano"), ["hidden_size=512", "head_dim=64"]).head_dim == 64
    assert set_options(preset("small_345m"), ["intermediate_size=2048"]).encoder_intermediate_size == 2688


def test_the_given_configuration_stays_as_it_was():
    config = preset("nano")
    assert replace_options(config, {"chunk_topk": 5}).chunk_topk == 5
    assert config.chunk_topk == 32
