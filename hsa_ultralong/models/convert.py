"""An HSA-UltraLong model that begins as a pretrained transformer, Llama or Qwen, weights reused wherever shapes allow.

Every source layer becomes one layer: its full attention becomes a window, its feed-forward block stays. The first layer
of every upper group also gets attention over the memory, whose output projection is zero at first. So on texts no
longer than the window the converted model computes what the source computes, bit for bit up to rounding, and training
starts from there. The encoder starts as a copy of the layer below the memory; retrieval starts fresh.
Used by `hsa convert`; tests/models/test_convert.py, docs/convert.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from hsa_ultralong.models.causal_lm import HSAForCausalLM
from hsa_ultralong.models.configuration_hsa import HSAConfig
from hsa_ultralong.nn.rotary import SCALING_KEYS

SOURCES = ("llama", "mistral", "qwen2", "qwen3")
# our name of a part of a layer -> the source's
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
_MLP = ("gate_proj", "up_proj", "down_proj")


class Conversion(NamedTuple):
    """The new model; `reused` maps its parameters to those of the source that they were copied from, the rest is in
    `initialised`, both by name."""

    model: HSAForCausalLM
    reused: dict[str, str]
    initialised: list[str]

    @property
    def reused_share(self) -> float:
        """Numbers that come from the source, of all."""
        sizes = {name: tensor.numel() for name, tensor in self.model.named_parameters()}
        return sum(sizes[name] for name in self.reused) / sum(sizes.values())


def converted_config(
    source: Any,
    *,
    sliding_window: int = 512,
    num_lower_layers: int | None = None,
    num_upper_groups: int | Sequence[int] = 2,
    reading_layers: Sequence[int] | None = None,
    **options: Any,
) -> HSAConfig:
    """The configuration that a source's layers fit into.

    Args:
        source: configuration of a Llama, Mistral, Qwen2 or Qwen3 model; of another kind, it is refused by name.
        num_lower_layers: layers below the memory; default half of them, so that the groups are equal.
        num_upper_groups: how many layers read the memory, each the first of as many; or the layers of every group.
        reading_layers: instead of both, the numbers of the layers that read, counted from 0: rising, the first above 0.
        options: of HSAConfig, such as chunk_topk, retrieval_dim, num_memory_heads.

    Raises:
        ValueError: for what the layers cannot represent, layers that do not divide into groups, a window beyond the
            source's own, or options that follow from the source.
    """
    problems = _problems(source)
    if problems:
        raise ValueError(f"this {source.model_type} model cannot be converted: {'; '.join(problems)}")
    if reading_layers is not None and (num_lower_layers is not None or num_upper_groups != 2):
        raise ValueError("the layers that read the memory say how many lie below and between them: leave those out")
    if reading_layers is None:
        num_lower_layers, sizes = _groups(source.num_hidden_layers, num_lower_layers, num_upper_groups)
    else:
        num_lower_layers, sizes = _groups_at(source.num_hidden_layers, reading_layers)
    own = getattr(source, "sliding_window", None)
    if own is not None and own < sliding_window:
        raise ValueError(f"the source's own attention reaches {own} tokens; choose a --window of at most {own}")
    fixed = dict(
        vocab_size=source.vocab_size,
        hidden_size=source.hidden_size,
        intermediate_size=source.intermediate_size,
        num_lower_layers=num_lower_layers,
        num_upper_groups=len(sizes),
        num_layers_per_group=sizes,
        num_attention_heads=source.num_attention_heads,
        num_key_value_heads=source.num_key_value_heads,
        head_dim=getattr(source, "head_dim", None) or source.hidden_size // source.num_attention_heads,
        tie_word_embeddings=source.tie_word_embeddings,
        sliding_window=sliding_window,
        hsa_sliding_window=sliding_window,
        rope_theta=float(_rope(source)["rope_theta"]),
        rope_scaling=_rope_scaling(source),
        use_qk_norm=source.model_type == "qwen3",
        use_qkv_bias=source.model_type == "qwen2" or bool(getattr(source, "attention_bias", False)),
        rms_norm_eps=source.rms_norm_eps,
        bos_token_id=source.bos_token_id,
        eos_token_id=source.eos_token_id,
        pad_token_id=source.pad_token_id,
    )
    if clash := sorted(set(options) & set(fixed)):
        raise ValueError(f"{', '.join(clash)}: follows from the source, the window and the groups; leave it out")
    return HSAConfig(**fixed, **options)


def _groups(layers: int, lower: int | None, groups: int | Sequence[int]) -> tuple[int, list[int]]:
    """Layers below the memory, and those of every group above it."""
    if isinstance(groups, int):
        # more than there are layers do not fit, however many
        groups = max(1, min(groups, layers + 1))
        lower = layers - layers // 2 // groups * groups if lower is None else lower
        sizes = [(layers - lower) // groups] * groups
    else:
        sizes = list(groups)
        lower = layers - sum(sizes) if lower is None else lower
    if lower < 1 or not sizes or min(sizes) < 1 or lower + sum(sizes) != layers:
        what = f"{groups} groups" if isinstance(groups, int) else f"groups of {', '.join(map(str, sizes))}"
        raise ValueError(
            f"{layers} layers, {lower} below the memory: the other {layers - lower} do not divide into {what}; choose "
            "other --lower-layers or --groups"
        )
    return lower, sizes


def _groups_at(layers: int, reading: Sequence[int]) -> tuple[int, list[int]]:
    """As _groups, where the layers `reading` read the memory."""
    ends = [*reading, layers]
    if not reading or reading[0] < 1 or any(first >= last for first, last in pairwise(ends)):
        raise ValueError(
            f"the layers that read the memory must be rising numbers from 1 to {layers - 1}, got "
            f"{', '.join(map(str, reading)) or 'none'}"
        )
    return reading[0], [last - first for first, last in pairwise(ends)]


def _rope(source: Any) -> dict[str, Any]:
    """RoPE's parameters, where transformers 5 keeps them or where older files have them."""
    found = getattr(source, "rope_parameters", None) or getattr(source, "rope_scaling", None) or {}
    kind = found.get("rope_type") or found.get("type") or "default"
    return {"rope_theta": getattr(source, "rope_theta", 10_000.0), **found, "rope_type": kind}


def _rope_scaling(source: Any) -> dict[str, Any] | None:
    """The numbers of a scaled RoPE that transformers reads."""
    rope = _rope(source)
    if (kind := rope["rope_type"]) == "default":
        return None
    needed, optional = SCALING_KEYS[kind]
    # transformers takes 0 for absent
    found = {key: rope[key] for key in (*needed, *optional) if rope.get(key)}
    if "truncate" in rope:
        found["truncate"] = bool(rope["truncate"])
    if kind == "yarn" and "factor" not in found:
        found["factor"] = source.max_position_embeddings / found["original_max_position_embeddings"]
    return {"rope_type": kind, **found}


def _problems(source: Any) -> list[str]:
    """What of a source configuration, which may be of any kind, our layers cannot represent."""

    def has(*names: str) -> bool:
        return any(getattr(source, name, None) for name in names)

    rope, activation = _rope(source), getattr(source, "hidden_act", "silu")
    kinds = set(getattr(source, "layer_types", None) or ())
    rotated = rope.get("partial_rotary_factor") or getattr(source, "partial_rotary_factor", None) or 1.0
    checks = {
        f"its type is none of {', '.join(SOURCES)}": source.model_type not in SOURCES,
        "its feed-forward blocks are mixtures of experts": has("num_experts", "num_local_experts", "n_routed_experts"),
        "its feed-forward blocks have biases": has("mlp_bias"),
        f"its activation is {activation}, not silu": activation not in ("silu", "swish"),
        "some of its layers have a sliding window, others none": {"full_attention", "sliding_attention"} <= kinds,
        "its logits are soft-capped": has("attn_logit_softcapping", "final_logit_softcapping"),
        f"its RoPE is scaled in a way that is not supported ({rope['rope_type']})": (
            rope["rope_type"] not in ("default", *SCALING_KEYS)
        ),
        "its RoPE differs from layer to layer": any(isinstance(value, dict) for value in rope.values()),
        "its RoPE covers a part of each head": rotated != 1.0,
        "its weights are quantised; convert the model that they were made from": has("quantization_config"),
    }
    return [text for text, is_so in checks.items() if is_so]


def convert_model(source: PreTrainedModel, **options: Any) -> Conversion:
    """A new model in the source's dtype; options as for converted_config.

    Raises:
        ValueError: see converted_config; or a source whose parameters have other names or shapes than its type's, or
            that has one without a place here, such as biases of attention's output, unless it is zero.
    """
    config = converted_config(source.config, **options)
    model = HSAForCausalLM(config).to(source.dtype)
    names = _sources(model)
    theirs = dict(source.named_parameters())
    missing = sorted(set(names.values()) - set(theirs))
    if missing:
        raise ValueError(f"the source lacks parameter {missing[0]!r}")
    for name in sorted(set(theirs) - set(names.values())):
        if theirs[name].any():
            raise ValueError(f"{name} of the source has no place in the new model, and it is not zero")
    reused: dict[str, str] = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in names:
                found = theirs[names[name]]
                if found.shape != parameter.shape:
                    shapes = f"{tuple(found.shape)} there, {tuple(parameter.shape)} here"
                    raise ValueError(f"{names[name]} does not fit {name}: {shapes}")
                if not found.isfinite().all():
                    raise ValueError(f"{names[name]} of the source holds numbers that are not finite; get it again")
                parameter.copy_(found)
                reused[name] = names[name]
            elif name.endswith(".hsa.o_proj.weight"):
                # the memory is silent at first
                parameter.zero_()
    if source.generation_config is not None and source.generation_config.eos_token_id is not None:
        # chat models name more tokens that end an answer there
        model.generation_config.eos_token_id = source.generation_config.eos_token_id
    initialised = [name for name, _ in model.named_parameters() if name not in reused]
    return Conversion(model.eval(), reused, initialised)


def _sources(model: HSAForCausalLM) -> dict[str, str]:
    """Our parameters -> the source's, for all that are reused."""
    config = model.config
    names = {"model.embed_tokens.weight": "model.embed_tokens.weight", "model.norm.weight": "model.norm.weight"}
    if not config.tie_word_embeddings:
        names["lm_head.weight"] = "lm_head.weight"
    own = {name for name, _ in model.named_parameters()}

    def take(prefix: str, their_layer: int, parts: dict[str, str]) -> None:
        for ours, theirs in parts.items():
            for kind in ("weight", "bias"):
                name = f"{prefix}.{ours}.{kind}"
                if name in own:
                    names[name] = f"model.layers.{their_layer}.{theirs}.{kind}"

    attention = {part: f"self_attn.{part}" for part in _ATTENTION}
    feed_forward = {f"mlp.{part}": f"mlp.{part}" for part in _MLP}
    norms = {"input_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    plain = {**norms, **feed_forward, **{f"attention.{ours}": theirs for ours, theirs in attention.items()}}
    hsa = {
        "window_norm": "input_layernorm", "hsa_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
        **feed_forward, **{f"window_attention.{ours}": theirs for ours, theirs in attention.items()},
        "hsa.q_proj": "self_attn.q_proj", "hsa.q_norm": "self_attn.q_norm",
    }  # fmt: skip
    for index in range(config.num_lower_layers):
        take(f"model.lower_layers.{index}", index, plain)
    for group, (number, size) in enumerate(zip(config.reading_layers, config.group_sizes, strict=True)):
        take(f"model.groups.{group}.hsa_layer", number, hsa)
        take(f"model.groups.{group}.retriever", number, {"norm": "input_layernorm"})
        for index in range(size - 1):
            take(f"model.groups.{group}.layers.{index}", number + 1 + index, plain)
    below = config.num_lower_layers - 1
    if config.encoder_intermediate_size == config.intermediate_size:
        for index in range(config.num_encoder_layers):
            take(f"model.chunk_encoder.layers.{index}", below, {**norms, **feed_forward, **attention})
    if config.num_memory_heads == config.num_key_value_heads:
        # keys and values of the layer that will read the memory first
        first = {"norm": "input_layernorm", "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj"}
        take("model.chunk_encoder", config.num_lower_layers, {**first, "k_norm": "self_attn.k_norm"})
    return names
