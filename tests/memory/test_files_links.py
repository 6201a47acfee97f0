"""Nothing outside a memory's folder is read, written, cut or removed, whatever stands in its files' places."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from hsa_ultralong.memory import MemoryFile, MemoryFileError, MemoryWriter, export_memory, verify_memory
from tests.memory.test_files_model import SPEC, add_document, build, state_of

FILES = (
    "manifest.json",
    "manifest.json.tmp",
    "writer.lock",
    "shards",
    "shards/000001.safetensors",
    "shards/000001.pages.json",
    "shards/000003.safetensors.tmp",
    "continuation-000002.safetensors",
    "continuation-000003.safetensors.tmp",
)
NOT_NEEDED = {name for name in FILES if name.endswith((".tmp", ".lock"))}


def to_file(path: Path, outside: Path) -> None:
    path.symlink_to(outside / "same" / path.name if (outside / "same" / path.name).exists() else outside / "victim")


def to_folder(path: Path, outside: Path) -> None:
    path.symlink_to(outside / "shards")


def to_nothing(path: Path, outside: Path) -> None:
    path.symlink_to(outside / "made by following")


def to_device(path: Path, outside: Path) -> None:
    path.symlink_to("/dev/zero")


def fifo(path: Path, outside: Path) -> None:
    os.mkfifo(path)


def listening(path: Path, outside: Path) -> None:
    # bound by a short name, for the limit of its length
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def in_a_folder(path: Path, outside: Path) -> None:
    path.mkdir()
    (path / "inside").write_text("stays")


KINDS = (to_file, to_folder, to_nothing, to_device, fifo, listening, in_a_folder)


def snapshot(folder: Path) -> dict[str, tuple]:
    """Everything of a tree: kinds, contents, times."""
    found = {}
    for entry in [folder, *folder.rglob("*")]:
        status = entry.lstat()
        data = hashlib.sha256(entry.read_bytes()).hexdigest() if stat.S_ISREG(status.st_mode) else None
        found[str(entry.relative_to(folder))] = (status.st_mode, status.st_mtime_ns, status.st_size, data)
    return found


@pytest.fixture
def place(tmp_path) -> tuple[Path, Path]:
    """A memory and a tree beside it that holds copies of all its files."""
    path, outside = build(tmp_path / "a.hsa", [[1, 2], [3]], is_open=True), tmp_path / "outside"
    shutil.copytree(path, outside)
    (outside / "victim").write_bytes(b"precious")
    shutil.copytree(path, outside / "same")
    for file in (path / "shards").iterdir():
        shutil.copy(file, outside / "same")
    return path, outside


def change(path: Path) -> None:
    with MemoryWriter.open(path) as writer:
        writer.close_document(1)
        add_document(writer, "new", [5, 6])
        writer.delete_document(0)
        writer.compact()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", FILES)
def test_no_member_is_followed_opened_or_waited_for(place, name, kind):
    path, outside = place
    member = path / name
    if member.is_dir():
        shutil.rmtree(member)
    else:
        member.unlink(missing_ok=True)
    kind(member, outside)
    before = snapshot(outside)
    is_refused = name not in NOT_NEEDED and not (name == "shards" and kind is in_a_folder)
    for action in (MemoryFile.open, change, lambda path: path.with_name("b.hsa").exists() or copy(path)):
        try:
            action(path)
            assert not is_refused
        except MemoryFileError as error:
            assert "\n" not in str(error)
            assert Path(name).name in str(error), error
    assert bool(verify_memory(path)) == (is_refused or name == "shards")
    assert snapshot(outside) == before
    if kind is in_a_folder:
        assert (member / "inside").read_text() == "stays"


def copy(path: Path) -> None:
    with MemoryFile.open(path) as file:
        export_memory(file, path.with_name("b.hsa"))


def test_what_is_not_a_file_is_named_as_what_it_is(place):
    path, outside = place
    for kind, word in (
        (to_file, "a symbolic link"),
        (fifo, "a pipe"),
        (listening, "a socket"),
        (in_a_folder, "a folder"),
    ):
        shutil.rmtree(path)
        build(path, [[1]])
        (path / "shards/000001.safetensors").unlink()
        kind(path / "shards/000001.safetensors", outside)
        with pytest.raises(MemoryFileError, match=rf"000001\.safetensors: is {word}, not a plain file .*: 'd0'"):
            MemoryFile.open(path)
        assert [damage.documents for damage in verify_memory(path)] == [("'d0'",)]


def test_a_memory_reached_by_a_link_is_a_memory(place):
    path, _ = place
    link = path.with_name("link.hsa")
    link.symlink_to(path)
    change(link)
    assert state_of(link) == state_of(path)
    assert link.is_symlink()


def hard_linked(path: Path, target: Path) -> dict[Path, bytes]:
    shutil.copytree(path, target, copy_function=os.link)
    return {file: file.read_bytes() for file in target.rglob("*") if file.is_file()}


def test_a_hard_linked_copy_never_changes(place):
    path, _ = place
    copy = path.with_name("copy.hsa")
    before = hard_linked(path, copy)
    for _ in range(2):
        with MemoryWriter.open(path) as writer:
            if writer.open_document is not None:
                writer.close_document(writer.open_document.id)
            add_document(writer, "new", [5, 6])
            writer.commit()
            writer.delete_document(writer.documents[0].id)
            writer.compact()
            with pytest.raises(MemoryFileError, match="is being written by process"):
                MemoryWriter.open(path)
            # its lock is another file now
            MemoryWriter.open(copy).close()
    after = {file: file.read_bytes() for file in copy.rglob("*") if file.is_file() and file.name != "writer.lock"}
    assert after == {file: data for file, data in before.items() if file.name != "writer.lock"}


def test_a_lock_that_is_hard_linked_to_a_users_file_is_not_written_to(place):
    path, outside = place
    (path / "writer.lock").unlink()
    os.link(outside / "victim", path / "writer.lock")
    before = snapshot(outside)
    change(path)
    assert {name: entry for name, entry in snapshot(outside).items()} == before
    assert (outside / "victim").read_bytes() == b"precious"


def test_a_lock_file_is_never_shown_as_it_is(place):
    path, _ = place
    with MemoryWriter.open(path):
        (path / "writer.lock").write_bytes(b"\x1b[2J\n[red]1")
        with pytest.raises(MemoryFileError, match="written by another process;"):
            MemoryWriter.open(path)


@pytest.mark.parametrize("make", [to_folder, to_nothing, fifo, in_a_folder], ids=lambda make: make.__name__)
def test_an_unfinished_export_is_removed_only_if_it_is_one(place, make: Callable[[Path, Path], None]):
    path, outside = place
    partial = path.with_name(".b.hsa.partial")
    make(partial, outside)
    before = snapshot(outside)
    with MemoryFile.open(path) as file, pytest.raises(MemoryFileError, match=r"\.b\.hsa\.partial is in the way"):
        export_memory(file, path.with_name("b.hsa"))
    assert os.path.lexists(partial) and not path.with_name("b.hsa").exists()
    assert snapshot(outside) == before


def test_what_a_killed_export_left_is_removed(place):
    path, _ = place
    build(path.with_name(".b.hsa.partial"), [[7]])
    copy(path)
    assert state_of(path.with_name("b.hsa")).documents == state_of(path).documents


def test_only_names_that_a_writer_gives_are_cleaned_up(place):
    path, _ = place
    strangers = ("000001.safetensors", "continuation-1.safetensors", "shards/manifest.json", "shards/000009.txt")
    for name in strangers:
        (path / name).write_text("mine")
    (path / "shards/continuation-000009.safetensors").write_text("mine")
    (path / "shards/000009.pages.json").write_text("left")
    MemoryWriter.open(path).close()
    assert all((path / name).read_text() == "mine" for name in strangers)
    assert (path / "shards/continuation-000009.safetensors").exists()
    assert not (path / "shards/000009.pages.json").exists()


def lost_lock(path: Path) -> None:
    (path / "writer.lock").unlink()


def replaced_folder(path: Path) -> None:
    path.rename(path.with_name("moved.hsa"))
    shutil.copytree(path.with_name("moved.hsa"), path)


@pytest.mark.parametrize("happening", [lost_lock, replaced_folder], ids=lambda happening: happening.__name__)
@pytest.mark.parametrize("other_commits", [False, True])
def test_a_writer_whose_lock_is_gone_publishes_and_removes_nothing(tmp_path, happening, other_commits):
    path = build(tmp_path / "a.hsa", [[1, 2]])
    writer = MemoryWriter.open(path, shard_bytes=2 * SPEC.row_bytes)
    add_document(writer, "staged", [7])
    happening(path)
    if other_commits:
        with MemoryWriter.open(path, shard_bytes=2 * SPEC.row_bytes) as other:
            add_document(other, "other", [3, 4, 5])
            other.commit()
    before = snapshot(path)
    for call in (writer.commit, writer.compact, lambda: add_document(writer, "more", [8, 9, 10])):
        with pytest.raises(MemoryFileError, match=r"writer\.lock, or the whole folder, was removed or replaced"):
            call()
    assert [document.name for document in writer.documents][:2] == ["d0", "staged"]
    writer.close()
    assert snapshot(path) == before
    assert [entry[0] for entry in state_of(path).documents.values()] == ["d0", "other"][: 1 + other_commits]


def test_a_commit_over_another_writers_commit_is_refused_and_keeps_what_is_staged(tmp_path):
    # a file system without flock: both hold the same lock file
    path = build(tmp_path / "a.hsa", [[1, 2]])
    with MemoryWriter.open(path) as writer:
        add_document(writer, "staged", [7])
        elsewhere = build(tmp_path / "b.hsa", [[1, 2]])
        with MemoryWriter.open(elsewhere) as other:
            add_document(other, "other", [3])
            other.commit()
        for name in ("shards/000002.safetensors", "shards/000002.pages.json", "manifest.json"):
            os.replace(elsewhere / name, path / name)
        before = state_of(path)
        with pytest.raises(MemoryFileError, match="another writer committed while the memory was open"):
            writer.commit()
        assert [document.name for document in writer.documents] == ["d0", "staged"]
        assert state_of(path) == before
        writer.discard()
        assert [document.name for document in writer.documents] == ["d0", "other"]
        add_document(writer, "staged", [7])
        writer.commit()
    assert [entry[0] for entry in state_of(path).documents.values()] == ["d0", "other", "staged"]
