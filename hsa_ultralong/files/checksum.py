"""SHA-256 of files: what shards, checkpoints and exported models are checked by. tests/files/test_checksum.py."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any


def file_digest(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def file_record(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file, as manifests hold them."""
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}
