"""A GGUF file gives the model that it was made from: names, halves of heads, RoPE, tied heads, quantisation."""

import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hsa_ultralong.files.gguf import read_gguf
from hsa_ultralong.models.convert import convert_model
from hsa_ultralong.models.gguf import gguf_config, load_gguf
from hsa_ultralong.testing.gguf_files import write_gguf

gguf = pytest.importorskip("gguf")

SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "initializer_range": 0.2, "rms_norm_eps": 1e-5,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": False, "head_dim": 32}),
    "llama, tied, scaled as 3.1": (
        LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True, "rope_parameters": LLAMA3}
    ),
    "llama, linear": (
        LlamaForCausalLM, LlamaConfig, {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}
    ),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 24}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 32, "tie_word_embeddings": True}),
}  # fmt: skip


def source(name):
    torch.manual_seed(0)
    model_class, config_class, options = MODELS[name]
    model = model_class(config_class(**{**SIZES, **options})).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.uniform_(0.5, 1.5)
            elif key.endswith("bias") and "o_proj" not in key:
                parameter.normal_(std=0.5)
    return model


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_file_gives_the_model_that_it_was_made_from(tmp_path, name):
    model = source(name)
    found = load_gguf(write_gguf(model, tmp_path / "model.gguf"))
    assert type(found) is type(model) and found.dtype == torch.float32
    for key, tensor in model.state_dict().items():
        assert torch.equal(found.state_dict()[key], tensor), key
    ids = torch.randint(64, (2, 20))
    torch.testing.assert_close(found(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    mine, theirs = found.config, model.config
    for option in ("rms_norm_eps", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(mine, option, None) == getattr(theirs, option, None), option
    for key, value in theirs.rope_parameters.items():
        assert mine.rope_parameters[key] == value, key
    student = convert_model(found, sliding_window=24, num_upper_groups=1, chunk_size=8, retrieval_dim=16).model
    torch.testing.assert_close(student(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16"])
def test_any_quantisation_that_the_package_decodes_is_read(tmp_path, kind):
    model = source("llama")
    found = load_gguf(write_gguf(model, tmp_path / "model.gguf", kind=kind))
    assert found.dtype == (torch.bfloat16 if kind == "BF16" else torch.float32)
    key = "model.layers.1.mlp.down_proj.weight"
    wanted = model.state_dict()[key]
    step = {"Q4_0": 8, "Q4_1": 8, "Q5_0": 16, "Q5_1": 16, "Q8_0": 128, "F16": 1024, "BF16": 128}[kind]
    error = (found.state_dict()[key].float() - wanted).abs().max()
    assert 0 < error <= 1.1 * wanted.abs().max() / step
    # the package's own numbers, bit for bit
    stored = read_gguf(tmp_path / "model.gguf").tensors["blk.1.ffn_down.weight"]
    theirs = next(t for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors if t.name == "blk.1.ffn_down.weight")
    assert np.array_equal(stored.numbers(), gguf.dequantize(theirs.data, theirs.tensor_type).reshape(stored.shape))


def packed_q4_k(rng, blocks):
    """Blocks of Q4_K, 144 bytes, and their 256 numbers: d * scale * q - dmin * least, in eights of 32."""
    d, dmin = (rng.uniform(0.001, 0.01, blocks).astype(np.float16) for _ in range(2))
    scales, least = (rng.integers(0, 64, (blocks, 8)) for _ in range(2))
    q = rng.integers(0, 16, (blocks, 8, 32))
    numbers = (
        d[:, None, None].astype("f4") * scales[..., None] * q - dmin[:, None, None].astype("f4") * least[..., None]
    )
    low, high = slice(0, 4), slice(4, 8)
    six = np.concatenate(
        (scales[:, low] | (scales[:, high] >> 4) << 6, least[:, low] | (least[:, high] >> 4) << 6,
         (scales[:, high] & 15) | (least[:, high] & 15) << 4), 1)  # fmt: skip
    nibbles = (q[:, 0::2] | q[:, 1::2] << 4).reshape(blocks, 128)
    parts = d.view("u1").reshape(blocks, 2), dmin.view("u1").reshape(blocks, 2), six.astype("u1"), nibbles.astype("u1")
    return np.concatenate(parts, 1), numbers.reshape(blocks, 256)


def packed_q6_k(rng, blocks):
    """Blocks of Q6_K, 210 bytes, and their 256 numbers: d * scale * (q - 32), in sixteens of 16."""
    d, scales = rng.uniform(0.001, 0.01, blocks).astype(np.float16), rng.integers(-128, 128, (blocks, 16))
    q = rng.integers(0, 64, (blocks, 2, 4, 32))  # half, quarter of it, place
    numbers = d[:, None, None].astype("f4") * scales[..., None] * (q.reshape(blocks, 16, 16) - 32)
    low = np.stack((q[:, :, 0] & 15 | (q[:, :, 2] & 15) << 4, q[:, :, 1] & 15 | (q[:, :, 3] & 15) << 4), 2)
    high = sum((q[:, :, part] >> 4) << 2 * part for part in range(4))
    parts = low.reshape(blocks, 128), high.reshape(blocks, 64), scales & 255, d.view("u1").reshape(blocks, 2)
    return np.concatenate([part.astype("u1") for part in parts], 1), numbers.reshape(blocks, 256)


@pytest.mark.parametrize(("kind", "packed"), [("Q4_K", packed_q4_k), ("Q6_K", packed_q6_k)])
def test_blocks_of_256_numbers_are_decoded_by_their_layout(tmp_path, kind, packed):
    config = LlamaConfig(**{**SIZES, "hidden_size": 256, "intermediate_size": 256})
    raw, numbers = packed(np.random.default_rng(0), 256)
    path = write_gguf(LlamaForCausalLM(config), tmp_path / "k.gguf", packed={"blk.1.ffn_down.weight": (kind, raw)})
    found = load_gguf(path).state_dict()["model.layers.1.mlp.down_proj.weight"]
    np.testing.assert_allclose(found.numpy(), numbers.reshape(256, 256), rtol=1e-5, atol=1e-6)


def test_every_token_that_ends_an_answer_is_kept(tmp_path):
    path = write_gguf(source("llama"), tmp_path / "model.gguf", fields={"tokenizer.ggml.eot_token_id": 7})
    assert load_gguf(path).generation_config.eos_token_id == [2, 7]


REFUSED = {
    "another architecture": (
        {"general.architecture": "gemma"},
        "of the kind 'gemma'; known are llama, qwen2 and qwen3",
    ),
    "experts": ({"llama.expert_count": 4}, "mixtures of experts"),
    "a part of each head": ({"llama.rope.dimension_count": 8}, "rope.dimension_count is 8, heads have 32 numbers"),
    "no heads": ({"llama.attention.head_count": 0}, "head_count is 0, which no model has"),
    "a longer rope": ({"llama.rope.scaling.type": "longrope"}, "scaled by 'longrope'"),
    "text for a number": ({"llama.block_count": "two"}, "block_count must be of the kind int, got 'two'"),
    "more layers": ({"llama.block_count": 3}, "layers.2.* has the shape none"),
    "another width": ({"llama.feed_forward_length": 95}, "has the shape"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_file_asks_for_and_cannot_be_is_refused_in_one_line(tmp_path, name):
    fields, problem = REFUSED[name]
    path = write_gguf(source("llama"), tmp_path / "model.gguf", fields=fields)
    with pytest.raises(ValueError, match=problem) as error:
        load_gguf(path)
    assert "\n" not in str(error.value)


def test_the_factors_of_llama_3_must_be_known_ones(tmp_path):
    model = source("llama, tied, scaled as 3.1")
    path = write_gguf(model, tmp_path / "model.gguf", tensors={"rope_freqs.weight": torch.linspace(1, 3, 8)})
    with pytest.raises(ValueError, match=r"not those of Llama 3\.1"):
        gguf_config(read_gguf(path))


def test_a_tensor_without_a_place_is_refused_by_name(tmp_path):
    path = write_gguf(
        source("llama"), tmp_path / "model.gguf", tensors={"blk.0.ffn_gate_exps.weight": torch.ones(2, 3)}
    )
    with pytest.raises(ValueError, match=r"'blk\.0\.ffn_gate_exps\.weight', which has no place"):
        load_gguf(path)
