"""A difference in few bits: every 64 numbers share a scale, each is a whole number of 2 to 8 bits.

docs/own-memory.md says what it costs. Called by difference.py and cli/compact.py; tests/train/test_packing.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import numpy as np
import torch

_BLOCK = 64
_CODES, _SCALES = "#codes", "#scales"
BITS = range(2, 9)


def pack(tensors: Mapping[str, torch.Tensor], bits: int) -> tuple[dict[str, torch.Tensor], str]:
    """Matrices in `bits` bits, vectors as they are, and what `unpack` needs to know.

    Raises:
        ValueError: for a number of bits that is none of 2 to 8.
    """
    if bits not in BITS:
        raise ValueError(f"bits must be one of {BITS.start} to {BITS.stop - 1}, got {bits}")
    packed: dict[str, torch.Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, tensor in tensors.items():
        if tensor.dim() < 2:
            packed[name] = tensor
            continue
        shapes[name] = list(tensor.shape)
        packed[name + _CODES], packed[name + _SCALES] = _pack(tensor, bits)
    return packed, json.dumps({"bits": bits, "shapes": shapes})


def unpack(packed: Mapping[str, torch.Tensor], about: str) -> dict[str, torch.Tensor]:
    """Tensors in fp32 again.

    Raises:
        ValueError: if they are not what `about` says.
    """
    try:
        told = json.loads(about)
        bits, shapes = (
            int(told["bits"]),
            {name: [int(size) for size in told["shapes"][name]] for name in told["shapes"]},
        )
        found = {name: part for name, part in packed.items() if not name.endswith((_CODES, _SCALES))}
        if len(packed) != len(found) + 2 * len(shapes):
            raise ValueError(f"{len(packed) - len(found)} parts of {len(shapes)} matrices")
        for name, shape in shapes.items():
            found[name] = _unpack(packed[name + _CODES], packed[name + _SCALES], shape, bits)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"packed tensors do not fit what is said of them ({error})") from error
    return found


def _pack(tensor: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    top = (1 << (bits - 1)) - 1
    flat = tensor.detach().float().flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % _BLOCK)).view(-1, _BLOCK)
    scales = (blocks.abs().amax(1) / top).clamp_min(6e-8).half()
    codes = (blocks / scales.float()[:, None]).round().clamp(-top, top) + top
    digits = np.unpackbits(codes.to(torch.uint8).numpy().reshape(-1, 1), axis=1)[:, 8 - bits :]
    return torch.from_numpy(np.packbits(digits)), scales


def _unpack(codes: torch.Tensor, scales: torch.Tensor, shape: list[int], bits: int) -> torch.Tensor:
    count = math.prod(shape)
    if bits not in BITS or min(shape) < 1 or len(scales) != -(-count // _BLOCK):
        raise ValueError(f"{len(scales)} scales for {count} numbers")
    if codes.shape != (len(scales) * _BLOCK * bits // 8,):
        raise ValueError(f"{codes.numel()} bytes for {count} numbers of {bits} bits")
    digits = np.unpackbits(codes.numpy(), count=len(scales) * _BLOCK * bits).reshape(-1, bits)
    padded = np.pad(digits, ((0, 0), (8 - bits, 0)))
    numbers = torch.from_numpy(np.packbits(padded, axis=1)[:, 0]).float() - ((1 << (bits - 1)) - 1)
    return (numbers.view(-1, _BLOCK) * scales.float()[:, None]).flatten()[:count].view(shape)
