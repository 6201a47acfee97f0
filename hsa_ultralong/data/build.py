"""Building token shards from text: tokenise in parallel, count words, split by hash, write atomically.

Called by ``hsa data`` and ``hsa quickstart``; what it writes is described and read in ``shards.py``; tested in
``tests/data/test_shards.py``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from hsa_ultralong.data.evaluation_words import EVALUATION_WORDS
from hsa_ultralong.data.shards import (
    DOCUMENTS_FILE,
    FORMAT_VERSION,
    MANIFEST_FILE,
    TOKENS_FILE,
    WORDS_FILE,
    TokenShards,
)
from hsa_ultralong.data.sources import HUB_PREFIX, BadRecords, iter_texts, source_files
from hsa_ultralong.data.text import PathLike
from hsa_ultralong.data.tokenizer import plain_backend, special_token_ids, tokenizer_fingerprint

logger = logging.getLogger(__name__)

MAX_WORDS = 20_000
_WORD = re.compile(r"\b[a-z]{4,10}\b")
# Beyond this many different words, those seen once are forgotten, so that counting takes bounded memory.
_MAX_COUNTED_WORDS = 2_000_000

# A blank or line break between a visible character and a letter is where a word begins for every byte-level
# pre-tokenizer, so tokenising the two sides apart gives the same tokens.
_CUT = re.compile(r"(?<=\S)[ \n](?=[^\W\d_])")
_PIECE_CHARACTERS = 1 << 16
_BATCH_CHARACTERS = 1 << 22


def build_shards(
    paths: PathLike | Iterable[PathLike],
    tokenizer: PreTrainedTokenizerFast,
    out_dir: str | Path,
    *,
    validation_fraction: float = 0.005,
    text_field: str = "text",
    max_bad: int = 0,
    progress: Callable[[int], None] | None = None,
) -> TokenShards:
    """Tokenise text files into a new directory of token shards.

    Documents are those of ``iter_texts(paths)``. A document belongs to validation if the hash of its text falls
    into the fraction, so a text keeps its side when the corpus grows, and duplicates stay together. At least one
    document is validation and at least one training, if there are two different ones and the fraction is above 0.

    Args:
        paths: text files, tables (.jsonl, .parquet), folders, "-" or hub datasets, see ``sources.iter_texts``.
        tokenizer: a fast tokenizer with bos, eos and pad.
        out_dir: directory to create; must not exist yet, or be empty.
        validation_fraction: share of documents held out, 0 <= fraction < 1.
        text_field: field or column of tables that holds the text.
        max_bad: so many records that cannot be read are passed over, logged and counted in the manifest.
        progress: called with the number of UTF-8 bytes of text tokenised so far.

    Returns:
        The shards, opened.

    Raises:
        ValueError: more unreadable input than ``max_bad``, ``out_dir`` in use, or a wrong fraction. Then nothing is
            left at ``out_dir``.
    """
    out_dir = Path(out_dir)
    if not 0.0 <= validation_fraction < 1.0:
        raise ValueError(f"validation_fraction must be at least 0 and below 1, got {validation_fraction}")
    if out_dir.exists() and not (out_dir.is_dir() and not any(out_dir.iterdir())):
        raise ValueError(f"{out_dir} exists already; remove it or choose another directory")
    special_token_ids(tokenizer)
    named = [paths] if isinstance(paths, (str, Path)) else list(paths)
    source_files([path for path in named if not str(path).startswith(HUB_PREFIX)] or ["-"])
    bad = BadRecords(max_bad)
    documents = iter_texts(named, text_field=text_field, on_bad=bad if max_bad else None)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    work_dir = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", suffix=".tmp", dir=out_dir.parent))
    try:
        work_dir.chmod(0o755)
        _write_shards(documents, tokenizer, work_dir, validation_fraction, progress, bad)
        work_dir.replace(out_dir)
    except BaseException:
        shutil.rmtree(work_dir, ignore_errors=True)
        raise
    return TokenShards.open(out_dir)


def _write_shards(
    documents: Iterator[str],
    tokenizer: PreTrainedTokenizerFast,
    directory: Path,
    validation_fraction: float,
    progress: Callable[[int], None] | None,
    bad: BadRecords,
) -> None:
    dtype = np.dtype("<u2" if len(tokenizer) < 1 << 16 else "<u4")
    offsets, hashes, words = array("q", [0]), array("Q"), Counter[str]()
    num_bytes = 0

    def observed() -> Iterator[str]:
        nonlocal num_bytes
        for document in documents:
            encoded = document.encode("utf-8")
            num_bytes += len(encoded)
            hashes.append(int.from_bytes(hashlib.sha256(encoded).digest()[:8], "big"))
            _count_words(words, document)
            yield document

    with (directory / TOKENS_FILE).open("wb") as file:
        for ids in _iter_tokens(observed(), tokenizer):
            file.write(ids.astype(dtype).tobytes())
            offsets.append(offsets[-1] + len(ids))
            if progress is not None:
                progress(num_bytes)
    np.save(directory / DOCUMENTS_FILE, np.array(offsets, dtype=np.int64))
    bank = [word for word, _ in sorted(words.items(), key=lambda item: (-item[1], item[0]))[:MAX_WORDS]]
    (directory / WORDS_FILE).write_text("".join(f"{word}\n" for word in bank), encoding="utf-8")
    manifest: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "vocab_size": len(tokenizer),
        "dtype": dtype.str,
        "num_documents": len(hashes),
        "num_tokens": offsets[-1],
        "num_text_bytes": num_bytes,
        "num_words": len(bank),
        "files": {name: _file_record(directory / name) for name in (TOKENS_FILE, DOCUMENTS_FILE, WORDS_FILE)},
        "bad_records": {"count": bad.count, "first": bad.messages},
        "validation_fraction": validation_fraction,
        "validation_documents": _validation_documents(np.array(hashes, dtype=np.uint64), validation_fraction),
    }
    (directory / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    logger.info("%d documents, %d bytes of text, %d tokens", len(hashes), num_bytes, offsets[-1])


def _iter_tokens(documents: Iterator[str], tokenizer: PreTrainedTokenizerFast) -> Iterator[np.ndarray]:
    """Yield every document as bos, tokens, eos, (length,) int64, tokenising pieces of several documents in parallel."""
    bos, eos, _ = special_token_ids(tokenizer)
    backend = plain_backend(tokenizer)
    can_cut = _can_cut(backend)
    for batch in _batches(documents):
        pieces = [split_pieces(document) if can_cut else [document] for document in batch]
        flat = [piece for document in pieces for piece in document]
        encodings = iter(backend.encode_batch_fast(flat, add_special_tokens=False))
        for document in pieces:
            parts = [np.array(next(encodings).ids, dtype=np.int64) for _ in document]
            yield np.concatenate([np.array([bos]), *parts, np.array([eos])])


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def split_pieces(text: str, num_characters: int = _PIECE_CHARACTERS) -> list[str]:
    """Cut a text into pieces of about ``num_characters`` whose tokens, joined, are the tokens of the text.

    Cuts fall before a word; where none begins, the piece grows until one does.
    """
    pieces: list[str] = []
    start = 0
    while len(text) - start > num_characters:
        cut = _CUT.search(text, start + num_characters)
        if cut is None:
            break
        pieces.append(text[start : cut.start()])
        start = cut.start()
    pieces.append(text[start:])
    return pieces


def _can_cut(backend: Tokenizer) -> bool:
    """Tell whether tokens of pieces are tokens of the whole, which holds for byte-level tokenizers."""
    left, blank, line = "It was the 12th old.", " mill in town", "\nThe end of it"
    whole: list[int] = backend.encode(left + blank + line, add_special_tokens=False).ids
    parts: list[int] = [
        token for part in (left, blank, line) for token in backend.encode(part, add_special_tokens=False).ids
    ]
    return whole == parts


def _count_words(words: Counter[str], document: str) -> None:
    words.update(_WORD.findall(document))
    if len(words) > _MAX_COUNTED_WORDS:
        for word in [word for word, count in words.items() if count == 1]:
            del words[word]
    for word in EVALUATION_WORDS:
        words.pop(word, None)


def _validation_documents(hashes: np.ndarray, fraction: float) -> list[int]:
    """Pick documents whose hash, read as a number in [0, 1), is below the fraction; some on either side if possible."""
    order = np.unique(hashes)
    if fraction == 0.0 or len(order) < 2:
        return []
    num_chosen = int(np.searchsorted(order, np.uint64(int(fraction * 2.0**64))))
    limit = order[min(max(num_chosen, 1), len(order) - 1)]
    return [int(i) for i in np.flatnonzero(hashes < limit)]


def _file_record(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
