"""Haystacks: Newton's Opticks (public domain, 282,777 tokens for nano), which ships with the library, and texts
recombined to any length. tests/eval/test_haystack.py.
"""

from __future__ import annotations

import lzma
from importlib import resources
from typing import Any

import torch


def opticks() -> str:
    """Isaac Newton, Opticks (4th edition, 1730), as plain text."""
    packed = resources.files("hsa_ultralong.eval").joinpath("assets/opticks.txt.xz").read_bytes()
    return lzma.decompress(packed).decode("utf-8")


def line_starts(tokens: torch.Tensor, tokenizer: Any) -> torch.Tensor:
    """Where the lines of tokens (n,) begin, the first included, (lines,) int64: after each token with a line break."""
    ends = torch.tensor(["\n" in tokenizer.decode([id]) for id in range(len(tokenizer))], device=tokens.device)
    breaks = ends[tokens.long()].nonzero()[:, 0] + 1
    starts = torch.cat((breaks.new_zeros(1), breaks[breaks < len(tokens)]))
    return starts


def recombined(tokens: torch.Tensor, length: int, tokenizer: Any, seed: int = 0, *, first: int = 0) -> torch.Tensor:
    """A haystack of any length from a text: the text as it is, then its lines in a new random order, again and again.

    A plain repetition would bring no new chunk; shuffled lines fall into other chunks (`count_distinct` says how many).

    Args:
        tokens: (n,) int32, on the device that shall do the shuffling. first: of the haystack, the tokens from there on.

    Returns:
        (length,) int32 on the host.
    """
    starts = line_starts(tokens, tokenizer)
    sizes = torch.diff(starts, append=starts.new_tensor([len(tokens)]))
    out = torch.empty(length, dtype=torch.int32)
    generator = torch.Generator().manual_seed(seed)
    for begin in range(0, first + length, len(tokens)):
        part, stop = tokens, min(begin + len(tokens), first + length)
        # the orders follow from one another
        order = torch.randperm(len(starts), generator=generator) if begin else None
        if stop <= first:
            continue
        if order is not None:
            order = order.to(tokens.device)
            moved = sizes[order]
            shift = torch.repeat_interleave(starts[order] - (moved.cumsum(0) - moved), moved)
            part = tokens[torch.arange(len(tokens), device=tokens.device) + shift]
        wanted = part[max(first - begin, 0) : stop - begin]
        out[stop - first - len(wanted) : stop - first] = wanted.cpu()
    return out


def count_distinct(tokens: torch.Tensor, chunk_size: int, device: torch.device | str = "cpu") -> int:
    """Number of different chunks of a text (n,), by a 64-bit hash."""
    hashes = chunk_hashes(tokens, chunk_size, device)
    return len(hashes.unique()) + (1 if len(tokens) % chunk_size else 0)


def chunk_hashes(tokens: torch.Tensor, chunk_size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """A hash of every full chunk of a text (n,), (n // S,) int64 on the device."""
    whole = len(tokens) // chunk_size * chunk_size
    generator = torch.Generator().manual_seed(1)
    factors = torch.randint(-(2**62), 2**62, (chunk_size,), generator=generator).to(device) | 1
    hashes = [
        (part.to(device).long().view(-1, chunk_size) * factors).sum(1)
        for part in tokens[:whole].split(chunk_size * (1 << 16))
    ]
    return torch.cat(hashes) if hashes else torch.empty(0, dtype=torch.int64, device=device)
