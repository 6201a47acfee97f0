"""Reading memory files: fetches, ranges, residents, and readers beside a writer."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from hsa_ultralong.memory import MemoryFile, MemoryWriter
from tests.memory.test_files_model import SPEC, S, add_document, build, model_of, rows, same_bytes, state_of

ROW = SPEC.row_bytes


@pytest.fixture
def scattered(tmp_path) -> MemoryFile:
    """Documents whose chunks lie in several shards and out of order."""
    path = build(tmp_path / "a.hsa", [list(range(20)), list(range(20, 50))], shard_bytes=7 * ROW)
    with MemoryWriter.open(path, shard_bytes=7 * ROW) as writer:
        writer.splice_chunks(0, 5, 6, rows([100, 101]), 21 * S)
        writer.splice_chunks(1, 10, 12, None, 28 * S)
        writer.commit()
    return MemoryFile.open(path)


NUMBERS = [*range(5), 100, 101, *range(6, 20), *range(20, 30), *range(32, 50)]


def test_fetching_any_chunks_gives_them_in_the_asked_order(scattered):
    expected = rows(NUMBERS)
    for size in (1, 2, 17, 300):
        chunks = torch.randint(len(NUMBERS), (size,))
        for name in SPEC.columns:
            assert same_bytes(scattered.fetch(name, chunks), expected[name][chunks])


def test_every_range_equals_the_chunks_one_by_one(scattered):
    expected = rows(NUMBERS)
    for first in range(len(NUMBERS)):
        for stop in range(first, len(NUMBERS) + 1):
            assert same_bytes(scattered.read("codes", first, stop), expected["codes"][first:stop])


def test_ranges_of_documents_follow_their_order(scattered):
    assert scattered.chunk_range(0) == (0, 21)
    assert scattered.chunk_range(1) == (21, 49)
    assert scattered.document(0).num_chunks == 21
    assert scattered.document_tokens(0).tolist() == [number for number in NUMBERS[:21] for _ in range(S)]


def test_a_read_of_a_resident_column_is_a_copy(scattered):
    part = scattered.read("lengths", 0, 3)
    part.zero_()
    assert scattered.resident("lengths").min() == S


def test_wrong_arguments_are_refused(scattered):
    for call, message in [
        (lambda: scattered.fetch("values", torch.tensor([0])), "no column 'values'; the memory has codes"),
        (lambda: scattered.fetch("codes", torch.tensor([49])), r"within 0\.\.48"),
        (lambda: scattered.fetch("codes", torch.tensor([-1])), r"within 0\.\.48"),
        (lambda: scattered.fetch("codes", torch.tensor([[1]])), r"\(n,\) numbers"),
        (lambda: scattered.fetch("codes", torch.tensor([1]), out=torch.empty(2, 3)), "out must be a contiguous host"),
        (lambda: scattered.read("codes", 3, 2), r"within 0\.\.49, got 3\.\.2"),
        (lambda: scattered.resident("codes"), "is not resident"),
        (lambda: scattered.document(7), "document 7 does not exist"),
        (lambda: scattered.chunk_range(7), "document 7 does not exist"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    scattered.close()
    with pytest.raises(ValueError, match="was closed"):
        scattered.fetch("codes", torch.tensor([1]))


def test_closing_gives_all_files_back(tmp_path):
    path = build(tmp_path / "a.hsa", [list(range(20))], shard_bytes=ROW)
    before = len(os.listdir("/dev/fd"))
    file = MemoryFile.open(path)
    assert len(os.listdir("/dev/fd")) > before
    file.close()
    assert len(os.listdir("/dev/fd")) == before
    with MemoryWriter.open(path) as writer:
        writer.compact()
    assert len(os.listdir("/dev/fd")) == before


def test_readers_beside_a_busy_writer_always_see_one_whole_generation(tmp_path):
    path = build(tmp_path / "a.hsa", [])
    child = os.fork()
    if child == 0:
        try:
            with MemoryWriter.open(path, shard_bytes=3 * ROW) as writer:
                number = 0
                while True:
                    add_document(writer, f"d{number}", [number] * (1 + number % 4))
                    if len(writer.documents) > 6:
                        writer.delete_document(writer.documents[0].id)
                    writer.commit(build_state={"last": number})
                    if number % 3 == 0:
                        writer.compact()
                    number += 1
        finally:
            os._exit(1)
    try:
        generations = set()
        while len(generations) < 40:
            with MemoryFile.open(path) as file:
                model = model_of(file)
                generations.add(file.generation)
            last = model.build_state.get("last", -1)
            names = [entry[0] for entry in model.documents.values()]
            assert names == [f"d{n}" for n in range(max(0, last - 5), last + 1)]
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert state_of(path)
