"""Every rival computes what its mask says, alone, in pieces and with a cache, and knows nothing of the future."""

from itertools import pairwise

import pytest
import torch

from hsa_ultralong.baselines import LAYERS, RivalConfig, RivalForCausalLM
from hsa_ultralong.baselines.build import ATTENTIONS, build_layer
from hsa_ultralong.models.cache_hsa import CACHE_NAME
from hsa_ultralong.nn.rotary import rotary_table
from hsa_ultralong.testing.factories import randomize
from tests.baselines.dense import DENSE

every_layer = pytest.mark.parametrize("name", LAYERS)
TINY = {
    "vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 4, "sliding_window": 5, "num_sinks": 2, "chunk_size": 4, "chunk_topk": 4,
    "calibration_rank": 3, "compression_size": 4, "compression_stride": 2, "dense_tokens": 9,
}  # fmt: skip


def tiny(*layers, **changes):
    model = RivalForCausalLM(RivalConfig(layers=list(layers), **{**TINY, **changes})).double()
    randomize(model)
    return model.eval()


def tokens(batch, length, seed=0):
    return torch.randint(37, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_every_layer_has_a_builder_and_an_oracle():
    assert set(LAYERS) == set(ATTENTIONS) == set(DENSE)


@every_layer
@pytest.mark.parametrize("heads", [(4, 2), (4, 1), (2, 2)])
@pytest.mark.parametrize("length", [1, 3, 9, "long"])
def test_a_layer_equals_its_dense_formulation_with_all_gradients(name, heads, length):
    if length == "long":
        # several blocks of windows; the oracles of choices are slow
        length = 150 if name.startswith(("full", "window")) else 43
    config = RivalConfig(**{**TINY, "num_attention_heads": heads[0], "num_key_value_heads": heads[1]})
    attention = build_layer(config, name).attention.double()
    randomize(attention)
    x = torch.randn(2, length, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    weights = [x, *attention.parameters()]
    rotary = rotary_table(length, config.head_dim, config.rope_theta, x.device, x.dtype)
    mine = attention(x, rotary)
    wanted = torch.stack([DENSE[name](attention, row, config) for row in x])
    torch.testing.assert_close(mine, wanted, rtol=1e-10, atol=1e-10)
    seed = torch.randn_like(mine)
    for one, other in zip(
        torch.autograd.grad(mine, weights, seed, allow_unused=True),
        torch.autograd.grad(wanted, weights, seed, allow_unused=True),
        strict=True,
    ):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_landmarks_read_the_best_chunks_at_evaluation():
    config = RivalConfig(**{**TINY, "chunk_topk": 2})
    attention = build_layer(config, "landmark").attention.double().eval()
    randomize(attention)
    x = torch.randn(1, 43, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = attention(x, rotary_table(43, config.head_dim, config.rope_theta, x.device, x.dtype))
    torch.testing.assert_close(found[0], DENSE["landmark"](attention, x[0], config), rtol=1e-10, atol=1e-10)


def test_a_landmark_stands_behind_every_chunk_with_the_position_of_the_next_token():
    model = tiny("hils").model
    x = torch.randn(1, 7, 16, dtype=torch.float64)
    for seen, wanted in ((0, [0, 1, 2, 3, 3, 4, 5, 6, 6]), (2, [2, 3, 3, 4, 5, 6, 6, 7, 8, 9])):
        stream, positions, tokens = model._with_landmarks(x, seen, model.landmark)
        assert positions.tolist() == wanted and torch.equal(stream[:, tokens], x)
        others = [i for i in range(stream.shape[1]) if i not in tokens.tolist()]
        assert torch.equal(stream[0, others], model.landmark.expand(len(others), -1))


@every_layer
def test_pieces_and_single_tokens_with_a_cache_equal_one_forward(name):
    model, ids = tiny(name, name), tokens(2, 150)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        for borders in ([0, 7, 8, 9, 60, 61, 150], [0, 1, 2, 3, 4, 5, 149, 150], [0, 130, *range(131, 151)]):
            cache = model.model.new_cache()
            parts = [model(ids[:, start:stop], past_key_values=cache).logits for start, stop in pairwise(borders)]
            torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-10)


@every_layer
def test_no_token_sees_the_future(name):
    model, ids = tiny(name, name), tokens(1, 40)
    changed = ids.clone()
    changed[0, 25] = (changed[0, 25] + 1) % 37
    moved = (model(changed).logits - model(ids).logits).abs().amax(-1)[0]
    assert moved[:25].max() == 0 and moved[25:].max() > 0


@every_layer
def test_padding_anywhere_changes_nothing(name):
    model, ids = tiny(name, name), tokens(1, 30)
    alone = model(ids[:, torch.arange(30) % 3 > 0], labels=ids[:, torch.arange(30) % 3 > 0])
    mask = (torch.arange(30) % 3 > 0).long()[None]
    labels = ids.masked_fill(mask == 0, -100)
    for inputs in ({"attention_mask": mask}, {"segment_ids": (mask - 1).int()}):
        padded = model(ids, labels=labels, use_cache=False, **inputs)
        torch.testing.assert_close(padded.logits[mask > 0][None], alone.logits, rtol=1e-10, atol=1e-10)
    # the label of the first real token has nothing to be predicted from
    torch.testing.assert_close(model(ids, labels=labels, attention_mask=mask).loss, alone.loss)


@every_layer
def test_greedy_generation_equals_the_loop_without_a_cache_and_beams_run(name):
    model, ids = tiny(name, name), tokens(2, 21)
    made = model.generate(ids, max_new_tokens=12, do_sample=False)
    grown = ids
    for _ in range(12):
        grown = torch.cat((grown, model(grown, use_cache=False).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(made, grown)
    assert model.generate(ids[:1], max_new_tokens=5, num_beams=3, do_sample=False).shape == (1, 26)


def test_layers_of_several_kinds_stand_in_one_model():
    model, ids = tiny(*LAYERS), tokens(1, 70)
    whole = model(ids, use_cache=False).logits
    outputs = model(ids[:, :50])
    rest = model(ids[:, 50:], past_key_values=getattr(outputs, CACHE_NAME)).logits
    torch.testing.assert_close(torch.cat((outputs.logits, rest), 1), whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("window_layer", ["window", "window_sinks", "gated_delta"])
def test_the_cache_of_windows_and_states_does_not_grow(window_layer):
    model = tiny(window_layer)
    cache = model.model.new_cache()
    model(tokens(1, 50), past_key_values=cache)
    size = cache.num_bytes()
    model(tokens(1, 5000), past_key_values=cache)
    assert cache.num_bytes() == size


@pytest.mark.parametrize(
    ("scaling", "theta"), [({"rope_type": "linear", "factor": 4.0}, None), ({"rope_type": "ntk", "factor": 4.0}, 16e4)]
)
def test_scaled_positions_are_interpolated_or_of_another_theta(scaling, theta):
    base, ids = tiny("full_rope"), tokens(1, 40)
    scaled = tiny("full_rope", rope_scaling=scaling)
    other = tiny("full_rope", rope_theta=theta) if theta else None
    if other is not None:
        torch.testing.assert_close(scaled(ids).logits, other(ids).logits, rtol=1e-12, atol=1e-12)
    assert not torch.equal(scaled(ids).logits, base(ids).logits)
    # no position, no change
    nope = [tiny("full_nope", rope_scaling=one)(ids).logits for one in (None, scaling)]
    assert torch.equal(*nope)
