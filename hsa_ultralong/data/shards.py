"""Token shards: a corpus tokenised once, read as needed ever after.

A directory holds ``tokens.bin`` (every document as bos, tokens, eos), ``documents.npy`` (offsets), ``words.txt`` (the
word bank for needle keys), ``tokenizer/`` and ``manifest.json``, which is sealed and has every file's SHA-256.
Conversations, if there are any, follow the documents of plain text, and ``labels.bin`` says which of their tokens the
loss counts, a byte each. It appears at its place complete or not at all.
Called by ``hsa data`` and ``MixtureDataset``; ``tests/data/test_shards.py``, ``tests/data/test_damaged_shards.py``.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from hsa_ultralong.data.token_file import TokenFile, recall, remember
from hsa_ultralong.data.tokenizer import tokenizer_fingerprint
from hsa_ultralong.files.fields import (
    DIGEST,
    OBJECT,
    RECORD,
    Check,
    is_finite,
    mapping,
    one_of,
    require,
    rows,
    table,
    text,
    that,
    whole,
)
from hsa_ultralong.files.messages import reason, shown
from hsa_ultralong.files.regular import read_regular
from hsa_ultralong.files.strict_json import unsealed

# 2 if there are conversations, which a reader of version 1 would take for text
FORMAT_VERSIONS = (1, 2)
TOKENS_FILE = "tokens.bin"
DOCUMENTS_FILE = "documents.npy"
WORDS_FILE = "words.txt"
LABELS_FILE = "labels.bin"
TOKENIZER_FOLDER = "tokenizer"
MANIFEST_FILE = "manifest.json"
SPLITS = ("train", "validation")
_MANIFEST_FIELDS: Mapping[str, Check] = {
    "format_version": whole(*FORMAT_VERSIONS),
    "tokenizer_fingerprint": DIGEST,
    "vocab_size": whole(1, 2**32),
    "dtype": one_of(("<u2", "<u4")),
    "num_documents": whole(1),
    "num_conversations": whole(),
    "num_tokens": whole(1),
    "num_text_bytes": whole(),
    "num_words": whole(),
    "files": mapping(text(), RECORD),
    "bad_records": OBJECT,
    "passed_over": OBJECT,
    "validation_fraction": that(lambda value: is_finite(value) and 0 <= value < 1, "a number of at least 0 below 1"),
    "validation_documents": rows(whole()),
}
# not in folders of earlier versions
_OPTIONAL = ("num_conversations", "bad_records", "passed_over")


class TokenShards:
    """A directory of tokenised documents, opened read-only; pickles as its path.

    Attributes:
        path: the directory.
        manifest: content of ``manifest.json``.
        offsets: (n + 1,) int64, where documents begin in ``data``.
        data: (num_tokens,) uint16 or uint32; slices are read from the file and checked against the vocabulary.
        words: the word bank, most frequent first.
        labels: (tokens of all conversations,) uint8, read like ``data``; None without conversations.
    """

    def __init__(
        self,
        path: Path,
        manifest: dict[str, Any],
        offsets: np.ndarray,
        data: TokenFile,
        words: tuple[str, ...],
        labels: TokenFile | None = None,
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.offsets = offsets
        self.data = data
        self.words = words
        self.labels = labels

    def __reduce__(self) -> tuple[Callable[..., TokenShards], tuple[Path, list[list[Any]]]]:
        # another process need not read all of them again if they are still as they were here
        return _reopen, (self.path, [file.record() for file in self._files().values()])

    def _files(self) -> dict[str, TokenFile]:
        return {TOKENS_FILE: self.data} | ({} if self.labels is None else {LABELS_FILE: self.labels})

    @classmethod
    def open(cls, path: str | Path, tokenizer: PreTrainedTokenizerFast | None = None) -> TokenShards:
        """Open a directory that ``build_shards`` wrote.

        All files are read once to compare their SHA-256; that they were whole is remembered, in the directory if it can
        be written, until they change.

        Args:
            path: the directory.
            tokenizer: if given, must be the tokenizer of the shards (same fingerprint).

        Raises:
            ValueError: not a shard directory, another format version, damaged files, or another tokenizer.
        """
        return cls._open(Path(path), tokenizer)

    @classmethod
    def _open(
        cls, path: Path, tokenizer: PreTrainedTokenizerFast | None = None, trusted: list[list[Any]] | None = None
    ) -> TokenShards:
        manifest = _read_manifest(path)
        if tokenizer is not None and (tokenizer_fingerprint(tokenizer), len(tokenizer)) != (
            manifest["tokenizer_fingerprint"],
            manifest["vocab_size"],
        ):
            raise ValueError(
                f"the shards in {path} were built with another tokenizer; open them with that one, or build them again"
            )
        num_conversations = manifest.get("num_conversations", 0)
        for name, expected in manifest["files"].items():
            size = (path / name).stat().st_size if (path / name).is_file() else None
            if size != expected["bytes"]:
                found = "is missing" if size is None else f"has {size:,} bytes"
                raise ValueError(f"{path / name} {found}, expected {expected['bytes']:,} bytes; build the shards again")
        data = TokenFile(path / TOKENS_FILE, np.dtype(manifest["dtype"]), manifest["vocab_size"])
        labels = TokenFile(path / LABELS_FILE, np.dtype(np.uint8), 2) if num_conversations else None
        offsets = _read_offsets(path, manifest)
        is_valid = offsets[0] == 0 and offsets[-1] == len(data) and bool((offsets[1:] > offsets[:-1]).all())
        if labels is not None and is_valid:
            is_valid = len(labels) == offsets[-1] - offsets[manifest["num_documents"] - num_conversations]
        if not is_valid or len(data) != manifest["num_tokens"]:
            raise ValueError(f"{path / DOCUMENTS_FILE} does not fit {TOKENS_FILE}; build the shards again")
        words = _read_words(path, manifest)
        shards = cls(path, manifest, offsets, data, words, labels)
        shards._verify(trusted)
        return shards

    def _verify(self, trusted: list[list[Any]] | None) -> None:
        """Every byte and every number once; files in one of the `trusted` states were verified by who opens them."""
        files = self._files()
        digests = {name: self.manifest["files"][name]["sha256"] for name in files}
        recall(self.path, files)
        for name, file in files.items():
            if trusted is not None and (not trusted or file.record() in trusted):
                file.trust(digests[name])
            file.verify(digests[name])
        if trusted is None:
            remember(self.path, files, digests)

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
        """Return the tokens of document ``i``, bos first and eos last, (length,) uint16 or uint32."""
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


def open_new(path: Path) -> TokenShards:
    """Shards that this process has just built, whose checksums are those of what it wrote."""
    return TokenShards._open(path, trusted=[])


def _reopen(path: Path, states: list[list[Any]]) -> TokenShards:
    return TokenShards._open(path, trusted=states)


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST_FILE
    if not file.exists():
        raise ValueError(f"{path} holds no token shards ({MANIFEST_FILE} is missing); build them with build_shards")
    data = read_regular(file)
    try:
        manifest, _ = unsealed(data, file)
        if (version := manifest.get("format_version")) in FORMAT_VERSIONS:
            _check_manifest(manifest, str(file))
    except ValueError as error:
        raise ValueError(f"{error}; build the shards again") from error
    if version not in FORMAT_VERSIONS:
        known = " and ".join(map(str, FORMAT_VERSIONS))
        raise ValueError(
            f"{file} has format version {shown(version)}, this library reads {known}; build the shards again"
        )
    return manifest


def _check_manifest(manifest: dict[str, Any], where: str) -> None:
    """Fields by their kind, and what they say together."""
    require(table(_MANIFEST_FIELDS, may_lack=_OPTIONAL), manifest, f"{where}:")
    num_documents, num_conversations = manifest["num_documents"], manifest.get("num_conversations", 0)
    names = {TOKENS_FILE, DOCUMENTS_FILE, WORDS_FILE} | ({LABELS_FILE} if num_conversations else set())
    if manifest["files"].keys() != names:
        raise ValueError(f"{where}: files must be {', '.join(sorted(names))}, got {shown(sorted(manifest['files']))}")
    if num_conversations > num_documents or (manifest["format_version"] == 2) != (num_conversations > 0):
        raise ValueError(f"{where}: {num_conversations:,} conversations contradict its other fields")
    held_out = manifest["validation_documents"]
    if held_out and (held_out[-1] >= num_documents or any(one >= other for one, other in pairwise(held_out))):
        raise ValueError(f"{where}: validation_documents must ascend below {num_documents:,}")


def _read_checked(path: Path, manifest: dict[str, Any], name: str) -> bytes:
    """Content of a small file, of the size and SHA-256 of the manifest."""
    record = manifest["files"][name]
    data = read_regular(path / name, record["bytes"])
    if hashlib.sha256(data).hexdigest() != record["sha256"]:
        raise ValueError(f"{path / name} is corrupt (its SHA-256 is not that of the manifest); build the shards again")
    return data


def _read_offsets(path: Path, manifest: dict[str, Any]) -> np.ndarray:
    """(num_documents + 1,) int64; the header of the file is believed only if the content is as it says."""
    data = _read_checked(path, manifest, DOCUMENTS_FILE)
    stream = io.BytesIO(data)
    shape = (manifest["num_documents"] + 1,)
    try:
        np.lib.format.read_magic(stream)  # type: ignore[no-untyped-call]
        header = np.lib.format.read_array_header_1_0(stream)  # type: ignore[no-untyped-call]
    # whatever a header that follows no rule makes numpy stumble over
    except Exception as error:
        raise ValueError(f"{path / DOCUMENTS_FILE} is no array ({reason(error)}); build the shards again") from error
    if header != (shape, False, np.dtype("<i8")) or len(data) - stream.tell() != 8 * shape[0]:
        raise ValueError(f"{path / DOCUMENTS_FILE} does not fit {MANIFEST_FILE}; build the shards again")
    return np.frombuffer(data, dtype="<i8", offset=stream.tell())


def _read_words(path: Path, manifest: dict[str, Any]) -> tuple[str, ...]:
    try:
        words = tuple(_read_checked(path, manifest, WORDS_FILE).decode("utf-8").split())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path / WORDS_FILE} is no UTF-8 text; build the shards again") from error
    if len(words) != manifest["num_words"]:
        raise ValueError(f"{path / WORDS_FILE} does not fit {MANIFEST_FILE}; build the shards again")
    return words
