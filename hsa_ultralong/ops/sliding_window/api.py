"""Causal sliding-window attention (paper sec. 3.1); rotary positions are applied by the caller."""

from __future__ import annotations

from typing import Any

import torch

from hsa_ultralong.ops._common import choose_impl, require_shape
from hsa_ultralong.ops._triton import KERNEL_SIZES, triton_runs_on
from hsa_ultralong.ops.sliding_window.isolation import isolated
from hsa_ultralong.ops.sliding_window.reference import sliding_window_reference
from hsa_ultralong.ops.sliding_window.torch_banded import sliding_window_banded


def _triton(*args: Any, **options: Any) -> torch.Tensor:
    from hsa_ultralong.ops.sliding_window.triton_window import sliding_window_triton  # imports triton

    return sliding_window_triton(*args, **options)


_BACKENDS = {"reference": sliding_window_reference, "torch": sliding_window_banded, "triton": _triton}


def _automatic(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> str:
    is_plain = q.dtype == k.dtype == v.dtype and q.dtype in (torch.bfloat16, torch.float16)
    fits = q.shape[-1] in KERNEL_SIZES and scale > 0 and min(q.shape[:2]) > 0
    return "triton" if is_plain and fits and triton_runs_on(q) else "torch"


def sliding_window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    window: int,
    query_segments: torch.Tensor | None = None,
    key_segments: torch.Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Each token attends to the last `window` keys, its own included, of its own document.

    Args:
        q: (B, Tq, Hq, D). k, v: (B, Tk, Hkv, D) with Tk >= Tq; the last key belongs to the last query, the first
            Tk - Tq come from a cache.
        window: number of keys including the token's own, >= 1.
        query_segments (B, Tq), key_segments (B, Tk): int32 document numbers, both or neither; -1 is padding, which
            attends to itself and its like only.
        scale: default 1 / sqrt(D).
        impl: "auto", "triton", "torch" (blocks of SDPA) or "reference"; "auto" is "triton" on an NVIDIA GPU for bf16
            and fp16.

    Returns:
        (B, Tq, Hq, D) in the dtype of q.

    Raises:
        ValueError: on shapes that do not fit, window < 1, an unknown impl, or what impl="triton" does not take.
        RuntimeError: impl="triton" without an NVIDIA GPU or without the triton package.
    """
    if q.dim() != 4:
        raise ValueError(f"q must be (B, T, Hq, D), got {tuple(q.shape)}")
    batch, num_queries, num_heads, dim = q.shape
    require_shape("k", k, (batch, None, None, dim))
    require_shape("v", v, tuple(k.shape))
    num_keys = k.shape[1]
    if num_keys < num_queries:
        raise ValueError(f"{num_keys} keys for {num_queries} queries: keys must include the queries' own")
    if num_heads % k.shape[2]:
        raise ValueError(f"q has {num_heads} heads, required a multiple of the {k.shape[2]} heads of k")
    if window < 1:
        raise ValueError(f"window must be >= 1, got {window}")
    if (query_segments is None) != (key_segments is None):
        raise ValueError("give both query_segments and key_segments, or neither")
    if query_segments is not None and key_segments is not None:
        require_shape("query_segments", query_segments, (batch, num_queries))
        require_shape("key_segments", key_segments, (batch, num_keys))
    scale = dim**-0.5 if scale is None else scale
    name = choose_impl("sliding_window_attention", impl, tuple(_BACKENDS), _automatic(q, k, v, scale))
    backend = _BACKENDS[name]
    places: dict[str, Any] = {"window": window, "query_segments": query_segments, "key_segments": key_segments}
    if num_queries == 0 or name == "triton":
        return backend(q, k, v, **places, scale=scale)
    return isolated(backend, q, k, v, **places, scale=scale)
