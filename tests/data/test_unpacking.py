"""Packed files: every kind of input in every packing, damage and bombs in one line."""

import bz2
import gzip
import json
import lzma

import pytest

from hsa_ultralong.data import iter_texts
from hsa_ultralong.data import unpacking as module


def zstd():
    try:
        from compression import zstd as library
    except ImportError:
        library = pytest.importorskip("backports.zstd")
    return library


PACK = {
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": lambda data: zstd().compress(data),
}
CONTENTS = {
    "a.txt": b"one\n\x1e\ntwo\n",
    "a.jsonl": b'{"text": "one\\n"}\n{"text": "two\\n"}\n',
    "a.ndjson": b'{"text": "one\\n"}\n{"text": "two\\n"}\n',
    "a.json": b'[{"text": "one\\n"}, {"text": "two\\n"}]',
    "a.csv": b'text\n"one\n"\n"two\n"\n',
    "a.tsv": b'n\ttext\n1\t"one\n"\n2\t"two\n"\n',
}


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("name", CONTENTS)
def test_every_kind_is_read_in_every_packing_by_any_spelling(tmp_path, name, suffix):
    packed = PACK[suffix](CONTENTS[name])
    for spelling in (name + suffix, (name + suffix).upper(), name):
        path = tmp_path / spelling
        path.write_bytes(packed)
        assert list(iter_texts([path])) == ["one\n", "two\n"]


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("damage", ["cut", "flip", "not packed"])
def test_a_damaged_packed_file_ends_in_one_line(tmp_path, suffix, damage):
    text = "".join(f"line {i * i}\n" for i in range(5000)).encode()
    packed = bytearray(PACK[suffix](text))
    if damage == "flip":
        for place in range(len(packed) // 2, len(packed) // 2 + 20):
            packed[place] ^= 0xFF
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes({"cut": packed[:-9], "flip": packed, "not packed": text}[damage])
    with pytest.raises(ValueError, match=rf"a\.txt{suffix} is not a whole {suffix} file") as error:
        list(iter_texts([path]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", PACK)
def test_a_bomb_ends_while_it_unpacks(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(module, "_HARMLESS_BYTES", 1 << 20)
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(PACK[suffix](bytes(b"a" * (1 << 23))))
    with pytest.raises(ValueError, match="unpacks to more than 250 times its size"):
        list(iter_texts([path]))


def test_archives_inside_packings_are_refused_by_their_kind(tmp_path):
    import io
    import tarfile

    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        member = tarfile.TarInfo("a.txt")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"one"))
    (tmp_path / "a.tar.gz").write_bytes(stream.getvalue())
    with pytest.raises(ValueError, match=r"a\.tar\.gz is a tar archive: unpack it"):
        list(iter_texts([tmp_path / "a.tar.gz"]))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(gzip.compress(b"text")))
    with pytest.raises(ValueError, match=r"packed twice"):
        list(iter_texts([tmp_path / "b.txt.gz"]))


def test_an_empty_packed_file_is_empty(tmp_path):
    for name, data in (("a.txt.gz", b""), ("b.txt.gz", gzip.compress(b""))):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name} is empty"):
            list(iter_texts([tmp_path / name]))


def test_zst_without_its_library_says_what_to_do(tmp_path, monkeypatch):
    import sys

    for name in ("compression", "backports"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "a.txt.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(20))
    with pytest.raises(ImportError, match=r'pip install "hsa-ultralong\[documents\]", or unpack it: zstd -d'):
        list(iter_texts([tmp_path / "a.txt.zst"]))


def test_parquet_is_read_packed_too(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["a", "b"]}), tmp_path / "t.parquet")
    (tmp_path / "t.PARQUET.gz").write_bytes(gzip.compress((tmp_path / "t.parquet").read_bytes()))
    assert list(iter_texts([tmp_path / "t.PARQUET.gz"])) == ["a", "b"]
    (tmp_path / "fake.parquet").write_text(json.dumps({"text": "a"}))
    with pytest.raises(ValueError, match=r"fake\.parquet is no parquet file"):
        list(iter_texts([tmp_path / "fake.parquet"]))
