"""The model inside transformers: files, generate in every mode, gradient checkpointing, Trainer."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hsa_ultralong.models import HSACache, HSAConfig, HSAForCausalLM, HSAModel
from hsa_ultralong.models.configuration_hsa import config_fields
from hsa_ultralong.testing.factories import MODEL_OPTIONS, random_tokens, tiny_config, tiny_model

EXACT = {"rtol": 1e-10, "atol": 1e-10}
GENERATED = 14


def generate(model, tokens, **options):
    fields = {
        "max_new_tokens": GENERATED,
        "do_sample": False,
        "pad_token_id": 0,
        "attention_mask": torch.ones_like(tokens),
    }
    return model.generate(tokens, **{**fields, **options})


def options_of(config):
    return {name: getattr(config, name) for name in config_fields()}


@torch.no_grad()
def argmax_loop(model, tokens, count=GENERATED):
    for _ in range(count):
        best = model(tokens, use_cache=False).logits[:, -1].argmax(-1)
        tokens = torch.cat((tokens, best[:, None]), 1)
    return tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_saved_model_loads_through_auto_classes_with_the_same_logits(tmp_path, dtype, tied):
    model, tokens = tiny_model(dtype=dtype, tie_word_embeddings=tied, num_experts=4), random_tokens(2, 17)
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), HSAConfig)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert type(loaded) is HSAForCausalLM and not loaded.training and loaded.dtype == dtype
    assert options_of(loaded.config) == options_of(model.config)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    base = AutoModel.from_pretrained(tmp_path, dtype=dtype)
    assert type(base) is HSAModel
    with torch.no_grad():
        assert torch.equal(base(tokens).last_hidden_state, model.model(tokens).last_hidden_state)


@pytest.mark.parametrize("options", MODEL_OPTIONS)
def test_every_option_survives_saving(tmp_path, options):
    config = tiny_config(**MODEL_OPTIONS[options])
    config.save_pretrained(tmp_path)
    assert options_of(HSAConfig.from_pretrained(tmp_path)) == options_of(config)


@pytest.mark.parametrize("tied", [True, False])
def test_head_and_embedding_are_tied_as_configured(tied):
    model = tiny_model(tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("options", ["default", "all_at_once", "mixture_of_experts"])
@pytest.mark.parametrize("length", [2, 10])
def test_greedy_generation_equals_an_argmax_loop_without_cache(options, length):
    model, tokens = tiny_model(**MODEL_OPTIONS[options]), random_tokens(2, length)
    assert torch.equal(generate(model, tokens), argmax_loop(model, tokens))


def test_generation_without_cache_equals_generation_with_it():
    model, tokens = tiny_model(), random_tokens(2, 10)
    assert torch.equal(generate(model, tokens, use_cache=False), generate(model, tokens))


@pytest.mark.parametrize("count", [1, 3])
def test_sampling_is_reproducible_from_the_seed(count):
    model, tokens = tiny_model(), random_tokens(1, 10)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(generate(model, tokens, do_sample=True, num_return_sequences=count, top_k=0))
    assert results[0].shape == (count, 10 + GENERATED)
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_beam_search_equals_beam_search_without_cache():
    model, tokens = tiny_model(), random_tokens(2, 10)
    beams = generate(model, tokens, num_beams=3)
    assert beams.shape == (2, 10 + GENERATED)
    assert torch.equal(beams, generate(model, tokens, num_beams=3, use_cache=False))
    assert not torch.equal(beams, generate(model, tokens))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_a_left_padded_batch_generates_what_its_rows_generate_alone(options):
    model, rows = tiny_model(), [random_tokens(1, n, seed=n) for n in (11, 6, 2)]
    tokens, mask = torch.zeros(3, 11, dtype=torch.long), torch.zeros(3, 11, dtype=torch.long)
    for b, row in enumerate(rows):
        tokens[b, 11 - row.shape[1] :], mask[b, 11 - row.shape[1] :] = row[0], 1
    batch = generate(model, tokens, attention_mask=mask, **options)
    for b, row in enumerate(rows):
        assert torch.equal(batch[b, 11:], generate(model, row, **options)[0, row.shape[1] :])


def test_a_cache_goes_by_both_names():
    model, tokens = tiny_model(), random_tokens(1, 12)
    expected = model(tokens).logits[:, 8:]
    for name in ("past_key_values", "cache"):
        cache = HSACache(model.config)
        model(tokens[:, :8], **{name: cache})
        torch.testing.assert_close(model(tokens[:, 8:], **{name: cache}).logits, expected, rtol=1e-9, atol=1e-10)
    whole = generate(model, tokens)
    for name in ("past_key_values", "cache"):
        assert torch.equal(generate(model, tokens, **{name: HSACache(model.config)}), whole)
    with pytest.raises(ValueError, match="name the same thing"):
        generate(model, tokens, past_key_values=HSACache(model.config), cache=HSACache(model.config))
    with pytest.raises(ValueError, match="name the same thing"):
        model(tokens, past_key_values=HSACache(model.config), cache=HSACache(model.config))


def test_generation_continues_from_a_returned_cache():
    model, tokens = tiny_model(), random_tokens(2, 10)
    whole = generate(model, tokens)
    first = generate(model, tokens, max_new_tokens=5, return_dict_in_generate=True)
    assert isinstance(first.past_key_values, HSACache)
    second = generate(model, first.sequences, max_new_tokens=GENERATED - 5, past_key_values=first.past_key_values)
    assert torch.equal(second, whole)
    question = torch.cat((whole, random_tokens(2, 3, seed=4)), 1)
    third = generate(model, whole, max_new_tokens=1, return_dict_in_generate=True).past_key_values
    third.crop(-(third.get_seq_length() - whole.shape[1]))
    assert torch.equal(generate(model, question, past_key_values=third), argmax_loop(model, question))


@pytest.mark.parametrize("has_padding", [False, True])
def test_chunked_prefill_generates_the_same(has_padding):
    model, tokens = tiny_model(), random_tokens(2, 19)
    mask = torch.ones_like(tokens)
    if has_padding:
        mask[1, :13] = 0
    whole = generate(model, tokens, attention_mask=mask)
    assert torch.equal(generate(model, tokens, attention_mask=mask, prefill_chunk_size=6), whole)


def test_prompt_lookup_decoding_equals_greedy():
    model = tiny_model()
    tokens = random_tokens(1, 6).repeat(1, 3)
    whole = generate(model, tokens)
    assert torch.equal(generate(model, tokens, prompt_lookup_num_tokens=3), whole)


def test_assisted_decoding_equals_greedy():
    model, helper, tokens = tiny_model(), tiny_model(seed=1), random_tokens(1, 10)
    assert torch.equal(generate(model, tokens, assistant_model=helper), generate(model, tokens))


def test_generate_refuses_a_foreign_cache_kind():
    with pytest.raises(ValueError, match="has its own cache"):
        generate(tiny_model(), random_tokens(1, 5), cache_implementation="static")


def train_once(checkpointing, **options):
    model, tokens = tiny_model(**options).train(), random_tokens(3, 18)
    if checkpointing:
        model.gradient_checkpointing_enable()
        assert all(layer.gradient_checkpointing for layer in model.model.lower_layers)
    torch.manual_seed(5)
    loss = model(tokens, labels=tokens, pool_memory=model.config.is_composable).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("options", ["default", "all_at_once", "mixture_of_experts"])
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(options):
    (loss, grads), (other_loss, other) = (train_once(flag, **MODEL_OPTIONS[options]) for flag in (False, True))
    torch.testing.assert_close(other_loss, loss, **EXACT)
    assert grads.keys() == other.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(other[name], grad, **EXACT, msg=name)


def test_gradient_checkpointing_runs_layers_twice_and_retrieval_once():
    model, tokens = tiny_model().train(), random_tokens(2, 20)
    model.gradient_checkpointing_enable()
    ran: dict[str, int] = {}
    for name, part in model.named_modules():
        if name.endswith(("mlp", "retriever.query_proj")):
            part.register_forward_pre_hook(lambda *_, name=name: ran.update({name: ran.get(name, 0) + 1}))
    model(tokens, labels=tokens).loss.backward()
    layers = {name: count for name, count in ran.items() if "encoder" not in name and "retriever" not in name}
    assert len(layers) == model.config.num_hidden_layers and set(layers.values()) == {2}
    assert {count for name, count in ran.items() if "retriever" in name} == {1}


def test_gradient_checkpointing_repeats_the_selection_noise():
    (loss, grads), (other_loss, other) = (train_once(flag, gumbel_noise=True, chunk_topk=1) for flag in (False, True))
    torch.testing.assert_close(other_loss, loss, **EXACT)
    for name, grad in grads.items():
        torch.testing.assert_close(other[name], grad, **EXACT, msg=name)


def test_gradient_checkpointing_refuses_the_reentrant_form():
    with pytest.raises(ValueError, match="use_reentrant=False"):
        tiny_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    if hasattr(HSAModel, "activation_checkpointing_enable"):
        with pytest.raises(ValueError, match="use_reentrant=False"):
            tiny_model().activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})


@pytest.mark.parametrize("options", ["default", "all_at_once", "no_shared_expert", "two_retrieval_heads"])
def test_every_parameter_receives_a_gradient(options):
    model, tokens = tiny_model(**MODEL_OPTIONS[options]).train(), random_tokens(4, 30)
    model(tokens, labels=tokens).loss.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert not missing


def test_loss_gradients_pass_a_finite_difference_check():
    model, tokens = tiny_model(chunk_topk=100).train(), random_tokens(2, 14)
    model(tokens, labels=tokens).loss.backward()
    source = torch.Generator().manual_seed(3)
    with torch.no_grad():
        directions = [torch.randn(p.shape, generator=source, dtype=torch.float64) for p in model.parameters()]
        slope = sum((p.grad * d).sum() for p, d in zip(model.parameters(), directions))
        losses = []
        for step in (1e-6, -2e-6):
            for p, d in zip(model.parameters(), directions):
                p += step * d
            losses.append(model(tokens, labels=tokens).loss)
    torch.testing.assert_close((losses[0] - losses[1]) / 2e-6, slope, rtol=1e-6, atol=1e-8)


def test_new_models_start_near_the_uniform_loss_and_with_unit_norms():
    torch.manual_seed(0)
    model, tokens = HSAForCausalLM(tiny_config()).eval(), random_tokens(2, 30)
    with torch.no_grad():
        loss = model(tokens, labels=tokens).loss
    assert abs(float(loss) - math.log(37)) < 0.3
    assert bool((model.model.norm.weight == 1).all()) and not bool(model.model.chunk_encoder.landmark_center.any())


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="transformers.Trainer needs accelerate")
def test_trainer_runs_three_steps(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = tiny_model(dtype=torch.float32)
    rows = [{"input_ids": row, "labels": row} for row in random_tokens(12, 17)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
        use_cpu=True, save_strategy="no", disable_tqdm=True, gradient_checkpointing=True,
    )  # fmt: skip
    before = model.lm_head.weight.detach().clone()
    result = Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert result.global_step == 3 and result.training_loss > 0
    assert not torch.equal(before, model.lm_head.weight)
