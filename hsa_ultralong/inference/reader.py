"""Exact reading of any length in segments: the lower decoder and the encoder only (fact 5 of docs/architecture.md).

Memory is O(segment) beside the chunk memory itself; time is linear. The upper decoder runs on the last U + m tokens
alone (models/reading.py), from kept lower outputs. Used by HSAForCausalLM.memorize; tests/inference/test_reader.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hsa_ultralong.inference.tiers import tiered_memory
from hsa_ultralong.memory.chunk_memory import ChunkMemory, Document
from hsa_ultralong.models import HSAForCausalLM
from hsa_ultralong.models.evaluation import evaluating
from hsa_ultralong.models.fingerprint import memory_fingerprint, require_same_model
from hsa_ultralong.models.reading import DocumentReader, kept_lower_outputs
from hsa_ultralong.models.wrapped import computing_dtype, device_of, unwrapped

_SEGMENT_TOKENS = {"cpu": 2048, "cuda": 65_536}
# compiled reading: the segments' length, and the tokens from which it wins back the 10 to 20 seconds of compiling
_COMPILED_SEGMENT, _COMPILED_FROM = 2**17, 2**26
_TOKEN_TYPES = (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.int64)
Progress = Callable[[int, int | None], None]


def as_tokens(tokens: Any) -> torch.Tensor:
    """(n,) int32 on the host.

    Raises:
        ValueError: if it is no one-dimensional sequence of token ids.
    """
    result: Any = tokens if isinstance(tokens, torch.Tensor) else np.asarray(tokens)
    if isinstance(result, np.ndarray) and (result.dtype.kind in "iu" or result.size == 0):
        result = torch.from_numpy(result.astype(np.int64))
    if result.ndim == 2 and result.shape[0] == 1:
        result = result[0]
    if result.ndim != 1 or result.dtype not in _TOKEN_TYPES:
        raise ValueError(
            f"a document must be a 1-D sequence of token ids, got shape {tuple(result.shape)} {result.dtype}"
        )
    # what does not fit into 32 bits must not wrap around to a valid id
    return result.to(device="cpu", dtype=torch.int64).clamp(-1, 2**31 - 1).to(torch.int32)


def _as_documents(tokens: Any) -> list[Iterable[torch.Tensor]]:
    """Documents, each as an iterable of pieces (n,) int32."""
    if isinstance(tokens, (torch.Tensor, np.ndarray)):
        return [[as_tokens(tokens)]]
    if isinstance(tokens, Sequence):
        if len(tokens) == 0:
            raise ValueError("nothing to memorise: no tokens were given")
        if isinstance(tokens[0], (int, np.integer)):
            return [[as_tokens(tokens)]]
        return [[as_tokens(document)] for document in tokens]
    if isinstance(tokens, Iterable):
        return [(as_tokens(piece) for piece in tokens)]
    raise ValueError(
        f"memorize takes token ids, a list of documents or a stream of pieces, got {type(tokens).__name__}"
    )


def memorize(
    model: HSAForCausalLM,
    tokens: Any,
    *,
    names: Sequence[str] | None = None,
    close: bool = True,
    segment_tokens: int | None = None,
    store: str | Path = "device",
    key_values: str | None = None,
    landmarks: str | None = None,
    device_bytes: int | None = None,
    progress: bool | Progress = False,
) -> ChunkMemory:
    """Read documents into a new ChunkMemory; linear time, activation memory of one segment.

    Args:
        tokens: token ids of one document (1-D tensor, array, list), a list of such documents, or an iterator of
            pieces of one document.
        names: a name per document.
        close: close the last document (its tail becomes a short chunk); False leaves it open for `append`,
            `last_logits` and `generate(continue_document=True)`.
        segment_tokens: tokens per forward; default 2,048 on a CPU, 65,536 on a GPU. On a GPU 131,072 stands for
            compiled layers, 1.5 to 3 times as fast after 10 to 20 seconds; the default from 64M tokens on.
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
    documents = _as_documents(tokens)
    if names is not None and len(names) != len(documents):
        raise ValueError(f"{len(names)} names for {len(documents)} documents")
    if Path(store).suffix == ".hsa":
        forms = (key_values, landmarks)
        return _memorize_to_file(model, documents, names, close, segment_tokens, Path(store), forms, progress)
    known = [len(part) for document in documents if isinstance(document, list) for part in document]
    total = sum(known) if len(known) == len(documents) else None
    size = model.config.chunk_size
    device, dtype = device_of(model), computing_dtype(model)
    if segment_tokens is None and device.type == "cuda" and total is not None and total >= _COMPILED_FROM:
        segment_tokens = _COMPILED_SEGMENT
    chunks = sum(-(-n // size) for n in known)
    if store == "device" and key_values is None and landmarks is None:
        memory = model.model.empty_memory(1, dtype, device, chunks, fingerprint=memory_fingerprint(model))
    else:
        memory = tiered_memory(
            model, chunks, store=str(store), key_values=key_values, landmarks=landmarks, device_bytes=device_bytes
        )
    with show_progress(progress, total) as report:
        for number, pieces in enumerate(documents):
            last = number == len(documents) - 1
            _read_document(
                model, memory, pieces, names[number] if names else "", close or not last, segment_tokens, report
            )
    return memory


def _memorize_to_file(
    model: HSAForCausalLM,
    documents: list[Iterable[torch.Tensor]],
    names: Sequence[str] | None,
    close: bool,
    segment_tokens: int | None,
    path: Path,
    forms: tuple[str | None, str | None],
    progress: bool | Progress,
) -> ChunkMemory:
    from hsa_ultralong.inference.library import Library
    from hsa_ultralong.memory.saving import open_memory

    dtype = computing_dtype(model)
    format = {torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16"}.get(dtype, "bf16")
    with Library.create(model, path, key_values=forms[0] or format, landmarks=forms[1] or format) as library:
        for number, pieces in enumerate(documents):
            library.add(
                torch.cat(list(pieces)),
                name=names[number] if names else "",
                close=close or number < len(documents) - 1,
                segment_tokens=segment_tokens,
                progress=progress,
            )
    return open_memory(path, device=device_of(model), dtype=dtype)


def append(
    model: HSAForCausalLM,
    memory: ChunkMemory,
    tokens: Any,
    *,
    document: int | None = None,
    name: str = "",
    close: bool = True,
    segment_tokens: int | None = None,
    progress: bool | Progress = False,
) -> None:
    """Add a new document (default), or go on with the open one (`document` = its number), in place.

    Raises:
        ValueError: if the memory is another model's, `document` is not the open one, or the input is empty.
    """
    model = unwrapped(model)
    require_same_model(model, memory)
    pieces = [as_tokens(tokens)]
    # all refusals come before the first change of the memory
    check_range(pieces[0], model.config.vocab_size)
    segment_length(model, segment_tokens)
    if len(pieces[0]) == 0:
        raise ValueError("nothing to append: no tokens were given")
    if document is None:
        close_document(model, memory)
    elif memory.open_document is None or document != len(memory.documents) - 1:
        raise ValueError(f"document {document} is not open; only the last document of a memory can be open")
    with show_progress(progress, len(pieces[0])) as report:
        _read_document(model, memory, pieces, name, close, segment_tokens, report, resume=document is not None)


def _read_document(
    model: HSAForCausalLM,
    memory: ChunkMemory,
    pieces: Iterable[torch.Tensor],
    name: str,
    close: bool,
    segment_tokens: int | None,
    report: Progress,
    resume: bool = False,
) -> None:
    device = device_of(model)
    step = segment_length(model, segment_tokens)
    is_compiled = device.type == "cuda" and step == _COMPILED_SEGMENT
    reader = DocumentReader(model, keep=kept_lower_outputs(model), compiled_segment=step if is_compiled else None)
    if resume:
        document = memory.documents[-1]
        assert document.continuation is not None
        reader.resume(document.continuation)
    else:
        empty = torch.empty(0, dtype=torch.int32)
        document = Document(empty, memory.num_chunks, 0, is_open=True, name=name)
    segment = len(memory.documents) - (1 if resume else 0)
    parts, count, done = [document.tokens], document.num_tokens, 0
    with evaluating(model), _undone_on_error(memory, document):
        for piece in pieces:
            check_range(piece, model.config.vocab_size)
            for start in range(0, len(piece), step):
                part = piece[start : start + step]
                chunks = reader.complete_chunks(part.to(device), count, document.num_chunks, segment)
                if chunks is not None:
                    memory.write(document.first_chunk + document.num_chunks, chunks)
                    document.num_chunks += chunks.landmarks.shape[1]
                count += len(part)
                parts.append(part)
                done += len(part)
                report(done, None)
        reader.check.require(repr(name) if name else f"document {segment}")
    if count == 0:
        raise ValueError(f"document {name or segment} is empty: nothing to memorise")
    document.tokens = torch.cat(parts)
    document.continuation = reader.continuation()
    if not resume:
        memory.documents.append(document)
    if close:
        close_document(model, memory)


def segment_length(model: HSAForCausalLM, segment_tokens: int | None) -> int:
    if segment_tokens is None:
        return _SEGMENT_TOKENS.get(device_of(model).type, 2048)
    if segment_tokens < 1:
        raise ValueError(f"segment_tokens must be >= 1, got {segment_tokens}")
    return segment_tokens


@contextmanager
def _undone_on_error(memory: ChunkMemory, document: Document) -> Iterator[None]:
    """Forget the chunks of a reading that fails or is interrupted: no document would own them."""
    total, own = memory.num_chunks, document.num_chunks
    try:
        yield
    except BaseException:
        memory.num_chunks, document.num_chunks = total, own
        raise


def check_range(tokens: torch.Tensor, vocab_size: int) -> None:
    if len(tokens) and (int(tokens.min()) < 0 or int(tokens.max()) >= vocab_size):
        raise ValueError(f"token ids must be 0..{vocab_size - 1}, got {int(tokens.min())}..{int(tokens.max())}")


def close_document(model: HSAForCausalLM, memory: ChunkMemory) -> None:
    """Close the open document, if any: its last m < S tokens become a short chunk, visible to other documents."""
    model, document = unwrapped(model), memory.open_document
    if document is None:
        return
    require_same_model(model, memory)
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


@contextmanager
def show_progress(progress: bool | Progress, total: int | None) -> Iterator[Progress]:
    if callable(progress):
        yield lambda done, _: progress(done, total)
        return
    if not progress:
        yield lambda done, _: None
        return
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    with Bar(
        TextColumn("memorising"), BarColumn(), TextColumn("{task.completed:,.0f} tokens"), TimeRemainingColumn()
    ) as bar:
        task = bar.add_task("", total=total)
        yield lambda done, _: bar.update(task, completed=done)
