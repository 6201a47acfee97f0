"""Numbers in a memory are finite, for one NaN would spoil every answer that reads it: checked when written and read.

Used by writer.py, reader.py, continuation.py and verification.py; tests/memory/test_files_finite.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from hsa_ultralong.memory.files.spec import MemoryFileError

WHAT = "numbers that are not finite (NaN or infinite)"


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all numbers of a tensor on the host are finite, in one pass; integers are."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.dtype == torch.float8_e4m3fn:
        return not bool(((tensor.view(torch.uint8) & 0x7F) == 0x7F).any())
    # NaN passes through
    low, high = tensor.aminmax()
    return math.isfinite(low) and math.isfinite(high)


def first_bad_row(tensor: torch.Tensor) -> int | None:
    """Number of the first row of (n, ...) that is not finite."""
    if is_finite(tensor):
        return None
    return next(number for number, row in enumerate(tensor) if not is_finite(row))


def require_finite_columns(columns: Mapping[str, torch.Tensor], label: str, first: int) -> None:
    """Refuse rows of a document (called `label` in the message) that are to be written from chunk `first` on.

    Raises:
        MemoryFileError: names the document, the column and the chunk.
    """
    for name, tensor in columns.items():
        row = first_bad_row(tensor)
        if row is not None:
            raise MemoryFileError(
                f"{label} was not written: {name} of its chunk {first + row} holds {WHAT}; either the model computes "
                f"them (check its weights), or {tensor.dtype} cannot hold its numbers (use another form)"
            )


def require_finite_state(tensors: Mapping[str, torch.Tensor], label: str) -> None:
    """Refuse to write a continuation of the open document (called `label`).

    Raises:
        MemoryFileError: names the document and the tensor.
    """
    for name, tensor in tensors.items():
        if not is_finite(tensor.detach().cpu()):
            raise MemoryFileError(f"{label} was not written: {name} holds {WHAT}; check the model's weights")
