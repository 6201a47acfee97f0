"""One file to read: where it lies, what it is called, what it holds.

Made by ``inputs.py``, read by ``text.py``, ``tables.py`` and ``documents.py``; tested in ``tests/data/test_inputs.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from hsa_ultralong.data import kinds
from hsa_ultralong.data.encodings import AUTO, HEAD_BYTES
from hsa_ultralong.data.unpacking import open_unpacked, packing_of

HUB_PREFIX = "hf:"


@dataclass(frozen=True)
class InputFile:
    """A file to read.

    Attributes:
        path: where its bytes lie.
        name: what people and documents call it; valid UTF-8.
        encoding: of text, "auto" or as Python names it.
        digest: SHA-256 of what came through a pipe, "" for a file.
        is_found: it was found in a folder, not named.
    """

    path: Path
    name: str
    encoding: str = AUTO
    digest: str = ""
    is_found: bool = False

    @property
    def num_bytes(self) -> int:
        """Size on disk."""
        return self.path.stat().st_size

    @property
    def is_packed(self) -> bool:
        """True if it grows when it is read."""
        with self.path.open("rb") as file:
            return bool(packing_of(file.read(16))) or kinds.kind_by_name(self.name) == kinds.PARQUET

    def open(self) -> BinaryIO:
        """The unpacked bytes; see `open_unpacked`."""
        return open_unpacked(self.path, self.name)

    def head(self) -> bytes:
        """The first 64 KiB, unpacked."""
        with self.open() as file:
            return file.read(HEAD_BYTES)

    def kind(self) -> str:
        """What it is, one of those in ``kinds.py``.

        Raises:
            ValueError: it cannot be read or is not what its name says.
        """
        found = kinds.kind_of(self.name, self.head())
        if found != "ZIP":
            return found
        with self.open() as file:
            return kinds.kind_of_zip(self.name, kinds.as_seekable(file))
