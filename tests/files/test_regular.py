"""Only regular files are opened, sealed JSON shows every change, and what is written is whole and in its folder."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsa_ultralong.files import regular

VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(), st.lists)


@given(st.dictionaries(st.text().filter(lambda name: name != "sha256"), VALUES), st.data())
def test_sealed_json_comes_back_and_shows_any_changed_bit(tmp_path_factory, content, data):
    path = tmp_path_factory.getbasetemp() / "x.json"
    whole = regular.sealed(content)
    assert regular.unsealed(whole, path) == (content, True)
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    changed = bytearray(whole)
    changed[bit // 8] ^= 1 << bit % 8
    try:
        found, is_sealed = regular.unsealed(bytes(changed), path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        # the name of the seal itself: a field that no reader knows
        assert not is_sealed and len(found) == len(content) + 1


@pytest.mark.parametrize("text", ["[1]", "3", "", "{", "[" * 100_000, "\xff", '{"a": 1' + "0" * 5000 + "}"])
def test_what_is_no_json_object_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "x.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"x\.json") as caught:
        regular.read_json(tmp_path / "x.json")
    assert "\n" not in str(caught.value)


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
    for name in ("x", ".partial-x"):
        (tmp_path / name).symlink_to(mine)
    regular.write_whole(tmp_path / "x", "new")
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
    with pytest.raises(ValueError, match="hard links"):
        regular.FileLock.acquire(tmp_path / "x", "it is used")
    regular.write_whole(tmp_path / "x", "new")
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_write_that_fails_leaves_the_file_before(tmp_path, monkeypatch):
    regular.write_whole(tmp_path / "x", "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(regular.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        regular.write_whole(tmp_path / "x", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x", "old")]


def test_fields_are_checked_by_name_and_kind():
    fields = {"n": regular.whole(1, 9), "name": regular.TEXT}
    regular.check_fields({"n": 3, "name": "a"}, fields, "it")
    regular.check_fields({"n": 3}, fields, "it", optional=("name",))
    for content, words in (
        ([], "must be a JSON object"),
        ({"n": 3}, "lacks 'name'"),
        ({"n": 3, "name": "a", "m": 1}, "unknown field 'm'"),
        ({"n": True, "name": "a"}, "n must be a whole number of 1 to 9, got True"),
        ({"n": 3, "name": ["\x1b[2J" * 99]}, "name must be text"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            regular.check_fields(json.loads(json.dumps(content)), fields, "it")
        assert str(caught.value).isprintable() and len(str(caught.value)) < 200
