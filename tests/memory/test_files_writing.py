"""Memory files: any sequence of changes equals a list model; snapshots; commits and what they leave."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from hsa_ultralong.memory import MemoryFile, MemoryWriter, export_memory
from hsa_ultralong.memory.files.spec import Extent, splice
from hsa_ultralong.memory.files.verification import verify_file
from tests.memory.test_files_model import SPEC, Model, S, add_document, build, model_of, rows, set_mark, state_of

ROW = SPEC.row_bytes


class Memories(RuleBasedStateMachine):
    """One memory on disk beside its list model; `old` are snapshots that must stay as they were."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "a.hsa"
        self.next_chunk = 1
        self.next_id = 0
        self.old: list[tuple[MemoryFile, Model]] = []

    @initialize(rows_per_shard=st.sampled_from([1, 3, 1000]))
    def create(self, rows_per_shard: int) -> None:
        self.shard_bytes = rows_per_shard * ROW
        self.writer = MemoryWriter.create(self.path, SPEC, shard_bytes=self.shard_bytes)
        self.model, self.staged = Model(), Model()

    def chunks(self, count: int) -> list[int]:
        self.next_chunk += count
        return list(range(self.next_chunk - count, self.next_chunk))

    def open_id(self) -> int | None:
        return next((id for id, entry in self.staged.documents.items() if entry[2]), None)

    @precondition(lambda self: self.open_id() is None)
    @rule(count=st.integers(0, 5), close=st.booleans())
    def add(self, count: int, close: bool) -> None:
        numbers = self.chunks(count)
        id = add_document(self.writer, f"d{self.next_id}", numbers, close=close, mark=self.next_chunk)
        assert id == self.next_id
        self.next_id += 1
        self.staged.documents[id] = (f"d{id}", count * S + (not close), not close, tuple(numbers))
        self.staged.continuation = None if close else self.next_chunk

    @precondition(lambda self: self.staged.documents)
    @rule(data=st.data(), count=st.integers(0, 4))
    def splice(self, data: st.DataObject, count: int) -> None:
        id = data.draw(st.sampled_from(list(self.staged.documents)))
        name, _, is_open, old = self.staged.documents[id]
        first = data.draw(st.integers(0, len(old)))
        stop = data.draw(st.integers(first, len(old)))
        new = self.chunks(count)
        chunks = (*old[:first], *new, *old[stop:])
        self.writer.splice_chunks(id, first, stop, rows(new) if count else None, len(chunks) * S)
        self.staged.documents[id] = (name, len(chunks) * S, is_open, chunks)
        if is_open:
            set_mark(self.writer, self.next_chunk)
            self.staged.continuation = self.next_chunk

    @precondition(lambda self: self.open_id() is not None)
    @rule()
    def close_document(self) -> None:
        id = self.open_id()
        self.writer.close_document(id)
        name, tokens, _, chunks = self.staged.documents[id]
        self.staged.documents[id] = (name, tokens, False, chunks)
        self.staged.continuation = None

    @precondition(lambda self: self.staged.documents)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(list(self.staged.documents)))
        self.writer.delete_document(id)
        if self.staged.documents.pop(id)[2]:
            self.staged.continuation = None

    @precondition(lambda self: self.open_id() is None)
    @rule(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3), drop=st.booleans())
    def merge(self, sizes: list[int], drop: bool) -> None:
        other = self.folder / "other.hsa"
        shutil.rmtree(other, ignore_errors=True)
        documents = [self.chunks(size) for size in sizes]
        with MemoryWriter.create(other, SPEC) as writer:
            ids = [add_document(writer, "m", chunks) for chunks in documents]
            writer.commit()
            if drop and len(ids) > 1:
                writer.delete_document(ids[0])
                documents = documents[1:]
                writer.commit()
        with MemoryFile.open(other) as file:
            added = self.writer.merge([file])
        assert added == list(range(self.next_id, self.next_id + len(documents)))
        for id, chunks in zip(added, documents, strict=True):
            self.staged.documents[id] = ("m", len(chunks) * S, False, tuple(chunks))
        self.next_id += len(documents)

    @rule(number=st.integers(0, 3))
    def commit(self, number: int) -> None:
        self.staged.build_state = {"number": number}
        self.writer.commit(build_state={"number": number})
        self.agree()

    @rule()
    def compact(self) -> None:
        self.writer.compact()
        self.agree()
        with MemoryFile.open(self.path) as file:
            assert file.dead_bytes == 0

    @rule()
    def discard(self) -> None:
        self.writer.discard()
        self.forget()

    @rule()
    def reopen(self) -> None:
        self.writer.close()
        self.writer = MemoryWriter.open(self.path, shard_bytes=self.shard_bytes)
        self.forget()

    @rule()
    def export(self) -> None:
        target = self.folder / "copy.hsa"
        shutil.rmtree(target, ignore_errors=True)
        with MemoryFile.open(self.path) as file:
            export_memory(file, target)
        copy = state_of(target)
        with MemoryFile.open(target) as file:
            assert file.dead_bytes == 0
        assert list(copy.documents.values()) == list(self.model.documents.values())
        assert (copy.continuation, copy.build_state) == (self.model.continuation, self.model.build_state)

    def forget(self) -> None:
        self.staged = replace(self.model, documents=dict(self.model.documents))
        # Ids that were never committed are free again.
        self.next_id = self.writer._next_document

    def agree(self) -> None:
        self.model = replace(self.staged, documents=dict(self.staged.documents))
        assert list(self.model.documents) == [document.id for document in self.writer.documents]
        file = MemoryFile.open(self.path)
        assert model_of(file) == self.model
        self.old = [*self.old[-2:], (file, self.model)]

    def teardown(self) -> None:
        if hasattr(self, "writer"):
            self.writer.close()
            assert state_of(self.path) == self.model
            for file, model in self.old:
                assert model_of(file) == model
            assert leftovers(self.path) == set()
        shutil.rmtree(self.folder)


def leftovers(path: Path) -> set[str]:
    with MemoryFile.open(path) as file:
        wanted = file.manifest.files() | {"manifest.json", "writer.lock"}
    return {str(entry.relative_to(path)) for entry in path.rglob("*") if entry.is_file()} - wanted


def test_any_sequence_of_changes_equals_a_list_model():
    run_state_machine_as_test(Memories, settings=settings(max_examples=40, stateful_step_count=25, deadline=None))


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), max_size=5),
    st.integers(0, 25),
    st.integers(0, 25),
    st.lists(st.integers(1, 4), max_size=3),
)
@settings(max_examples=200)
def test_splicing_extents_equals_splicing_lists(parts, first, length, new):
    extents = [Extent(shard, 10 * number, count) for number, (shard, count) in enumerate(parts)]
    added = [Extent(9, 100 * number, count) for number, count in enumerate(new)]

    def rows_of(some):
        return [(shard, row) for shard, start, count in some for row in range(start, start + count)]

    flat = rows_of(extents)
    first = min(first, len(flat))
    stop = min(first + length, len(flat))
    result = splice(extents, first, stop, added)
    assert rows_of(result) == flat[:first] + rows_of(added) + flat[stop:]
    assert all(a.shard != b.shard or a.first + a.num_chunks != b.first for a, b in pairwise(result))


def test_nothing_is_visible_before_commit(tmp_path):
    path = build(tmp_path / "a.hsa", [[1, 2]])
    before = state_of(path)
    with MemoryWriter.open(path, shard_bytes=ROW) as writer:
        # Three rows of a shard each: two are written before the commit.
        add_document(writer, "new", [3, 4, 5])
        assert state_of(path) == before
        assert len(list((path / "shards").glob("*.safetensors"))) == 3
    assert state_of(path) == before
    assert leftovers(path) == set()


def test_appending_copies_nothing_that_is_there(tmp_path):
    path = build(tmp_path / "a.hsa", [list(range(100))], is_open=True)
    shard = path / "shards" / "000001.safetensors"
    former = shard.stat()
    with MemoryWriter.open(path) as writer:
        writer.append_chunks(0, rows([100]), 101 * S)
        set_mark(writer, 8)
        writer.commit()
    assert (shard.stat().st_mtime_ns, shard.stat().st_ino) == (former.st_mtime_ns, former.st_ino)
    assert (path / "shards" / "000002.safetensors").stat().st_size < ROW + 2048
    assert state_of(path).documents[0][3] == tuple(range(101))


def test_a_snapshot_stays_readable_while_a_writer_commits_and_compacts(tmp_path):
    path = build(tmp_path / "a.hsa", [[1, 2], [3, 4], [5]], is_open=True)
    snapshot = MemoryFile.open(path)
    with MemoryWriter.open(path) as writer:
        writer.delete_document(0)
        writer.splice_chunks(1, 0, 1, rows([30]), 2 * S)
        writer.close_document(2)
        assert writer.compact() > 0
        writer.delete_document(1)
        writer.commit()
    assert model_of(snapshot).documents[0][3] == (1, 2)
    assert model_of(snapshot).documents[1][3] == (3, 4)
    assert model_of(snapshot).continuation == 7
    assert verify_file(snapshot) == []
    assert list(state_of(path).documents) == [2]


def test_opening_retries_when_a_writer_replaces_the_files_meanwhile(tmp_path, monkeypatch):
    path = build(tmp_path / "a.hsa", [[1, 2], [3, 4]])
    from hsa_ultralong.memory.files import reader

    read_manifest, calls = reader.read_manifest, []

    def read_then_compact(folder):
        manifest = read_manifest(folder)
        calls.append(manifest.generation)
        if len(calls) == 1:
            with MemoryWriter.open(path) as writer:
                writer.delete_document(0)
                writer.compact()
        return manifest

    monkeypatch.setattr(reader, "read_manifest", read_then_compact)
    with MemoryFile.open(path) as file:
        assert [document.id for document in file.documents] == [1]
    # the second is the writer's own
    assert len(calls) == 3 and calls[2] > calls[1] == calls[0]


def test_compacting_frees_deleted_documents_for_good(tmp_path):
    secret = 123_456_789
    path = build(tmp_path / "a.hsa", [[1, 2], [secret, secret], [3]], shard_bytes=100 * ROW)
    needle = secret.to_bytes(4, "little")
    with MemoryWriter.open(path) as writer:
        writer.delete_document(1)
        writer.splice_chunks(0, 1, 2, rows([9]), 2 * S)
        writer.commit()
        writer.compact()
    assert not any(needle in entry.read_bytes() for entry in path.rglob("*") if entry.is_file())
    assert leftovers(path) == set()
    assert [entry[3] for entry in state_of(path).documents.values()] == [(1, 9), (3,)]


def test_many_small_commits_leave_few_shards(tmp_path):
    with MemoryWriter.create(tmp_path / "a.hsa", SPEC, shard_bytes=4096 * ROW) as writer:
        for number in range(70):
            add_document(writer, f"d{number}", [number])
            writer.commit()
        assert len(writer.committed.shards) < 24
    assert [entry[3] for entry in state_of(tmp_path / "a.hsa").documents.values()] == [(n,) for n in range(70)]


def test_a_builder_goes_on_where_the_last_commit_was(tmp_path):
    path = tmp_path / "a.hsa"

    def run(limit: int) -> None:
        with MemoryWriter.create(path, SPEC, exist_ok=True) as writer:
            for number in range(writer.build_state.get("next", 0), limit):
                add_document(writer, f"d{number}", [number])
                writer.commit(build_state={"next": number + 1})
            add_document(writer, "not committed", [99])

    run(2)
    run(5)
    assert [entry[0] for entry in state_of(path).documents.values()] == ["d0", "d1", "d2", "d3", "d4"]


def test_exporting_some_documents_gives_a_memory_of_only_these(tmp_path):
    path = build(tmp_path / "a.hsa", [[1, 2], [3, 4], [5], [6]], is_open=True, shard_bytes=1000 * ROW)
    with MemoryFile.open(path) as file:
        export_memory(file, tmp_path / "b.hsa", [2, 0])
        export_memory(file, tmp_path / "c.hsa", [1, 3])
    assert [entry[3] for entry in state_of(tmp_path / "b.hsa").documents.values()] == [(5,), (1, 2)]
    # Nothing of the others travels along.
    with MemoryFile.open(tmp_path / "b.hsa") as file:
        assert file.dead_bytes == 0 and sum(r.num_chunks for r in file.manifest.shards) == 3
    assert state_of(tmp_path / "b.hsa").continuation is None
    assert state_of(tmp_path / "c.hsa").continuation == 7
    assert not list(tmp_path.glob(".*partial"))


def test_a_commit_without_changes_writes_nothing(tmp_path):
    path = build(tmp_path / "a.hsa", [[1]])
    with MemoryWriter.open(path) as writer:
        before = os.stat(path / "manifest.json").st_mtime_ns
        assert writer.commit() == writer.generation == 1
        assert os.stat(path / "manifest.json").st_mtime_ns == before
        assert writer.commit(build_state={"a": 1}) == 2


def test_a_continuation_must_be_set_again_after_the_open_document_changed(tmp_path):
    path = build(tmp_path / "a.hsa", [[1]], is_open=True)
    with MemoryWriter.open(path) as writer:
        writer.append_chunks(0, rows([2]), 2 * S)
        with pytest.raises(ValueError, match="call set_continuation or clear_continuation"):
            writer.commit()
        writer.clear_continuation()
        writer.commit()
    assert state_of(path).continuation is None


def test_the_tokens_of_an_open_document_include_its_tail(tmp_path):
    path = build(tmp_path / "a.hsa", [[1], [2, 3]], is_open=True)
    with MemoryFile.open(path) as file:
        assert file.document_tokens(1).tolist() == [2] * S + [3] * S + [7]
        assert file.document_tokens(0).dtype == torch.int32
        assert (file.num_tokens, file.num_chunks, file.dead_bytes) == (13, 3, 0)
