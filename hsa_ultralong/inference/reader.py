"""Reading documents into a memory: in memory of its own, on tiers, or in a file.

Activation memory is O(piece) beside the chunk memory itself; time is linear. The upper decoder runs on the last U + m
tokens alone (models/reading.py), from kept lower outputs. Used by HSAForCausalLM.memorize;
tests/inference/test_reader.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hsa_ultralong.inference.library import Library
from hsa_ultralong.inference.placement import tiered_memory
from hsa_ultralong.inference.reading_loop import (
    Progress,
    Text,
    as_text,
    as_tokens,
    piece_length,
    read_document,
    show_progress,
)
from hsa_ultralong.memory.chunk_memory import Document, Memory
from hsa_ultralong.memory.opening import open_memory
from hsa_ultralong.memory.quantization import format_of
from hsa_ultralong.models import HSAForCausalLM
from hsa_ultralong.models.evaluation import evaluating
from hsa_ultralong.models.fingerprint import memory_fingerprint, require_same_model
from hsa_ultralong.models.reading import DocumentReader
from hsa_ultralong.models.wrapped import computing_dtype, device_of, unwrapped
from hsa_ultralong.nn.views import ChunkTensors


def _as_documents(tokens: Any, vocab_size: int) -> list[Text]:
    """One document, a list of documents, or a stream of pieces of one; what is here already is checked."""
    if isinstance(tokens, Sequence) and not isinstance(tokens, str | bytes):
        if len(tokens) == 0:
            raise ValueError("nothing to memorise: no tokens were given")
        if not isinstance(tokens[0], (int, np.integer)):
            return [as_text(as_tokens(document), vocab_size) for document in tokens]
    elif not isinstance(tokens, Iterable):
        raise ValueError(
            f"memorize takes token ids, a list of documents or a stream of pieces, got {type(tokens).__name__}"
        )
    return [as_text(tokens, vocab_size)]


def memorize(
    model: HSAForCausalLM,
    tokens: Any,
    *,
    names: Sequence[str] | None = None,
    close: bool = True,
    piece_tokens: int | None = None,
    store: str | Path = "device",
    key_values: str | None = None,
    landmarks: str | None = None,
    device_bytes: int | None = None,
    progress: bool | Progress = False,
) -> Memory:
    """Read documents into a new memory; linear time, activation memory of one piece.

    Args:
        tokens: token ids of one document (1-D tensor, array, list), a list of such documents, or an iterator of
            pieces of one document.
        names: a name per document.
        close: close the last document (its tail becomes a short chunk); False leaves it open for `append`,
            `last_logits` and `generate(continue_document=True)`.
        piece_tokens: tokens per forward; default 2,048 on a CPU, 65,536 on a GPU. On a GPU layers are
            compiled for 131,072 and its multiples, 1.5 to 3 times as fast after 10 to 20 seconds; 131,072 from 64M on.
        store: "device", "host" (keys and values in host memory), "tiered" (on the device as far as they fit, the rest
            in host memory), or the path of a new memory file NAME.hsa, which is returned open, keys and values on disk.
        key_values, landmarks: their form, "int8" for example; default the model's dtype.
        device_bytes: for keys and values of "tiered"; default what is free, less 10 GiB.
        progress: True for a progress bar, or a callable (tokens done, total or None).

    Raises:
        ValueError: empty or malformed input, or a memory that does not fit.
        MemoryFileError: the path of `store` exists already or cannot be written.
    """
    model = unwrapped(model)
    documents = _as_documents(tokens, model.config.vocab_size)
    if names is not None and len(names) != len(documents):
        raise ValueError(f"{len(names)} names for {len(documents)} documents")
    if device_bytes is not None and store != "tiered":
        raise ValueError(f"device_bytes is room for store='tiered', got store={str(store)!r}")
    known = [text.num_tokens for text in documents if text.num_tokens is not None]
    total = sum(known) if len(known) == len(documents) else None
    piece_tokens = piece_length(model, piece_tokens, total)
    with ExitStack() as opened:
        if Path(store).suffix == ".hsa":
            library = opened.enter_context(_new_library(model, Path(store), key_values, landmarks))
        else:
            library = None
            memory = _empty_memory(model, known, str(store), key_values, landmarks, device_bytes)
        report, done = opened.enter_context(show_progress(progress, total)), 0

        def advance(count: int, _: int | None) -> None:
            report(done + count, None)

        for number, text in enumerate(documents):
            name, is_closed = names[number] if names else "", close or number < len(documents) - 1
            if library is not None:
                library.add_text(text, name=name, close=is_closed, piece_tokens=piece_tokens, progress=advance)
                done += library.documents[-1].num_tokens
            else:
                _read_document(model, memory, text, name, is_closed, piece_tokens, advance)
                done += memory.documents[-1].num_tokens
    if library is None:
        return memory
    return open_memory(Path(store), device=device_of(model), dtype=computing_dtype(model))


def _empty_memory(
    model: HSAForCausalLM,
    known: Sequence[int],
    store: str,
    key_values: str | None,
    landmarks: str | None,
    device_bytes: int | None,
) -> Memory:
    """A memory with room for documents of these many tokens."""
    chunks = sum(-(-n // model.config.chunk_size) for n in known)
    if store == "device" and key_values is None and landmarks is None:
        fingerprint = memory_fingerprint(model)
        return model.model.empty_memory(1, computing_dtype(model), device_of(model), chunks, fingerprint=fingerprint)
    return tiered_memory(
        model, chunks, store=store, key_values=key_values, landmarks=landmarks, device_bytes=device_bytes
    )


def _new_library(model: HSAForCausalLM, path: Path, key_values: str | None, landmarks: str | None) -> Library:
    own = format_of(computing_dtype(model))
    return Library.create(model, path, key_values=key_values or own, landmarks=landmarks or own)


def append(
    model: HSAForCausalLM,
    memory: Memory,
    tokens: Any,
    *,
    document: int | None = None,
    name: str = "",
    close: bool = True,
    piece_tokens: int | None = None,
    progress: bool | Progress = False,
) -> None:
    """Add a new document (default), or go on with the open one (`document` = its number), in place.

    Raises:
        ValueError: if the memory is another model's, `document` is not the open one, or the input is empty.
    """
    model = unwrapped(model)
    require_same_model(model, memory)
    memory.require_changeable("written to")
    # all refusals come before the first change of the memory
    text = as_text(tokens, model.config.vocab_size)
    piece_length(model, piece_tokens)
    if text.num_tokens == 0:
        raise ValueError("nothing to append: no tokens were given")
    if document is not None and (memory.open_document is None or document != len(memory.documents) - 1):
        raise ValueError(f"document {document} is not open; only the last document of a memory can be open")
    before = 0 if document is None else memory.documents[-1].num_tokens
    with show_progress(progress, text.num_tokens) as report, _undone_on_error(memory):
        if document is None:
            close_document(model, memory)
        _read_document(
            model, memory, text, name, close, piece_tokens, lambda done, _: report(done - before, None),
            resume=document is not None,
        )  # fmt: skip


class _MemorySink:
    """A document of a memory, on the device or on tiers."""

    def __init__(self, memory: Memory, document: Document) -> None:
        self.memory, self.document, self.num_tokens = memory, document, document.num_tokens
        self.parts = [document.tokens]

    @property
    def num_chunks(self) -> int:
        return self.document.num_chunks

    def take(self, tokens: torch.Tensor, chunks: ChunkTensors | None, reader: DocumentReader, *, is_last: bool) -> None:
        if chunks is not None:
            self.memory.write(self.document.first_chunk + self.document.num_chunks, chunks)
            self.document.num_chunks += chunks.landmarks.shape[1]
        self.parts.append(tokens)
        self.num_tokens += len(tokens)
        if is_last:
            # while the device still computes
            self.parts = [torch.cat(self.parts)]


def _read_document(
    model: HSAForCausalLM,
    memory: Memory,
    text: Text,
    name: str,
    close: bool,
    piece_tokens: int | None,
    report: Progress,
    resume: bool = False,
) -> None:
    if resume:
        document = memory.documents[-1]
        assert document.continuation is not None
    else:
        empty = torch.empty(0, dtype=torch.int32)
        document = Document(empty, memory.num_chunks, 0, is_open=True, name=name)
    number = len(memory.documents) - (1 if resume else 0)
    label, sink = repr(name) if name else f"document {number}", _MemorySink(memory, document)
    with evaluating(model):
        reader = read_document(
            model, text, sink, state=document.continuation, number=number, label=label, piece_tokens=piece_tokens,
            report=report,
        )  # fmt: skip
    if sink.num_tokens == 0:
        raise ValueError(f"document {name or number} is empty: nothing to memorise")
    (document.tokens,) = sink.parts
    document.continuation = reader.continuation()
    if not resume:
        memory.documents.append(document)
    if close:
        close_document(model, memory)


@contextmanager
def _undone_on_error(memory: Memory) -> Iterator[None]:
    """A memory is as it was before a change that fails or is interrupted: nothing half-read, nothing left open."""
    documents, num_chunks = list(memory.documents), memory.num_chunks
    last = dict(vars(documents[-1])) if documents else {}
    try:
        yield
    except BaseException:
        memory.documents[:], memory.num_chunks = documents, num_chunks
        if documents:
            vars(documents[-1]).update(last)
        raise


def close_document(model: HSAForCausalLM, memory: Memory) -> None:
    """Close the open document, if any: its last m < S tokens become a short chunk, visible to other documents."""
    model, document = unwrapped(model), memory.open_document
    if document is None:
        return
    require_same_model(model, memory)
    memory.require_changeable("written to")
    reader = DocumentReader(model, keep=0)
    rest = document.num_tokens - document.num_chunks * reader.size
    if rest:
        assert document.continuation is not None
        with evaluating(model):
            hidden = document.continuation.lower[:, -rest:]
            short = reader.encode_short(hidden, document.num_chunks, len(memory.documents) - 1)
        reader.check.require(repr(document.name) if document.name else f"document {len(memory.documents) - 1}")
        memory.write(document.first_chunk + document.num_chunks, short)
        document.num_chunks += 1
    document.is_open, document.continuation = False, None
