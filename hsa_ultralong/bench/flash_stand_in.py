"""What MoBA of flash-linear-attention needs of flash-attn, by torch's own FlashAttention, where flash-attn is missing.

Its two passes over packed sequences are called through the private functions of flash-attn 2.8. torch carries the same
kernels (FlashAttention-2), so the three names are given to that one module; nothing is put under the name flash_attn,
since other packages look for it. A record that was measured so says `"flash_attn": "torch"`. Called by rival_calls.py;
tests/bench/test_rivals.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch

_NAMES = ("flash_attn_varlen_func", "_flash_attn_varlen_forward", "_flash_attn_varlen_backward")


def is_needed() -> bool:
    """Whether flash-attn itself is not installed."""
    return find_spec("flash_attn") is None


def is_possible() -> bool:
    """Whether this build of torch has the kernels."""
    return torch.backends.cuda.is_flash_attention_available()


def lend_to(module: Any) -> None:
    """Give `module` (fla.ops.moba.parallel) the functions that it did not find, and leave those that it did."""
    for name, function in zip(_NAMES, (varlen_attention, varlen_forward, varlen_backward), strict=True):
        if getattr(module, name, None) is None:
            setattr(module, name, function)


def varlen_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, None, torch.Tensor]:
    """Attention within each of several packed sequences.

    Args:
        q, k, v: (queries, H, D) and (keys, H, D) of all sequences, 16-bit.
        cu_seqlens_q, cu_seqlens_k: (sequences + 1,) int32, where each begins.

    Returns:
        Output like q, logsumexp (H, queries) fp32, None and the state of the random numbers, as flash-attn has them.
    """
    out, logsumexp, state, *_ = _kernel("_flash_attention_forward")(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, causal, False, scale=softmax_scale
    )
    return out, logsumexp, None, state


def varlen_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    deterministic: bool = False,
    **rest: Any,
) -> None:
    """Gradients of `varlen_forward` into dq, dk and dv, whose storage becomes that of torch's results: no copy.

    Raises:
        NotImplementedError: for windows, soft caps and slopes, which MoBA does not use.
    """
    idle = {"window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None, "rng_state": None}
    if set(rest) - set(idle) or any(rest[name] != idle[name] for name in rest) or dropout_p:
        raise NotImplementedError(f"torch's own FlashAttention stands in for plain attention only, got {rest}")
    nothing = torch.empty(2, dtype=torch.uint64, device=q.device)
    with _deterministic(deterministic):
        found = _kernel("_flash_attention_backward")(
            dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, causal,
            nothing, nothing, scale=softmax_scale,
        )  # fmt: skip
    for place, gradient in zip((dq, dk, dv), found, strict=True):
        place.set_(gradient)


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = False,
) -> torch.Tensor:
    """`varlen_forward` with torch's own gradients; (queries, H, D)."""
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return varlen_forward(q, k, v, *lengths, 0.0, None, causal)[0]


def _kernel(name: str) -> Callable[..., Any]:
    kernel: Callable[..., Any] = getattr(torch.ops.aten, name)
    return kernel


@contextmanager
def _deterministic(is_wanted: bool) -> Iterator[None]:
    """torch's kernel asks the global flag; memory that is about to be written is not filled besides."""
    flags: Any = torch.utils.deterministic
    before, fills = torch.are_deterministic_algorithms_enabled(), flags.fill_uninitialized_memory
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(is_wanted)
    flags.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
        flags.fill_uninitialized_memory = fills
