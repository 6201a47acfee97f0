"""Building token shards: tokenise in parallel, count words, split by hash, go on after an interruption.

Called by ``hsa data``; what it writes is described and read in ``shards.py``; tested in ``tests/data/test_shards.py``
and ``tests/data/test_resume.py``.
"""

from __future__ import annotations

import hashlib
import io
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from hsa_ultralong.data.chat import conversation_pieces, parse_messages
from hsa_ultralong.data.encodings import AUTO
from hsa_ultralong.data.evaluation_words import EVALUATION_WORDS
from hsa_ultralong.data.inputs import (
    Input,
    InputFile,
    PassedOver,
    Spool,
    inputs_of,
    missing_parents,
    remove_empty,
    spool_of,
)
from hsa_ultralong.data.kinds import JSON, JSON_LINES, PARQUET
from hsa_ultralong.data.partial import PartialBuild
from hsa_ultralong.data.shards import (
    DOCUMENTS_FILE,
    FORMAT_VERSIONS,
    LABELS_FILE,
    MANIFEST_FILE,
    TOKENS_FILE,
    WORDS_FILE,
    TokenShards,
    open_new,
)
from hsa_ultralong.data.sources import BadRecords, parse_text, read_parsed
from hsa_ultralong.data.tokenizer import plain_backend, special_token_ids, tokenizer_fingerprint
from hsa_ultralong.files.checksum import file_record
from hsa_ultralong.files.durable import write_whole
from hsa_ultralong.files.strict_json import sealed

logger = logging.getLogger(__name__)

PathLike = str | Path
BuildProgress = Callable[[int, int], None]

MAX_WORDS = 20_000
_WORD = re.compile(r"\b[a-z]{4,10}\b")
# Beyond this many different words, those seen once are forgotten, so that counting takes bounded memory.
_MAX_COUNTED_WORDS = 2_000_000

# A blank or line break between a visible character and a letter is where a word begins for every byte-level
# pre-tokenizer, so tokenising the two sides apart gives the same tokens.
_CUT = re.compile(r"(?<=\S)[ \n](?=[^\W\d_])")
_PIECE_CHARACTERS = 1 << 16
_BATCH_CHARACTERS = 1 << 22
# files of folders that a manifest names
_MAX_PASSED_OVER = 10_000


class _Document(NamedTuple):
    """A text, for a conversation its pieces with what the loss counts, and where the record after it lies."""

    text: str
    pieces: list[tuple[str, bool]] | None
    next_input: int
    next_record: int


def build_shards(
    paths: PathLike | Iterable[PathLike | Input],
    tokenizer: PreTrainedTokenizerFast,
    out_dir: str | Path,
    *,
    chats: Iterable[PathLike | Input] = (),
    validation_fraction: float = 0.005,
    text_field: str = "text",
    chat_field: str = "messages",
    encoding: str = AUTO,
    max_bad: int = 0,
    passed_over: Sequence[PassedOver] = (),
    progress: BuildProgress | None = None,
    checkpoint_seconds: float = 30.0,
) -> TokenShards:
    """Tokenise documents, then conversations, into a new directory of token shards.

    A document belongs to validation if the hash of its text falls into the fraction, so a text keeps its side when the
    corpus grows, and duplicates stay together. At least one document is validation and at least one training, if there
    are two different ones and the fraction is above 0; the same holds for conversations.

    An interrupted build leaves a hidden folder beside ``out_dir``; the same call goes on there and ends with the same
    files as one that was never interrupted. What comes through pipes is copied beside ``out_dir`` until the end.

    Args:
        paths: inputs of plain documents, see ``inputs.inputs_of``; may be empty if there are chats.
        tokenizer: a fast tokenizer with bos, eos and pad; kept in the directory.
        out_dir: directory to create; must not exist yet, or be empty.
        chats: inputs of conversations: JSON and parquet files, folders of them, hub datasets; see ``chat.py``.
        validation_fraction: share of documents held out, 0 <= fraction < 1.
        text_field, chat_field: field or column of tables that holds the text, the messages.
        encoding: of text that has no byte order mark and is not UTF-8, such as "cp1252".
        max_bad: so many records that cannot be read are passed over, logged and counted in the manifest.
        passed_over: files of folders that were left out when ``paths`` were made inputs, for the manifest.
        progress: called with the numbers of UTF-8 bytes of text and of tokens so far.
        checkpoint_seconds: least time between two checkpoints.

    Returns:
        The shards, opened.

    Raises:
        ValueError: more unreadable input than ``max_bad``, ``out_dir`` in use, an interrupted build of other inputs, or
            a wrong fraction. Then nothing is at ``out_dir``.
    """
    out_dir = Path(out_dir)
    if not 0.0 <= validation_fraction < 1.0:
        raise ValueError(f"validation_fraction must be at least 0 and below 1, got {validation_fraction}")
    if out_dir.exists() and not (out_dir.is_dir() and not any(out_dir.iterdir())):
        raise ValueError(f"{out_dir} exists already; remove it or choose another directory")
    special_token_ids(tokenizer)
    skipped = list(passed_over)
    with spool_of(out_dir) as spool:
        chat_inputs = chat_inputs_of(chats, spool, chat_field, encoding, skipped)
        named = [paths] if isinstance(paths, (str, Path)) else list(paths)
        options: dict[str, Any] = {"field": text_field, "encoding": encoding, "passed_over": skipped}
        inputs = inputs_of(named, spool=spool, **options) if named or not chat_inputs else []
        identity = {
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "documents": [text_field, *map(_identify, inputs)],
            "conversations": [chat_field, *map(_identify, chat_inputs)],
        }
        made = missing_parents(out_dir)
        partial = PartialBuild(out_dir, identity)
        build = _Build(partial, tokenizer, max_bad)
        try:
            build.run(inputs, chat_inputs, text_field, chat_field, progress, checkpoint_seconds)
            build.finish(validation_fraction, skipped)
            partial.publish(out_dir, has_labels=build.num_conversations > 0)
        except BaseException:
            if build.keep():
                partial.close()
                logger.warning("the build so far is kept in %s; the same command goes on from there", partial.path)
            else:
                partial.discard()
                remove_empty(made)
            raise
    return open_new(out_dir)


def chat_inputs_of(
    chats: Iterable[PathLike | Input],
    spool: Spool,
    field: str = "messages",
    encoding: str = AUTO,
    passed_over: list[PassedOver] | None = None,
) -> list[Input]:
    """The inputs of conversations, see ``inputs.inputs_of``; none for none.

    Raises:
        ValueError: a file that can hold none.
    """
    named = list(chats)
    options: dict[str, Any] = {"field": field, "encoding": encoding, "passed_over": passed_over}
    inputs = inputs_of(named, spool=spool, **options) if named else []
    for one in inputs:
        if isinstance(one, InputFile) and (kind := one.kind()) not in (JSON_LINES, JSON, PARQUET):
            raise ValueError(f"conversations are read from .jsonl, .json, .parquet, hf:NAME; got {one.name} ({kind})")
    return inputs


def _identify(one: Input) -> list[Any]:
    """An input and, of a file, size and time of change or digest: a build must not go on with another text."""
    if isinstance(one, str):
        return [one]
    if one.digest:
        return [one.name, one.encoding, one.digest]
    status = one.path.stat()
    return [str(one.path.resolve()), one.encoding, status.st_size, status.st_mtime_ns]


class _Build:
    """One build: what it has counted, and its place in the inputs."""

    def __init__(self, partial: PartialBuild, tokenizer: PreTrainedTokenizerFast, max_bad: int) -> None:
        self._partial = partial
        self._tokenizer = tokenizer
        self._dtype = np.dtype("<u2" if len(tokenizer) < 1 << 16 else "<u4")
        self._bos, self._eos, _ = special_token_ids(tokenizer)
        self._backend = plain_backend(tokenizer)
        self._can_cut = _can_cut(self._backend)
        state = partial.state or {}
        self.place: list[int] = state.get("place", [0, 1])
        self.num_bytes: int = state.get("num_bytes", 0)
        self.num_tokens: int = state.get("num_tokens", 0)
        self.num_documents: int = state.get("num_documents", 0)
        self.num_conversations: int = state.get("num_conversations", 0)
        self.words: Counter[str] = Counter(state.get("words", {}))
        self.bad = BadRecords(max_bad, *state.get("bad", ()))
        # what a checkpoint now would hold; None while files and counts change
        self._state: dict[str, Any] | None = partial.state

    def run(
        self,
        inputs: list[Input],
        chats: list[Input],
        text_field: str,
        chat_field: str,
        progress: BuildProgress | None,
        checkpoint_seconds: float,
    ) -> None:
        """Tokenise everything from the place of the last checkpoint on."""
        if self.num_documents:
            logger.warning("going on after the first %d documents of an interrupted build", self.num_documents)
        self._partial.keep_tokenizer(self._tokenizer)
        saved = time.monotonic()
        for batch in _batches(self._documents(inputs, chats, text_field, chat_field)):
            encoded = self._encode(batch)
            # from here on until all is counted, an interruption goes back to the last checkpoint
            self._state = None
            for document, (tokens, labels) in zip(batch, encoded, strict=True):
                self._add(document, tokens, labels)
            self._state = self._now(batch[-1])
            if progress is not None:
                progress(self.num_bytes, self.num_tokens)
            if time.monotonic() - saved >= checkpoint_seconds:
                self._partial.save(self._state)
                saved = time.monotonic()
        if self.num_documents == 0:
            raise ValueError("the inputs hold no document; " + (self.bad.messages or ["they are empty"])[0])

    def keep(self) -> bool:
        """Checkpoint what is complete; False if there is nothing to go on from."""
        if self._state is not None:
            self._partial.save(self._state)
        return self._state is not None or self._partial.state is not None

    def _now(self, last: _Document) -> dict[str, Any]:
        return {
            "place": [last.next_input, last.next_record],
            "num_bytes": self.num_bytes,
            "num_tokens": self.num_tokens,
            "num_documents": self.num_documents,
            "num_conversations": self.num_conversations,
            # the counter itself: a copy of millions of words per batch would cost more than tokenising
            "words": self.words,
            "bad": [self.bad.count, list(self.bad.messages)],
        }

    def _documents(
        self, inputs: list[Input], chats: list[Input], text_field: str, chat_field: str
    ) -> Iterator[_Document]:
        on_bad = self.bad if self.bad.limit else None
        first_input, first_record = self.place
        for number, one in enumerate([*inputs, *chats]):
            first = first_record if number == first_input else 1
            if number < first_input:
                continue
            if number < len(inputs):
                for record, text in read_parsed(one, parse_text, field=text_field, on_bad=on_bad, first=first):
                    yield _Document(text, None, number, record.number + 1)
            else:
                for record, messages in read_parsed(one, parse_messages, field=chat_field, on_bad=on_bad, first=first):
                    pieces = conversation_pieces(messages)
                    yield _Document("".join(text for text, _ in pieces), pieces, number, record.number + 1)

    def _encode(self, batch: list[_Document]) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """Each document as bos, tokens, eos, and a conversation's labels (n,) uint8; pieces of all in parallel."""
        cut = [self._pieces(document) for document in batch]
        flat = [text for pieces in cut for text, _ in pieces]
        encodings = iter(self._backend.encode_batch_fast(flat, add_special_tokens=False))
        encoded: list[tuple[np.ndarray, np.ndarray | None]] = []
        for document, pieces in zip(batch, cut, strict=True):
            parts = [np.array(next(encodings).ids, dtype=self._dtype) for _ in pieces]
            tokens = np.concatenate([np.array([self._bos]), *parts, np.array([self._eos])]).astype(self._dtype)
            labels = None
            if document.pieces is not None:
                counted = [np.full(len(part), is_label) for part, (_, is_label) in zip(parts, pieces, strict=True)]
                # a conversation ends with an answer, so its eos counts
                labels = np.concatenate([np.array([False]), *counted, np.array([True])]).astype(np.uint8)
            encoded.append((tokens, labels))
        return encoded

    def _add(self, document: _Document, tokens: np.ndarray, labels: np.ndarray | None) -> None:
        text = document.text.encode("utf-8")
        self._partial.append(tokens, int.from_bytes(hashlib.sha256(text).digest()[:8], "big"), labels)
        self.num_bytes += len(text)
        self.num_tokens += len(tokens)
        self.num_documents += 1
        if labels is None:
            _count_words(self.words, document.text)
        else:
            self.num_conversations += 1

    def _pieces(self, document: _Document) -> list[tuple[str, bool]]:
        if document.pieces is not None:
            return document.pieces
        return [(piece, True) for piece in split_pieces(document.text)] if self._can_cut else [(document.text, True)]

    def finish(self, validation_fraction: float, passed_over: Sequence[PassedOver]) -> None:
        """Write offsets, word bank and manifest."""
        folder = self._partial.path
        lengths, hashes = self._partial.lengths_and_hashes()
        offsets = io.BytesIO()
        np.save(offsets, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
        write_whole(folder / DOCUMENTS_FILE, offsets.getvalue())
        bank = [word for word, _ in sorted(self.words.items(), key=lambda item: (-item[1], item[0]))[:MAX_WORDS]]
        write_whole(folder / WORDS_FILE, "".join(f"{word}\n" for word in bank))
        num_plain = self.num_documents - self.num_conversations
        held_out = _validation_documents(hashes[:num_plain], validation_fraction)
        held_out += [num_plain + i for i in _validation_documents(hashes[num_plain:], validation_fraction)]
        files = [TOKENS_FILE, DOCUMENTS_FILE, WORDS_FILE, *([LABELS_FILE] if self.num_conversations else [])]
        manifest: dict[str, Any] = {
            "format_version": FORMAT_VERSIONS[1] if self.num_conversations else FORMAT_VERSIONS[0],
            "tokenizer_fingerprint": tokenizer_fingerprint(self._tokenizer),
            "vocab_size": len(self._tokenizer),
            "dtype": self._dtype.str,
            "num_documents": self.num_documents,
            "num_conversations": self.num_conversations,
            "num_tokens": self.num_tokens,
            "num_text_bytes": self.num_bytes,
            "num_words": len(bank),
            "files": {name: file_record(folder / name) for name in files},
            "bad_records": {"count": self.bad.count, "first": self.bad.messages},
            "passed_over": {"count": len(passed_over), "files": [list(one) for one in passed_over[:_MAX_PASSED_OVER]]},
            "validation_fraction": validation_fraction,
            "validation_documents": held_out,
        }
        write_whole(folder / MANIFEST_FILE, sealed(manifest))
        logger.info("%d documents, %d bytes of text, %d tokens", self.num_documents, self.num_bytes, self.num_tokens)


def _batches(documents: Iterator[_Document]) -> Iterator[list[_Document]]:
    batch: list[_Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
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
