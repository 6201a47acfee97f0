"""HSAConfig: every bad value is one clear error, and the derived numbers are those of the facts."""

from __future__ import annotations

import math

import pytest
import torch

from hsa_ultralong.models import HSAConfig
from hsa_ultralong.models.configuration_hsa import config_fields
from hsa_ultralong.models.fingerprint import memory_fingerprint
from hsa_ultralong.testing.factories import random_tokens, tiny_config, tiny_model

COUNTS = [
    "vocab_size", "hidden_size", "intermediate_size", "num_lower_layers", "num_upper_groups", "num_layers_per_group",
    "num_attention_heads", "num_key_value_heads", "sliding_window", "chunk_size", "num_encoder_layers",
    "num_memory_heads", "chunk_topk", "retrieval_dim", "num_retrieval_heads", "num_experts_per_token",
]  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [0, -3])
def test_a_count_below_one_is_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be >= 1, got {value}"):
        tiny_config(**{name: value})


@pytest.mark.parametrize("name", ["hsa_sliding_window", "num_experts", "num_shared_experts", "num_dense_layers"])
def test_a_negative_count_is_refused(name):
    with pytest.raises(ValueError, match=f"^{name} must be >= 0, got -1"):
        tiny_config(**{name: -1})


@pytest.mark.parametrize("name", ["landmark_source", "hsa_residual", "fusion"])
def test_an_unknown_choice_is_refused_with_the_choices(name):
    with pytest.raises(ValueError, match=f"{name} must be one of .*got 'other'"):
        tiny_config(**{name: "other"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads=4 must be a multiple of num_key_value_heads=3"),
        ({"num_memory_heads": 3}, "num_attention_heads=4 must be a multiple of num_memory_heads=3"),
        ({"num_memory_heads": 4, "num_retrieval_heads": 2}, "num_retrieval_heads must be 1 or num_memory_heads=4"),
        ({"num_memory_heads": 2, "num_retrieval_heads": 2, "retrieval_dim": 7}, "retrieval_dim=7 must be a multiple"),
        ({"unsure_below": []}, "unsure_below must be None or pairs"),
        ({"unsure_below": [0.5]}, "unsure_below must be None or pairs"),
        ({"unsure_below": [[64, 0.5, 1]]}, "unsure_below must be None or pairs"),
        ({"unsure_below": [[64, "0.5"]]}, "unsure_below must be None or pairs"),
        ({"unsure_below": [[64, 1.5]]}, "weights from 0 to 1"),
        ({"unsure_below": [[64, math.nan]]}, "weights from 0 to 1"),
        ({"unsure_below": [[0, 0.5]]}, "rising chunks"),
        ({"unsure_below": [[math.inf, 0.5]]}, "rising chunks"),
        ({"unsure_below": [[64, 0.5], [64, 0.3]]}, "rising chunks"),
        ({"head_dim": 5}, "head_dim must be even"),
        ({"head_dim": 1}, "head_dim must be >= 2"),
        ({"num_experts": 2, "num_experts_per_token": 3}, "num_experts_per_token=3 exceeds num_experts=2"),
        ({"top_k": 5}, "unknown configuration key 'top_k'"),
        ({"chunk_topkk": 5}, "did you mean 'chunk_topk'"),
        ({"per_layer_config": {0: {"head_dim": 8}}}, "have their options in common"),
        ({"attn_implementation": "flash_attention_2"}, "have their own kernels"),
        ({"_attn_implementation": "flex_attention"}, "have their own kernels"),
    ],
)
def test_values_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**options)


NEAR_MISSES = {
    "chunk_top_k": "chunk_topk", "topk": "chunk_topk", "top_k": "chunk_topk", "chunk_sise": "chunk_size",
    "chunkSize": "chunk_size", "hiden_size": "hidden_size", "num_experts_per_tok": "num_experts_per_token",
    "window": "sliding_window", "sliding_windows": "sliding_window", "num_heads": "num_attention_heads",
    "num_layers": "num_lower_layers", "qk_norm": "use_qk_norm", "learned_temprature": "learned_temperature",
    "max_positions_embeddings": "max_position_embeddings",
}  # fmt: skip


@pytest.mark.parametrize("key", NEAR_MISSES)
def test_what_looks_like_an_option_is_refused_wherever_it_is_set(key):
    message = f"unknown configuration key '{key}'; did you mean '{NEAR_MISSES[key]}'"
    config = tiny_config()
    for use in (
        lambda: HSAConfig(**{key: 3}),
        lambda: setattr(config, key, 3),
        lambda: config.update({key: 3}),
        lambda: HSAConfig.from_dict({}, **{key: 3}),
        lambda: HSAConfig.from_dict({key: 3}),
    ):
        with pytest.raises(ValueError, match=message):
            use()


def test_a_number_that_follows_from_others_cannot_be_given():
    with pytest.raises(ValueError, match="num_hidden_layers follows from other options"):
        HSAConfig(num_hidden_layers=3)


# as transformers, Trainer, peft, trl, unsloth and quantisers write them
NOTED = {
    "_name_or_path": "here", "architectures": ["HSAForCausalLM"], "auto_map": {"AutoTokenizer": ["a.B", None]},
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}, "tokenizer_class": "Any",
    "max_position_embeddings": 4096, "_attn_implementation": "sdpa", "transformers_version": "4.57.0",
    "torch_dtype": "bfloat16", "id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1},
    "task_specific_params": {"text-generation": {"do_sample": True}}, "problem_type": "regression",
    "max_length": 20, "temperature": 0.7, "do_sample": True, "num_beams": 1, "sep_token_id": 2, "cls_token_id": None,
    "eod_token_id": 1, "is_decoder": False, "is_encoder_decoder": False, "add_cross_attention": False,
    "pruned_heads": {}, "torchscript": False, "use_bfloat16": False, "pretraining_tp": 1, "unsloth_version": "2026.1",
    "unsloth_fixed": True, "model_name": "x", "chunk_size_feed_forward": 0,
    "finetuning_task": None, "prefix": None, "tf_legacy_loss": False, "tie_encoder_decoder": False,
    "output_hidden_states": False, "output_attentions": False, "_commit_hash": None, "_unsloth_note": 1,
}  # fmt: skip


def test_keys_of_transformers_and_its_tools_are_kept_without_a_word(tmp_path, caplog):
    config = tiny_config(**NOTED)
    assert config.quantization_config == NOTED["quantization_config"] and config.dtype == torch.bfloat16
    config.save_pretrained(tmp_path)
    again = HSAConfig.from_pretrained(tmp_path)
    assert {**again.to_dict(), "_name_or_path": "here"} == config.to_dict() and again.tokenizer_class == "Any"
    assert again.auto_map["AutoTokenizer"] == ["a.B", None]
    assert not caplog.records


def test_a_key_that_nobody_knows_is_kept_and_named_once(tmp_path, caplog):
    config = tiny_config(nonsense_xyz=5)
    config.save_pretrained(tmp_path)
    assert HSAConfig.from_pretrained(tmp_path).nonsense_xyz == 5
    assert ["nonsense_xyz" in record.getMessage() for record in caplog.records] == [True]


def test_attention_by_transformers_names_is_one_and_the_same():
    for name in (None, "sdpa", "eager"):
        assert tiny_config(attn_implementation=name)._attn_implementation == name


def test_a_length_is_stated_for_tools_that_no_row_can_exceed():
    assert tiny_config().max_position_embeddings == tiny_config(max_position_embeddings=None).max_position_embeddings
    assert tiny_config().max_position_embeddings == 2**31 - 1
    with pytest.raises(ValueError, match="max_position_embeddings must be >= 1"):
        tiny_config(max_position_embeddings=0)


@pytest.mark.parametrize(
    "options",
    [{"hidden_size": "x"}, {"chunk_size": 4.5}, {"tie_word_embeddings": "yes"}, {"fusion": 3}, {"chunk_topk": None}],
)
def test_a_value_of_the_wrong_type_is_refused_by_name(options):
    with pytest.raises(Exception, match=next(iter(options))):
        tiny_config(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"rope_theta": 0.0}, {"rope_theta": -1.0}, {"rms_norm_eps": -1e-6}, {"initializer_range": -0.1},
        {"encoder_intermediate_size": 0}, {"moe_intermediate_size": 0}, {"router_bias_update_rate": -1.0},
    ],
)  # fmt: skip
def test_a_number_out_of_range_is_refused_by_name(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        tiny_config(**options)


def test_defaults_follow_from_other_fields():
    config = HSAConfig(hidden_size=96, num_attention_heads=6, num_key_value_heads=2, intermediate_size=100)
    assert (config.head_dim, config.encoder_intermediate_size, config.moe_intermediate_size) == (16, 100, 100)
    assert config.num_hidden_layers == 4 + 2 * 2


LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "type": "llama3"}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **{k: LLAMA3[k] for k in LLAMA3 if k != "rope_type"}}},
        {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
        {"rope_parameters": {**LLAMA3, "rope_theta": 5e5, "beta_fast": None}, "rope_scaling": None},
    ],
)
def test_rope_is_read_as_transformers_5_and_older_write_it(options, tmp_path):
    given = {key: dict(value) if isinstance(value, dict) else value for key, value in options.items()}
    config = tiny_config(**given)
    assert (config.rope_theta, config.rope_scaling) == (5e5, LLAMA3)
    assert given == options
    config.save_pretrained(tmp_path)
    again = HSAConfig.from_pretrained(tmp_path)
    assert (again.rope_theta, again.rope_scaling) == (5e5, LLAMA3)


@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
def test_an_unscaled_rope_leaves_theta_only(name):
    config = tiny_config(**{name: {"rope_type": "default", "rope_theta": 123.0}})
    assert (config.rope_theta, config.rope_scaling) == (123.0, None)
    assert tiny_config(rope_theta=5.0, rope_scaling=None, rope_parameters=None).rope_theta == 5.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "one of linear, llama3, yarn, got 'dynamic'"),
        ({"rope_scaling": {"factor": 2.0}}, "got 'default' with factor"),
        ({"rope_scaling": {"rope_type": "linear"}}, "needs factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "facter": 1.0}}, "has no 'facter'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -2.0}}, "factor must be a positive number, got -2.0"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor must be a positive number, got '2'"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "low_freq_factor must be below high_freq_factor"),
        ({"rope_parameters": {"rope_theta": 0.0}}, "rope_theta must be > 0"),
        ({"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": LLAMA3}, "give one of them"),
        (
            {"rope_scaling": {
                "rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 9, "truncate": 1}},
            "truncate must be true or false",
        ),
    ],
)  # fmt: skip
def test_a_rope_that_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**options)


def test_reaches_are_the_sums_of_the_windows():
    config = tiny_config(num_lower_layers=3, num_upper_groups=2, num_layers_per_group=3)
    assert config.lower_reach == 3 * (5 - 1)
    assert config.upper_reach == 2 * (2 * (5 - 1) + (3 - 1))
    assert tiny_config(hsa_sliding_window=0, num_layers_per_group=1).upper_reach == 0


def test_only_plain_softmax_fusion_is_composable():
    assert tiny_config().is_composable
    assert not tiny_config(fusion="stick_breaking").is_composable
    assert not tiny_config(position_decay=True).is_composable


def test_the_line_of_unsure_answers_is_saved_and_changes_no_fingerprint_and_no_number(tmp_path):
    plain, drawn = tiny_model(), tiny_model(unsure_below=[[64, 0.5], [4096, 0.25]])
    assert memory_fingerprint(plain) == memory_fingerprint(drawn)
    tokens = random_tokens(1, 20)
    assert torch.equal(plain(tokens).logits, drawn(tokens).logits)
    drawn.config.save_pretrained(tmp_path)
    assert HSAConfig.from_pretrained(tmp_path).unsure_below == [[64, 0.5], [4096, 0.25]]
    assert HSAConfig().unsure_below is None


def test_every_option_is_documented():
    missing = [name for name in config_fields() if name not in HSAConfig.__doc__ and not name.endswith("token_id")]
    assert set(missing) <= {"use_cache"}
