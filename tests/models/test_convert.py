"""A converted transformer computes what its source computes, until the text outgrows the window."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, Qwen2Config, Qwen3Config, Qwen3ForCausalLM

from hsa_ultralong.models.convert import convert_model, converted_config

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
OURS = {"sliding_window": 24, "chunk_size": 8, "retrieval_dim": 16, "chunk_topk": 2}


def llama(**changes):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "tie_word_embeddings": False, **changes})).double().eval()


def qwen3(**changes):
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**{**SIZES, "head_dim": 16, "tie_word_embeddings": True, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model.double().eval()


class ExactAngles(torch.nn.Module):
    """The source's rotary embedding in fp64."""

    def __init__(self, config):
        super().__init__()
        self.theta, self.dim = config.rope_parameters["rope_theta"], config.head_dim

    def forward(self, x, position_ids):
        angles = position_ids[..., None].double() * self.theta ** (-torch.arange(0, self.dim, 2).double() / self.dim)
        return torch.cat((angles.cos(),) * 2, -1), torch.cat((angles.sin(),) * 2, -1)


def exact(model):
    """transformers' norms and angles are fp32 whatever the dtype; these are not."""
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            norm = torch.nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon, dtype=torch.float64)
            norm.weight = module.weight
            model.set_submodule(name, norm)
    model.model.rotary_emb = ExactAngles(model.config)
    return model


@pytest.mark.parametrize("source", [llama, qwen3])
@torch.no_grad()
def test_within_the_window_the_logits_are_the_sources(source):
    teacher = exact(source(initializer_range=0.2))
    student = convert_model(teacher, **OURS).model
    ids = torch.randint(61, (2, 40), generator=torch.Generator().manual_seed(1))
    expected, found = teacher(ids).logits, student(ids).logits
    # a token at place t of layer l reads inputs that have seen t tokens: all windows are full attention up to W
    torch.testing.assert_close(found[:, :24], expected[:, :24], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(found[:, 30:], expected[:, 30:], atol=1e-2)


@torch.no_grad()
def test_the_memory_is_silent_but_not_dead():
    teacher = llama()
    student = convert_model(teacher, **OURS).model.train()
    ids = torch.randint(61, (1, 40))
    with torch.enable_grad():
        student(ids, labels=ids).loss.backward()
    for group in student.model.upper_groups():
        assert not group.hsa_layer.hsa.o_proj.weight.any()
        assert group.hsa_layer.hsa.o_proj.weight.grad.abs().max() > 0


def test_the_report_names_every_parameter():
    conversion = convert_model(llama(), **OURS)
    names = {name for name, _ in conversion.model.named_parameters()}
    assert set(conversion.reused) | set(conversion.initialised) == names
    assert not set(conversion.reused) & set(conversion.initialised)
    assert any("retriever.query_proj" in name for name in conversion.initialised)
    assert not any("lower_layers" in name for name in conversion.initialised)
    assert 0.5 < conversion.reused_share < 1
    # memory heads of their own shape start fresh, equal ones from the source
    same = convert_model(llama(), **OURS, num_memory_heads=2)
    assert "model.chunk_encoder.k_proj.weight" in same.reused
    assert "model.chunk_encoder.k_proj.weight" in conversion.initialised


def test_layers_divide_into_groups():
    config = converted_config(llama().config, **OURS)
    assert (config.num_lower_layers, config.num_upper_groups, config.num_layers_per_group) == (4, 2, 1)
    config = converted_config(llama().config, **OURS, num_lower_layers=2)
    assert (config.num_hidden_layers, config.num_layers_per_group) == (6, 2)
    with pytest.raises(ValueError, match="do not divide"):
        converted_config(llama().config, **OURS, num_lower_layers=3)


def test_what_cannot_be_represented_is_refused_by_name():
    for config, problem in (
        (Qwen2Config(**SIZES), "type is none of"),
        (LlamaConfig(**SIZES, attention_bias=True, hidden_act="gelu"), "attention has biases; its activation is gelu"),
        (LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}), "scaled"),
    ):
        with pytest.raises(ValueError, match=problem):
            converted_config(config)


def test_a_window_reaches_no_further_than_the_sources():
    config = MistralConfig(**SIZES, sliding_window=24)
    assert converted_config(config, sliding_window=24).sliding_window == 24
    with pytest.raises(ValueError, match="at most 24"):
        converted_config(config, sliding_window=25)


def test_options_that_follow_from_the_source_are_refused():
    with pytest.raises(ValueError, match="hidden_size, rope_theta: follows"):
        converted_config(llama().config, **OURS, rope_theta=5.0, hidden_size=64)
