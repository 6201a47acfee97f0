"""A build of token shards in progress: a hidden folder beside the output whose files grow, and how far they are right.

A checkpoint makes the files durable first and then replaces ``state.json``, so a build that was killed goes on from its
last checkpoint: what was written later is cut off and made again. Called by ``build.py``; tested in
``tests/data/test_resume.py``.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from hsa_ultralong.data.shards import LABELS_FILE, TOKENIZER_FOLDER, TOKENS_FILE

STATE_FILE = "state.json"
_LOCK_FILE = "lock"
# per document: number of tokens, int64; hash of the text, uint64
LENGTHS_FILE = "lengths.bin"
HASHES_FILE = "hashes.bin"
_GROWING = (TOKENS_FILE, LABELS_FILE, LENGTHS_FILE, HASHES_FILE)


def partial_folder(out_dir: Path) -> Path:
    """Where the build of ``out_dir`` goes on until it is complete."""
    return out_dir.parent / f".{out_dir.name}.partial"


def partial_tokenizer(out_dir: Path) -> Path | None:
    """The tokenizer folder of an interrupted build of ``out_dir``, with which it must go on; None if there is none."""
    folder = partial_folder(out_dir)
    return folder / TOKENIZER_FOLDER if (folder / STATE_FILE).is_file() else None


class PartialBuild:
    """The growing files of one build; held by one process at a time.

    Args:
        out_dir: the folder that is being built.
        identity: what must be the same for a build to go on: inputs, tokenizer, options; JSON.

    Attributes:
        path: the hidden folder.
        state: that of the last checkpoint; None before the first.

    Raises:
        ValueError: another process builds the same folder, or an interrupted build had another identity.
    """

    def __init__(self, out_dir: Path, identity: dict[str, Any]) -> None:
        self.path = partial_folder(out_dir)
        self._identity = identity
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / _LOCK_FILE).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise ValueError(
                f"another process is building {out_dir} (in {self.path}); wait for it or stop it"
            ) from error
        saved = self._read(out_dir)
        self.state: dict[str, Any] | None = None if saved is None else saved["state"]
        self._files = {name: (self.path / name).open("ab") for name in _GROWING}
        for name, file in self._files.items():
            file.truncate(0 if saved is None else saved["sizes"][name])

    def _read(self, out_dir: Path) -> dict[str, Any] | None:
        file = self.path / STATE_FILE
        if not file.is_file():
            return None
        try:
            saved: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            sizes = {name: (self.path / name).stat().st_size for name in _GROWING}
            is_whole = all(sizes[name] >= saved["sizes"][name] for name in _GROWING)
        except (OSError, ValueError, KeyError):
            is_whole = False
        if not is_whole:
            self._lock.close()
            raise ValueError(f"the interrupted build in {self.path} is damaged; remove that folder to start again")
        # through JSON, as it was saved
        if saved["identity"] != json.loads(json.dumps(self._identity)):
            self._lock.close()
            raise ValueError(
                f"an interrupted build of {out_dir} had other inputs, tokenizer or options; repeat the command that "
                f"began it, or remove {self.path} to start again"
            )
        return saved

    def append(self, tokens: np.ndarray, text_hash: int, labels: np.ndarray | None = None) -> None:
        """Add a document: tokens of the final dtype, hash of its text, and for a conversation labels (n,) uint8."""
        self._files[TOKENS_FILE].write(tokens.tobytes())
        self._files[LENGTHS_FILE].write(np.int64(len(tokens)).tobytes())
        self._files[HASHES_FILE].write(np.uint64(text_hash).tobytes())
        if labels is not None:
            self._files[LABELS_FILE].write(labels.tobytes())

    def save(self, state: dict[str, Any]) -> None:
        """Checkpoint: what was appended so far belongs to ``state``."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        sizes = {name: os.fstat(file.fileno()).st_size for name, file in self._files.items()}
        new = self.path / f"{STATE_FILE}.new"
        with new.open("w", encoding="utf-8") as stream:
            json.dump({"identity": self._identity, "sizes": sizes, "state": state}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        new.replace(self.path / STATE_FILE)
        self.state = state

    def lengths_and_hashes(self) -> tuple[np.ndarray, np.ndarray]:
        """Of all documents, (n,) int64 and (n,) uint64."""
        for file in self._files.values():
            file.flush()
        return (
            np.fromfile(self.path / LENGTHS_FILE, dtype=np.int64),
            np.fromfile(self.path / HASHES_FILE, dtype=np.uint64),
        )

    def publish(self, out_dir: Path, *, has_labels: bool) -> None:
        """Rename the folder to ``out_dir``, without the files that only a build needs."""
        self.close()
        for name in (STATE_FILE, _LOCK_FILE, LENGTHS_FILE, HASHES_FILE, *(() if has_labels else (LABELS_FILE,))):
            (self.path / name).unlink(missing_ok=True)
        self.path.replace(out_dir)

    def close(self) -> None:
        """Leave the folder to whoever goes on."""
        for file in self._files.values():
            file.close()
        self._lock.close()

    def discard(self) -> None:
        """Remove the folder: there is nothing to go on from."""
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)
