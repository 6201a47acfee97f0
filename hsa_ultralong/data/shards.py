"""Token shards: a corpus tokenised once, memory-mapped ever after.

A directory holds ``tokens.bin`` (every document as bos, tokens, eos), ``documents.npy`` (offsets), ``words.txt`` (the
word bank for needle keys), ``tokenizer/`` and ``manifest.json``. Conversations, if there are any, follow the documents
of plain text, and ``labels.bin`` says which of their tokens the loss counts, a byte each. It appears at its place
complete or not at all.
Called by ``hsa data`` and ``MixtureDataset``; tested in ``tests/data/test_shards.py``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from hsa_ultralong.data.tokenizer import tokenizer_fingerprint

# 2 if there are conversations, which a reader of version 1 would take for text
FORMAT_VERSIONS = (1, 2)
TOKENS_FILE = "tokens.bin"
DOCUMENTS_FILE = "documents.npy"
WORDS_FILE = "words.txt"
LABELS_FILE = "labels.bin"
TOKENIZER_FOLDER = "tokenizer"
MANIFEST_FILE = "manifest.json"
SPLITS = ("train", "validation")


class TokenShards:
    """A directory of tokenised documents, opened read-only; pickles as its path, so workers share the page cache.

    Attributes:
        path: the directory.
        manifest: content of ``manifest.json``.
        offsets: (n + 1,) int64, where documents begin in ``data``.
        data: (num_tokens,) uint16 or uint32, memory-mapped.
        words: the word bank, most frequent first.
        labels: (tokens of all conversations,) uint8, memory-mapped; None without conversations.
    """

    def __init__(
        self,
        path: Path,
        manifest: dict[str, Any],
        offsets: np.ndarray,
        data: np.ndarray,
        words: tuple[str, ...],
        labels: np.ndarray | None = None,
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.offsets = offsets
        self.data = data
        self.words = words
        self.labels = labels

    def __reduce__(self) -> tuple[Callable[[Path], TokenShards], tuple[Path]]:
        return TokenShards.open, (self.path,)

    @classmethod
    def open(cls, path: str | Path, tokenizer: PreTrainedTokenizerFast | None = None) -> TokenShards:
        """Open a directory that ``build_shards`` wrote.

        Args:
            path: the directory.
            tokenizer: if given, must be the tokenizer of the shards (same fingerprint).

        Raises:
            ValueError: not a shard directory, another format version, damaged files, or another tokenizer.
        """
        path = Path(path)
        manifest = _read_manifest(path)
        if tokenizer is not None and tokenizer_fingerprint(tokenizer) != manifest["tokenizer_fingerprint"]:
            raise ValueError(
                f"the shards in {path} were built with another tokenizer; open them with that one, or build them again"
            )
        for name, expected in manifest["files"].items():
            size = (path / name).stat().st_size if (path / name).is_file() else None
            if size != expected["bytes"]:
                found = "is missing" if size is None else f"has {size:,} bytes"
                raise ValueError(f"{path / name} {found}, expected {expected['bytes']:,} bytes; build the shards again")
        data = np.memmap(path / TOKENS_FILE, dtype=np.dtype(manifest["dtype"]), mode="r")
        offsets = np.load(path / DOCUMENTS_FILE, allow_pickle=False)
        is_valid = (
            offsets.shape == (manifest["num_documents"] + 1,)
            and offsets[0] == 0
            and offsets[-1] == len(data)
            and bool((np.diff(offsets) > 0).all())
        )
        num_conversations = manifest.get("num_conversations", 0)
        labels = np.memmap(path / LABELS_FILE, dtype=np.uint8, mode="r") if num_conversations else None
        if labels is not None and is_valid:
            is_valid = len(labels) == offsets[-1] - offsets[manifest["num_documents"] - num_conversations]
        if not is_valid:
            raise ValueError(f"{path / DOCUMENTS_FILE} does not fit {TOKENS_FILE}; build the shards again")
        words = tuple((path / WORDS_FILE).read_text(encoding="utf-8").split())
        return cls(path, manifest, offsets, data, words, labels)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all documents, bos and eos included."""
        return len(self.data)

    @property
    def num_documents(self) -> int:
        """Number of documents of both splits."""
        return len(self.offsets) - 1

    @property
    def num_conversations(self) -> int:
        """Number of conversations of both splits; they are the last documents."""
        return int(self.manifest.get("num_conversations", 0))

    def documents(self, split: str = "train") -> np.ndarray:
        """Return the indices of the plain documents of ``"train"`` or ``"validation"``, (n,) int64, ascending."""
        return self._split(split, 0, self.num_documents - self.num_conversations)

    def conversations(self, split: str = "train") -> np.ndarray:
        """Return the indices of the conversations of ``"train"`` or ``"validation"``, (n,) int64, ascending."""
        return self._split(split, self.num_documents - self.num_conversations, self.num_documents)

    def _split(self, split: str, start: int, stop: int) -> np.ndarray:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        validation = np.array(self.manifest["validation_documents"], dtype=np.int64)
        validation = validation[(validation >= start) & (validation < stop)]
        if split == "validation":
            return validation
        return np.setdiff1d(np.arange(start, stop, dtype=np.int64), validation)

    def tokens(self, i: int) -> np.ndarray:
        """Return the tokens of document ``i``, bos first and eos last, (length,) uint16 or uint32, memory-mapped."""
        if not 0 <= i < self.num_documents:
            raise ValueError(f"document index must be within 0..{self.num_documents - 1}, got {i}")
        return self.data[self.offsets[i] : self.offsets[i + 1]]

    def loss_mask(self, i: int) -> np.ndarray:
        """Return whether the loss counts each token of conversation ``i``, (length,) bool."""
        first = self.num_documents - self.num_conversations
        if self.labels is None or not first <= i < self.num_documents:
            raise ValueError(f"document {i} is no conversation; they are {first}..{self.num_documents - 1}")
        start = self.offsets[first]
        return np.asarray(self.labels[self.offsets[i] - start : self.offsets[i + 1] - start], dtype=np.bool_)


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST_FILE
    if not file.is_file():
        raise ValueError(f"{path} holds no token shards ({MANIFEST_FILE} is missing); build them with build_shards")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not readable JSON ({error}); build the shards again") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version not in FORMAT_VERSIONS:
        known = " and ".join(map(str, FORMAT_VERSIONS))
        raise ValueError(f"{file} has format version {version}, this library reads {known}; build the shards again")
    return dict(manifest)
