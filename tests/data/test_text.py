from __future__ import annotations

import lzma

import pytest

from hsa_ultralong.data import iter_documents, read_text


def test_documents_are_split_at_separator_lines_only(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("one\n\x1e\ntwo \x1e still two\r\n\x1e\r\n \n\x1e\nthrée".encode())
    assert list(iter_documents(path)) == ["one\n", "two \x1e still two\r\n", "thrée"]
    assert len(list(iter_documents(path, separator="never"))) == 1


def test_folders_are_read_in_sorted_order_without_hidden_and_other_files(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b" / "x.md").write_text("md")
    (tmp_path / "a.txt").write_text("txt")
    (tmp_path / "c.txt.xz").write_bytes(lzma.compress(b"xz\n\x1e\nxz2"))
    (tmp_path / "d.png").write_bytes(b"\xff")
    (tmp_path / "e.txt").write_text("")
    (tmp_path / ".git" / "h.txt").write_text("hidden")
    assert list(iter_documents([tmp_path])) == ["txt", "md", "xz\n", "xz2"]


def test_missing_paths_fail_at_once(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        iter_documents(tmp_path / "absent.txt")
    with pytest.raises(ValueError, match="holds no text file"):
        iter_documents(tmp_path)
    with pytest.raises(ValueError, match="no paths"):
        iter_documents([])
    with pytest.raises(ValueError, match="one line"):
        iter_documents(tmp_path, separator="a\nb")


@pytest.mark.parametrize("read", [read_text, lambda path: list(iter_documents(path))])
def test_empty_files_and_wrong_bytes_are_named(tmp_path, read):
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    with pytest.raises(ValueError, match=r"empty\.txt is empty"):
        read(empty)
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"fine\n\x1e\ncaf\xe9 noir")
    with pytest.raises(ValueError, match=r"latin.txt is not UTF-8 text: byte 0xe9 at offset 10"):
        read(latin)
    cut = tmp_path / "cut.txt.xz"
    cut.write_bytes(lzma.compress(b"hello " * 1000)[:-20])
    with pytest.raises(ValueError, match=r"not a whole \.xz file"):
        read(cut)


def test_read_text_returns_the_whole_file_without_byte_order_mark(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\n\x1e\r\ntwo")
    assert read_text(path) == "one\n\x1e\r\ntwo"
    with pytest.raises(ValueError, match="is a folder"):
        read_text(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        read_text(tmp_path / "absent")
