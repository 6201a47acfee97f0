"""Retrieval: which chunks does each token read, and with what score (paper sec. 2.2, equations 1 and 2)."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from hsa_ultralong.ops._common import accumulation_dtype, choose_impl, require_shape
from hsa_ultralong.ops._triton import triton_runs_on
from hsa_ultralong.ops.chunk_topk.reference import chunk_topk_reference
from hsa_ultralong.ops.chunk_topk.torch_blocked import chunk_topk_torch
from hsa_ultralong.ops.chunk_topk.visibility import ChunkVisibility


@lru_cache(maxsize=1)
def _kernels() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    from hsa_ultralong.ops.chunk_topk.triton_topk import chunk_topk_triton  # imports triton, which may be missing

    return chunk_topk_triton


def _triton(*args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _kernels()(*args, **options)


_BACKENDS = {"reference": chunk_topk_reference, "torch": chunk_topk_torch, "triton": _triton}
# what the kernels take
_MOST_DIMENSIONS, _MOST_KEPT = 1024, 256


def _automatic(query: torch.Tensor, landmarks: torch.Tensor, topk: int) -> str:
    is_plain = query.dtype == landmarks.dtype and query.dtype in (torch.bfloat16, torch.float16)
    fits = query.shape[-1] <= _MOST_DIMENSIONS and (topk <= _MOST_KEPT or topk >= landmarks.shape[1])
    return "triton" if is_plain and fits and triton_runs_on(query) else "torch"


def _check_seed(seed: torch.Tensor, device: torch.device) -> None:
    if seed.dim() or seed.dtype != torch.int64 or seed.device != device:
        raise ValueError(
            f"noise_seed must be a number or an int64 tensor () on {device}, got {tuple(seed.shape)} {seed.dtype} on "
            f"{seed.device}"
        )


def chunk_topk(
    query: torch.Tensor,
    landmarks: torch.Tensor,
    visible: ChunkVisibility,
    *,
    topk: int,
    scale: float | torch.Tensor | None = None,
    noise_seed: int | torch.Tensor | None = None,
    noise_start: int = 0,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Select the `topk` visible chunks of highest score s = scale * <query, landmark>.

    Args:
        query: (B, T, Hr, R), any float dtype.
        landmarks: (1 or B, C, Hr, R); batch 1 is one memory shared by the whole batch.
        visible: who may see what, see ChunkVisibility.
        topk: K >= 1; K >= C means full coverage.
        scale: default 1 / sqrt(R); a scalar or (Hr,), of which a tensor receives its gradient.
        noise_seed: adds counter-based Gumbel noise to the scores for the choice only (training). Its low 32 bits
            count: of a number, or of an int64 tensor () on the device of the query, which a CUDA graph reads anew.
        noise_start: number of the first query in its row, where rows come in pieces: the noise is that of the row.
        impl: "auto", "triton", "torch" or "reference". "auto" is "triton" on an NVIDIA GPU for bf16 and fp16.

    Returns:
        indices (B, T, Hr, min(K, C)) int32 in descending chunk index (most recent first), empty slots last as -1;
        scores of the same shape, fp32 (fp64 for fp64 inputs), -inf in empty slots, without the noise. Ties go to the
        lower chunk index. Gradients reach query, landmarks and scale through the kept pairs only.

    Raises:
        ValueError: on shapes that do not fit, topk < 1, a seed of another kind, an unknown impl, or what impl="triton"
            does not take.
        RuntimeError: impl="triton" without an NVIDIA GPU or without the triton package.
    """
    if query.dim() != 4:
        raise ValueError(f"query must be (B, T, Hr, R), got {tuple(query.shape)}")
    if isinstance(topk, bool) or not isinstance(topk, int) or topk < 1:
        raise ValueError(f"topk must be an integer >= 1, got {topk!r}")
    batch, num_tokens, heads, dim = query.shape
    require_shape("landmarks", landmarks, (None, None, heads, dim))
    if landmarks.shape[0] not in (1, batch):
        raise ValueError(f"landmarks have batch {landmarks.shape[0]}, required 1 or {batch}")
    require_shape("visible.query_segment", visible.query_segment, (batch, num_tokens))
    require_shape("visible.chunk_segment", visible.chunk_segment, (None, landmarks.shape[1]))
    if isinstance(noise_seed, torch.Tensor):
        _check_seed(noise_seed, query.device)
    factor: torch.Tensor | float = dim**-0.5 if scale is None else scale
    if isinstance(factor, torch.Tensor):
        if tuple(factor.shape) not in ((), (1,), (heads,)):
            raise ValueError(f"scale must be a scalar or ({heads},), got {tuple(factor.shape)}")
        factor = factor.to(accumulation_dtype(query.dtype))
        if factor.dim() == 1:
            factor = factor[:, None]  # (Hr, 1)
    backend = _BACKENDS[choose_impl("chunk_topk", impl, tuple(_BACKENDS), _automatic(query, landmarks, topk))]
    return backend(query, landmarks, visible, topk=topk, factor=factor, noise_seed=noise_seed, noise_start=noise_start)
