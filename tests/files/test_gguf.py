"""A damaged or crafted GGUF file is one line, whatever its header claims; nothing large is made of a claim."""

import struct

import numpy as np
import pytest

from hsa_ultralong.files.gguf import read_gguf


def text(value):
    return struct.pack("<Q", len(value.encode())) + value.encode()


def header(tensors=0, fields=0, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, fields)


WORD = text("key") + struct.pack("<I", 8) + text("value")


def tensor(name="x", shape=(4,), kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def test_fields_and_tensors_are_read_as_written(tmp_path):
    numbers = np.arange(8, dtype="<f4")
    fields = WORD + text("list") + struct.pack("<IIQ", 9, 5, 2) + struct.pack("<ii", -1, 7)
    fields += text("eps") + struct.pack("<If", 6, 1e-5) + text("yes") + struct.pack("<I?", 7, True)
    fields += text("texts") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("ü")
    data = header(1, 5) + fields + tensor(shape=(4, 2))
    path = tmp_path / "a.gguf"
    path.write_bytes(data + bytes(-len(data) % 32) + numbers.tobytes())
    file = read_gguf(path)
    assert file.fields == {"key": "value", "list": [-1, 7], "eps": 1e-5, "yes": True, "texts": ["a", "ü"]}
    assert np.array_equal(file.tensors["x"].numbers(), numbers.reshape(2, 4))


DAMAGED = {
    "empty": (b"", "it is empty"),
    "something else": (b"PK\x03\x04 a zip file", "does not begin with GGUF"),
    "an old version": (header(version=1), "version 1, known are"),
    "the other byte order": (header(version=3 << 24), "little-endian"),
    "half a header": (header()[:10], "ends before"),
    "more fields than bytes": (header(fields=2**60), "ends before the 10,376,"),
    "more tensors than bytes": (header(tensors=2**63), "ends before"),
    "a text longer than the file": (header(fields=1) + struct.pack("<Q", 2**62) + b"key" + bytes(20), "ends before"),
    "a list longer than the file": (
        header(fields=1) + text("key") + struct.pack("<IIQ", 9, 0, 2**61) + bytes(20), "ends before"
    ),
    "a list of texts longer than the file": (
        header(fields=1) + text("key") + struct.pack("<IIQ", 9, 8, 2**58) + bytes(20), "ends before"
    ),
    "lists in a list": (header(fields=1) + text("key") + struct.pack("<IIQ", 9, 9, 1) + bytes(20), "unknown type 9"),
    "an unknown type": (header(fields=1) + text("key") + struct.pack("<I", 99) + bytes(20), "unknown type 99"),
    "a key twice": (header(fields=2) + WORD + WORD, "'key' stands there twice"),
    "no UTF-8": (header(fields=1) + struct.pack("<Q", 2) + b"\xff\xfe" + bytes(20), "not UTF-8"),
    "a tensor twice": (header(tensors=2) + tensor() + tensor() + bytes(90), "'x' stands there twice"),
    "a tensor of too many dimensions": (header(tensors=1) + tensor(shape=(1,) * 9), "9 dimensions"),
    "a tensor larger than the file": (header(tensors=1) + tensor(shape=(2**40, 2**40)) + bytes(90), "ends before"),
    "a tensor beyond the end": (header(tensors=1) + tensor(offset=2**62) + bytes(90), "ends before"),
    "a wrong alignment": (
        header(fields=1) + text("general.alignment") + struct.pack("<II", 4, 0), "not a power of two"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_one_line(tmp_path, name):
    content, problem = DAMAGED[name]
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=problem) as error:
        read_gguf(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_what_needs_the_package_says_how_to_install_it(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "gguf", None)
    data = header(1) + tensor(shape=(32, 1), kind=8)
    path = tmp_path / "a.gguf"
    path.write_bytes(data + bytes(-len(data) % 32 + 34))
    with pytest.raises(ImportError, match=r"pip install 'hsa-ultralong\[gguf\]'"):
        read_gguf(path)


def test_a_block_type_that_nobody_knows_is_refused(tmp_path):
    pytest.importorskip("gguf")
    data = header(1) + tensor(shape=(32, 1), kind=77)
    path = tmp_path / "a.gguf"
    path.write_bytes(data + bytes(100))
    with pytest.raises(ValueError, match="unknown type 77"):
        read_gguf(path)
