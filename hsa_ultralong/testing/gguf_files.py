"""Small GGUF files of transformers' models, written with the package `gguf` as llama.cpp does; for tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

_LAYER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(
    model: PreTrainedModel,
    path: Path,
    *,
    kind: str = "F32",
    tokenizer: Mapping[str, Any] | None = None,
    fields: Mapping[str, Any] | None = None,
    tensors: Mapping[str, torch.Tensor] | None = None,
    packed: Mapping[str, tuple[str, Any]] | None = None,
) -> Path:
    """The file of a Llama, Mistral, Qwen2 or Qwen3 model; matrices are of the kind `kind`.

    Args:
        tokenizer: fields below `tokenizer.`. fields, tensors: added, or in place of those that follow from the model.
        packed: name -> kind and bytes (rows, n) uint8 of matrices that are packed already.
    """
    import gguf

    config = model.config
    arch = "llama" if config.model_type == "mistral" else config.model_type
    table = {**_fields(config, arch), **{f"tokenizer.{key}": value for key, value in (tokenizer or {}).items()}}
    table.update(fields or {})
    writer = gguf.GGUFWriter(path, table.pop("general.architecture", arch))
    for key, value in table.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            kinds: dict[type, Any] = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
            kinds.get(type(value), writer.add_string)(key, value)
    written = {**_tensors(model, arch), **(tensors or {})}
    for name, (own, data) in (packed or {}).items():
        rows = data.reshape(len(written.pop(name)), -1)
        writer.add_tensor(name, rows, raw_dtype=gguf.GGMLQuantizationType[own])
    for name, tensor in written.items():
        numbers = tensor.detach().float().numpy()
        chosen = gguf.GGMLQuantizationType["F32" if tensor.ndim == 1 else kind]
        writer.add_tensor(name, gguf.quantize(numbers, chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _fields(config: Any, arch: str) -> dict[str, Any]:
    rope = config.rope_parameters
    table: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if head_dim := getattr(config, "head_dim", None):
        table |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if window := getattr(config, "sliding_window", None):
        table["attention.sliding_window"] = window
    if rope["rope_type"] in ("linear", "yarn"):
        table |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
    if rope["rope_type"] == "yarn":
        table["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    named = {"bos": config.bos_token_id, "eos": config.eos_token_id, "padding": config.pad_token_id}
    found = {f"{arch}.{key}": value for key, value in table.items()}
    return {**found, **{f"tokenizer.ggml.{key}_token_id": value for key, value in named.items() if value is not None}}


def _tensors(model: PreTrainedModel, arch: str) -> dict[str, torch.Tensor]:
    config, found = model.config, {}
    for name, tensor in model.named_parameters():
        stem, _, ending = name.rpartition(".")
        theirs = _OUTER.get(stem)
        if theirs is None:
            _, _, number, part = stem.split(".", 3)
            theirs = f"blk.{number}.{_LAYER[part]}"
        if arch == "llama" and stem.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if stem.endswith("q_proj") else config.num_key_value_heads
            tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        found[f"{theirs}.{ending}"] = tensor
    if config.rope_parameters["rope_type"] == "llama3":
        inverse = model.model.rotary_emb.inv_freq
        dim = 2 * len(inverse)
        plain = config.rope_parameters["rope_theta"] ** (-torch.arange(0, dim, 2).double() / dim)
        found["rope_freqs.weight"] = plain / inverse
    return found
