"""What memory files refuse: second writers, other models, what cannot be merged; each with one clear line."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hsa_ultralong.memory import Column, MemoryFile, MemoryFileError, MemorySpec, MemoryWriter, export_memory
from tests.memory.test_files_model import COLUMNS, SPEC, S, add_document, build, rows, set_mark, state_of


def built_with(path: Path, spec: MemorySpec) -> MemoryFile:
    with MemoryWriter.create(path, spec) as writer:
        add_document(writer, "a", [1, 2])
        add_document(writer, "b", [3])
        writer.commit()
    return MemoryFile.open(path)


def test_a_second_writer_is_refused_and_told_the_process_of_the_first(tmp_path):
    path = build(tmp_path / "a.hsa", [[1]])
    with MemoryWriter.open(path):
        with pytest.raises(MemoryFileError, match=f"is being written by process {os.getpid()} on "):
            MemoryWriter.open(path)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                MemoryWriter.open(path)
            except MemoryFileError as error:
                code = 0 if f"process {os.getppid()} on " in str(error) else 2
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        assert state_of(path).documents[0][3] == (1,)
    MemoryWriter.open(path).close()


def test_a_closed_writer_changes_nothing(tmp_path):
    path = build(tmp_path / "a.hsa", [[1, 2]])
    before = state_of(path)
    closed = MemoryWriter.open(path)
    closed.close()
    with MemoryWriter.open(path, shard_bytes=SPEC.row_bytes) as writer:
        add_document(writer, "new", [3, 4, 5])
        for change in (
            lambda: closed.begin_document("x"),
            lambda: closed.splice_chunks(0, 0, 1, rows([9]), 8),
            lambda: closed.delete_document(0),
            lambda: closed.close_document(0) or closed.clear_continuation(),
            lambda: closed.commit(build_state={"a": 1}),
            lambda: closed.compact(),
        ):
            with pytest.raises(ValueError, match="was closed"):
                change()
        closed.close()
        assert state_of(path) == before
        writer.commit()
    assert state_of(path).documents[1][3] == (3, 4, 5)


def test_a_forked_child_neither_writes_nor_unlocks(tmp_path):
    path = build(tmp_path / "a.hsa", [[1, 2]])
    with MemoryWriter.open(path) as writer:
        add_document(writer, "new", [3])
        child = os.fork()
        if child == 0:
            code = 1
            try:
                with pytest.raises(ValueError, match="belongs to a parent process"):
                    writer.commit()
                writer.close()
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        with pytest.raises(MemoryFileError, match="is being written"):
            MemoryWriter.open(path)
        writer.commit()
    assert state_of(path).documents[1][3] == (3,)


def test_a_memory_of_another_model_is_refused(tmp_path):
    path = build(tmp_path / "a.hsa", [[1]])
    for opening in (MemoryFile.open, MemoryWriter.open):
        with pytest.raises(
            MemoryFileError, match=r"was built by another model: fingerprint 'ffffffffffff', this model"
        ):
            opening(path, fingerprint="0" * 64)
        opening(path, fingerprint="f" * 64).close()
    with pytest.raises(MemoryFileError, match="built by another model"):
        MemoryWriter.create(path, replace(SPEC, fingerprint="0" * 64), exist_ok=True)
    # The refused writer gave the lock back.
    MemoryWriter.open(path).close()


def test_a_folder_without_a_memory_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    missing = r"holds no memory \(manifest\.json is missing\)"
    for path, words in ((tmp_path / "none", "none does not exist"), (tmp_path, missing), (tmp_path / "file", missing)):
        for opening in (MemoryFile.open, MemoryWriter.open):
            with pytest.raises(MemoryFileError, match=words):
                opening(path)
    assert not (tmp_path / "none").exists() and not (tmp_path / "writer.lock").exists()


def test_creating_over_something_is_refused(tmp_path):
    path = build(tmp_path / "a.hsa", [[1]])
    with pytest.raises(MemoryFileError, match="holds a memory already"):
        MemoryWriter.create(path, SPEC)
    (path / "manifest.json").unlink()
    with pytest.raises(MemoryFileError, match="is not empty"):
        MemoryWriter.create(path, SPEC, exist_ok=True)
    assert (path / "shards" / "000001.safetensors").exists()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("x")
    with pytest.raises(MemoryFileError, match=r"is not empty \(notes\.txt\)"):
        MemoryWriter.create(tmp_path / "b", SPEC)
    with pytest.raises(MemoryFileError, match="exists already"):
        export_memory(built_with(tmp_path / "c", SPEC), tmp_path / "b")


def test_files_that_are_not_ours_stay(tmp_path):
    path = build(tmp_path / "a.hsa", [[1]])
    (path / "README.txt").write_text("mine")
    (path / "shards" / "000009.safetensors.tmp").write_text("left")
    (path / "shards" / "000009.safetensors").write_text("left")
    MemoryFile.open(path).close()
    assert (path / "shards" / "000009.safetensors").exists()
    MemoryWriter.open(path).close()
    assert (path / "README.txt").exists()
    assert sorted(os.listdir(path / "shards")) == ["000001.pages.json", "000001.safetensors"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fingerprint": "0" * 64}, "other.hsa was built by another model"),
        ({"tokenizer": "0" * 64}, "other.hsa was built with another tokenizer"),
        ({"chunk_size": 8}, "other.hsa has chunks of 8 tokens, required 4"),
        ({"columns": {**COLUMNS, "scale": Column((), torch.float16)}}, r"another form \(columns scale\)"),
        ({"columns": {**COLUMNS, "codes": Column((3,), torch.int8)}}, r"another form \(columns codes\)"),
    ],
)
def test_merging_refuses_memories_of_another_kind(tmp_path, change, message):
    spec = replace(SPEC, **change)
    other = tmp_path / "other.hsa"
    with MemoryWriter.create(other, spec) as writer:
        writer.close_document(writer.begin_document("empty"))
        writer.commit()
    with MemoryWriter.create(tmp_path / "a.hsa", SPEC) as writer, MemoryFile.open(other) as file:
        with pytest.raises(MemoryFileError, match=message):
            writer.merge([file])
        assert writer.documents == ()


def test_merging_refuses_open_documents(tmp_path):
    is_open, closed = build(tmp_path / "open.hsa", [[1]], is_open=True), build(tmp_path / "closed.hsa", [[1]])
    message = r"open\.hsa holds the open document 'd0'; close it first"
    with MemoryWriter.open(is_open) as writer, pytest.raises(MemoryFileError, match=message):
        writer.merge([MemoryFile.open(closed)])
    with MemoryWriter.open(closed) as writer, MemoryFile.open(is_open) as file:
        with pytest.raises(MemoryFileError, match=message):
            writer.merge([MemoryFile.open(closed), file])
        assert len(writer.documents) == 1


def test_a_model_that_depends_on_order_refuses_what_changes_it(tmp_path):
    spec = replace(SPEC, is_composable=False)
    file = built_with(tmp_path / "a.hsa", spec)
    with MemoryWriter.open(tmp_path / "a.hsa") as writer:
        for call, what in [
            (lambda: writer.merge([file]), "merge"),
            (lambda: writer.delete_document(0), "delete"),
            (lambda: export_memory(file, tmp_path / "b.hsa", [1]), "select"),
        ]:
            with pytest.raises(MemoryFileError, match=f"cannot {what} documents: this model's fusion depends on"):
                call()
        writer.delete_document(1)
        writer.commit()
    export_memory(file, tmp_path / "b.hsa")
    assert state_of(tmp_path / "b.hsa").documents[1][3] == (3,)


def test_wrong_use_of_a_writer_is_refused_and_changes_nothing(tmp_path):
    path = build(tmp_path / "a.hsa", [[1, 2], [3]], is_open=True)
    before = state_of(path)
    with MemoryWriter.open(path) as writer:
        good = rows([9])
        for call, message in [
            (lambda: writer.begin_document("x"), "'d1' is still open; close it with close_document"),
            (lambda: writer.reopen_document(0), "only the last document of a memory can be open"),
            (lambda: writer.delete_document(5), "document 5 does not exist"),
            (lambda: writer.splice_chunks(0, 1, 3, good, 8), r"within 0\.\.2 of 'd0', got 1\.\.3"),
            (lambda: writer.append_chunks(0, good, -1), "num_tokens must be >= 0"),
            (lambda: writer.append_chunks(0, {}, 4), "columns must be codes, keys_values"),
            (lambda: writer.append_chunks(0, {**good, "codes": good["tokens"]}, 4), "column 'codes' must be"),
            (
                lambda: writer.append_chunks(0, {**good, "lengths": good["lengths"].repeat(2)}, 4),
                r"same number of chunks, got \[1, 2\]",
            ),
            (lambda: writer.commit(build_state={"a": float("nan")}), "build_state must be JSON"),
        ]:
            with pytest.raises(ValueError, match=message):
                call()
        assert writer.commit() == writer.generation
        writer.close_document(1)
        with pytest.raises(ValueError, match="a continuation needs an open document"):
            set_mark(writer, 1)
        writer.discard()
        writer.reopen_document(1)
    assert state_of(path) == before
    with MemoryFile.open(path) as file:
        with pytest.raises(ValueError, match="documents must be different"):
            export_memory(file, tmp_path / "b.hsa", [0, 0])
        with pytest.raises(MemoryFileError, match="'d1' is open and must be the last"):
            export_memory(file, tmp_path / "b.hsa", [1, 0])
    assert S == 4


def test_too_many_open_files_says_what_to_do(tmp_path):
    resource = pytest.importorskip("resource")
    path = build(tmp_path / "a.hsa", [list(range(40))], shard_bytes=SPEC.row_bytes)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/dev/fd"))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 20, limits[1]))
        with pytest.raises(MemoryFileError, match=r"raise the limit \(ulimit -n\) or compact"):
            MemoryFile.open(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    with MemoryFile.open(path) as file:
        assert file.num_chunks == 40
