"""Memory files: the format itself, as docs/memory-format.md describes it."""

from __future__ import annotations

import hashlib
import json
import zlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from hsa_ultralong.memory import Column, MemoryFile, MemoryFileError, MemorySpec, MemoryWriter
from hsa_ultralong.memory.files.manifest import decode, encode, read_manifest
from hsa_ultralong.memory.files.shard import PAGE_BYTES
from hsa_ultralong.memory.files.spec import DTYPES
from hsa_ultralong.memory.files.verification import verify_file
from tests.memory.test_files_model import COLUMNS, SPEC, S, add_document, build, rows, same_bytes


def reframed(path, change) -> None:
    """Rewrite the manifest with a changed body and a right checksum."""
    value = json.loads((path / "manifest.json").read_text())
    change(value)
    body = json.dumps(value["body"], sort_keys=True, separators=(",", ":")).encode()
    value["sha256"] = hashlib.sha256(body).hexdigest()
    (path / "manifest.json").write_text(json.dumps(value, separators=(",", ":")) + "\n")


def test_the_manifest_is_json_with_a_checksum_of_its_body(tmp_path):
    path = build(tmp_path / "a.hsa", [[1, 2], [3]], is_open=True)
    value = json.loads((path / "manifest.json").read_text())
    assert list(value) == ["format", "version", "sha256", "body"]
    assert (value["format"], value["version"]) == ("hsa-memory", 1)
    canonical = json.dumps(value["body"], sort_keys=True, separators=(",", ":")).encode("ascii")
    assert value["sha256"] == hashlib.sha256(canonical).hexdigest()
    assert value["body"]["documents"][1] == {
        "id": 1,
        "name": "d1",
        "metadata": {},
        "num_tokens": 5,
        "is_open": True,
        "extents": [[2, 0, 1]],
    }
    assert encode(read_manifest(path)) == (path / "manifest.json").read_bytes()


def test_shards_are_safetensors_files_with_a_checksum_per_page(tmp_path):
    path = tmp_path / "a.hsa"
    with MemoryWriter.create(path, SPEC) as writer:
        add_document(writer, "long", list(range(9000)))
        writer.commit()
    shard = path / "shards" / "000001.safetensors"
    tensors, expected = load_file(shard), rows(list(range(9000)))
    assert set(tensors) == set(COLUMNS)
    for name in COLUMNS:
        assert same_bytes(tensors[name], expected[name])
    data = shard.read_bytes()
    assert len(data) > PAGE_BYTES
    table = (path / "shards" / "000001.pages.json").read_bytes()
    assert json.loads(table) == {
        "page_bytes": 2**20,
        "num_bytes": len(data),
        "crc32": [zlib.crc32(data[start : start + 2**20]) for start in range(0, len(data), 2**20)],
    }
    record = json.loads((path / "manifest.json").read_text())["body"]["shards"][0]
    assert record == {
        "number": 1,
        "num_chunks": 9000,
        "num_bytes": len(data),
        "sha256": hashlib.sha256(table).hexdigest(),
    }


def test_the_continuation_is_a_safetensors_file(tmp_path):
    path = tmp_path / "a.hsa"
    window = torch.randn(1, 3, 2, 8).to(torch.bfloat16)
    with MemoryWriter.create(path, SPEC) as writer:
        writer.begin_document("open")
        writer.set_continuation({"keys": window[:, 1:], "values": window[:, 1:], "none": window[:, :0]}, {"layers": 2})
        writer.commit()
    (file,) = path.glob("continuation-*.safetensors")
    with safe_open(file, "pt") as opened:
        assert torch.equal(opened.get_tensor("keys"), window[:, 1:])
        assert json.loads(opened.metadata()["hsa"]) == {"layers": 2}
    with MemoryFile.open(path) as memory:
        tensors, metadata = memory.continuation()
    assert torch.equal(tensors["values"], window[:, 1:]) and tensors["none"].shape == (1, 0, 2, 8)
    assert metadata == {"layers": 2}


@pytest.mark.parametrize("is_resident", [False, True])
@pytest.mark.parametrize("name", sorted(DTYPES))
def test_every_dtype_comes_back_bit_by_bit(tmp_path, name, is_resident):
    dtype = DTYPES[name]
    columns = {
        "a": Column((3, 5), dtype, is_resident),
        "b": Column((), dtype, is_resident),
        "c": Column((7,), torch.uint8),
    }
    spec = MemorySpec(S, columns)
    values = {
        key: torch.randint(0, 256, (11 * column.row_bytes,), dtype=torch.uint8).view(
            dtype if key != "c" else torch.uint8
        )
        for key, column in columns.items()
    }
    values = {key: value.view(11, *columns[key].shape) for key, value in values.items()}
    # what is not finite is refused
    values = {k: v.float().nan_to_num(0, 0, 0).to(v.dtype) if v.is_floating_point() else v for k, v in values.items()}
    with MemoryWriter.create(tmp_path / "a.hsa", spec) as writer:
        id = writer.begin_document()
        writer.append_chunks(id, values, 44)
        writer.commit()
    chunks = torch.tensor([10, 3, 3, 4, 5, 0])
    with MemoryFile.open(tmp_path / "a.hsa") as file:
        assert file.spec == spec
        for key in columns:
            assert same_bytes(file.fetch(key, chunks), values[key][chunks])
            assert same_bytes(file.read(key, 2, 9), values[key][2:9])
            assert file.fetch(key, chunks[:0]).shape == (0, *columns[key].shape)
            out = torch.empty_like(values[key][:6])
            assert file.fetch(key, chunks, out=out) is out and same_bytes(out, values[key][chunks])


def test_a_memory_without_documents_or_chunks_can_be_read(tmp_path):
    path = build(tmp_path / "a.hsa", [])
    with MemoryFile.open(path) as file:
        assert (file.documents, file.num_chunks, file.num_tokens, file.num_bytes) == ((), 0, 0, 0)
        assert file.resident("landmarks").shape == (0, 1, 8)
        assert file.read("keys_values", 0, 0).shape == (0, 2, S, 1, 8)
        assert verify_file(file) == [] and file.continuation() is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value.update(version=2), "has format version 2, this library reads 1"),
        (lambda value: value.update(format="zip"), "is not the manifest of a memory"),
        (lambda value: value["body"]["documents"][0]["extents"].append([1, 0, 1]), "contradicts itself .extents"),
        (lambda value: value["body"]["documents"][0].update(extents=[[1, 1, 2]]), "contradicts itself .extents"),
        (lambda value: value["body"]["documents"][0].update(extents=[[3, 0, 1]]), "contradicts itself .extents"),
        (lambda value: value["body"]["documents"][0].update(is_open=True), "contradicts itself .an open document"),
        (lambda value: value["body"]["documents"][0].update(id=1), "contradicts itself .document ids"),
        (lambda value: value["body"]["documents"][1].update(is_open=False), "contradicts itself .a continuation"),
        (lambda value: value["body"]["shards"][0].update(number=9), "contradicts itself .shard numbers"),
        (lambda value: value["body"].pop("spec"), "contradicts itself .body lacks 'spec'"),
        (
            lambda value: value["body"]["spec"]["columns"]["tokens"].update(dtype="I13"),
            r"contradicts itself .body\.spec\.columns\.tokens\.dtype must be one of",
        ),
    ],
)
def test_foreign_versions_and_contradictions_are_refused(tmp_path, change, message):
    path = build(tmp_path / "a.hsa", [[1, 2], [3]], is_open=True)
    reframed(path, change)
    for opening in (MemoryFile.open, MemoryWriter.open):
        with pytest.raises(MemoryFileError, match=message) as refused:
            opening(path)
        assert "\n" not in str(refused.value)


def test_any_changed_byte_of_the_manifest_is_refused(tmp_path):
    path = build(tmp_path / "a.hsa", [[1]])
    data = (path / "manifest.json").read_bytes()
    for position in range(len(data)):
        for bit in (0, 5):
            changed = bytearray(data)
            changed[position] ^= 1 << bit
            with pytest.raises(MemoryFileError):
                decode(bytes(changed), path)
    for length in range(len(data)):
        with pytest.raises(MemoryFileError):
            decode(data[:length], path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Column((2,), torch.complex64), "dtype must be one of"),
        (lambda: Column((0,), torch.int8), "shape must be positive"),
        (lambda: MemorySpec(0, COLUMNS), "chunk_size must be a whole number within 1"),
        (lambda: MemorySpec(4, {}), "columns must be an object of 1"),
        (lambda: MemorySpec(4, {"a b": COLUMNS["codes"]}), "must be an identifier"),
        (lambda: MemorySpec(4, COLUMNS, metadata={"a": {1, 2}}), "metadata must be JSON"),
    ],
)
def test_a_spec_that_cannot_be_stored_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
