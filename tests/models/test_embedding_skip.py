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


def test_the_chunk_encoder_reads_the_lower_outputs_with_the_normalised_embedding_added():
    model = tiny_model(embedding_skip=3.0)
    inner, x = model.model, model.model.embed_tokens(random_tokens(1, 20))
    found = inner.read_lower(x, inner.rotary(x, None))
    assert found.shape[-1] == model.config.lower_width == 2 * model.config.hidden_size
    size = model.config.chunk_size
    chunks = found[:, :size].unflatten(1, (-1, size))
    skip, inner.embedding_skip = inner.embedding_skip, None
    plain = inner.read_lower(x, inner.rotary(x, None))
    unit = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    expected = (plain + 3.0 * unit @ skip.weight.T)[:, :size].unflatten(1, (-1, size))
    torch.testing.assert_close(inner.chunk_encoder(chunks), inner.chunk_encoder(expected))


def test_the_upper_decoder_does_not_see_it():
    # nothing is read where the layers that read are silent: what was the source's is then the source's to the bit
    model, other = tiny_model(embedding_skip=3.0), tiny_model(embedding_skip=3.0)
    other.load_state_dict(model.state_dict())
    other.model.embedding_skip.weight.data.zero_()
    tokens = random_tokens(2, 40)
    assert not torch.equal(model(tokens).logits, other(tokens).logits)
    for one in (model, other):
        for group in one.model.groups:
            group.hsa_layer.hsa.o_proj.weight.data.zero_()
    torch.testing.assert_close(model(tokens).logits, other(tokens).logits, rtol=0, atol=0)


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
