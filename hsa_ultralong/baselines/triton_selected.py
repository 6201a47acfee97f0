"""The Triton form of selected.py and of NSA's compressed branch: masks, lists of chunks, gradients.

Imports triton; called where `sparse_impl="triton"` asks for it. tests/baselines/test_triton_selected.py.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from hsa_ultralong.ops._common import refuse_second_derivatives
from hsa_ultralong.ops._triton import (
    KERNEL_DTYPES,
    KERNEL_SIZES,
    check_compiled,
    is_interpreted,
    shared_memory,
    triton_runs_on,
)

try:
    from hsa_ultralong.baselines import kernel_selected
except ImportError as error:
    raise ImportError('sparse_impl="triton" needs triton: pip install "hsa-ultralong[kernels]"') from error

# bytes of a mask that exist at once
_MASK_BYTES = 1 << 28
# shared memory of the largest chunks, D = S = 128, with two stages of 16-bit numbers, and of 32-bit ones
_LARGEST_BYTES, _LARGEST_BYTES_FP32 = 114_688, 163_840


class Chosen(NamedTuple):
    """mask: (B, Hs, C, T) bytes. Chunks of every tile of tokens, (B, Hs, tiles, C), and how many, (B, Hs, tiles); tiles
    of every chunk, (B, Hs, C, tiles), and how many, (B, Hs, C)."""

    mask: torch.Tensor
    chunks: torch.Tensor
    num_chunks: torch.Tensor
    tiles: torch.Tensor
    num_tiles: torch.Tensor


def lay_out(chosen: torch.Tensor, count: int, tile: int) -> Chosen:
    """Lists (B, T, Hs, K) of `count` chunks, -1 for none, as the kernels take them."""
    batch, new, heads, _ = chosen.shape
    index = torch.where(chosen < 0, count, chosen).long().permute(0, 2, 3, 1)  # (B, Hs, K, T)
    mask = torch.zeros(batch, heads, count + 1, new, dtype=torch.uint8, device=chosen.device)
    mask = mask.scatter_(2, index, 1)[:, :, :count].contiguous()
    padded = torch.nn.functional.pad(mask, (0, -new % tile))
    is_met = padded.unflatten(-1, (-1, tile)).amax(-1)  # (B, Hs, C, tiles)
    lists = []
    for part in (is_met.transpose(2, 3), is_met):
        order = part.argsort(dim=-1, descending=True, stable=True)
        lists += [order.int().contiguous(), part.sum(-1, dtype=torch.int32)]
    return Chosen(mask, *lists)


class SelectedLaunch(NamedTuple):
    """Tokens of a tile, warps and software-pipelining stages."""

    tile: int
    warps: int
    stages: int


def launch_options(dim: int, keys: int, dtype: torch.dtype, memory: int) -> SelectedLaunch:
    """Of all three kernels; keys: of a chunk, memory: bytes of shared memory that a program may use."""
    if dtype == torch.float32:
        return SelectedLaunch(16, 4, 1)
    if dim + keys == 256 and memory < _LARGEST_BYTES:
        return SelectedLaunch(32, 8, 1)
    return SelectedLaunch(64, 4 if dim <= 64 else 8, 2)


class _Problem:
    """Contiguous operands and the arguments that every kernel takes."""

    def __init__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chosen: torch.Tensor | None, keys: int, start: int,
        stride: int, size: int,
    ) -> None:  # fmt: skip
        self.q, self.k, self.v = q.contiguous(), k.contiguous(), v.contiguous()
        self.batch, self.new, self.heads, self.dim = q.shape
        self.total, self.kv_heads = k.shape[1:3]
        self.tile, warps, stages = launch_options(self.dim, keys, q.dtype, shared_memory(q.device.index))
        self.blocks = -(-self.total // keys)
        # without lists some tensor of integers, which is not read
        none = torch.zeros(1, dtype=torch.int32, device=q.device)
        self.chosen = Chosen(*[none] * 5) if chosen is None else lay_out(chosen, self.blocks, self.tile)
        self.choosers = 1 if chosen is None else chosen.shape[2]
        self.sizes = (self.new, self.total, self.blocks, start, self.dim**-0.5 * math.log2(math.e))
        self.counts = (self.heads, self.kv_heads, self.choosers)
        self.constants: dict[str, Any] = {
            "D": self.dim, "BT": self.tile, "BN": keys, "STRIDE": stride, "SIZE": size,
            "HAS_CHOSEN": chosen is not None, "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
            "STAGES": stages, "num_warps": warps,
        }  # fmt: skip

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """out, and lse (B, T, Hq) fp32."""
        out = torch.empty_like(self.q)
        lse = torch.empty(self.q.shape[:3], dtype=torch.float32, device=self.q.device)
        mask, chunks, num_chunks, *_ = self.chosen
        kernel_selected.forward_kernel[(-(-self.new // self.tile), self.heads, self.batch)](
            self.q, self.k, self.v, mask, chunks, num_chunks, out, lse, *self.sizes, *self.counts, **self.constants
        )
        return out, lse

    def gradients(self, upward: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """dq, dk, dv."""
        upward = upward.contiguous()
        deltas = (upward.float() * out.float()).sum(-1)
        grads = [torch.empty_like(x) for x in (self.q, self.k, self.v)]
        mask, chunks, num_chunks, tiles, num_tiles = self.chosen
        operands, sums = (self.q, self.k, self.v, mask), (upward, lse, deltas)
        shared = (*self.sizes, self.dim**-0.5, *self.counts)
        kernel_selected.query_gradient_kernel[(-(-self.new // self.tile), self.heads, self.batch)](
            *operands, chunks, num_chunks, *sums, grads[0], *shared, **self.constants
        )
        kernel_selected.key_gradient_kernel[(self.blocks, self.kv_heads, self.batch)](
            *operands, tiles, num_tiles, *sums, *grads[1:], *shared, **self.constants
        )
        return tuple(grads)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chosen: torch.Tensor | None, *places: int
    ) -> torch.Tensor:
        out, lse = _Problem(q, k, v, chosen, *places).forward()
        ctx.save_for_backward(q, k, v, chosen, out, lse)
        ctx.places = places
        return out

    @staticmethod
    def backward(ctx: Any, upward: torch.Tensor) -> tuple[Any, ...]:
        refuse_second_derivatives("selected_attention", "triton", "torch")
        q, k, v, chosen, out, lse = ctx.saved_tensors
        return *_Problem(q, k, v, chosen, *ctx.places).gradients(upward, out, lse), None, *[None] * len(ctx.places)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chosen: torch.Tensor | None, *places: int
) -> torch.Tensor:
    if not (triton_runs_on(q) or is_interpreted()):
        raise ValueError(
            f'sparse_impl="triton" needs an NVIDIA GPU, got {q.device}: use sparse_impl="torch", of a model folder '
            "`hsa eval FOLDER --set sparse_impl=torch`"
        )
    if (
        not q.dtype == k.dtype == v.dtype
        or q.dtype not in KERNEL_DTYPES
        or q.shape[-1] not in KERNEL_SIZES
        or places[0] not in KERNEL_SIZES
    ):
        raise ValueError(
            f'sparse_impl="triton" takes head_dim and chunk_size in {KERNEL_SIZES} and one of bf16, fp16, fp32; got '
            f'{q.shape[-1]}, {places[0]}, {q.dtype}, {k.dtype}, {v.dtype}: use sparse_impl="torch"'
        )
    memory = shared_memory(q.device.index)
    if q.dtype == torch.float32 and q.shape[-1] + places[0] == 256 and memory < _LARGEST_BYTES_FP32:
        raise ValueError(
            f'sparse_impl="triton" in fp32 with head_dim and chunk_size 128 takes {_LARGEST_BYTES_FP32:,} bytes of '
            f'shared memory, this card has {memory:,}: use bf16 or sparse_impl="torch"'
        )
    check_compiled()
    return _Attention.apply(q, k, v, chosen, *places)


@torch.compiler.disable
def selected_attention_triton(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chosen: torch.Tensor, *, chunk_size: int
) -> torch.Tensor:
    """As selected.selected_attention; O(T N) bytes of a mask, at most 256 MiB at once."""
    new, total = q.shape[1], k.shape[1]
    piece = max(64, _MASK_BYTES // (q.shape[0] * chosen.shape[2] * -(-total // chunk_size)))
    parts = []
    for first in range(0, new, piece):
        place = total - new + first
        part, wanted = q[:, first : first + piece], chosen[:, first : first + piece]
        parts.append(_attend(part, k, v, wanted, chunk_size, place, 1, 1))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


@torch.compiler.disable
def block_attention_triton(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, size: int, stride: int, start: int
) -> torch.Tensor:
    """Tokens from place `start` on read keys and values (B, C, Hkv, D) of blocks of `size` tokens, one every `stride`,
    that end at or before them; 0 where there is none."""
    if k.shape[1] == 0:
        return q * 0
    return _attend(q, k, v, None, 64, start, stride, size)
