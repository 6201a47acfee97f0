"""Lines that are kept for good lie packed, as NAME.xz in place of NAME. A run writes NAME; what reads it takes both.

Called by eval/recorded_run.py and eval/plots.py; tests/files/test_packed.py.
"""

from __future__ import annotations

import lzma
from pathlib import Path

from hsa_ultralong.files.regular import read_regular

SUFFIX = ".xz"
MAX_BYTES = 2**32


def stored(path: Path) -> Path:
    """Where the content of `path` lies: in itself, or packed beside it if only that is there."""
    beside = path.with_name(path.name + SUFFIX)
    return beside if not path.exists() and beside.exists() else path


# of text: what follows a byte depends on all of the byte before it, and not on places modulo four
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "pb": 0, "nice_len": 273}]


def pack(data: bytes) -> bytes:
    """Content of a .xz file, as small as xz makes it."""
    return lzma.compress(data, filters=_FILTERS)


def unpacked(path: Path) -> bytes:
    """What was packed into a .xz file.

    Raises:
        ValueError: a damaged file, or more than 4 GiB.
    """
    reader = lzma.LZMADecompressor(lzma.FORMAT_XZ)
    try:
        data = reader.decompress(read_regular(path, MAX_BYTES), MAX_BYTES)
    except lzma.LZMAError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not reader.eof:
        raise ValueError(f"{path} is cut off, or holds more than {MAX_BYTES:,} bytes")
    return data


def read_stored(path: Path) -> bytes:
    """The content of a file, unpacked if its name ends in .xz; errors as in `unpacked` and `read_regular`."""
    return unpacked(path) if path.suffix == SUFFIX else read_regular(path, MAX_BYTES)
