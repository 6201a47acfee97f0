"""A converted transformer computes what its source computes, until the text outgrows the window."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from transformers import (
    Gemma2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MixtralConfig,
    PhiConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
)

from hsa_ultralong.inference.engine import DecodingEngine
from hsa_ultralong.models import HSACache
from hsa_ultralong.models.accounting import count_parameters
from hsa_ultralong.models.convert import convert_model, converted_config

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
OURS = {"sliding_window": 24, "chunk_size": 8, "retrieval_dim": 16, "chunk_topk": 2}
# of the four pairs of a head, one is kept, one falls between, two are divided
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 512}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}


def randomized(model):
    """Norms and biases, which transformers starts at one and zero, take part as well."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.5)
    return model.double().eval()


def llama(**changes):
    torch.manual_seed(0)
    return randomized(LlamaForCausalLM(LlamaConfig(**{**SIZES, "tie_word_embeddings": False, **changes})))


def qwen2(**changes):
    torch.manual_seed(0)
    return randomized(Qwen2ForCausalLM(Qwen2Config(**{**SIZES, "tie_word_embeddings": True, **changes})))


def qwen3(**changes):
    torch.manual_seed(0)
    options = {**SIZES, "head_dim": 16, "tie_word_embeddings": True, **changes}
    return randomized(Qwen3ForCausalLM(Qwen3Config(**options)))


def llama_with_biases(**changes):
    """As when a Qwen model is stored as a Llama: attention's output has a bias, which is zero."""
    model = llama(attention_bias=True, **changes)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.bias.zero_()
    return model


SOURCES = {
    "llama": (llama, {}),
    "llama, scaled as 3.1": (llama, {"rope_parameters": LLAMA3}),
    "llama, linear": (llama, {"rope_parameters": LINEAR}),
    "llama with biases": (llama_with_biases, {}),
    "qwen2": (qwen2, {}),
    "qwen2, yarn": (qwen2, {"rope_parameters": YARN}),
    "qwen2, yarn in every detail": (
        qwen2,
        {"rope_parameters": {**YARN, "beta_fast": 9, "beta_slow": 2.0, "mscale": 2.0, "mscale_all_dim": 0.5,
                             "truncate": False}},
    ),
    "qwen3": (qwen3, {}),
    "qwen3, yarn": (qwen3, {"rope_parameters": {**YARN, "attention_factor": 1.3}}),
}  # fmt: skip


class ExactAngles(torch.nn.Module):
    """The source's own rotary embedding, its code run in fp64."""

    def __init__(self, rotary):
        super().__init__()
        with mock.patch.object(torch, "float", torch.float64), mock.patch.object(torch, "float32", torch.float64):
            fresh = type(rotary)(rotary.config)
        assert fresh.inv_freq.dtype == torch.float64
        self.frequency, self.factor = fresh.inv_freq, fresh.attention_scaling

    def forward(self, x, position_ids):
        angles = position_ids[..., None].double() * self.frequency
        return tuple(torch.cat((part,) * 2, -1) * self.factor for part in (angles.cos(), angles.sin()))


def exact(model):
    """transformers' norms and angles are fp32 whatever the dtype; these are not."""
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            norm = torch.nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon, dtype=torch.float64)
            norm.weight = module.weight
            model.set_submodule(name, norm)
    model.model.rotary_emb = ExactAngles(model.model.rotary_emb)
    return model


def ids_of(*shape, seed=1):
    return torch.randint(3, 61, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("source", SOURCES)
@torch.no_grad()
def test_within_the_window_the_logits_are_the_sources(source):
    make, options = SOURCES[source]
    teacher = exact(make(initializer_range=0.2, **options))
    student = convert_model(teacher, **OURS).model
    ids = ids_of(2, 40)
    expected, found = teacher(ids).logits, student(ids).logits
    # a token at place t of layer l reads inputs that have seen t tokens: all windows are full attention up to W
    torch.testing.assert_close(found[:, :24], expected[:, :24], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(found[:, 30:], expected[:, 30:], atol=1e-2)
    assert count_parameters(student.config).total == sum(part.numel() for part in student.parameters())


@pytest.mark.parametrize("source", ["llama, scaled as 3.1", "qwen2", "qwen2, yarn"])
@torch.no_grad()
def test_a_converted_model_decodes_what_it_computes_in_parallel(source):
    make, options = SOURCES[source]
    teacher = exact(make(initializer_range=0.2, **options))
    student = convert_model(teacher, **OURS).model
    # the memory takes part
    for group in student.model.upper_groups():
        group.hsa_layer.hsa.o_proj.weight.normal_(std=0.2)
    memory, ids = student.memorize(ids_of(1, 50, seed=2)[0]), ids_of(1, 70)
    expected = student(ids, past_key_values=HSACache(student.config, memory=memory)).logits[0]
    cache = HSACache(student.config, memory=memory)
    parts = [student(part, past_key_values=cache).logits[0] for part in ids.split([30, 1, 1, 38], dim=1)]
    torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-9, atol=1e-9)
    engine = DecodingEngine(student, memory, max_tokens=80)
    engine.start(0, ids[0, :31])
    for place in range(31, 70):
        engine.tokens.copy_(ids[0, place])
        engine.step()
        torch.testing.assert_close(engine.logits[0], expected[place], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("source", ["llama, scaled as 3.1", "qwen2"])
def test_generation_within_the_window_is_the_sources(source):
    make, options = SOURCES[source]
    teacher = make(initializer_range=0.2, **options)
    student, prompt = convert_model(teacher, **OURS).model, ids_of(1, 6)
    expected, found = (model.generate(prompt, max_new_tokens=16, do_sample=False) for model in (teacher, student))
    assert torch.equal(found, expected)


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
    for wrong in (
        {"num_lower_layers": 3}, {"num_upper_groups": 2**40}, {"num_upper_groups": [4, 3]}, {"num_upper_groups": []},
        {"num_upper_groups": [2, 2], "num_lower_layers": 1}, {"num_upper_groups": [5, 0]},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="do not divide"):
            converted_config(llama().config, **OURS, **wrong)


def test_any_layers_above_the_first_may_read_the_memory():
    by_layer = converted_config(llama().config, **OURS, reading_layers=[1, 2, 4])
    assert (by_layer.num_lower_layers, by_layer.group_sizes, by_layer.reading_layers) == (1, [1, 2, 2], [1, 2, 4])
    assert converted_config(llama().config, **OURS, num_upper_groups=[1, 2, 2]).to_dict() == by_layer.to_dict()
    # equal groups have one form, however they are given
    assert converted_config(llama().config, **OURS, reading_layers=[2, 4]).num_layers_per_group == 2
    for wrong in ([0, 2], [3, 3], [4, 2], [2, 6], []):
        with pytest.raises(ValueError, match="rising numbers from 1 to 5"):
            converted_config(llama().config, **OURS, reading_layers=wrong)
    with pytest.raises(ValueError, match="leave those out"):
        converted_config(llama().config, **OURS, reading_layers=[2, 4], num_lower_layers=2)


@torch.no_grad()
def test_with_uneven_groups_everything_is_as_with_even_ones(tmp_path):
    teacher = exact(llama(initializer_range=0.2))
    student = convert_model(teacher, **OURS, reading_layers=[1, 2, 5]).model
    ids = ids_of(1, 60)
    torch.testing.assert_close(student(ids).logits[:, :24], teacher(ids).logits[:, :24], rtol=1e-9, atol=1e-9)
    for group in student.model.upper_groups():
        group.hsa_layer.hsa.o_proj.weight.normal_(std=0.2)
    config = student.config
    assert count_parameters(config).total == sum(part.numel() for part in student.parameters())
    assert config.layer_windows == [24] * 6 and config.upper_reach == 5 * 23
    expected, cache = student(ids).logits, HSACache(config)
    parts = [student(part, past_key_values=cache).logits for part in ids.split([30, 1, 29], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-9, atol=1e-9)
    memory = student.memorize(ids[0])
    engine = DecodingEngine(student, memory, max_tokens=80)
    engine.start(0, ids[0, :8])
    engine.step()
    student.save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path, dtype=torch.float64)
    assert again.config.group_sizes == [1, 3, 1]
    torch.testing.assert_close(again(ids).logits, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("heads", [1, 2])
def test_biases_come_from_the_source_and_are_reported(heads):
    conversion = convert_model(qwen2(), **OURS, num_memory_heads=heads)
    names = {name for name, _ in conversion.model.named_parameters() if name.endswith("bias")}
    assert names <= set(conversion.reused)
    for part in ("lower_layers.0.attention", "groups.0.hsa_layer.window_attention", "chunk_encoder.layers.0"):
        assert {f"model.{part}.{kind}_proj.bias" for kind in "qkv"} <= names
    assert "model.groups.1.hsa_layer.hsa.q_proj.bias" in names


def test_tokens_that_end_an_answer_come_from_the_generation_config():
    teacher = llama()
    assert convert_model(teacher, **OURS).model.generation_config.eos_token_id == 2
    teacher.generation_config.eos_token_id = [2, 7]
    assert convert_model(teacher, **OURS).model.generation_config.eos_token_id == [2, 7]


REFUSED = {
    "mixtral": (MixtralConfig(**SIZES), "type is none of .*; its feed-forward blocks are mixtures of experts"),
    "qwen3_moe": (Qwen3MoeConfig(**SIZES), "mixtures of experts"),
    "gemma2": (Gemma2Config(**SIZES), "some of its layers have a sliding window, others none; its logits are soft-cap"),
    "phi": (PhiConfig(**SIZES), "type is none of .*; its RoPE covers a part of each head"),
    "qwen2": (
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=512, max_window_layers=3),
        "^this qwen2 model cannot be converted: some of its layers have a sliding window, others none$",
    ),
    "dynamic": (
        LlamaConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
        r"RoPE is scaled in a way that is not supported \(dynamic\)$",
    ),
    "partial": (LlamaConfig(**SIZES, partial_rotary_factor=0.5), "RoPE covers a part of each head$"),
    "two": (LlamaConfig(**SIZES, mlp_bias=True, hidden_act="gelu"), "blocks have biases; its activation is gelu, not"),
    "quantised": (LlamaConfig(**SIZES, quantization_config={"quant_method": "gptq"}), "weights are quantised"),
    "bare keys": (SimpleNamespace(model_type="new"), "^this new model cannot be converted: its type is none of [^;]*$"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_represented_is_refused_by_name(name):
    config, problem = REFUSED[name]
    with pytest.raises(ValueError, match=problem) as error:
        converted_config(config)
    assert "\n" not in str(error.value)


def test_a_parameter_without_a_place_is_refused_by_name():
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.o_proj\.bias of the source has no place"):
        convert_model(llama(attention_bias=True), **OURS)


def test_the_yarn_factor_may_follow_from_the_lengths():
    rope = {**YARN, "factor": None}
    config = converted_config(LlamaConfig(**SIZES, rope_parameters=rope, max_position_embeddings=2048), **OURS)
    assert config.rope_scaling == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


def test_a_window_reaches_no_further_than_the_sources():
    config = MistralConfig(**SIZES, sliding_window=24)
    assert converted_config(config, sliding_window=24).sliding_window == 24
    with pytest.raises(ValueError, match="at most 24"):
        converted_config(config, sliding_window=25)


def test_options_that_follow_from_the_source_are_refused():
    with pytest.raises(ValueError, match="hidden_size, rope_theta: follows"):
        converted_config(llama().config, **OURS, rope_theta=5.0, hidden_size=64)
