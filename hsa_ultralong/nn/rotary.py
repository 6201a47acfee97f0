"""Rotary position embedding from local indices, angles formed in fp64 (fact 8 of docs/architecture.md).

Rotary attention depends on differences of positions only and windows are short, so angles come from the index inside
the current call (cached keys are kept unrotated and rotated at use): exact at any absolute position. Su et al. 2021.
Scaled frequencies are those that a source model was trained with (docs/convert.md); every table comes from
`rotary_frequencies`. tests/nn/test_rotary.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

# type of scaling -> keys that it needs, keys that it may have; Hugging Face's names
SCALING_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}


class RotaryTable(NamedTuple):
    """cos and sin of every local index, (T, D / 2) each; YaRN's attention factor is in both."""

    cos: torch.Tensor
    sin: torch.Tensor


def check_scaling(scaling: Mapping[str, Any]) -> dict[str, Any] | None:
    """A dictionary of RoPE scaling as this module reads it, or None if it scales nothing.

    Args:
        scaling: "rope_type" (in older files "type"): "default", or a key of SCALING_KEYS with its numbers. Entries that
            are None count as absent.

    Raises:
        ValueError: for an unknown type, a missing or unknown key, or a value that is no positive number.
    """
    values = {key: value for key, value in scaling.items() if value is not None}
    old_name = values.pop("type", "default")
    kind = values.pop("rope_type", old_name)
    if kind == "default" and not values:
        return None
    if kind not in SCALING_KEYS:
        numbers = f" with {', '.join(sorted(values))}" if values else ""
        raise ValueError(f"rope_scaling: rope_type must be one of {', '.join(SCALING_KEYS)}, got {kind!r}{numbers}")
    needed, optional = SCALING_KEYS[kind]
    if missing := [key for key in needed if key not in values]:
        raise ValueError(f"rope_scaling of type {kind!r} needs {', '.join(missing)}")
    if unknown := sorted(set(values) - {*needed, *optional}):
        raise ValueError(f"rope_scaling of type {kind!r} has no {unknown[0]!r} (known: {', '.join(needed + optional)})")
    for key, value in values.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if key == "truncate" and not isinstance(value, bool):
            raise ValueError(f"rope_scaling: truncate must be true or false, got {value!r}")
        if key != "truncate" and not (is_number and value > 0 and math.isfinite(value)):
            raise ValueError(f"rope_scaling: {key} must be a positive number, got {value!r}")
    if kind == "llama3" and values["low_freq_factor"] >= values["high_freq_factor"]:
        raise ValueError("rope_scaling: low_freq_factor must be below high_freq_factor")
    return {"rope_type": kind, **values}


def rotary_frequencies(
    head_dim: int, theta: float, scaling: Mapping[str, Any] | None = None, device: torch.device | None = None
) -> tuple[torch.Tensor, float]:
    """Radians per token of every pair, (D / 2,) fp64, and the factor on cos and sin.

    Unscaled: theta^(-2j / D). "linear" divides all by `factor` (Chen et al. 2023). "llama3" divides those of fewer than
    `low_freq_factor` turns in the original context, keeps those of more than `high_freq_factor`, and goes from one to
    the other linearly in the turns (Llama 3.1). "yarn" does so between `beta_slow` and `beta_fast` turns, linearly in
    j, and multiplies cos and sin by `attention_factor`, by default 0.1 ln(factor) + 1 (Peng et al. 2023).

    Args:
        scaling: as `check_scaling` returns it.
    """
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim)
    if scaling is None:
        return frequency, 1.0
    factor = scaling["factor"]
    if scaling["rope_type"] == "linear":
        return frequency / factor, 1.0
    if scaling["rope_type"] == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = frequency * (scaling["original_max_position_embeddings"] / (2 * math.pi))
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return frequency * (kept + (1 - kept) / factor), 1.0
    first, last = _yarn_ramp(head_dim, theta, scaling)
    pair = torch.arange(head_dim // 2, dtype=torch.float64, device=device)
    kept = 1 - ((pair - first) / (last - first)).clamp(0, 1)
    return frequency * (kept + (1 - kept) / factor), _yarn_attention_factor(scaling)


def _yarn_ramp(head_dim: int, theta: float, scaling: Mapping[str, Any]) -> tuple[float, float]:
    """Pairs (whole numbers unless truncate is false) between which YaRN goes from kept to divided frequencies."""

    def pair_that_turns(times: float) -> float:
        length = scaling["original_max_position_embeddings"]
        return head_dim * math.log(length / (times * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_that_turns(scaling.get("beta_fast", 32)), pair_that_turns(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    return first, last if last != first else last + 0.001


def _yarn_attention_factor(scaling: Mapping[str, Any]) -> float:
    def stretch(weight: float) -> float:
        return 1.0 if scaling["factor"] <= 1 else 0.1 * weight * math.log(scaling["factor"]) + 1.0

    if "attention_factor" in scaling:
        return float(scaling["attention_factor"])
    if "mscale" in scaling and "mscale_all_dim" in scaling:
        return stretch(scaling["mscale"]) / stretch(scaling["mscale_all_dim"])
    return stretch(1.0)


def rotary_at(
    places: torch.Tensor, head_dim: int, theta: float, dtype: torch.dtype, scaling: Mapping[str, Any] | None = None
) -> RotaryTable:
    """The table of any places (T,), angles formed in fp64, stored in fp32 (fp64 for fp64 models).

    Args:
        dtype: of the model. scaling: see rotary_frequencies.
    """
    stored = torch.float64 if dtype == torch.float64 else torch.float32
    frequency, factor = rotary_frequencies(head_dim, theta, scaling, places.device)
    angle = places.double()[:, None] * frequency  # (T, D / 2)
    cos, sin = angle.cos(), angle.sin()
    if factor != 1.0:
        cos, sin = cos * factor, sin * factor
    return RotaryTable(cos.to(stored), sin.to(stored))


def rotary_table(
    length: int,
    head_dim: int,
    theta: float,
    device: torch.device,
    dtype: torch.dtype,
    scaling: Mapping[str, Any] | None = None,
) -> RotaryTable:
    """The table of places 0 .. length - 1, see rotary_at."""
    return rotary_at(torch.arange(length, device=device), head_dim, theta, dtype, scaling)


def apply_rotary(x: torch.Tensor, table: RotaryTable) -> torch.Tensor:
    """Rotate x (..., T, H, D) by the angles of indices 0..T-1 of `table`; pairs are (j, j + D / 2)."""
    length = x.shape[-3]
    cos, sin = (part[:length, None] for part in table)  # (T, 1, D / 2)
    left, right = x.to(cos.dtype).chunk(2, dim=-1)
    turned = (torch.addcmul(left * cos, right, sin, value=-1), torch.addcmul(right * cos, left, sin))
    return torch.cat(turned, dim=-1).to(x.dtype)


def tail(table: RotaryTable, start: int) -> RotaryTable:
    """The table from index `start` on."""
    return RotaryTable(table.cos[start:], table.sin[start:])
