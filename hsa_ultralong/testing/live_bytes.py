"""How many bytes a computation holds at its worst moment, on any device; tests/train/test_segmented.py."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Kept:
    """A saved tensor, counted while the graph holds it."""

    def __init__(self, tensor: torch.Tensor, counter: SavedBytes) -> None:
        self.tensor, self.counter, self.bytes = tensor, counter, tensor.numel() * tensor.element_size()
        counter.now += self.bytes
        counter.most = max(counter.most, counter.now)

    def __del__(self) -> None:
        self.counter.now -= self.bytes


def _tensor_of(kept: _Kept) -> torch.Tensor:
    return kept.tensor


class SavedBytes:
    """Inside, `most` is the most bytes that autograd holds at once for backward passes; what two operations save counts
    twice."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: _Kept(tensor, self), _tensor_of)

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)


class LiveBytes(TorchDispatchMode):
    """Inside, `most` is the most bytes that all tensors made inside take at once, however they are held."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                self._known.add(storage)
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return made

    def _add(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)
