from __future__ import annotations

import lzma

import pytest

from hsa_ultralong.data import InputFile, iter_texts, read_text
from hsa_ultralong.data.text import raw_documents


def test_documents_are_split_at_separator_lines_only(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("one\n\x1e\ntwo \x1e still two\r\n\x1e\r\n \n\x1e\nthrée".encode())
    assert list(iter_texts([path])) == ["one\n", "two \x1e still two\r\n", "thrée"]
    assert len(list(raw_documents(InputFile(path, "a.txt"), b"never"))) == 1


@pytest.mark.parametrize("read", [read_text, lambda path: list(iter_texts([path]))])
def test_empty_files_and_wrong_bytes_are_named(tmp_path, read):
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    with pytest.raises(ValueError, match=r"empty\.txt is empty"):
        read(empty)
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"fine\n\x1e\ncaf\xe9 noir")
    with pytest.raises(ValueError, match=r"latin.txt is not UTF-8 text: byte 0xe9 at offset 10, line 3; .*cp1252"):
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
    (tmp_path / "a.csv").write_text("text\nx\n")
    with pytest.raises(ValueError, match=r"a\.csv is a table \(CSV\)"):
        read_text(tmp_path / "a.csv")
