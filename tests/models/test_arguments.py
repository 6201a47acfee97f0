"""Every argument of forward and generate is honoured or refused: names, positions, outputs, shifted labels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import GenerationConfig

from hsa_ultralong.models import HSACache
from hsa_ultralong.models.cache_hsa import CACHE_NAME
from hsa_ultralong.testing.factories import MODEL_OPTIONS, random_tokens, tiny_model

EXACT = {"rtol": 1e-10, "atol": 1e-10}
GREEDY = {"max_new_tokens": 5, "do_sample": False}


@pytest.mark.parametrize("part", ["model", "body"])
@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("pool_memroy", "pool_memory"),
        ("segment_id", "segment_ids"),
        ("atention_mask", "attention_mask"),
        ("qwertz", ""),
    ],
)
def test_an_unknown_argument_is_refused_with_the_nearest_known_one(part, name, close):
    model = tiny_model()
    called = model if part == "model" else model.model
    with pytest.raises(TypeError, match=f"unknown argument '{name}'" + (f".*did you mean '{close}'" if close else "")):
        called(random_tokens(1, 5), **{name: 1})


@pytest.mark.parametrize("part", ["model", "body"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cu_seq_lens_q": torch.tensor([0, 3, 8])}, "segment_ids"),
        ({"cu_seq_lens_k": torch.tensor([0, 3, 8])}, "segment_ids"),
        ({"max_length_q": 5}, "segment_ids"),
        ({"max_length_k": 5}, "segment_ids"),
        ({"seq_idx": torch.zeros(1, 8)}, "segment_ids"),
        ({"output_attentions": True}, "output_retrieval"),
        ({"output_router_logits": True}, "update_router_bias"),
        ({"is_causal": False}, "causal"),
        ({"token_type_ids": torch.ones(1, 8, dtype=torch.long)}, "return_token_type_ids"),
    ],
)
def test_what_is_not_supported_is_refused_with_what_to_do_instead(part, given, message):
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        (model if part == "model" else model.model)(random_tokens(1, 8), **given)


def test_arguments_that_change_nothing_are_accepted():
    model, tokens = tiny_model(), random_tokens(1, 8)
    given = {
        "token_type_ids": torch.zeros_like(tokens), "is_causal": True, "output_attentions": False,
        "output_router_logits": False, "cu_seq_lens_q": None, "anything": None, "return_dict": None,
        "shift_labels": None,
    }  # fmt: skip
    with torch.no_grad():
        assert torch.equal(model(tokens, **given).logits, model(tokens).logits)


def test_a_configuration_that_asks_for_attentions_is_refused():
    model = tiny_model()
    model.config._attn_implementation = "eager"
    model.config.output_attentions = True
    with pytest.raises(ValueError, match="takes no output_attentions"):
        model(random_tokens(1, 8))


def starts_again(lengths):
    return torch.cat([torch.arange(n) for n in lengths])[None]


@pytest.mark.parametrize(
    "position_ids",
    [starts_again([5, 3]), starts_again([1] * 8), torch.arange(8).flip(0)[None], torch.arange(1, 9)[None],
     torch.arange(0, 16, 2)[None], torch.arange(8).view(1, 1, 8), torch.arange(7)[None]],
)  # fmt: skip
def test_positions_that_do_not_count_the_tokens_are_refused(position_ids):
    with pytest.raises(ValueError, match="position_ids"):
        tiny_model()(random_tokens(1, 8), position_ids=position_ids)


def test_restarting_positions_are_refused_naming_segment_ids_and_the_collator():
    with pytest.raises(ValueError, match=r"segment_ids.*PackingCollator"):
        tiny_model()(random_tokens(1, 8), position_ids=starts_again([5, 3]))


def test_positions_that_count_the_tokens_change_nothing():
    model, tokens = tiny_model(), random_tokens(2, 10)
    mask = torch.tensor([[0, 0, 0] + [1] * 7, [1] * 8 + [0, 0]])
    counted = (mask.cumsum(1) - 1).clamp_min(0)
    columns = torch.arange(10).expand(2, -1)
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask).logits
        for positions in (counted, counted.masked_fill(mask == 0, 1), columns):
            assert torch.equal(model(tokens, attention_mask=mask, position_ids=positions).logits, expected)
        assert torch.equal(model(tokens, position_ids=columns[:1]).logits, model(tokens).logits)
        cache = HSACache(model.config)
        parts = []
        for start, stop in ((0, 4), (4, 5), (5, 10)):
            options = {"attention_mask": mask[:, :stop], "position_ids": counted[:, start:stop]}
            parts.append(model(tokens[:, start:stop], past_key_values=cache, **options).logits)
        torch.testing.assert_close(torch.cat(parts, 1)[mask.bool()], expected[mask.bool()], **EXACT)


def test_column_numbers_do_not_count_where_a_token_inside_is_masked():
    model, tokens, mask = tiny_model(), random_tokens(1, 6), torch.tensor([[1, 1, 0, 1, 1, 1]])
    model(tokens, attention_mask=mask, position_ids=torch.tensor([[0, 1, 1, 2, 3, 4]]))
    with pytest.raises(ValueError, match="do not count the real tokens"):
        model(tokens, attention_mask=mask, position_ids=torch.arange(6)[None])


def test_positions_of_packed_documents_must_be_those_of_the_segments():
    model, tokens = tiny_model(), random_tokens(1, 12)
    segments = torch.tensor([[0] * 5 + [-1] * 3 + [1] * 4])
    mask = (segments >= 0).long()
    with torch.no_grad():
        expected = model(tokens, segment_ids=segments, use_cache=False).logits
        for positions in (torch.arange(12)[None], starts_again([8, 4])):
            given = {"position_ids": positions, "attention_mask": mask, "segment_ids": segments}
            assert torch.equal(model(tokens, use_cache=False, **given).logits, expected)
    with pytest.raises(ValueError, match="position_ids"):
        model(tokens, segment_ids=segments, position_ids=starts_again([4, 8]))


def test_generate_takes_the_positions_of_a_left_padded_batch():
    model, tokens = tiny_model(), random_tokens(2, 9)
    mask = torch.tensor([[0, 0, 0] + [1] * 6, [1] * 9])
    options = {"attention_mask": mask, **GREEDY}
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    assert torch.equal(model.generate(tokens, position_ids=positions, **options), model.generate(tokens, **options))
    with pytest.raises(ValueError, match="position_ids"):
        model.generate(tokens, position_ids=starts_again([4, 5]).repeat(2, 1), **options)


def test_decoding_checks_no_mask_and_no_positions(monkeypatch):
    from hsa_ultralong.models import modeling_hsa

    calls = []
    real, check = modeling_hsa.real_tokens, modeling_hsa.check_positions
    monkeypatch.setattr(modeling_hsa, "real_tokens", lambda *args: calls.append("mask") or real(*args))
    monkeypatch.setattr(
        modeling_hsa, "check_positions", lambda *args, **kw: calls.append("places") or check(*args, **kw)
    )
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    for beams in (1, 2):
        tiny_model().generate(random_tokens(2, 9), attention_mask=mask, num_beams=beams, **GREEDY)
    assert calls == ["mask"] * 2


def by_hand(model, tokens):
    """The embedding and every decoder layer's output, through hooks."""
    outputs, body = [], model.model
    layers = [*body.lower_layers, *(layer for group in body.groups for layer in (group.hsa_layer, *group.layers))]
    hooks = [layer.register_forward_hook(lambda _, __, out: outputs.append(out)) for layer in layers]
    with torch.no_grad():
        body(tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [body.embed_tokens(tokens), *outputs[:-1], body.norm(outputs[-1])]


@pytest.mark.parametrize("length", [3, 23])
@pytest.mark.parametrize("options", ["default", "all_at_once", "one_group_of_one", "mixture_of_experts"])
def test_hidden_states_are_the_embedding_and_every_layers_output(options, length):
    model, tokens = tiny_model(**MODEL_OPTIONS[options]), random_tokens(2, length)
    expected = by_hand(model, tokens)
    for called in (model, model.model):
        with torch.no_grad():
            states = called(tokens, output_hidden_states=True, use_cache=False).hidden_states
        assert isinstance(states, tuple) and len(states) == model.config.num_hidden_layers + 1 == len(expected)
        for state, wanted in zip(states, expected):
            torch.testing.assert_close(state, wanted, **EXACT)
        assert called(tokens).hidden_states is None


def test_hidden_states_with_a_cache_and_masks_are_those_of_one_forward():
    model, tokens = tiny_model(), random_tokens(1, 21)
    mask = torch.ones_like(tokens)
    mask[0, 3:6] = 0
    expected = by_hand(model, tokens[mask.bool()][None])
    cache, parts = HSACache(model.config), []
    with torch.no_grad():
        for start, stop in ((0, 11), (11, 12), (12, 21)):
            options = {"attention_mask": mask[:, :stop], "past_key_values": cache, "output_hidden_states": True}
            parts.append(model(tokens[:, start:stop], **options).hidden_states)
    for layer, wanted in enumerate(expected):
        joined = torch.cat([states[layer] for states in parts], 1)
        torch.testing.assert_close(joined[:, mask[0].bool()], wanted, **EXACT)


def test_hidden_states_carry_the_same_gradients_with_gradient_checkpointing():
    gradients = []
    for checkpointing in (False, True):
        model, tokens = tiny_model().train(), random_tokens(2, 17)
        if checkpointing:
            model.gradient_checkpointing_enable()
        states = model(tokens, output_hidden_states=True).hidden_states
        sum(state.pow(2).mean() for state in states).backward()
        gradients.append([part.grad for part in model.parameters()])
    for left, right in zip(*gradients):
        torch.testing.assert_close(left, right, **EXACT)


def test_configured_hidden_states_and_tuples_are_honoured():
    model, tokens = tiny_model(), random_tokens(1, 9)
    model.config.output_hidden_states = True
    assert len(model(tokens).hidden_states) == model.config.num_hidden_layers + 1
    assert model(tokens, output_hidden_states=False).hidden_states is None
    model.config.return_dict = False
    assert isinstance(model(tokens), tuple) and isinstance(model.model(tokens), tuple)
    assert not isinstance(model(tokens, return_dict=True), tuple)


def test_a_tuple_has_the_fields_in_transformers_order():
    model, tokens = tiny_model(), random_tokens(1, 9)
    options = {"labels": tokens, "output_hidden_states": True}
    with torch.no_grad():
        wanted = model(tokens, **options)
        loss, logits, cache, states = model(tokens, return_dict=False, **options)
        hidden, *_ = model.model(tokens, return_dict=False)
    assert torch.equal(loss, wanted.loss) and torch.equal(logits, wanted.logits) and isinstance(cache, HSACache)
    assert len(states) == len(wanted.hidden_states) and torch.equal(hidden, wanted.hidden_states[-1])


@pytest.mark.parametrize("beams", [1, 2])
def test_generate_returns_the_hidden_states_of_every_step(beams):
    model, tokens = tiny_model(), random_tokens(1, 6)
    options = {"return_dict_in_generate": True, "output_hidden_states": True, "num_beams": beams, **GREEDY}
    out = model.generate(tokens, **options)
    field = out.hidden_states
    assert len(field) == 5 and all(len(step) == model.config.num_hidden_layers + 1 for step in field)
    assert field[0][0].shape[1] == 6 and field[1][0].shape[1] == 1
    if beams == 1:
        whole = by_hand(model, out.sequences[:, :-1])
        for layer, wanted in enumerate(whole):
            torch.testing.assert_close(torch.cat([step[layer] for step in field], 1), wanted, **EXACT)


@pytest.mark.parametrize("training", [False, True])
def test_shifted_labels_are_taken_as_they_are(training):
    model, tokens = tiny_model().train(training), random_tokens(2, 11)
    shifted = F.pad(tokens[:, 1:], (0, 1), value=-100)
    shifted[0, :4] = -100
    with torch.no_grad():
        logits = tiny_model()(tokens).logits
        expected = F.cross_entropy(logits.flatten(0, 1), shifted.flatten())
        for labels in (None, tokens):
            torch.testing.assert_close(model(tokens, labels=labels, shift_labels=shifted).loss, expected, **EXACT)
        total = model(tokens, shift_labels=shifted, num_items_in_batch=torch.tensor(32)).loss
    torch.testing.assert_close(total, expected * 16 / 32, **EXACT)
    with pytest.raises(ValueError, match="shift_labels must be"):
        model(tokens, shift_labels=shifted[:, 1:])


@pytest.mark.parametrize("count", [None, 0, torch.tensor(0)])
@pytest.mark.parametrize("training", [False, True])
def test_labels_that_are_all_masked_give_a_loss_of_zero_and_gradients_of_zero(count, training):
    model, tokens = tiny_model().train(training), random_tokens(2, 11)
    loss = model(tokens, labels=torch.full_like(tokens, -100), num_items_in_batch=count).loss
    assert float(loss.detach()) == 0
    loss.backward()
    assert all(not bool(part.grad.any()) for part in model.parameters() if part.grad is not None)


@pytest.mark.parametrize("shape", [(1, 0), (0, 4)])
def test_empty_inputs_are_refused_everywhere(shape):
    model, tokens = tiny_model(), torch.zeros(shape, dtype=torch.long)
    memory = model.memorize(random_tokens(1, 9)[0])
    for call in (model, model.model, model.generate, lambda x: model.generate(x, memory=memory)):
        with pytest.raises(ValueError, match=r"one token|prompt"):
            call(tokens)
    for given in (torch.zeros(0, dtype=torch.long), []):
        with pytest.raises(ValueError, match=r"nothing|empty|no tokens"):
            model.memorize(given)


@pytest.mark.parametrize("name", ["segment_ids", "labels"])
def test_generate_refuses_inputs_of_whole_rows(name):
    tokens = random_tokens(1, 8)
    with pytest.raises(ValueError, match=f"generate takes no {name}"):
        tiny_model().generate(tokens, **{name: torch.zeros_like(tokens)}, **GREEDY)


def test_generate_takes_its_prompt_by_either_name_and_its_configuration_by_place():
    model, tokens = tiny_model(), random_tokens(1, 6)
    memory = model.memorize(random_tokens(1, 30)[0])
    config = GenerationConfig(**GREEDY)
    for options in ({}, {"memory": memory}):
        expected = model.generate(tokens, **options, **GREEDY)
        assert torch.equal(model.generate(inputs=tokens, **options, **GREEDY), expected)
        assert torch.equal(model.generate(input_ids=tokens, **options, **GREEDY), expected)
        assert torch.equal(model.generate(tokens, config, **options), expected)
    with pytest.raises(ValueError, match="one of them"):
        model.generate(tokens, input_ids=tokens)


@pytest.mark.parametrize("how", ["argument", "configuration"])
def test_use_cache_false_with_a_memory_or_a_cache_is_refused(how):
    model, tokens = tiny_model(), random_tokens(1, 6)
    memory = model.memorize(random_tokens(1, 30)[0])
    given = {"use_cache": False} if how == "argument" else {"generation_config": GenerationConfig(use_cache=False)}
    for state in (
        {"memory": memory},
        {CACHE_NAME: HSACache(model.config)},
        {"past_key_values": HSACache(model.config)},
    ):
        with pytest.raises(ValueError, match="leave use_cache out"):
            model.generate(tokens, **state, **given, **GREEDY)
    with pytest.raises(ValueError, match="use_cache=False with a cache"):
        model(tokens, past_key_values=HSACache(model.config), use_cache=False)


def test_a_model_that_is_set_not_to_cache_still_answers_from_a_memory():
    model, tokens = tiny_model(), random_tokens(1, 6)
    memory = model.memorize(random_tokens(1, 30)[0])
    expected = model.generate(tokens, memory=memory, **GREEDY)
    model.config.use_cache = model.generation_config.use_cache = False
    assert torch.equal(model.generate(tokens, memory=memory, **GREEDY), expected)


def test_a_continued_document_takes_a_generation_configuration():
    model, tokens = tiny_model(), random_tokens(1, 33)
    memory = model.memorize(tokens[0, :30], close=False)
    expected = model.generate(tokens[:, 30:], memory=memory, continue_document=True, **GREEDY)
    options = {"memory": memory, "continue_document": True}
    assert torch.equal(model.generate(tokens[:, 30:], GenerationConfig(**GREEDY), **options), expected)
    limited = model.generate(tokens[:, 30:], GenerationConfig(do_sample=False, max_length=8), **options)
    assert torch.equal(limited, expected)
    with pytest.raises(ValueError, match="one sequence"):
        model.generate(tokens[:, 30:], GenerationConfig(num_beams=2), **options)


def test_tokens_whose_retrieval_is_wanted_are_refused_where_none_is_asked_for():
    model, ids = tiny_model(), random_tokens(2, 8)
    with pytest.raises(ValueError, match="retrieval_to_keep goes with output_retrieval=True"):
        model.model(ids, retrieval_to_keep=1)
