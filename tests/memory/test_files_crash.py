"""Memory files under kill -9 at every single step, at random moments, and on a full disk: nothing is lost."""

from __future__ import annotations

import errno
import gc
import os
import random
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hsa_ultralong.memory import MemoryFile, MemoryFileError, MemoryWriter, export_memory, verify_memory
from hsa_ultralong.memory.files import housekeeping, transfer
from tests.memory.test_files_model import SPEC, Model, S, add_document, build, rows, set_mark, state_of

ROW = SPEC.row_bytes
STEPS = ("open", "write", "fsync", "replace", "rename", "unlink", "link", "mkdir", "ftruncate", "pwrite", "rmdir")


@pytest.fixture
def folder() -> Iterator[Path]:
    """In RAM where there is such a folder: a kill needs no disk, and fsync takes most of the time on one."""
    root = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=root) as name:
        yield Path(name)


def build_more(path: Path) -> None:
    """A resumable builder; run again, it continues."""
    with MemoryWriter.create(path, SPEC, exist_ok=True, shard_bytes=2 * ROW) as writer:
        for number in range(writer.build_state.get("next", 0), 2):
            if writer.open_document is not None:
                writer.close_document(writer.open_document.id)
            add_document(writer, f"b{number}", [10 * number + 1, 10 * number + 2, 3], close=False, mark=number)
            writer.commit(build_state={"next": number + 1})


def append(path: Path) -> None:
    with MemoryWriter.open(path) as writer:
        if writer.build_state.get("step") != "append":
            id = writer.documents[-1].id
            writer.append_chunks(id, rows([50, 51]), (writer.documents[-1].num_chunks + 2) * S + 1)
            set_mark(writer, 9)
            writer.commit(build_state={"step": "append"})


def edit(path: Path) -> None:
    with MemoryWriter.open(path) as writer:
        if writer.build_state.get("step") != "edit":
            writer.splice_chunks(0, 1, 2, rows([60, 61]), 3 * S)
            writer.commit(build_state={"step": "edit"})


def delete_and_compact(path: Path) -> None:
    with MemoryWriter.open(path, shard_bytes=2 * ROW) as writer:
        if any(document.id == 1 for document in writer.documents):
            writer.delete_document(1)
        writer.compact()


def merge(path: Path) -> None:
    with MemoryWriter.open(path) as writer, MemoryFile.open(path.with_name("other.hsa")) as other:
        if writer.build_state.get("step") != "merge":
            writer.merge([other])
            writer.commit(build_state={"step": "merge"})


def fold(path: Path) -> None:
    with MemoryWriter.open(path) as writer:
        if len(writer.documents) < 3:
            add_document(writer, "f", [100])
        writer.commit()


def prepare(path: Path, name: str) -> None:
    """The memory that the operation begins with; the builder begins with none."""
    if name == "build_more":
        return
    if name == "merge":
        build(path, [[1, 2], [3]])
        other = build(path.with_name("other.hsa"), [[4, 5], [6, 7], [8]], shard_bytes=2 * ROW)
        with MemoryWriter.open(other) as writer:
            writer.delete_document(2)
            writer.splice_chunks(1, 0, 1, rows([66]), 2 * S)
            writer.commit()
    elif name == "fold":
        build(path, [[0], [1]])
    else:
        build(path, [[1, 2], [3, 4], [5]], is_open=True)


def die_at(step: int, calls: list[str] | None = None) -> None:
    """From the step-th change of the file system on this process is dead; writes are torn in the middle."""
    count = 0

    def wrap(name: str) -> Callable[..., object]:
        original = getattr(os, name)

        def call(*arguments: object, **options: object) -> object:
            nonlocal count
            if name == "open" and not arguments[1] & os.O_CREAT:
                return original(*arguments, **options)
            if calls is not None:
                calls.append(name)
            if count == step:
                if name == "write":
                    original(arguments[0], arguments[1][: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return original(*arguments, **options)

        return call

    for name in STEPS:
        setattr(os, name, wrap(name))


def in_child(action: Callable[[], None]) -> int:
    """Fork, run, and return the wait status; 0 if the action ended well."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


def state_or_none(path: Path) -> Model | None:
    return state_of(path) if (path / "manifest.json").exists() else None


def contents(model: Model | None) -> object:
    return None if model is None else (list(model.documents.values()), model.continuation)


OPERATIONS = [build_more, append, edit, delete_and_compact, merge, fold]


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
def test_killed_at_every_step_it_is_before_or_after_and_a_rerun_completes_it(folder, operation, monkeypatch):
    monkeypatch.setattr(transfer, "_FOLD", 3)
    whole = folder / "whole"
    whole.mkdir()
    prepare(whole / "a.hsa", operation.__name__)
    start = folder / "start"
    shutil.copytree(whole, start)
    allowed = [contents(state_or_none(whole / "a.hsa"))]
    publish = MemoryWriter.publish

    def noting(self, *arguments):
        result = publish(self, *arguments)
        allowed.append(contents(state_of(self.path)))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryWriter, "publish", noting)
        operation(whole / "a.hsa")
    # An empty memory is what `create` commits.
    allowed.append(([], None))
    final = state_of(whole / "a.hsa")
    if operation is fold:
        assert len(MemoryFile.open(whole / "a.hsa").manifest.shards) == 1
    step, is_killed = 0, True
    # Children then touch, and so copy, less of this process.
    gc.freeze()
    while is_killed:
        run = folder / "run"
        shutil.copytree(start, run)
        path = run / "a.hsa"

        def action(step: int = step, path: Path = path) -> None:
            die_at(step)
            operation(path)

        status = in_child(action)
        is_killed = os.WIFSIGNALED(status)
        assert is_killed or status == 0, f"step {step}"
        assert contents(state_or_none(path)) in allowed, f"step {step}"
        operation(path)
        assert contents(state_of(path)) == contents(final), f"step {step}"
        assert state_of(path).build_state == final.build_state
        with MemoryFile.open(path) as file:
            wanted = file.manifest.files() | {"manifest.json", "writer.lock"}
        assert {str(f.relative_to(path)) for f in path.rglob("*") if f.is_file()} == wanted, f"step {step}"
        shutil.rmtree(run)
        step += 1
    gc.unfreeze()
    assert step > 10


def test_an_export_killed_at_every_step_is_complete_or_absent(folder):
    path = build(folder / "a.hsa", [[1, 2], [3, 4], [5]], is_open=True)
    target = folder / "b.hsa"
    step, is_killed = 0, True
    while is_killed:

        def action(step: int = step) -> None:
            die_at(step)
            with MemoryFile.open(path) as file:
                export_memory(file, target)

        is_killed = os.WIFSIGNALED(in_child(action))
        if not target.exists():
            with MemoryFile.open(path) as file:
                export_memory(file, target)
        assert contents(state_of(target)) == contents(state_of(path))
        assert not list(folder.glob(".*"))
        shutil.rmtree(target)
        step += 1
    assert step > 10


def test_fifty_kills_at_random_moments_lose_nothing(folder):
    path = folder / "a.hsa"

    def work() -> None:
        with MemoryWriter.create(path, SPEC, exist_ok=True, shard_bytes=4 * ROW) as writer:
            number = writer.build_state.get("next", 0)
            while True:
                add_document(writer, f"d{number}", list(range(number, number + 1 + number % 5)))
                if number % 3 == 2:
                    writer.delete_document(writer.documents[0].id)
                number += 1
                writer.commit(build_state={"next": number})
                if number % 7 == 0:
                    writer.compact()

    generator, last, kills = random.Random(0), 0, 0
    # on a busy machine a run comes less far before its kill
    while kills < 50 or last <= 20:
        kills += 1
        child = os.fork()
        if child == 0:
            try:
                work()
            finally:
                os._exit(1)
        time.sleep(generator.uniform(0.0, 0.06))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        if not (path / "manifest.json").exists():
            continue
        model = state_of(path)
        count = model.build_state.get("next", 0)
        assert count >= last
        last = count
        kept = range(count // 3, count)
        expected = [(f"d{n}", (1 + n % 5) * S, False, tuple(range(n, n + 1 + n % 5))) for n in kept]
        assert list(model.documents.values()) == expected


def test_every_file_is_on_disk_before_the_manifest_names_it(tmp_path, monkeypatch):
    path = build(tmp_path / "a.hsa", [[1, 2], [3]], is_open=True)
    synced: set[int] = set()
    fsync, replace = os.fsync, os.replace
    checked = 0

    def noting_fsync(descriptor):
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            synced.update(
                os.stat(os.readlink(f"/proc/self/fd/{descriptor}") + "/" + name).st_ino * -1
                for name in os.listdir(descriptor)
            )

    def checking_replace(source, target, *, src_dir_fd, dst_dir_fd):
        nonlocal checked
        assert os.stat(source, dir_fd=src_dir_fd).st_ino in synced, "renamed before it was synced"
        if str(target).endswith("manifest.json"):
            for name in durable_names(path / source):
                inode = os.stat(path / name).st_ino
                if inode not in known:
                    assert inode in synced and -inode in synced, name
                    checked += 1
        replace(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    def durable_names(source) -> set[str]:
        from hsa_ultralong.memory.files.manifest import decode

        return decode(Path(source).read_bytes(), path).files()

    known = {entry.stat().st_ino for entry in path.rglob("*") if entry.is_file()}
    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "replace", checking_replace)
    append(path)
    assert checked == 3


@pytest.mark.parametrize("name", ["append", "edit", "merge", "delete_and_compact"])
def test_a_full_disk_leaves_the_last_state_and_the_commit_can_be_repeated(tmp_path, name, monkeypatch):
    prepare(tmp_path / "a.hsa", name)
    operation = next(operation for operation in OPERATIONS if operation.__name__ == name)
    before = contents(state_of(tmp_path / "a.hsa"))
    write, step, is_full = os.write, 0, True
    while is_full:
        count, is_full = 0, False

        def limited(descriptor, data, step=step):
            nonlocal count, is_full
            count += 1
            if count > step:
                is_full = True
                write(descriptor, data[: len(data) // 2])
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(descriptor, data)

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", limited)
            try:
                operation(tmp_path / "a.hsa")
            except MemoryFileError as error:
                assert "no space left" in str(error) and "\n" not in str(error)
        if is_full and name != "delete_and_compact":
            assert contents(state_of(tmp_path / "a.hsa")) == before
        assert verify_memory(tmp_path / "a.hsa") == []
        with MemoryFile.open(tmp_path / "a.hsa") as file:
            wanted = file.manifest.files() | {"manifest.json", "writer.lock"}
        found = {str(f.relative_to(tmp_path / "a.hsa")) for f in (tmp_path / "a.hsa").rglob("*") if f.is_file()}
        assert found == wanted
        step += 1
    assert step >= 2
    assert contents(state_of(tmp_path / "a.hsa")) != before


def test_staged_chunks_survive_a_failed_commit(tmp_path, monkeypatch):
    path = build(tmp_path / "a.hsa", [[1]])
    with MemoryWriter.open(path) as writer:
        add_document(writer, "new", [2, 3])
        replace = os.replace
        for failing in ("safetensors", "pages.json", "manifest.json"):

            def full(source, target, failing=failing, **folders):
                if str(target).endswith(failing):
                    raise OSError(errno.ENOSPC, "No space left on device")
                replace(source, target, **folders)

            with monkeypatch.context() as patch:
                patch.setattr(os, "replace", full)
                with pytest.raises(MemoryFileError, match="no space left while committing"):
                    writer.commit()
            assert len(state_of(path).documents) == 1
            assert not list(path.rglob("*.tmp"))
        writer.commit()
    assert state_of(path).documents[1][3] == (2, 3)


def test_an_interrupt_right_after_the_manifest_was_replaced_loses_nothing(tmp_path, monkeypatch):
    path = build(tmp_path / "a.hsa", [[1]])
    replace = os.replace

    def interrupted(source, target, **folders):
        replace(source, target, **folders)
        if str(target).endswith("manifest.json"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), MemoryWriter.open(path) as writer:
        add_document(writer, "new", [2, 3])
        monkeypatch.setattr(os, "replace", interrupted)
        writer.commit()
    assert state_of(path).documents[1][3] == (2, 3)


def test_a_file_size_limit_of_the_system_is_an_error_and_no_damage(tmp_path):
    path = build(tmp_path / "a.hsa", [[1]])
    before = state_of(path)

    def work() -> None:
        with MemoryWriter.open(path) as writer:
            add_document(writer, "new", list(range(100)))
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
            with pytest.raises(MemoryFileError, match="no space left"):
                writer.commit()

    assert in_child(work) == 0
    assert state_of(path) == before
    assert not list(path.rglob("*.tmp"))


def test_a_killed_writer_leaves_no_lock(tmp_path):
    path = build(tmp_path / "a.hsa", [[1]])

    def work() -> None:
        MemoryWriter.open(path)
        os.kill(os.getpid(), signal.SIGKILL)

    assert os.WIFSIGNALED(in_child(work))
    MemoryWriter.open(path).close()
    assert (path / housekeeping.LOCK_FILE).exists()
