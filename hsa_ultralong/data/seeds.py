"""Random generators from explicit seeds, in namespaces that cannot meet.

The namespace's hash is part of the seed, so training and evaluation draw different streams even from equal numbers.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np


@functools.lru_cache(maxsize=64)
def _namespace_entropy(namespace: str) -> int:
    return int.from_bytes(hashlib.sha256(f"hsa_ultralong.data/{namespace}".encode()).digest()[:8], "little")


def namespaced_rng(namespace: str, *numbers: int) -> np.random.Generator:
    """Return a generator that is a function of the namespace and the numbers (non-negative integers) alone.

    Raises:
        ValueError: a number is negative.
    """
    if any(number < 0 for number in numbers):
        raise ValueError(f"seeds must be non-negative integers, got {numbers}")
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((_namespace_entropy(namespace), *numbers))))
