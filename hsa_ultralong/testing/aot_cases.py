"""The operator calls whose Triton kernels aot.py compiles: forward and backward, training shapes and one query.

The tensors are on the CPU and hold noise; only shapes, dtypes and alignment reach the compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch

from hsa_ultralong.baselines.triton_selected import block_attention_triton, selected_attention_triton
from hsa_ultralong.ops import (
    ChunkVisibility,
    ScoredChunks,
    _triton,
    chunk_topk,
    combine_topk,
    hsa_attention,
    joint_attention,
    sliding_window_attention,
    swiglu_fp8,
)
from hsa_ultralong.ops.chunk_gather import ChunkBlocks, gather_chunks
from hsa_ultralong.ops.chunk_topk.quantized import chunk_topk_quantized


@dataclass(frozen=True)
class Shape:
    """One setting of the operators; letters as in docs/architecture.md."""

    T: int = 2048
    Hq: int = 16
    Hkv: int = 1
    D: int = 64
    S: int = 64
    K: int = 32
    R: int = 256
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"T={self.T} Hq={self.Hq} Hkv={self.Hkv} D={self.D} S={self.S} K={self.K} R={self.R} {dtype}"


# the benchmark's shape first
SHAPES = (
    Shape(T=32_768),
    Shape(Hq=2, Hkv=2, D=128, S=128, K=16, R=128, dtype=torch.float16),
)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def all_shapes() -> Iterator[Shape]:
    """SHAPES and every group size, head dimension, chunk size and dtype that the kernels take."""
    yield from SHAPES
    yield Shape(D=32, S=32, K=16, R=64, dtype=torch.float16)
    # retrieval of small_345m and dense_0_5b
    yield Shape(T=8192, R=1024)
    yield Shape(T=8192, R=1024, K=64)
    for group, dim, size, dtype in product((1, 2, 4, 8, 16), (32, 64, 128), (32, 64, 128), _DTYPES):
        yield Shape(Hq=group, D=dim, S=size, dtype=dtype)
    # rows whose gradients come from one pass
    for group, size, dtype in product((1, 2, 4, 8, 16), (32, 64), _DTYPES):
        yield Shape(T=16_384, Hq=group, D=size, S=size, dtype=dtype)


def _widest_retrieval() -> Iterator[Shape]:
    """Every number of chunks kept and dimension that meets tiles of its own in retrieval."""
    for dim, topk, dtype in product((256, 512, 1024), (32, 64, 128, 256), (torch.bfloat16, torch.float32)):
        yield Shape(T=32_768, K=topk, R=dim, dtype=dtype)


def _noise(*shape: int, dtype: torch.dtype, grad: bool = True) -> torch.Tensor:
    return torch.randn(shape).to(dtype).requires_grad_() if grad else torch.zeros(shape, dtype=dtype)


def _run_hsa(shape: Shape, num_queries: int, is_training: bool) -> None:
    chunks = shape.T // shape.S
    q = _noise(1, num_queries, shape.Hq, shape.D, dtype=shape.dtype, grad=is_training)
    k, v = (_noise(1, shape.T, shape.Hkv, shape.D, dtype=shape.dtype, grad=is_training) for _ in range(2))
    indices = torch.randint(chunks, (1, num_queries, 1, min(shape.K, chunks)), dtype=torch.int32)
    indices = indices.sort(-1, descending=True).values
    weights = torch.rand(indices.shape).requires_grad_(is_training)
    out = hsa_attention(q, k, v, indices, weights, chunk_size=shape.S, causal=is_training, impl="triton")
    if is_training:
        out.backward(torch.ones_like(out))


def _run_joint(shape: Shape, is_short: bool) -> None:
    """is_short: with chunks of less than S tokens, and a gradient of the logsumexp."""
    chunks, heads = shape.T // shape.S, (shape.Hq, shape.Hkv, shape.Hkv)
    q, k, v = (_noise(1, shape.T, count, shape.D, dtype=shape.dtype) for count in heads)
    indices = torch.randint(chunks, (1, shape.T, shape.Hkv, min(shape.K, chunks)), dtype=torch.int32)
    weights = torch.rand(indices.shape).requires_grad_()
    lengths = torch.ones((1, chunks), dtype=torch.int32) if is_short else None
    out, mass = joint_attention(q, k, v, indices, weights, chunk_size=shape.S, chunk_lengths=lengths, impl="triton")
    (out.sum() + mass.sum() if is_short else out.sum()).backward()


def _run_window(shape: Shape, has_documents: bool) -> None:
    operands = [_noise(1, shape.T, heads, shape.D, dtype=shape.dtype) for heads in (shape.Hq, shape.Hkv, shape.Hkv)]
    segments = torch.zeros((1, shape.T), dtype=torch.int32) if has_documents else None
    out = sliding_window_attention(*operands, window=512, query_segments=segments, key_segments=segments, impl="triton")
    out.backward(torch.ones_like(out))


def _run_topk(
    shape: Shape, num_queries: int, is_training: bool, chunks: int, seed: int | torch.Tensor | None = None
) -> None:
    query = _noise(1, num_queries, 1, shape.R, dtype=shape.dtype, grad=is_training)
    landmarks = _noise(1, chunks, 1, shape.R, dtype=shape.dtype, grad=is_training)
    visible = ChunkVisibility.causal(1, num_queries, chunks, shape.S)
    scale = None if seed is None else torch.ones(1, requires_grad=is_training)
    _, scores = chunk_topk(query, landmarks, visible, topk=shape.K, scale=scale, noise_seed=seed, impl="triton")
    if is_training:
        scores.backward(torch.ones_like(scores))


def _run_quantized(shape: Shape, chunks: int) -> None:
    query = _noise(1, 1, 1, shape.R, dtype=shape.dtype, grad=False)
    payload = torch.ones((1, chunks, 1, shape.R), dtype=torch.int8)
    scales = torch.ones((1, chunks, 1), dtype=torch.bfloat16)
    visible = ChunkVisibility.causal(1, 1, chunks, shape.S)
    chunk_topk_quantized(query, payload, scales, visible, topk=shape.K, impl="triton")


def _run_combine(widths: tuple[int, ...], topk: int) -> None:
    lists = [
        ScoredChunks(torch.zeros((1, 1, 1, width), dtype=torch.int32), torch.zeros((1, 1, 1, width)), 1000 * number)
        for number, width in enumerate(widths)
    ]
    combine_topk(lists, topk=topk, impl="triton")


def _run_selected(shape: Shape) -> None:
    """The baselines' attention in chosen chunks and in compressed blocks of 32 tokens, one every 16."""
    heads = (shape.Hq, shape.Hkv, shape.Hkv)
    q, k, v = (_noise(1, shape.T, count, shape.D, dtype=shape.dtype) for count in heads)
    chosen = torch.zeros((1, shape.T, shape.Hkv, shape.K), dtype=torch.int32)
    out = selected_attention_triton(q, k, v, chosen, chunk_size=shape.S)
    out.backward(torch.ones_like(out))
    k, v = (_noise(1, shape.T // 16 - 1, shape.Hkv, shape.D, dtype=shape.dtype) for _ in range(2))
    out = block_attention_triton(q, k, v, size=32, stride=16, start=0)
    out.backward(torch.ones_like(out))


def _run_gather(shape: Shape, payload: torch.dtype) -> None:
    row = (16, 2, shape.S, shape.Hkv, shape.D)
    blocks = ChunkBlocks(16, torch.device("cpu"), addresses=torch.zeros((2, 64), dtype=torch.int64))
    blocks.payloads.append(torch.zeros(row).to(payload))
    if payload.itemsize == 1:
        blocks.scales.append(torch.zeros(row[:-1], dtype=torch.bfloat16))
    gather_chunks(blocks, torch.zeros(shape.K, dtype=torch.int32), shape.dtype, impl="triton")


def _run_swiglu(weight_dtype: torch.dtype, width: int, size: int) -> None:
    x = _noise(64, width, dtype=torch.bfloat16)
    # cards without 8-bit floats have no such kernels
    if not _triton.fp8_runs_on(x):
        return
    gate, up, down = (_noise(*shape, dtype=weight_dtype) for shape in ((size, width), (size, width), (width, size)))
    out = swiglu_fp8(x, gate, up, down, impl="triton")
    out.backward(torch.ones_like(out))


def _with_shape(call: Callable[..., None], *arguments: object) -> Callable[[], None]:
    return lambda: call(*arguments)


def operator_cases(is_complete: bool = False) -> list[tuple[str, Callable[[], None]]]:
    """Named calls of the public operators with impl="triton"; the name begins with the operator's."""
    cases: list[tuple[str, Callable[[], None]]] = []
    shapes = list(all_shapes() if is_complete else SHAPES)
    for shape in shapes:
        if is_complete or shape == SHAPES[0]:
            cases.append((f"selected_attention {shape}", _with_shape(_run_selected, shape)))
        cases += [
            (f"hsa_attention training {shape}", _with_shape(_run_hsa, shape, shape.T, True)),
            (f"hsa_attention forward {shape}", _with_shape(_run_hsa, shape, shape.T, False)),
            (f"hsa_attention decode {shape}", _with_shape(_run_hsa, shape, 1, False)),
            (f"joint_attention {shape}", _with_shape(_run_joint, shape, False)),
            (f"joint_attention short chunks {shape}", _with_shape(_run_joint, shape, True)),
            (f"sliding_window_attention {shape}", _with_shape(_run_window, shape, False)),
            (f"sliding_window_attention documents {shape}", _with_shape(_run_window, shape, True)),
        ]
    # of training small_345m
    rows = Shape(T=8192, Hkv=2)
    cases.append((f"sliding_window_attention {rows}", _with_shape(_run_window, rows, False)))
    # rows so short that memories and queries have passes of their own
    short = replace(SHAPES[0], T=8192)
    cases.append((f"hsa_attention training {short}", _with_shape(_run_hsa, short, short.T, True)))
    seen = set()
    for shape in [*shapes, *(_widest_retrieval() if is_complete else ())]:
        retrieval = (shape.K, shape.R, shape.dtype, shape.T > 16_384)
        if retrieval in seen:
            continue
        seen.add(retrieval)
        chunks = shape.T // shape.S
        cases += [
            (f"chunk_topk training {shape}", _with_shape(_run_topk, shape, shape.T, True, chunks)),
            (f"chunk_topk noise {shape}", _with_shape(_run_topk, shape, shape.T, True, chunks, 1)),
            (f"chunk_topk stored noise {shape}", _with_shape(_run_topk, shape, shape.T, True, chunks, torch.tensor(1))),
        ]
        for scanned in (128, 16_384, 262_144) if is_complete else (65_536,):
            name = f"C={scanned} {shape}"
            cases.append((f"chunk_topk decode {name}", _with_shape(_run_topk, shape, 1, False, scanned)))
            is_scanned = shape.dtype != torch.float32 and scanned > shape.K
            if is_scanned and (is_complete or shape == SHAPES[0]):
                cases.append((f"chunk_topk quantized {name}", _with_shape(_run_quantized, shape, scanned)))
    # a library, and own chunks; two processes; three, and full coverage of a few
    for widths, topk in (((64, 64), 64), ((32, 32, 32), 32), ((32, 32, 32, 7), 32), ((256, 256), 256)):
        cases.append((f"combine_topk {widths}", _with_shape(_run_combine, widths, topk)))
    for dtype, size in ((torch.float32, 4096), (torch.bfloat16, 16_384)) if is_complete else ((torch.float32, 4096),):
        cases.append((f"swiglu_fp8 F={size} {dtype}", _with_shape(_run_swiglu, dtype, 1024, size)))
    for payload in (torch.bfloat16, torch.int8, torch.float8_e4m3fn) if is_complete else (torch.int8,):
        cases.append((f"gather_chunks {payload}", _with_shape(_run_gather, SHAPES[0], payload)))
    return cases
