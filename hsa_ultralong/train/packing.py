"""A difference in few bits: every 64 numbers share a scale, each is a whole number of 2 to 8 bits.

These numbers crowd around zero, so frequent ones are written in fewer bits than rare ones (Huffman's code, by zlib):
that loses nothing and takes a twentieth off. docs/own-memory.md says what it costs.
Called by difference.py and cli/compact.py; tests/train/test_packing.py.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping

import numpy as np
import torch

_BLOCK = 64
_CODES, _SCALES = "#codes", "#scales"
BITS = range(2, 9)
# zlib without its head and sum: the file has its own
_RAW = -15


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
    coder = zlib.compressobj(9, zlib.DEFLATED, _RAW, 9, zlib.Z_HUFFMAN_ONLY)
    written = coder.compress(codes.to(torch.uint8).numpy().tobytes()) + coder.flush()
    return torch.from_numpy(np.frombuffer(written, dtype=np.uint8).copy()), scales


def _unpack(codes: torch.Tensor, scales: torch.Tensor, shape: list[int], bits: int) -> torch.Tensor:
    count, top = math.prod(shape), (1 << (bits - 1)) - 1
    if bits not in BITS or min(shape) < 1 or len(scales) != -(-count // _BLOCK):
        raise ValueError(f"{len(scales)} scales for {count} numbers")
    try:
        # no more than is wanted, whatever the file holds
        read = zlib.decompressobj(_RAW).decompress(codes.numpy().tobytes(), len(scales) * _BLOCK + 1)
    except zlib.error as error:
        raise ValueError(f"codes that are none ({error})") from None
    if len(read) != len(scales) * _BLOCK:
        raise ValueError(f"codes of {len(read)} numbers for {count}")
    numbers = torch.from_numpy(np.frombuffer(read, dtype=np.uint8).copy()).float() - top
    if numbers.max() > top:
        raise ValueError(f"codes above {2 * top} for numbers of {bits} bits")
    return (numbers.view(-1, _BLOCK) * scales.float()[:, None]).flatten()[:count].view(shape)
