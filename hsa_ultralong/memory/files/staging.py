"""Rows that are not committed yet: in RAM up to the size of a shard, then in a shard that no manifest names.

Used by writer.py only; tests/memory/test_files_writing.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from hsa_ultralong.files.durable import remove_file
from hsa_ultralong.memory.files.shard import ShardRecord, write_shard
from hsa_ultralong.memory.files.spec import Extent, MemorySpec

SHARD_BYTES = 2**28


class Staging:
    """Collects rows of one coming shard after the other.

    Args:
        take_number: gives the next shard number, never used before.
        shard_bytes: rows are written when this many bytes have gathered.
    """

    def __init__(self, folder: Path, spec: MemorySpec, take_number: Callable[[], int], shard_bytes: int) -> None:
        self._folder, self._spec, self._take_number = folder, spec, take_number
        self._capacity = max(1, shard_bytes // spec.row_bytes)
        self._number, self._count = 0, 0
        self._rows: dict[str, list[np.ndarray]] = {}
        self.written: list[ShardRecord] = []

    def add(self, columns: Mapping[str, torch.Tensor]) -> tuple[Extent, ...]:
        """Copy rows, {column: (n, *shape)} as `check_columns` accepts them; returns where they will lie."""
        raw = {name: as_bytes(tensor) for name, tensor in columns.items()}  # (n, row_bytes)
        total = len(next(iter(raw.values())))
        extents: list[Extent] = []
        done = 0
        while done < total:
            if self._count == self._capacity:
                self.flush()
            if self._count == 0:
                self._number = self._take_number()
                self._rows = {name: [] for name in self._spec.columns}
            count = min(total - done, self._capacity - self._count)
            for name, rows in raw.items():
                self._rows[name].append(rows[done : done + count].copy())
            extents.append(Extent(self._number, self._count, count))
            self._count += count
            done += count
        return tuple(extents)

    def flush(self) -> None:
        """Write the rows in RAM as a shard; if that fails they stay."""
        if self._count:
            self.written.append(write_shard(self._folder, self._number, self._spec, self._count, self._rows))
            self._rows, self._count = {}, 0

    def drop(self, records: Sequence[ShardRecord]) -> None:
        """Remove shards that turned out not to be needed."""
        for record in records:
            self.written.remove(record)
            remove_file(self._folder, record.file)
            remove_file(self._folder, record.pages_file)


def check_columns(spec: MemorySpec, columns: Mapping[str, torch.Tensor]) -> int:
    """The number of rows in `columns`.

    Raises:
        ValueError: missing or unknown columns, a shape or dtype that the memory does not have, or unequal lengths.
    """
    if set(columns) != set(spec.columns):
        raise ValueError(
            f"columns must be {', '.join(sorted(spec.columns))}; got {', '.join(sorted(columns)) or 'none'}"
        )
    counts = set()
    for name, column in spec.columns.items():
        tensor = columns[name]
        if tensor.ndim == 0 or tensor.shape[1:] != column.shape or tensor.dtype != column.dtype:
            raise ValueError(
                f"column {name!r} must be (n, {', '.join(map(str, column.shape))}) {column.dtype}, "
                f"got {tuple(tensor.shape)} {tensor.dtype}"
            )
        counts.add(tensor.shape[0])
    if len(counts) != 1:
        raise ValueError(f"all columns must have the same number of chunks, got {sorted(counts)}")
    return counts.pop()


def as_bytes(tensor: torch.Tensor) -> np.ndarray:
    """The rows of a tensor (n, ...) as uint8 (n, row_bytes) on the host, uncopied where possible."""
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return flat.numpy().reshape(tensor.shape[0], -1) if tensor.shape[0] else np.empty((0, 0), dtype=np.uint8)
