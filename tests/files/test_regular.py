"""Only regular files are opened, and what is written is whole and in its folder."""

from __future__ import annotations

import os

import pytest

from hsa_ultralong.files import durable, regular
from hsa_ultralong.files.durable import write_whole
from hsa_ultralong.files.lock import FileLock


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "pipe", tmp_path / "folder", "/dev/null"):
        for open_it in (regular.read_regular, lambda path: regular.append_text(path, "x")):
            with pytest.raises(ValueError, match="is no regular file"):
                open_it(path)
    (tmp_path / "long").write_text("12345")
    with pytest.raises(ValueError, match="more than 4 bytes"):
        regular.read_regular(tmp_path / "long", 4)


def test_writing_replaces_links_and_never_follows_them(tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("mine")
    for name in ("x", "x.tmp"):
        (tmp_path / name).symlink_to(mine)
    write_whole(tmp_path / "x", "new")
    assert (mine.read_text(), (tmp_path / "x").read_text()) == ("mine", "new")
    (tmp_path / "y").symlink_to(mine)
    with pytest.raises(ValueError, match="symbolic link"):
        regular.append_text(tmp_path / "y", "more")
    assert mine.read_text() == "mine" and sorted(path.name for path in tmp_path.iterdir()) == ["mine", "x", "y"]


def test_what_has_another_name_is_not_written_through(tmp_path):
    (tmp_path / "mine").write_text("mine")
    os.link(tmp_path / "mine", tmp_path / "x")
    with pytest.raises(ValueError, match="hard links"):
        regular.append_text(tmp_path / "x", "more")
    lock = FileLock.acquire(tmp_path / "x", "it is used")
    assert (tmp_path / "x").read_text().startswith(f"{os.getpid()} ")
    lock.release()
    os.link(tmp_path / "mine", tmp_path / "x")
    write_whole(tmp_path / "x", "new")
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_write_that_fails_leaves_the_file_before(tmp_path, monkeypatch):
    write_whole(tmp_path / "x", "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(tmp_path / "x", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x", "old")]
