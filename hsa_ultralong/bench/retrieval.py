"""Points of retrieval and decoding: chunk_topk, its unfused baseline, one query over millions of tokens, one reading
and a copy of as many bytes.

The unfused baseline stores all scores, as one would write it with torch: matmul, mask, topk; its scores are rounded to
the inputs' dtype, which ours never are. tests/bench/test_benchmarks.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from hsa_ultralong.bench.attention import hsa_inputs
from hsa_ultralong.bench.points import (
    DIRECTIONS,
    Call,
    Point,
    Settings,
    directed,
    noise,
    traffic,
    visible_chunks,
)


def unfused_topk(query: torch.Tensor, landmarks: torch.Tensor, hidden: torch.Tensor, topk: int) -> torch.Tensor:
    """Scores of the K best chunks, (T, K) fp32; query (T, R), landmarks (C, R), hidden (T, C) bool."""
    scores = (query @ landmarks.T).float() * query.shape[-1] ** -0.5  # (T, C)
    chosen = scores.detach().masked_fill(hidden, -torch.inf).topk(min(topk, scores.shape[-1]), dim=-1).indices
    return scores.gather(-1, chosen)


def _unfused(settings: Settings, direction: str, T: int, K: int) -> Call:
    C = T // settings.S
    hidden = (torch.arange(C, device=settings.device) + 1) * settings.S > torch.arange(
        T, device=settings.device
    )[:, None]  # fmt: skip
    inputs = [noise(settings, T, settings.R, seed=1), noise(settings, C, settings.R, seed=2)]
    return directed(lambda query, landmarks: unfused_topk(query, landmarks, hidden, K), inputs, direction)


def topk_points(operators: Any, settings: Settings) -> Iterator[Point]:
    """chunk_topk at every K: kernels, the torch path and the unfused baseline."""

    def point(impl: str, direction: str, T: int, K: int) -> Point:
        C = T // settings.S

        def prepare() -> Call:
            if impl == "unfused":
                return _unfused(settings, direction, T, K)
            visible = operators.ChunkVisibility.causal(1, T, C, settings.S, device=settings.device)
            inputs = [noise(settings, 1, T, 1, settings.R, seed=1), noise(settings, 1, C, 1, settings.R, seed=2)]

            def forward(query: torch.Tensor, landmarks: torch.Tensor) -> torch.Tensor:
                return operators.chunk_topk(query, landmarks, visible, topk=K, impl=impl)[1]

            return directed(forward, inputs, direction)

        flops = 2 * settings.R * visible_chunks(T, settings.S)
        if direction == "fwd_bwd":
            flops += 4 * settings.R * T * min(K, C)
        size = traffic(direction, (T + C) * settings.R * settings.dtype.itemsize, T * K * 4, T * K * 4)
        return Point("chunk_topk", impl, direction, T, prepare, K=K, C=C, flops=flops, bytes=size)

    for T in settings.lengths:
        for K in settings.topks:
            for impl in ("triton", "torch", "unfused") if settings.device == "cuda" else ("torch", "unfused"):
                # torch's backends are measured at one K, and not where they take seconds
                is_ours = impl == "triton"
                if is_ours or (settings.main_topk == K and (impl == "unfused" or settings.full_max >= T)):
                    for direction in DIRECTIONS:
                        yield point(impl, direction, T, K)


def decode_points(operators: Any, settings: Settings) -> Iterator[Point]:
    """One query over C chunks, captured in a CUDA graph on a GPU: retrieval, attention; landmarks read, and copied."""
    is_gpu = settings.device == "cuda"
    for C in settings.decode_chunks:
        yield _copy_point(settings, C)
        yield _read_point(settings, C)
        if is_gpu:
            yield _decode_topk_point(operators, settings, "triton", C)
            yield _decode_hsa_point(operators, settings, "triton", C)
    # last, for a capture that fails may spoil what follows
    for C in settings.decode_chunks:
        yield _decode_topk_point(operators, settings, "torch", C)
        yield _decode_hsa_point(operators, settings, "torch_gather", C)


def _landmark_bytes(settings: Settings, C: int) -> int:
    return C * settings.R * settings.dtype.itemsize


def _copy_point(settings: Settings, C: int) -> Point:
    def prepare() -> Call:
        source = noise(settings, C, settings.R)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    # every byte is read and written
    size = 2 * _landmark_bytes(settings, C)
    return Point("copy", "torch", "fwd", 1, prepare, C=C, bytes=size, use_graph=True)


def _read_point(settings: Settings, C: int) -> Point:
    """torch's sum of all landmarks: what reading them once takes."""

    def prepare() -> Call:
        source = noise(settings, C, settings.R)
        return lambda: source.sum(dtype=torch.float32)

    return Point("read", "torch", "fwd", 1, prepare, C=C, bytes=_landmark_bytes(settings, C), use_graph=True)


def _decode_topk_point(operators: Any, settings: Settings, impl: str, C: int) -> Point:
    K = settings.main_topk

    def prepare() -> Call:
        query, landmarks = noise(settings, 1, 1, 1, settings.R, seed=1), noise(settings, 1, C, 1, settings.R, seed=2)
        zero = torch.zeros(1, 1, dtype=torch.int32, device=settings.device)
        ends = (torch.arange(C, dtype=torch.int32, device=settings.device) + 1)[None] * settings.S  # (1, C)
        visible = operators.ChunkVisibility(zero, zero + C * settings.S, torch.zeros_like(ends), ends)

        def run() -> Any:
            with torch.no_grad():
                return operators.chunk_topk(query, landmarks, visible, topk=K, impl=impl)

        return run

    return Point(
        "decode_topk", impl, "fwd", 1, prepare, K=K, C=C, flops=2 * settings.R * C, bytes=_landmark_bytes(settings, C),
        use_graph=True,
    )  # fmt: skip


def _decode_hsa_point(operators: Any, settings: Settings, impl: str, C: int) -> Point:
    K = settings.main_topk

    def prepare() -> Call:
        # the list of the first token that sees all C chunks
        generator = torch.Generator().manual_seed(settings.seed)
        chosen = torch.randperm(C, generator=generator)[:K].sort(descending=True).values.to(torch.int32)
        indices, inputs = hsa_inputs(settings, chosen[None].numpy(), C * settings.S)

        def run() -> Any:
            with torch.no_grad():
                q, k, v, weights = inputs
                return operators.hsa_attention(q, k, v, indices, weights, chunk_size=settings.S, impl=impl)

        return run

    keys = min(K, C) * settings.S
    size = (2 * keys * settings.Hkv + 2 * settings.Hq) * settings.D * settings.dtype.itemsize
    flops = 4 * settings.Hq * settings.D * keys
    return Point(
        "decode_hsa", impl, "fwd", 1, prepare, selection="random", K=K, C=C, flops=flops, bytes=size, use_graph=True
    )
