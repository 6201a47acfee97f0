"""Keyword arguments beyond a signature: each is honoured, known to change nothing, or refused by its name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

import torch

_SEGMENTS = "give segment_ids (B, T) on the chunk grid instead, which hsa_ultralong.data.PackingCollator makes"
# what transformers, accelerate, peft and trl may pass: the value that changes nothing, and what to do instead of others
_FOREIGN: dict[str, tuple[Any, str]] = {
    "cu_seq_lens_q": (None, _SEGMENTS),
    "cu_seq_lens_k": (None, _SEGMENTS),
    "max_length_q": (None, _SEGMENTS),
    "max_length_k": (None, _SEGMENTS),
    "seq_idx": (None, _SEGMENTS),
    "is_causal": (True, "the model is causal"),
    "output_attentions": (False, "chunks are attended to without forming the matrix; output_retrieval=True says which"),
    "output_router_logits": (False, "experts are balanced by HSAForCausalLM.update_router_bias, without a loss"),
    "token_type_ids": (0, "tokens have one type; call the tokenizer with return_token_type_ids=False"),
    "cache_position": (None, "positions follow from the mask and the cache"),
}


def check_arguments(function: Callable[..., Any], given: dict[str, Any]) -> None:
    """Refuse keyword arguments that `function` does not name and that would be dropped.

    Raises:
        TypeError: for an unknown name, with the nearest known one. ValueError: for a known one that is not supported.
    """
    for name, value in given.items():
        if value is None:
            continue
        if name not in _FOREIGN:
            known = [*inspect.signature(function).parameters, *_FOREIGN, "return_dict", "shift_labels"]
            close = get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"{function.__qualname__} got an unknown argument {name!r}{hint}")
        neutral, instead = _FOREIGN[name]
        is_neutral = not value.any() if isinstance(value, torch.Tensor) and neutral == 0 else value == neutral
        if not is_neutral:
            raise ValueError(f"HSA-UltraLong takes no {name}: {instead}")


def check_noise_seed(seed: int | torch.Tensor | None, has_noise: bool) -> None:
    """Raises: ValueError: a seed of selection noise where none is drawn."""
    if seed is not None and not has_noise:
        raise ValueError("noise_seed is of a model in training mode with gumbel_noise=True: leave it out")


def check_tokens(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> None:
    """Refuse anything but one of input_ids (B, T) and inputs_embeds (B, T, M), with B and T of at least 1.

    Raises:
        ValueError: otherwise.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give either input_ids or inputs_embeds")
    for name, given, shape in (("input_ids", input_ids, "(B, T)"), ("inputs_embeds", inputs_embeds, "(B, T, M)")):
        if given is not None and (given.dim() != shape.count(",") + 1 or 0 in given.shape):
            raise ValueError(f"{name} must be {shape} with at least one row and one token, got {tuple(given.shape)}")


def check_labels(name: str, labels: torch.Tensor | None, tokens: torch.Tensor | None) -> None:
    """Refuse labels of another shape than the tokens (B, T, ...).

    Raises:
        ValueError: otherwise.
    """
    if labels is not None and tokens is not None and labels.shape != tokens.shape[:2]:
        raise ValueError(f"{name} must be {tuple(tokens.shape[:2])} as the tokens, got {tuple(labels.shape)}")


def check_generation(inputs: torch.Tensor | None, kwargs: dict[str, Any], *, has_state: bool) -> None:
    """Refuse what `generate` cannot honour, before any work; has_state: a memory or a cache is given.

    Raises:
        ValueError: for an empty prompt, inputs of whole rows, output_retrieval, or use_cache=False with a state.
    """
    prompt = kwargs.get("inputs_embeds") if inputs is None else inputs
    if prompt is not None and 0 in prompt.shape[:2]:
        raise ValueError(f"generate needs a prompt of at least one row and one token, got {tuple(prompt.shape)}")
    for name in ("segment_ids", "labels", "shift_labels"):
        if kwargs.get(name) is not None:
            raise ValueError(f"generate takes no {name}: a prompt is one document a row, masked by attention_mask")
    if kwargs.get("output_retrieval"):
        raise ValueError(
            "generate takes no output_retrieval, as its outputs have no place for it: "
            "hsa_ultralong.inference.DecodingEngine(model, memory).stream says what every token retrieved"
        )
    config = kwargs.get("generation_config")
    use_cache = kwargs.get("use_cache")
    if use_cache is None:
        use_cache = getattr(config, "use_cache", None)
    if has_state and use_cache is False:
        raise ValueError("generating after a memory or a cache extends a cache: leave use_cache out or set it to True")
