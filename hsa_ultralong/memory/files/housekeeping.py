"""What a memory folder contains besides its current generation: leftovers of killed writers, strangers, gaps.

Called by writer.py; tests/memory/test_files_crash.py, tests/memory/test_files_refusals.py.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from hsa_ultralong.memory.files.durable import LOCK_FILE, TEMPORARY, remove_file
from hsa_ultralong.memory.files.manifest import FILE, Manifest
from hsa_ultralong.memory.files.shard import FOLDER
from hsa_ultralong.memory.files.spec import MemoryFileError

_OURS = re.compile(r"(\d{6,}\.safetensors|\d{6,}\.pages\.json|continuation-\d+\.safetensors|manifest\.json)(\.tmp)?")


def require_empty(folder: Path) -> None:
    """Refuse to make a memory in a folder that holds anything but the traces of a killed `create`.

    Raises:
        MemoryFileError: names what is there.
    """
    names = sorted(entry.name for entry in folder.iterdir() if entry.name not in (LOCK_FILE, FILE + TEMPORARY))
    if FILE in names:
        raise MemoryFileError(f"{folder} holds a memory already; open it, or choose another name")
    if names and (names != [FOLDER] or any((folder / FOLDER).iterdir())):
        raise MemoryFileError(f"{folder} is not empty ({names[0]}); choose another name, or empty the folder")


def require_files(folder: Path, manifest: Manifest) -> None:
    """Refuse to go on with a memory that lacks files; pages of shards are not read.

    Raises:
        MemoryFileError: a file of this generation is missing, truncated, or (page tables, continuation) damaged.
    """
    sizes = {record.file: record.num_bytes for record in manifest.shards}
    sums = {record.pages_file: record.sha256 for record in manifest.shards}
    if manifest.continuation is not None:
        sums[manifest.continuation.file] = manifest.continuation.sha256
    for name in sorted(manifest.files()):
        path = folder / name
        if not path.is_file():
            problem = "is missing"
        elif name in sizes and path.stat().st_size != sizes[name]:
            problem = f"has {path.stat().st_size:,} bytes, not {sizes[name]:,}"
        elif name in sums and hashlib.sha256(path.read_bytes()).hexdigest() != sums[name]:
            problem = "is damaged (its checksum differs)"
        else:
            continue
        raise MemoryFileError(f"{path} {problem}; restore the memory from a copy or build it again")


def remove_leftovers(folder: Path, manifest: Manifest) -> None:
    """Remove temporary files and what no manifest names; files that are not ours stay."""
    wanted = manifest.files() | {FILE}
    for directory, prefix in ((folder, ""), (folder / FOLDER, f"{FOLDER}/")):
        if directory.is_dir():
            for entry in directory.iterdir():
                if _OURS.fullmatch(entry.name) and prefix + entry.name not in wanted:
                    remove_file(entry)
    (folder / FOLDER).mkdir(exist_ok=True)
