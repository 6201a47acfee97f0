"""A memory's fingerprint covers what it depends on, and nothing that it does not."""

import pytest

from hsa_ultralong.models.fingerprint import memory_fingerprint
from hsa_ultralong.testing.factories import MODEL_OPTIONS, random_tokens, tiny_model

YARN = MODEL_OPTIONS["yarn_rope"]["rope_scaling"]


def test_the_scaling_of_rope_is_part_of_it():
    found = {
        memory_fingerprint(tiny_model(**options))
        for options in (
            {},
            {"rope_theta": 9.0},
            {"rope_scaling": YARN},
            {"rope_scaling": {**YARN, "factor": 5.0}},
            {"rope_scaling": {"rope_type": "linear", "factor": 5.0}},
        )
    }
    assert len(found) == 5
    # as transformers 5 names it, and in another order, it is the same
    other = {"rope_parameters": dict(reversed([*YARN.items(), ("rope_theta", 10_000.0)]))}
    assert memory_fingerprint(tiny_model(**other)) in found


@pytest.mark.parametrize("part", ["lower_layers.1.attention", "chunk_encoder.layers.0"])
@pytest.mark.parametrize("kind", ["q", "k", "v"])
def test_biases_below_the_memory_are_part_of_it(part, kind):
    model = tiny_model(use_qkv_bias=True)
    before = memory_fingerprint(model)
    model.model.get_parameter(f"{part}.{kind}_proj.bias").data[0] += 1
    assert memory_fingerprint(model) != before


def test_biases_above_the_memory_are_not():
    model = tiny_model(use_qkv_bias=True)
    before, memory = memory_fingerprint(model), model.memorize(random_tokens(1, 20)[0])
    for name, parameter in model.model.groups.named_parameters():
        if name.endswith("bias"):
            parameter.data += 1
    assert memory_fingerprint(model) == before == memory.fingerprint
