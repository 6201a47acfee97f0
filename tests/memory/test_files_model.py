"""A list model of a memory file, with which the other tests/memory/test_files*.py compare what is on disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hsa_ultralong.memory import Column, MemoryFile, MemorySpec, MemoryWriter
from hsa_ultralong.memory.files.verification import verify_file

S = 4
COLUMNS = {
    "keys_values": Column((2, S, 1, 8), torch.bfloat16),
    "landmarks": Column((1, 8), torch.bfloat16, is_resident=True),
    "lengths": Column((), torch.int32, is_resident=True),
    "tokens": Column((S,), torch.int32),
    "codes": Column((3,), torch.float8_e4m3fn),
}
SPEC = MemorySpec(S, COLUMNS, fingerprint="f" * 64, tokenizer="t" * 64, metadata={"model_name": "tiny"})


def rows(chunks: list[int], spec: MemorySpec = SPEC) -> dict[str, torch.Tensor]:
    """Columns whose bytes follow from the chunks' numbers; `tokens` are the number, `lengths` are full."""
    numbers = torch.tensor(chunks, dtype=torch.int64)
    result = {}
    for name, column in spec.columns.items():
        if name == "lengths":
            result[name] = torch.full((len(chunks),), S, dtype=torch.int32)
        elif name == "tokens":
            result[name] = numbers.to(torch.int32)[:, None].repeat(1, S)
        else:
            # bytes that are finite numbers in every dtype
            raw = (numbers[:, None] * 7919 + torch.arange(column.row_bytes) * 31) % 113  # (n, row_bytes)
            result[name] = raw.to(torch.uint8).view(-1).view(column.dtype).view(len(chunks), *column.shape)
    return result


def same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal shape, dtype and bytes; NaNs are equal to themselves."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return torch.equal(left.contiguous().view(-1).view(torch.uint8), right.contiguous().view(-1).view(torch.uint8))


@dataclass
class Model:
    """What a memory should hold: per document id its name, number of tokens, whether open, and its chunks' numbers."""

    documents: dict[int, tuple[str, int, bool, tuple[int, ...]]] = field(default_factory=dict)
    continuation: int | None = None
    build_state: dict[str, Any] = field(default_factory=dict)


def model_of(file: MemoryFile) -> Model:
    """The model of a memory file, after checking that every column of every chunk holds what belongs there."""
    numbers = file.read("tokens", 0, file.num_chunks)[:, 0].tolist() if file.num_chunks else []
    expected = rows(numbers, file.spec)
    order = torch.randperm(file.num_chunks)
    for name, column in file.spec.columns.items():
        assert same_bytes(file.read(name, 0, file.num_chunks), expected[name]), name
        assert same_bytes(file.fetch(name, order), expected[name][order]), name
        if column.is_resident:
            assert same_bytes(file.resident(name), expected[name]), name
    result, state = Model(build_state=file.build_state), file.continuation()
    for document in file.documents:
        first, stop = file.chunk_range(document.id)
        chunks = tuple(numbers[first:stop])
        result.documents[document.id] = (document.name, document.num_tokens, document.is_open, chunks)
    if state is not None:
        assert state[0]["tail_tokens"].tolist() == [state[1]["mark"]]
        result.continuation = state[1]["mark"]
    return result


def state_of(path: Path) -> Model:
    """The model of the memory at `path`, which must be undamaged."""
    with MemoryFile.open(path) as file:
        assert verify_file(file) == []
        return model_of(file)


def add_document(writer: MemoryWriter, name: str, chunks: list[int], *, close: bool = True, mark: int = 0) -> int:
    """A document of these chunks; an open one gets a continuation with `mark`."""
    id = writer.begin_document(name)
    writer.append_chunks(id, rows(chunks, writer.spec), len(chunks) * S + (0 if close else 1))
    if close:
        writer.close_document(id)
    else:
        set_mark(writer, mark)
    return id


def set_mark(writer: MemoryWriter, mark: int) -> None:
    writer.set_continuation({"tail_tokens": torch.tensor([mark], dtype=torch.int32)}, {"mark": mark})


def build(path: Path, documents: list[list[int]], *, is_open: bool = False, **options: Any) -> Path:
    """A memory of these documents, one commit each; with `is_open` the last one is open."""
    with MemoryWriter.create(path, SPEC, **options) as writer:
        for number, chunks in enumerate(documents):
            close = number < len(documents) - 1 or not is_open
            add_document(writer, f"d{number}", chunks, close=close, mark=7)
            writer.commit()
    return path


def test_the_model_sees_what_was_written(tmp_path):
    path = build(tmp_path / "a.hsa", [[1, 2, 3], [4]], is_open=True)
    assert state_of(path) == Model({0: ("d0", 12, False, (1, 2, 3)), 1: ("d1", 5, True, (4,))}, 7)
