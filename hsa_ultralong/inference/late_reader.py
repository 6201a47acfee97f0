"""Results of decoding steps on their way to the host. Used by engine.py; tests/inference/test_engine.py."""

from __future__ import annotations

from typing import Any

import torch

Retrieved = list[tuple[torch.Tensor, torch.Tensor]]


class LateReader:
    """Copies of a step's results on their way to the host: waited for only after the next step was started."""

    def __init__(self, device: torch.device) -> None:
        self.is_cuda = device.type == "cuda"
        self.waiting: list[tuple[torch.Tensor, Retrieved, Any]] = []

    def put(self, tokens: torch.Tensor, retrieved: Retrieved) -> None:
        copies = [(self._copy(indices), self._copy(weights)) for indices, weights in retrieved]
        event = torch.cuda.Event() if self.is_cuda else None
        self.waiting.append((self._copy(tokens), copies, event))
        if event is not None:
            event.record()

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self.is_cuda)
        return copy.copy_(tensor, non_blocking=True)

    def get(self) -> tuple[torch.Tensor, Retrieved]:
        tokens, retrieved, event = self.waiting.pop(0)
        if event is not None:
            event.synchronize()
        return tokens, retrieved

    @property
    def is_empty(self) -> bool:
        return not self.waiting
