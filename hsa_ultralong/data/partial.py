"""A build of token shards in progress: a hidden folder beside the output whose files grow, and how far they are right.

A checkpoint makes the files durable first and then replaces ``state.json``, so a build that was killed goes on from its
last checkpoint: what was written later is cut off and made again. Called by ``build.py``; tested in
``tests/data/test_resume.py``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from hsa_ultralong.data.shards import LABELS_FILE, TOKENIZER_FOLDER, TOKENS_FILE
from hsa_ultralong.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from hsa_ultralong.files.durable import write_whole
from hsa_ultralong.files.fields import DIGEST, OBJECT, mapping, require, row, rows, table, text, whole
from hsa_ultralong.files.lock import FileLock
from hsa_ultralong.files.regular import open_regular, read_regular
from hsa_ultralong.files.strict_json import sealed, unsealed

STATE_FILE = "state.json"
_LOCK_FILE = "lock"
# per document: number of tokens, int64; hash of the text, uint64
LENGTHS_FILE = "lengths.bin"
HASHES_FILE = "hashes.bin"
_GROWING = (TOKENS_FILE, LABELS_FILE, LENGTHS_FILE, HASHES_FILE)
_STATE_BYTES = 2**31


_STATE = table(
    {
        "place": row(whole(), whole()),
        **{name: whole() for name in ("num_bytes", "num_tokens", "num_documents", "num_conversations")},
        "words": mapping(text(longest=_STATE_BYTES), whole()),
        "bad": row(whole(), rows(lambda _: None)),
    }
)
# builds of earlier versions have no digests
_SAVED = table(
    {
        "identity": OBJECT,
        "sizes": table(dict.fromkeys(_GROWING, whole())),
        "digests": mapping(text(), DIGEST),
        "state": _STATE,
    },
    may_lack=("digests",),
)


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
        if self.path.is_symlink():
            raise ValueError(f"{self.path} is a symbolic link, which is not followed here; remove it")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock.acquire(self.path / _LOCK_FILE, f"{out_dir} is being built (in {self.path})")
        self._files: dict[str, Any] = {}
        try:
            saved = self._read(out_dir)
            self.state: dict[str, Any] | None = None if saved is None else saved["state"]
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
            for name in _GROWING:
                self._files[name] = os.fdopen(open_regular(self.path / name, flags), "ab")
                self._files[name].truncate(0 if saved is None else saved["sizes"][name])
            self._digests = self._hash(saved)
        except BaseException:
            self.close()
            raise

    def _read(self, out_dir: Path) -> dict[str, Any] | None:
        file = self.path / STATE_FILE
        if not os.path.lexists(file):
            return None
        try:
            saved, _ = unsealed(read_regular(file, _STATE_BYTES, follow=False), file)
            require(_SAVED, saved, f"{file}:")
            self._check_sizes(saved["sizes"], saved["state"])
        except (OSError, ValueError) as error:
            raise ValueError(
                f"the interrupted build in {self.path} is damaged ({error}); remove that folder to start again"
            ) from error
        # through JSON, as it was saved
        if saved["identity"] != json.loads(json.dumps(self._identity)):
            raise ValueError(
                f"an interrupted build of {out_dir} had other inputs, tokenizer or options; repeat the command that "
                f"began it, or remove {self.path} to start again"
            )
        return saved

    def _check_sizes(self, sizes: dict[str, int], state: dict[str, Any]) -> None:
        for name in _GROWING:
            if (self.path / name).stat().st_size < sizes[name]:
                raise ValueError(f"{name} is too short")
        num_documents, num_tokens = state["num_documents"], state["num_tokens"]
        is_valid = sizes[LENGTHS_FILE] == sizes[HASHES_FILE] == 8 * num_documents
        if not is_valid or sizes[TOKENS_FILE] not in (2 * num_tokens, 4 * num_tokens):
            raise ValueError(f"{STATE_FILE} does not fit the files beside it")

    def _hash(self, saved: dict[str, Any] | None) -> dict[str, Any]:
        """Running SHA-256 of the growing files, each of which must hold what the last checkpoint says."""
        digests = {}
        for name in _GROWING:
            digests[name] = hashlib.sha256()
            with (self.path / name).open("rb") as stream:
                while block := stream.read(1 << 20):
                    digests[name].update(block)
            if saved is not None and "digests" in saved and digests[name].hexdigest() != saved["digests"].get(name):
                raise ValueError(
                    f"the interrupted build in {self.path} is damaged ({name} is corrupt); remove that folder to start "
                    "again"
                )
        return digests

    def _write(self, name: str, data: bytes) -> None:
        self._files[name].write(data)
        self._digests[name].update(data)

    def append(self, tokens: np.ndarray, text_hash: int, labels: np.ndarray | None = None) -> None:
        """Add a document: tokens of the final dtype, hash of its text, and for a conversation labels (n,) uint8."""
        self._write(TOKENS_FILE, tokens.tobytes())
        self._write(LENGTHS_FILE, np.int64(len(tokens)).tobytes())
        self._write(HASHES_FILE, np.uint64(text_hash).tobytes())
        if labels is not None:
            self._write(LABELS_FILE, labels.tobytes())

    def keep_tokenizer(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Write the tokenizer, unless the folder has it already; what else stands in its place goes."""
        folder = self.path / TOKENIZER_FOLDER
        if not folder.is_symlink() and not any(file.is_symlink() for file in folder.glob("*")):
            with contextlib.suppress(ValueError):
                if tokenizer_fingerprint(load_tokenizer(folder)) == tokenizer_fingerprint(tokenizer):
                    return
        if folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder)
        else:
            folder.unlink(missing_ok=True)
        tokenizer.save_pretrained(folder)

    def save(self, state: dict[str, Any]) -> None:
        """Checkpoint: what was appended so far belongs to ``state``."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        sizes = {name: os.fstat(file.fileno()).st_size for name, file in self._files.items()}
        digests = {name: digest.hexdigest() for name, digest in self._digests.items()}
        content = {"identity": self._identity, "sizes": sizes, "digests": digests, "state": state}
        write_whole(self.path / STATE_FILE, sealed(content, indent=None))
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
        self._lock.release()

    def discard(self) -> None:
        """Remove the folder: there is nothing to go on from."""
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)
