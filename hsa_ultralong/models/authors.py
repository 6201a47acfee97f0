"""Checkpoints of the authors' code (HSA_Ultralong in Tencent-Hunyuan/HiLS-Attention), read into our model.

Theirs is one list of layers: windows, one chunking layer, then per group retrieval, HSA and windows. Input is the
folder that their converter makes: config.json and `backbone.*`, `lm_head.weight`. Windows have W keys, as with the
versions that they pin. Used by `hsa convert`; tests/models/test_authors.py, docs/convert.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from hsa_ultralong.files.messages import shown
from hsa_ultralong.models.causal_lm import HSAForCausalLM
from hsa_ultralong.models.configuration_hsa import HSAConfig

MODEL_TYPES = ("hsa_swa", "flash_hsa")
# what their configuration class and getattr calls take where config.json is silent
_DEFAULTS: dict[str, Any] = {
    "num_kv_heads": 1, "head_dim": 64, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "hidden_act": "silu",
    "hsa_only": True, "encoder_layers": 1, "enable_enc_cls": True,
}  # fmt: skip
_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_kv_heads",
    "head_dim", "sliding_window", "chunk_size", "encoder_layers", "num_lower_layers", "num_upper_layers",
    "num_upper_groups", "retrieval_dim", "chunk_topk",
)  # fmt: skip
_MUST_BE_OFF = (
    "enable_softmax1", "mask_slide_window", "enc_prenorm", "enable_lmk_norm", "attention_bias", "skip_hsa",
    "rope_scaling",
)  # fmt: skip
# constants of their code that are one option of ours with others
_MUST_BE: dict[str, Any] = {
    "rms_norm_eps": 1e-6, "rope_theta": 10_000, "hidden_act": "silu", "enable_qk_norm": True, "enable_enc_cls": True,
}  # fmt: skip
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
_MLP = ("gate_proj", "up_proj", "down_proj")
_NORMS = {"input_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
_LARGEST = 2**31 - 1


def authors_config(keys: Mapping[str, Any]) -> HSAConfig:
    """Our configuration of a model that their config.json describes.

    Raises:
        ValueError: naming the key, where it is missing, no number, or asks for what our model does not do.
    """
    given = {**_DEFAULTS, **{key: value for key, value in keys.items() if value is not None}}
    for name in _SIZES:
        if type(given.get(name)) is not int or not 1 <= given[name] <= _LARGEST:
            raise ValueError(f"config.json: {name} must be a whole number above 0, got {shown(given.get(name))}")
    for name in _MUST_BE_OFF:
        if given.get(name):
            raise ValueError(
                f"config.json: {name}={shown(given[name])} is not supported; only models without it are read"
            )
    for name, wanted in _MUST_BE.items():
        if given.get(name, False) != wanted:
            raise ValueError(f"config.json: {name}={shown(given.get(name, False))} is not supported, {wanted} is")
    width, heads, groups = given["hidden_size"], given["num_attention_heads"], given["num_upper_groups"]
    if given["head_dim"] * heads != width:
        raise ValueError(f"config.json: head_dim must be hidden_size / num_attention_heads = {width / heads:g}")
    if given["num_upper_layers"] % groups:
        raise ValueError(f"config.json: num_upper_layers must be a multiple of num_upper_groups={groups}")
    window = 0 if given["hsa_only"] else given.get("hsa_sliding_window") or given["sliding_window"]
    if given["hsa_only"] and given.get("hsa_sliding_window"):
        raise ValueError("config.json: hsa_sliding_window with hsa_only, which their code cannot run")
    is_softmax = bool(given.get("enable_softmax"))
    return HSAConfig(
        **{name: given[name] for name in _SIZES if name in HSAConfig.__annotations__ and name != "chunk_topk"},
        chunk_topk=given["chunk_topk"],
        num_layers_per_group=1 + given["num_upper_layers"] // groups,
        num_memory_heads=given["num_kv_heads"],
        num_encoder_layers=given["encoder_layers"],
        encoder_intermediate_size=width * 8 // 3 // 64 * 64,
        encoder_qk_norm=bool(given.get("enable_stable_enc")),
        encoder_qkv_bias=True,
        hsa_sliding_window=window,
        num_retrieval_heads=1 if given.get("singlehead_retrieval") else given["num_kv_heads"],
        normalize_retrieval=False,
        learned_temperature=False,
        fusion="softmax" if is_softmax else "stick_breaking",
        position_decay=is_softmax and bool(given.get("enable_pos_decay")),
        gumbel_noise=bool(given.get("enable_gumbel_noise")),
        hsa_residual="standard" if given.get("reset_hsa_residual") else "bypass",
        final_norm_eps=given.get("layer_norm_epsilon"),
        **{name: keys.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )


def read_authors(keys: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> HSAForCausalLM:
    """Our model with their weights, in the dtype of their embedding, in eval mode.

    The head is tied if it equals the embedding, whatever config.json says.

    Raises:
        ValueError: see authors_config; or tensors that are missing, have another shape, or have no place.
    """
    config = authors_config(keys)
    theirs = {name.replace("backbone.embedding.", "backbone.embeddings."): part for name, part in tensors.items()}
    embedding, head = (theirs.get(name) for name in ("backbone.embeddings.weight", "lm_head.weight"))
    if embedding is None:
        raise ValueError("the checkpoint lacks backbone.embeddings.weight")
    config.tie_word_embeddings = head is None or torch.equal(head, embedding)
    names = dict(_names(config))
    model = HSAForCausalLM(config).to(embedding.dtype)
    left = set(theirs) - set(names.values()) - {"lm_head.weight"}
    if config.fusion == "stick_breaking":
        # made, but not used by it
        left = {name for name in left if not name.endswith(".pos_decay")}
    if left:
        raise ValueError(
            f"{shown(min(left))} of the checkpoint has no place in the model that its config.json describes"
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            found = theirs.get(names[name])
            if found is None:
                raise ValueError(f"the checkpoint lacks {names[name]}")
            is_one_of_more = name.endswith((".cls", ".position_decay"))
            if found.numel() != parameter.numel() or (found.shape != parameter.shape and not is_one_of_more):
                shapes = f"{tuple(found.shape)}, not {tuple(parameter.shape)}"
                raise ValueError(f"{names[name]} of the checkpoint has the shape {shapes}")
            if not found.isfinite().all():
                raise ValueError(f"{names[name]} of the checkpoint holds numbers that are not finite; get it again")
            parameter.copy_(found.reshape(parameter.shape))
    return model.eval()


def _names(config: HSAConfig) -> Iterator[tuple[str, str]]:
    """Our parameters and theirs, biases where we may have them."""
    yield "model.embed_tokens.weight", "backbone.embeddings.weight"
    yield "model.norm.weight", "backbone.norm_f.weight"
    yield "lm_head.weight", "lm_head.weight"
    for ours, theirs in _modules(config):
        for kind in ("weight", "bias"):
            yield f"model.{ours}.{kind}", f"backbone.layers.{theirs}.{kind}"
    number = config.num_lower_layers
    yield "model.chunk_encoder.cls", f"backbone.layers.{number}.cls_emb"
    for group, size in enumerate(config.group_sizes):
        yield f"model.groups.{group}.retriever.position_decay", f"backbone.layers.{number + 1}.pos_decay"
        number += size + 1


def _modules(config: HSAConfig) -> Iterator[tuple[str, str]]:
    def layer(ours: str, theirs: str, attention: str = "attention.") -> Iterator[tuple[str, str]]:
        yield from ((f"{ours}.{mine}", f"{theirs}.{name}") for mine, name in _NORMS.items())
        yield from ((f"{ours}.{attention}{name}", f"{theirs}.self_attn.{name}") for name in _PROJECTIONS)
        yield from ((f"{ours}.mlp.{name}", f"{theirs}.mlp.{name}") for name in _MLP)

    for index in range(config.num_lower_layers):
        yield from layer(f"lower_layers.{index}", f"{index}")
    number = config.num_lower_layers
    for index in range(config.num_encoder_layers):
        yield from layer(f"chunk_encoder.layers.{index}", f"{number}.encoder.layers.{index}", "")
    encoder = {
        "norm": "encoder.norm", "k_proj": "proj_k", "v_proj": "proj_v", "k_norm": "k_rmsnorm", "landmark_proj": "lmk_ln"
    }  # fmt: skip
    yield from ((f"chunk_encoder.{mine}", f"{number}.{name}") for mine, name in encoder.items())
    hsa = {
        "hsa_norm": "pre_norm", "hsa.q_proj": "q_proj", "hsa.q_norm": "q_norm", "hsa.o_proj": "o_proj",
        "mlp_norm": "_mlp_norm", "window_norm": "swa_prenorm", **{f"mlp.{name}": f"_mlp.{name}" for name in _MLP},
        **{f"window_attention.{name}": f"attn.{name}" for name in _PROJECTIONS},
    }  # fmt: skip
    number += 1
    for group, size in enumerate(config.group_sizes):
        yield f"groups.{group}.retriever.norm", f"{number}.pre_norm"
        yield f"groups.{group}.retriever.query_proj", f"{number}.ln"
        yield from ((f"groups.{group}.hsa_layer.{mine}", f"{number + 1}.{name}") for mine, name in hsa.items())
        for index in range(size - 1):
            yield from layer(f"groups.{group}.layers.{index}", f"{number + 2 + index}")
        number += size + 1
