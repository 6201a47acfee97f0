"""A memory written to a new folder, wherever it lies. tests/memory/test_saving.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hsa_ultralong.memory.columns import memory_spec, to_columns
from hsa_ultralong.memory.files import MemoryWriter
from hsa_ultralong.memory.files.housekeeping import new_folder

if TYPE_CHECKING:
    from hsa_ultralong.memory.chunk_memory import Continuation, Memory

# chunks converted at a time
_STEP = 4096


def pack_continuation(state: Continuation, tail_tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tensors of the continuation file; tail_tokens: ids of the unfinished chunk."""
    tensors = {"lower": state.lower, "tail_tokens": tail_tokens.to(torch.int32)}
    for number, (keys, values) in enumerate(state.windows):
        tensors[f"window_{number}_keys"], tensors[f"window_{number}_values"] = keys, values
    return tensors


def save_memory(
    memory: Memory,
    path: str | Path,
    *,
    key_values: str | None = None,
    landmarks: str | None = None,
    tokenizer: str = "",
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write a memory, wherever it lies, to a new folder, which appears complete or not at all.

    Forms default to those that the memory is kept in; kept as they are, they are copied bit for bit.

    Raises:
        MemoryFileError: the folder exists and is not empty, or cannot be written.
        ValueError: unknown format, or a memory shared out over processes.
    """
    tensors, size = memory.tensors, memory.chunk_size
    forms = (key_values or memory.forms[0], landmarks or memory.forms[1])
    spec = memory_spec(
        chunk_size=size,
        num_memory_heads=memory.storage.k.shape[2],
        head_dim=memory.storage.k.shape[3],
        num_retrieval_heads=tensors.landmarks.shape[2],
        retrieval_dim=tensors.landmarks.shape[2] * tensors.landmarks.shape[3],
        key_values=forms[0],  # type: ignore[arg-type]
        landmarks=forms[1],  # type: ignore[arg-type]
        fingerprint=memory.fingerprint,
        tokenizer=tokenizer,
        is_composable=memory.is_composable,
        metadata=metadata,
    )
    with new_folder(Path(path), "saving") as partial, MemoryWriter.create(partial, spec) as writer:
        for document in memory.documents:
            id = writer.begin_document(document.name)
            # an open document may be too short for a chunk
            writer.splice_chunks(id, 0, 0, None, document.num_tokens)
            for first in range(0, document.num_chunks, _STEP):
                stop = min(first + _STEP, document.num_chunks)
                place = (document.first_chunk + first, document.first_chunk + stop)
                tokens = document.tokens[first * size : min(stop * size, document.num_tokens)]
                columns = to_columns(spec, memory.part(*place), tokens, memory.kept(*place, forms))
                writer.append_chunks(id, columns, document.num_tokens)
            if document.is_open:
                assert document.continuation is not None
                tail = document.tokens[document.num_chunks * size :]
                writer.set_continuation(pack_continuation(document.continuation, tail))
            else:
                writer.close_document(id)
        writer.commit()
