"""Exact edits of a memory in place: only the chunks that a changed token can reach are read again (fact 6)."""

from __future__ import annotations

from typing import Any

from hsa_ultralong.inference.fingerprint import require_same_model
from hsa_ultralong.inference.reader import DocumentReader, _as_tokens, _check_range, evaluating, kept_lower_outputs
from hsa_ultralong.models import HSAForCausalLM
from hsa_ultralong.nn.chunk_memory import ChunkMemory


def affected_chunks(model: HSAForCausalLM, memory: ChunkMemory, start: int, stop: int, document: int = 0) -> range:
    """Chunks of the document (counted inside it) that replacing its tokens start..stop rewrites."""
    size = model.config.chunk_size
    last = (stop - 1 + model.config.lower_reach) // size
    return range(start // size, min(memory.documents[document].num_chunks, last + 1))


def edit(model: HSAForCausalLM, memory: ChunkMemory, start: int, stop: int, tokens: Any, *, document: int = 0) -> range:
    """Replace tokens start..stop of a document by as many others, in place; equals rebuilding the memory.

    Args:
        start, stop: half-open range of token positions in the document. tokens: (stop - start,) token ids.

    Returns:
        The rewritten chunks, counted inside the document.

    Raises:
        ValueError: for another model's memory, an unknown document, a range outside it, or another number of tokens.
    """
    require_same_model(model, memory)
    if not 0 <= document < len(memory.documents):
        raise ValueError(f"document {document} does not exist; the memory holds {len(memory.documents)}")
    record = memory.documents[document]
    new = _as_tokens(tokens)
    if not 0 <= start < stop <= record.num_tokens:
        raise ValueError(f"tokens {start}..{stop} are not a range of document {document} (0..{record.num_tokens})")
    if len(new) != stop - start:
        raise ValueError(
            f"edit replaces {stop - start} tokens by as many others, got {len(new)}; memorise the document again to "
            "change its length"
        )
    _check_range(new, model.config.vocab_size)
    chunks = affected_chunks(model, memory, start, stop, document)
    record.tokens = record.tokens.clone()
    record.tokens[start:stop] = new
    with evaluating(model):
        if chunks:
            _rewrite(model, memory, chunks, document)
        if record.is_open:
            _refresh_continuation(model, memory, document)
    return chunks


def _rewrite(model: HSAForCausalLM, memory: ChunkMemory, chunks: range, document: int) -> None:
    record, size = memory.documents[document], model.config.chunk_size
    first_token, last_token = chunks.start * size, min(chunks.stop * size, record.num_tokens)
    lead = max(0, first_token - model.config.lower_reach)
    reader = DocumentReader(model, keep=last_token - first_token)
    reader.read(record.tokens[lead:last_token].to(memory.k.device))
    hidden = reader.lower
    assert hidden is not None
    whole = hidden.shape[1] // size
    if whole:
        new = reader.encode(hidden[:, : whole * size], chunks.start, document)
        memory.write(record.first_chunk + chunks.start, new)
    if hidden.shape[1] > whole * size:
        short = reader.encode_short(hidden[:, whole * size :], chunks.start + whole, document)
        memory.write(record.first_chunk + chunks.start + whole, short)


def _refresh_continuation(model: HSAForCausalLM, memory: ChunkMemory, document: int) -> None:
    """Read the end of an open document again: its windows and kept lower outputs may have changed."""
    record = memory.documents[document]
    keep = kept_lower_outputs(model)
    length = keep + model.config.lower_reach + model.config.sliding_window
    reader = DocumentReader(model, keep=keep)
    reader.read(record.tokens[max(0, record.num_tokens - length) :].to(memory.k.device))
    record.continuation = reader.continuation()
