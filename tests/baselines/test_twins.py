"""Twins have the model's width, heads and number of parameters, and count what they cost."""

import pytest

from hsa_ultralong.baselines import LAYERS, RivalForCausalLM
from hsa_ultralong.baselines.accounting import training_flops
from hsa_ultralong.baselines.twins import TWINS, rival_parameters, twin_config
from hsa_ultralong.models.accounting import count_parameters
from hsa_ultralong.models.presets import preset

every_twin = pytest.mark.parametrize("twin", TWINS)


@every_twin
@pytest.mark.parametrize("size", ["nano", "small_345m"])
def test_a_twin_has_the_parameters_of_the_model_within_two_percent(twin, size):
    model = preset(size)
    rival = twin_config(model, twin)
    assert abs(rival_parameters(rival) / count_parameters(model).total - 1) < 0.02
    assert rival.num_hidden_layers == model.num_hidden_layers + model.num_encoder_layers
    for name in ("vocab_size", "hidden_size", "head_dim", "num_attention_heads", "sliding_window", "chunk_size"):
        assert getattr(rival, name) == getattr(model, name)


def test_counted_parameters_are_those_of_the_built_model():
    rival = twin_config(preset("debug"), "window_sinks", {"num_sinks": 2})
    assert rival_parameters(rival) == sum(part.numel() for part in RivalForCausalLM(rival).parameters())
    assert rival.num_sinks == 2


@every_twin
def test_flops_grow_with_the_context_as_the_mask_says(twin):
    rival = twin_config(preset("nano"), twin)
    short, long = training_flops(rival, 8192), training_flops(rival, 131_072)
    assert 0 < short <= long
    assert 6 * rival_parameters(rival) <= short
    if twin in ("window", "window_sinks"):
        assert long < 1.01 * short


def test_every_layer_is_a_twin():
    assert set(LAYERS) <= set(TWINS)
