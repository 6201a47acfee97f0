"""Counter-based Gumbel noise: a pure function of (seed; batch, token, head, chunk), the same in every backend.

Each coordinate is folded into a 32-bit state by one multiply-xorshift round (the "lowbias32" mixer of C. Wellons);
23 bits of the result make a uniform in (0, 1) and the noise is -log(-log(u)). No generator state, so blocks,
recomputation in the backward and other devices see the same numbers. Training only (paper facts A.2).
"""

from __future__ import annotations

import torch

_MASK = 0xFFFFFFFF


def _mix(x: torch.Tensor) -> torch.Tensor:
    """One avalanche round on the low 32 bits of an int64 tensor (products wrap modulo 2^64, low bits stay right)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & _MASK
    x = (x ^ (x >> 15)) * 0x846CA68B & _MASK
    return x ^ (x >> 16)


def gumbel_noise(
    seed: int | torch.Tensor,
    batch: int,
    start: int,
    stop: int,
    num_heads: int,
    chunks: int | torch.Tensor,
    device: torch.device | str,
) -> torch.Tensor:
    """Standard Gumbel noise for tokens start..stop and chunks 0..chunks, (batch, stop - start, num_heads, chunks) fp32;
    or for the chunk indices of a tensor (batch, stop - start, num_heads, K).

    seed: its low 32 bits count; a number, or an int64 tensor () on the device, which the host does not read.
    """

    def axis(first: int, last: int, *shape: int) -> torch.Tensor:
        return torch.arange(first, last, dtype=torch.int64, device=device).view(shape)

    state = _mix((axis(0, batch, -1, 1, 1, 1) + (seed & _MASK)) & _MASK)
    state = _mix((state + axis(start, stop, 1, -1, 1, 1)) & _MASK)
    state = _mix((state + axis(0, num_heads, 1, 1, -1, 1)) & _MASK)
    chunk = axis(0, chunks, 1, 1, 1, -1) if isinstance(chunks, int) else chunks.long().clamp_min(0)
    state = _mix((state + chunk) & _MASK)
    # 23 bits: with 24, the half added to the largest value rounds up to u = 1, whose noise is infinite
    uniform = ((state >> 9).to(torch.float32) + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))
