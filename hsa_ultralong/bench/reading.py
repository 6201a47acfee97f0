"""How fast a model folder reads and what it keeps: ours through a memory, any other through its cache.

Called by `hsa bench reading`; records have the form of docs/results.md (suite memory). tests/bench/test_reading.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch

from hsa_ultralong.baselines import RivalCache
from hsa_ultralong.inference import memorize
from hsa_ultralong.models import HSAForCausalLM
from hsa_ultralong.models.cache_hsa import CACHE_NAME

_REPEATS = 3


def reading_records(model: Any, name: str, lengths: Sequence[int], *, seed: int = 0) -> Iterator[dict[str, Any]]:
    """read_tokens_per_s of every length (the fastest of three, after one that does not count), and bytes_per_token: by
    how much the memory, or the cache, grows from one length to the next. Tokens are random."""
    device = model.device
    ids = torch.randint(model.config.vocab_size, (max(lengths),), generator=torch.Generator().manual_seed(seed))
    sizes = []
    for length in lengths:
        tokens = ids[:length].to(device)
        seconds, size = [], 0
        for _ in range(1 + _REPEATS):
            begin = _now(device)
            size = _read(model, tokens)
            seconds.append(_now(device) - begin)
        sizes.append(size)
        yield _record(name, "read_tokens_per_s", length, length / min(seconds[1:]))
    for (short, less), (long, more) in pairwise(zip(lengths, sizes, strict=True)):
        yield _record(name, "bytes_per_token", long, (more - less) / (long - short))


def _read(model: Any, tokens: torch.Tensor) -> int:
    """Read; bytes kept afterwards."""
    with torch.no_grad():
        if isinstance(model, HSAForCausalLM):
            memory = memorize(model, tokens)
            return memory.num_bytes
        outputs = model(input_ids=tokens[None], use_cache=True, logits_to_keep=1)
    cache = getattr(outputs, CACHE_NAME)
    if isinstance(cache, RivalCache):
        return cache.num_bytes(with_room=False)
    return sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _record(name: str, metric: str, tokens: int, value: float) -> dict[str, Any]:
    return {"metric": metric, "preset": name, "store": "device", "dtype": "", "tokens": tokens, "batch": 1,
            "value": value}  # fmt: skip
