"""Training mode, with or without gradient checkpointing, answers as evaluation mode does where a cache is involved."""

from __future__ import annotations

import pytest
import torch

from hsa_ultralong.models import HSACache
from hsa_ultralong.testing.factories import MODEL_OPTIONS, encode_documents, random_tokens, tiny_model

EXACT = {"rtol": 1e-10, "atol": 1e-10}
GREEDY = {"max_new_tokens": 9, "do_sample": False}


def in_training(checkpointing, **options):
    model = tiny_model(gumbel_noise=True, **options).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("options", ["default", "all_at_once", "mixture_of_experts"])
def test_generate_in_training_mode_answers_as_in_evaluation_mode(options, checkpointing):
    fields, tokens = MODEL_OPTIONS[options], random_tokens(2, 21)
    model, mask = in_training(checkpointing, **fields), torch.ones_like(tokens)
    mask[1, :5] = 0
    memory = tiny_model(**fields).memorize(random_tokens(1, 50, seed=1)[0])
    for given in ({}, {"memory": memory}, {"num_beams": 2}):
        expected = tiny_model(**fields).generate(tokens, attention_mask=mask, **given, **GREEDY)
        assert torch.equal(model.generate(tokens, attention_mask=mask, **given, **GREEDY), expected)
    assert all(part.training for part in model.modules())
    assert all(not bool(load.any()) for name, load in model.named_buffers() if name.endswith("expert_load"))


def test_generate_leaves_parts_that_were_in_evaluation_mode_as_they_were():
    model = tiny_model().train()
    model.model.chunk_encoder.eval()
    before = [part.training for part in model.modules()]
    model.generate(random_tokens(1, 5), **GREEDY)
    assert [part.training for part in model.modules()] == before and not all(before)
    with pytest.raises(ValueError, match="one token"):
        model.generate(random_tokens(1, 5)[:, :0], **GREEDY)
    assert [part.training for part in model.modules()] == before


def test_a_generation_that_fails_leaves_training_mode_on():
    model = tiny_model().train()
    with pytest.raises(ValueError, match="not used by the model"):
        model.generate(random_tokens(1, 5), qwertz=1, **GREEDY)
    assert all(part.training for part in model.modules())


@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("options", ["default", "all_at_once"])
def test_a_cache_in_training_with_gradient_checkpointing_is_used(options, with_gradients):
    model, tokens = tiny_model(**MODEL_OPTIONS[options]).train(), random_tokens(2, 23)
    with torch.no_grad():
        expected = tiny_model(**MODEL_OPTIONS[options])(tokens, use_cache=False).logits
    model.gradient_checkpointing_enable()
    with torch.set_grad_enabled(with_gradients):
        first = model(tokens[:, :13], use_cache=True)
        assert isinstance(first.past_key_values, HSACache)
        second = model(tokens[:, 13:], past_key_values=first.past_key_values)
        if with_gradients:
            second.logits.sum().backward()
    torch.testing.assert_close(torch.cat((first.logits, second.logits), 1), expected, **EXACT)
    assert second.past_key_values.get_seq_length() == 23


def test_questions_to_a_library_train_alike_with_and_without_gradient_checkpointing():
    found = []
    for checkpointing in (False, True):
        model, tokens = tiny_model().train(), random_tokens(2, 17)
        library = encode_documents(model, [random_tokens(1, 20, seed=1)[0]])
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss = model(tokens, labels=tokens, past_key_values=HSACache(model.config, library)).loss
        loss.backward()
        found.append((loss.detach(), [part.grad for part in model.parameters()]))
    torch.testing.assert_close(found[0], found[1], **EXACT)
    plain = tiny_model()(tokens, labels=tokens).loss
    assert float((plain.detach() - found[0][0]).abs()) > 1e-4


def test_memorizing_in_training_mode_with_checkpointing_is_that_of_evaluation_mode():
    tokens = random_tokens(1, 50)[0]
    expected, found = tiny_model().memorize(tokens), in_training(True).memorize(tokens)
    for left, right in zip(found.tensors, expected.tensors):
        assert torch.equal(left, right)
