"""Lines are read alike whether they lie plain or packed."""

from __future__ import annotations

import lzma

import pytest

from hsa_ultralong.eval.plots import read_jsonl, read_log
from hsa_ultralong.files.packed import pack, stored, unpacked

LINES = b'{"stage": "a", "global_step": 1, "tokens": 64}\n{"stage": "a", "global_step": 2, "tokens": 128}\n'


def test_lines_are_read_plain_or_packed_and_the_plain_ones_first(tmp_path):
    path, beside = tmp_path / "log.jsonl", tmp_path / "log.jsonl.xz"
    assert read_log(path) == [] and stored(path) == path
    beside.write_bytes(pack(LINES))
    assert pack(LINES) == pack(LINES) and stored(path) == stored(beside) == beside
    packed = read_log(path)
    assert [line["global_step"] for line in packed] == [1, 2]
    assert packed == read_log(beside) == read_jsonl(path) == read_jsonl(beside)
    # a run that goes on writes there
    path.write_bytes(LINES[: LINES.index(b"\n") + 1])
    assert read_log(path) == read_jsonl(path) == packed[:1]


def test_errors_name_the_packed_file(tmp_path):
    path = tmp_path / "log.jsonl.xz"
    path.write_bytes(pack(b'{"a": 1}\nnot json\n'))
    for read in (read_log, read_jsonl):
        with pytest.raises(ValueError, match=r"log\.jsonl\.xz:[12]"):
            read(tmp_path / "log.jsonl")
    path.write_bytes(pack(LINES)[:-20])
    with pytest.raises(ValueError, match="is cut off"):
        read_log(path)


def test_a_damaged_or_huge_file_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.xz"
    path.write_bytes(b"this is no archive")
    with pytest.raises(ValueError, match="is damaged"):
        unpacked(path)
    path.write_bytes(lzma.compress(bytes(1000)))
    monkeypatch.setattr("hsa_ultralong.files.packed.MAX_BYTES", 999)
    with pytest.raises(ValueError, match="more than 999 bytes"):
        unpacked(path)
