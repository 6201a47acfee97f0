"""Exact edits: replacing, inserting or deleting tokens reads again only the chunks that a changed token can reach.

An edit that moves the chunk grid (a length change that is no multiple of S) reads the rest of its document again, other
documents never (fact 6 of docs/architecture.md). Used on memories in place and, by library.py, on files.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from hsa_ultralong.inference.reading_loop import as_tokens, check_range, piece_length
from hsa_ultralong.memory.chunk_memory import Continuation, Memory
from hsa_ultralong.models import HSAConfig, HSAForCausalLM
from hsa_ultralong.models.evaluation import evaluating
from hsa_ultralong.models.fingerprint import require_same_model
from hsa_ultralong.models.reading import DocumentReader, kept_lower_outputs
from hsa_ultralong.models.wrapped import device_of, unwrapped
from hsa_ultralong.nn.views import ChunkTensors


class EditPlan(NamedTuple):
    """What an edit of a document costs: its chunks first..old_stop become first..new_stop, read again from the text."""

    first: int
    old_stop: int
    new_stop: int

    @property
    def num_chunks(self) -> int:
        """Chunks to read again."""
        return self.new_stop - self.first


def plan_edit(
    config: HSAConfig, num_tokens: int, start: int, stop: int, num_new: int, *, is_open: bool = False
) -> EditPlan:
    """Chunks that replacing tokens start..stop of a document of `num_tokens` by `num_new` others touches.

    Raises:
        ValueError: a range outside the document, or an edit that would leave it empty.
    """
    if not 0 <= start <= stop <= num_tokens:
        raise ValueError(f"tokens {start}..{stop} are not a range of the document (0..{num_tokens})")
    growth = num_new - (stop - start)
    if num_tokens + growth == 0:
        raise ValueError("the edit would leave the document empty; delete the document instead")
    size = config.chunk_size
    old, new = (n // size if is_open else -(-n // size) for n in (num_tokens, num_tokens + growth))
    first = min(start // size, old, new)
    if start == stop and num_new == 0:
        return EditPlan(first, first, first)
    if growth % size:
        return EditPlan(first, old, new)
    last = start + num_new - 1 + config.lower_reach  # the last token, after the edit, that sees a changed one
    new_stop = min(new, max(first, last // size + 1))
    return EditPlan(first, new_stop - growth // size, new_stop)


def difference(old: torch.Tensor, new: torch.Tensor) -> tuple[int, int, int]:
    """(start, stop, count): replacing old[start:stop] by new[start:start + count] gives `new`, (n,) each."""
    shorter = min(len(old), len(new))
    differs = (old[:shorter] != new[:shorter]).nonzero()
    start = int(differs[0]) if len(differs) else shorter
    rest = shorter - start
    backwards = (old.flip(0)[:rest] != new.flip(0)[:rest]).nonzero()
    same = int(backwards[0]) if len(backwards) else rest
    return start, len(old) - same, len(new) - same - start


def recompute_chunks(
    model: HSAForCausalLM, tokens: torch.Tensor, first: int, stop: int, document: int, step: int | None = None
) -> Iterator[ChunkTensors]:
    """Chunks first..stop of a document of all these tokens (n,), in pieces; a last one that is not full is short."""
    size, device = model.config.chunk_size, device_of(model)
    begin, end = first * size, min(stop * size, len(tokens))
    lead = max(0, begin - model.config.lower_reach)
    reader, step = DocumentReader(model, keep=size), piece_length(model, step)
    number = first
    for start in range(lead, end, step):
        chunks = reader.complete_chunks(tokens[start : min(start + step, end)].to(device), start, number, document)
        if chunks is not None:
            yield chunks
            number += chunks.landmarks.shape[1]
    rest = end - number * size
    if rest:
        assert reader.lower is not None
        yield reader.encode_short(reader.lower[:, -rest:], number, document)
    reader.check.require("the edited document")


def continuation_at_end(model: HSAForCausalLM, tokens: torch.Tensor) -> Continuation:
    """How to go on after a document's tokens (n,), from reading its end again."""
    keep = kept_lower_outputs(model)
    length = keep + model.config.lower_reach + model.config.sliding_window
    reader = DocumentReader(model, keep=keep)
    reader.read(tokens[max(0, len(tokens) - length) :].to(device_of(model)))
    reader.check.require("the edited document")
    return reader.continuation()


def edit(model: HSAForCausalLM, memory: Memory, start: int, stop: int, tokens: Any, *, document: int = 0) -> range:
    """Replace tokens start..stop of a document by others, any number of them, in place; equals rebuilding the memory.

    start == stop inserts, no tokens delete.

    Args:
        start, stop: half-open range of token positions in the document. tokens: token ids.

    Returns:
        The chunks that were read again, counted inside the document after the edit.

    Raises:
        ValueError: for another model's memory or one with a store, an unknown document, a range outside it, or an edit
            that would leave it empty.
    """
    model = unwrapped(model)
    require_same_model(model, memory)
    if not 0 <= document < len(memory.documents):
        raise ValueError(f"document {document} does not exist; the memory holds {len(memory.documents)}")
    record = memory.documents[document]
    new = as_tokens(tokens)
    plan = plan_edit(model.config, record.num_tokens, start, stop, len(new), is_open=record.is_open)
    check_range(new, model.config.vocab_size)
    memory.require_changeable("changed", plan.new_stop - plan.old_stop)
    changed = torch.cat((record.tokens[:start], new, record.tokens[stop:]))
    with evaluating(model):
        parts = list(recompute_chunks(model, changed, plan.first, plan.new_stop, document)) if plan.num_chunks else []
        chunks = ChunkTensors(*(torch.cat(columns, 1) for columns in zip(*parts, strict=True))) if parts else None
        state = continuation_at_end(model, changed) if record.is_open else None
    if chunks is None:
        chunks = ChunkTensors(*(part[:, :0] for part in memory.tensors))
    memory.splice(document, plan.first, plan.old_stop, chunks)
    record.tokens, record.continuation = changed, state
    return range(plan.first, plan.new_stop)
