"""A Llama, Mistral, Qwen2 or Qwen3 model out of a GGUF file, as transformers' own model: a source for convert.py.

Names and shapes of a GGUF file are llama.cpp's. Its Llama layout also stores queries and keys with the two halves of
every head interleaved, which is undone here. Used by `hsa convert`; tests/models/test_gguf.py, docs/convert.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hsa_ultralong.files.gguf import GGUFFile, read_gguf
from hsa_ultralong.files.messages import shown

_CLASSES: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
_LAYER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
# frequencies that llama.cpp multiplies; they follow from rope_scaling
_ROPE = "rope_freqs.weight"
# of Llama 3.1 to 3.3, which a file states by _ROPE alone
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_MOST = 2**31 - 1


def load_gguf(path: Path | str) -> PreTrainedModel:
    """The model of a GGUF file on the CPU in eval mode: bf16 where the file's matrices are, fp32 otherwise.

    Raises:
        ValueError: no GGUF file, a damaged one, another architecture, or tensors that do not fit its fields.
        ImportError: quantised, and the package `gguf` is missing.
    """
    file = read_gguf(Path(path))
    config = gguf_config(file)
    weights, is_bf16 = _weights(file, config), file.tensors["token_embd.weight"].is_bf16
    model_class = _CLASSES[config.model_type][1]
    with torch.device("meta"):
        expected = {name: part.shape for name, part in model_class(config).state_dict().items()}
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
    for name in sorted(expected.keys() | weights.keys()):
        found = weights[name].shape if name in weights else None
        if found != expected.get(name):
            here, there = (tuple(part) if part is not None else "none" for part in (found, expected.get(name)))
            raise ValueError(f"{file.path}: {name} has the shape {here}, the file's fields ask for {there}")
    model = model_class.from_pretrained(
        None, config=config, state_dict=weights, dtype=torch.bfloat16 if is_bf16 else torch.float32
    )
    ends = [config.eos_token_id, file.fields.get("tokenizer.ggml.eot_token_id")]
    if (known := [end for end in ends if end is not None]) and model.generation_config is not None:
        model.generation_config.eos_token_id = list(dict.fromkeys(known)) if len(set(known)) > 1 else known[0]
    return model.eval()


def gguf_config(file: GGUFFile) -> PreTrainedConfig:
    """The configuration of transformers that a file's fields describe.

    Raises:
        ValueError: naming the field, if it is missing, of another kind, or describes what the class cannot.
    """
    kind = _field(file, "general.architecture", str)
    if kind not in ("llama", "qwen2", "qwen3"):
        raise ValueError(f"{file.path} holds a model of the kind {shown(kind)}; known are llama, qwen2 and qwen3")
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{file.path} holds no token_embd.weight: it is no language model")

    def size(name: str, default: int | None = None) -> int:
        value = _field(file, f"{kind}.{name}", int, default)
        if value < min(1, 1 if default is None else default):
            raise ValueError(f"{file.path}: {kind}.{name} is {value}, which no model has")
        return value

    width, heads = size("embedding_length"), size("attention.head_count")
    head_dim = size("attention.key_length", width // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if size(name, head_dim) != head_dim:
            raise ValueError(f"{file.path}: {kind}.{name} is {size(name)}, heads have {head_dim} numbers")
    if size("expert_count", 0):
        raise ValueError(f"{file.path}: its feed-forward blocks are mixtures of experts, which are not converted")
    window = size("attention.sliding_window", 0)
    if window and kind != "llama":
        raise ValueError(f"{file.path}: {kind} with a sliding window of {window} is not converted")
    biases = any(name.startswith("blk.0.attn") and name.endswith(".bias") for name in file.tensors)
    options: dict[str, Any] = {"sliding_window": window} if window else {}
    if (kind == "llama" and not window) or kind == "qwen3":
        options["attention_bias"] = biases
    tokens = ("bos_token_id", "eos_token_id", "padding_token_id")
    bos, eos, pad = (_field(file, f"tokenizer.ggml.{name}", int, -1) for name in tokens)
    return _CLASSES["mistral" if window else kind][0](
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        hidden_size=width,
        intermediate_size=size("feed_forward_length"),
        num_hidden_layers=size("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=size("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=size("context_length"),
        rms_norm_eps=_field(file, f"{kind}.attention.layer_norm_rms_epsilon", float),
        rope_parameters=_rope(file, kind, head_dim),
        tie_word_embeddings="output.weight" not in file.tensors,
        bos_token_id=None if bos < 0 else bos,
        eos_token_id=None if eos < 0 else eos,
        pad_token_id=None if pad < 0 else pad,
        **options,
    )


def _field(file: GGUFFile, key: str, kind: type, default: Any = None) -> Any:
    value = file.fields.get(key, default)
    if value is None:
        raise ValueError(f"{file.path} lacks the field {key}")
    if type(value) is not kind or (isinstance(value, int) and not -1 <= value <= _MOST):
        raise ValueError(f"{file.path}: {key} must be of the kind {kind.__name__}, got {shown(value)}")
    return value


def _rope(file: GGUFFile, kind: str, head_dim: int) -> dict[str, Any]:
    """RoPE's parameters by transformers' names."""
    theta = _field(file, f"{kind}.rope.freq_base", float, 10_000.0)
    scaling = _field(file, f"{kind}.rope.scaling.type", str, "none")
    factor = _field(file, f"{kind}.rope.scaling.factor", float, _field(file, f"{kind}.rope.scale_linear", float, 1.0))
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if _ROPE in file.tensors:
        return {**rope, **_llama3(file, theta, head_dim)}
    if scaling == "yarn":
        length = _field(file, f"{kind}.rope.scaling.original_context_length", int)
        rope |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": length}
    elif scaling == "linear" or (scaling == "none" and factor != 1.0):
        rope |= {"rope_type": "linear", "factor": factor}
    elif scaling != "none":
        raise ValueError(f"{file.path}: RoPE scaled by {shown(scaling)} is not converted")
    known = {"type", "factor", "original_context_length", "finetuned"}
    for key in file.fields:
        name = key.removeprefix(f"{kind}.rope.scaling.")
        if name != key and name not in known:
            raise ValueError(f"{file.path}: {key} changes RoPE in a way that is not converted")
    return rope


def _llama3(file: GGUFFile, theta: float, head_dim: int) -> dict[str, Any]:
    """The scaling of Llama 3 that gives the file's factors.

    Raises:
        ValueError: its usual numbers do not.
    """
    from hsa_ultralong.nn.rotary import rotary_frequencies

    divisors = torch.from_numpy(file.tensors[_ROPE].numbers().astype("f8")).flatten()
    scaling = {"rope_type": "llama3", "factor": float(divisors.max()), **_LLAMA3}
    plain, scaled = (rotary_frequencies(head_dim, theta, given)[0] for given in (None, scaling))
    if divisors.shape != plain.shape or not torch.allclose(plain / scaled, divisors, rtol=1e-3):
        raise ValueError(f"{file.path}: the factors of {_ROPE} are not those of Llama 3.1 to 3.3")
    return scaling


def _weights(file: GGUFFile, config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """All tensors by transformers' names."""
    found = {}
    for name, tensor in file.tensors.items():
        if name == _ROPE:
            continue
        stem, _, ending = name.rpartition(".")
        parts = stem.split(".", 2)
        theirs = _OUTER.get(stem)
        if parts[0] == "blk" and len(parts) == 3 and parts[1].isascii() and parts[1].isdigit() and parts[2] in _LAYER:
            theirs = f"model.layers.{int(parts[1])}.{_LAYER[parts[2]]}"
        if theirs is None or ending not in ("weight", "bias"):
            raise ValueError(f"{file.path} holds the tensor {shown(name)}, which has no place in a {config.model_type}")
        numbers = torch.from_numpy(tensor.numbers().copy())
        is_llama = config.model_type in ("llama", "mistral")
        if is_llama and parts[-1] in ("attn_q", "attn_k"):
            heads = config.num_attention_heads if parts[-1] == "attn_q" else config.num_key_value_heads
            numbers = _halves_apart(numbers, heads, file.path, name)
        found[f"{theirs}.{ending}"] = numbers
    return found


def _halves_apart(x: torch.Tensor, heads: int, path: Path, name: str) -> torch.Tensor:
    """Rows 0, 2, 4, ... of every head first, then 1, 3, 5, ...: (heads * D, ...) -> same."""
    if x.shape[0] % (2 * heads):
        raise ValueError(f"{path}: {shown(name)} has {x.shape[0]} rows, no multiple of two for {heads} heads")
    return x.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
