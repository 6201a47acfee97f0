"""A linear map of the embeddings beside the lower decoder: silent at first, part of what a memory depends on."""

import pytest
import torch

from hsa_ultralong import HSAConfig, HSAForCausalLM
from hsa_ultralong.models.accounting import count_parameters
from hsa_ultralong.models.fingerprint import memory_fingerprint
from hsa_ultralong.testing.factories import random_tokens, tiny_config, tiny_model
from hsa_ultralong.train.freezing import freeze_memory
from hsa_ultralong.train.lora import is_memory


def test_a_new_model_computes_what_it_computes_without():
    plain = tiny_model()
    model = HSAForCausalLM(tiny_config(embedding_skip=3.0)).double().eval()
    assert not model.model.embedding_skip.weight.any()
    model.load_state_dict(plain.state_dict(), strict=False)
    tokens = random_tokens(2, 30)
    torch.testing.assert_close(model(tokens).logits, plain(tokens).logits, rtol=0, atol=0)


def test_it_adds_the_normalised_embedding_to_the_lower_outputs():
    model = tiny_model(embedding_skip=3.0)
    inner, x = model.model, model.model.embed_tokens(random_tokens(1, 20))
    found = inner.read_lower(x, inner.rotary(x, None))
    skip, inner.embedding_skip = inner.embedding_skip, None
    unit = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(found - inner.read_lower(x, inner.rotary(x, None)), 3.0 * unit @ skip.weight.T)


def test_memories_depend_on_it_and_freezing_knows():
    model = tiny_model(embedding_skip=1)
    before = memory_fingerprint(model)
    assert before == memory_fingerprint(tiny_model(embedding_skip=1.0))
    assert before != memory_fingerprint(tiny_model(embedding_skip=2))
    model.model.embedding_skip.weight.data[0, 0] += 1
    assert memory_fingerprint(model) != before
    freeze_memory(model)
    assert not model.model.embedding_skip.weight.requires_grad
    # what came from a source is trained at another rate than this
    assert is_memory("model.embedding_skip.weight")


def test_its_parameters_are_counted():
    config = tiny_config(embedding_skip=1)
    assert count_parameters(config).total == HSAForCausalLM(config).num_parameters()


def test_a_negative_scale_is_refused():
    with pytest.raises(ValueError, match="embedding_skip must be >= 0, got -1"):
        HSAConfig(embedding_skip=-1)
