"""What a reading computes is finite, or the document is refused: sums stay on the device, one look at the end.

Used by reader.py; tests/inference/test_nonfinite.py.
"""

from __future__ import annotations

import torch


class FiniteCheck:
    """Sums of tensors that were computed: not finite if any number was not."""

    def __init__(self) -> None:
        self._total: torch.Tensor | None = None

    def note(self, *parts: torch.Tensor) -> None:
        """Add the sums of these tensors, without waiting for the device."""
        for part in parts:
            found = part.detach().sum(dtype=torch.float32)
            self._total = found if self._total is None else self._total + found

    def require(self, label: str) -> None:
        """Refuse a document (called `label`); waits for the device.

        Raises:
            ValueError: something noted was not finite.
        """
        if self._total is not None and not bool(self._total.isfinite()):
            raise ValueError(
                f"{label} cannot be memorised: the model computes numbers that are not finite (NaN or infinite) for "
                "it; check the model's weights, or use bf16 or fp32 where it runs in fp16"
            )
        self._total = None
