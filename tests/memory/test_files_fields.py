"""Crafted memories whose checksums are right: whatever a field says, it is refused in one line or harms nothing."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from hsa_ultralong.files import strict_json
from hsa_ultralong.files.fields import MAX_DEPTH, free_object, require
from hsa_ultralong.files.strict_json import parse_json
from hsa_ultralong.memory import Column, MemoryFile, MemoryFileError, MemorySpec, MemoryWriter, verify_memory
from hsa_ultralong.memory.files import manifest
from hsa_ultralong.memory.files.spec import MemoryDocument
from tests.memory.test_files_damage import LARGE
from tests.memory.test_files_model import COLUMNS, SPEC, S, add_document, build, state_of

HUGE = (-1, 2**63, 10**900, True, 1.0, "1", None, [], {})


def reframe(path: Path, body: str) -> None:
    digest = hashlib.sha256(body.encode()).hexdigest()
    frame = f'{{"format":"hsa-memory","version":1,"sha256":"{digest}","body":{body}}}\n'
    (path / "manifest.json").write_text(frame)


def body_of(path: Path) -> dict:
    return json.loads((path / "manifest.json").read_text())["body"]


def dumped(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def assert_refused(path: Path, *words: str) -> None:
    """By readers, writers and verify, in one line, and nothing of the folder is touched."""
    before = {entry: entry.read_bytes() for entry in path.rglob("*") if entry.is_file() and entry.name != "writer.lock"}
    for opening in (MemoryFile.open, MemoryWriter.open):
        with pytest.raises(MemoryFileError) as refused:
            opening(path)
        message = str(refused.value)
        assert "\n" not in message and len(message) < 600
        assert all(word in message for word in words), message
    assert verify_memory(path)
    after = {entry: entry.read_bytes() for entry in path.rglob("*") if entry.is_file() and entry.name != "writer.lock"}
    assert before == after


def places(value: object, at: tuple = ()) -> list[tuple]:
    """The way to every value inside JSON."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, entry in inner for place in places(entry, (*at, key)))]


FREE = {("build_state",), ("spec", "metadata")}


def test_no_field_of_the_manifest_takes_a_value_of_another_type_or_range(tmp_path):
    path = build(tmp_path / "a.hsa", [[1, 2], [3]], is_open=True)
    body = dumped(body_of(path))
    for place in places(json.loads(body)):
        if any(place[: len(free)] == free for free in FREE) or (place[:1] == ("documents",) and "metadata" in place):
            continue
        for value in HUGE:
            changed = json.loads(body)
            holder = changed
            for key in place[:-1]:
                holder = holder[key]
            old = holder[place[-1]] if place else changed
            is_allowed = type(value) is type(old) or (value is None and place == ("continuation",))
            if is_allowed and (not isinstance(value, int) or isinstance(value, bool)):
                continue
            if place:
                holder[place[-1]] = value
            reframe(path, dumped(changed if place else value))
            with pytest.raises(MemoryFileError, match=r"manifest\.json contradicts itself") as refused:
                MemoryFile.open(path)
            assert "\n" not in str(refused.value) and len(str(refused.value)) < 600, (place, value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda body: body["spec"].update(chunk_size=10**18), ("spec.chunk_size", "1000000000000000000")),
        (lambda body: body["spec"]["columns"]["codes"].update(shape=[2**40, 2**40]), ("bytes",)),
        (lambda body: body["spec"]["columns"]["codes"].update(shape=[2**40]), ("chunk has",)),
        (lambda body: body["spec"]["columns"]["codes"].update(shape=[4]), ("the size of shard",)),
        (lambda body: body["spec"]["columns"]["codes"].update(shape=[1] * 17), ("shape must be a list of 0..16",)),
        (lambda body: body["spec"]["columns"]["codes"].update(dtype="F7"), ("codes.dtype must be one of",)),
        (lambda body: body["spec"]["columns"].update({"__metadata__": body["spec"]["columns"]["codes"]}), ("a key",)),
        (lambda body: body["spec"]["columns"].update({"a b": body["spec"]["columns"]["codes"]}), ("a key",)),
        (lambda body: body["spec"].update(columns={}), ("columns must be an object of 1..100",)),
        (lambda body: body["shards"][0].update(num_chunks=2**62, num_bytes=2**62), ("the size of shard",)),
        (lambda body: body["shards"][0].update(number=0), ("shards[0].number",)),
        (lambda body: body["shards"][0].update(sha256="A" * 64), ("sha256 must match",)),
        (lambda body: body["documents"][0].update(num_tokens=13), ("more tokens than chunks hold",)),
        (lambda body: body["documents"][0].update(extents=[[1, 2**63 - 1, 1]]), ("extents",)),
        (lambda body: body["documents"][0].update(extents=[[1, 1, 2**63 - 1]]), ("extents",)),
        (lambda body: body["documents"][0].update(extents=[[1, 0, 1], [1, 0, 1]]), ("extents",)),
        (lambda body: body["documents"][0].update(extents=[[1, 0, 1, 1]]), ("extents[0] must be a list of 3",)),
        (lambda body: body["documents"][0].update(extra=1), ("documents[0] has an unknown field 'extra'",)),
        (lambda body: body["documents"][0].pop("name"), ("documents[0] lacks 'name'",)),
        (lambda body: body["documents"][0].update(name="x" * 70_000), ("documents[0].name",)),
        (lambda body: body.update(next_document=1), ("document ids",)),
        (lambda body: body.update(next_shard=2), ("shard numbers",)),
        (lambda body: body.update(generation=1), ("continuation's name",)),
        (lambda body: body["continuation"].update(num_bytes=2**62), ("continuation-000002", "the checksum differs")),
    ],
)  # fmt: skip
def test_a_contradiction_with_right_checksums_is_named(tmp_path, change, words):
    path = build(tmp_path / "a.hsa", [[1, 2], [3]], is_open=True)
    body = body_of(path)
    change(body)
    reframe(path, dumped(body))
    assert_refused(path, *words)


@pytest.mark.parametrize(
    "name",
    [
        "../victim",
        "shards/000001.safetensors",
        "manifest.json",
        "continuation-000002.safetensors/../../victim",
        "continuation-2.safetensors",
        "continuation-0000002.safetensors",
        "continuation-000002.safetensors\n",
        "/etc/passwd",
        "continuation-\u0660\u0660\u0660\u0660\u0660\u0662.safetensors",
    ],
)
def test_a_continuation_has_its_own_name_and_no_other_file_is_read_or_removed_for_it(tmp_path, name):
    path = build(tmp_path / "a.hsa", [[1, 2], [3]], is_open=True)
    data = (path / "continuation-000002.safetensors").read_bytes()
    (tmp_path / "victim").write_bytes(data)
    body = body_of(path)
    body["continuation"]["file"] = name
    reframe(path, dumped(body))
    assert_refused(path, "continuation")
    assert (tmp_path / "victim").read_bytes() == data


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('{"a":1,"a":2}', "twice"),
        ('{"a":NaN}', "NaN"),
        ('{"a":-Infinity}', "Infinity"),
        ('{"a":1e999}', "1e999"),
        ('{"a":' + "9" * 5000 + "}", "5,000 digits"),
        ("[" * 500_000 + "]" * 500_000, "deep"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "deep"),
        ('{"a":"\u00e9"}', "ascii"),
        ('{"a":}', "Expecting value"),
    ],
)
def test_json_that_python_would_take_or_choke_on_is_refused(tmp_path, text, word):
    with pytest.raises(ValueError, match=word) as refused:
        parse_json(text.encode(), encoding="ascii")
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 200
    path = build(tmp_path / "a.hsa", [[1]])
    body = dumped(body_of(path)).replace('"build_state":{}', f'"build_state":{text}')
    digest = hashlib.sha256(body.encode()).hexdigest()
    frame = f'{{"format":"hsa-memory","version":1,"sha256":"{digest}","body":{body}}}\n'
    (path / "manifest.json").write_text(frame)
    assert_refused(path, "contradicts itself", word)


def test_free_json_is_bounded_in_depth_for_writers_too(tmp_path):
    def nested(depth: int) -> dict:
        value: dict = {}
        for _ in range(depth - 1):
            value = {"a": value}
        return value

    require(free_object, nested(MAX_DEPTH), "it")
    with MemoryWriter.create(tmp_path / "a.hsa", SPEC) as writer:
        for depth in (MAX_DEPTH + 1, 100_000):
            with pytest.raises(ValueError, match=r"deep|JSON"):
                writer.begin_document("x", nested(depth))
            with pytest.raises(ValueError, match=r"deep|JSON"):
                writer.commit(build_state=nested(depth))
        writer.close_document(writer.begin_document("x", nested(MAX_DEPTH)))
        writer.commit(build_state=nested(MAX_DEPTH))
    assert state_of(tmp_path / "a.hsa").build_state == nested(MAX_DEPTH)


def test_a_manifest_is_not_parsed_when_it_has_too_many_items_or_bytes(tmp_path, monkeypatch):
    path = build(tmp_path / "a.hsa", [[1], [2]])
    monkeypatch.setattr(strict_json, "MAX_ITEMS", 20)
    assert_refused(path, "items")
    monkeypatch.undo()
    monkeypatch.setattr(manifest, "LARGEST_FILE", 100)
    assert_refused(path, "bytes")


def test_a_writer_refuses_what_no_reader_would_take_back(tmp_path):
    path = build(tmp_path / "a.hsa", [[1, 2]])
    before = state_of(path)
    with MemoryWriter.open(path) as writer:
        for call in (
            lambda: writer.begin_document(5),
            lambda: writer.begin_document("x" * 70_000),
            lambda: writer.splice_chunks(0, 0, 0, None, 2**63),
            lambda: writer.splice_chunks(0, 0, 0, None, True),
            lambda: writer.splice_chunks(0, 0, 0, None, 8.0),
        ):
            with pytest.raises(ValueError, match=r"must be a"):
                call()
        assert writer.commit() == 1
    assert state_of(path) == before
    for make in (
        lambda: MemorySpec(2**31, COLUMNS),
        lambda: MemorySpec(True, COLUMNS),
        lambda: MemorySpec(S, COLUMNS, fingerprint=None),
        lambda: MemorySpec(S, {"__metadata__": COLUMNS["codes"]}),
        lambda: MemorySpec(S, {"a": Column((2**39,), torch.int8), "b": Column((2**39 + 1,), torch.int8)}),
        lambda: Column((2**21, 2**21), torch.int8),
    ):
        with pytest.raises(ValueError):
            make()


def table_with_right_sums(path: Path, table: bytes) -> None:
    (path / "shards/000001.pages.json").write_bytes(table)
    body = body_of(path)
    body["shards"][0]["sha256"] = hashlib.sha256(table).hexdigest()
    reframe(path, dumped(body))


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table["crc32"].pop(),
        lambda table: table["crc32"].append(0),
        lambda table: table.update(crc32=[]),
        lambda table: table.pop("crc32"),
        lambda table: table.update(crc32=[None] * len(table["crc32"])),
        lambda table: table.update(crc32=[2**32] * len(table["crc32"])),
        lambda table: table.update(crc32=dict.fromkeys("ab", 1)),
        lambda table: table.update(num_bytes=1),
        lambda table: table.update(page_bytes=2**21),
        lambda table: table.update(page_bytes=float(2**20)),
        lambda table: table.update(more=1),
    ],
)
def test_a_page_table_without_the_right_number_of_sums_never_passes(tmp_path, change):
    path = tmp_path / "a.hsa"
    with MemoryWriter.create(path, LARGE) as writer:
        add_document(writer, "a", list(range(60)))
        writer.commit()
    table = json.loads((path / "shards/000001.pages.json").read_text())
    assert len(table["crc32"]) > 1
    change(table)
    table_with_right_sums(path, json.dumps(table, separators=(",", ":")).encode() + b"\n")
    assert_refused(path, "000001.pages.json", "is not that of the shard")
    assert "page table" in verify_memory(path)[0].what


def test_a_page_table_that_is_no_table_never_passes(tmp_path):
    path = build(tmp_path / "a.hsa", [[1]])
    for table in (b"", b"[]", b"null", b'"' + b"x" * 50, b"\xff\xfe", b"[" * 60):
        table_with_right_sums(path, table)
        assert_refused(path, "000001.pages.json")
    table_with_right_sums(path, b" " * 10_000_000)
    assert_refused(path, "000001.pages.json")


@pytest.mark.parametrize(
    "data",
    [
        b"0123456789",
        b"\xff" * 8 + b"{}",
        (2**62).to_bytes(8, "little") + b"{}",
        save({"tail_tokens": torch.zeros(1, dtype=torch.int32)}),
        save({"tail_tokens": torch.zeros(1, dtype=torch.int32)}, {"hsa": "[1]"}),
        save({"tail_tokens": torch.zeros(1, dtype=torch.int32)}, {"hsa": '{"a":NaN}'}),
        save({"tail_tokens": torch.zeros(1, dtype=torch.int32)}, {"hsa": "{"}),
        save({"tail_tokens": torch.zeros(1, dtype=torch.int32)}, {"hsa": "{}"})[:-1],
    ],
)
def test_a_continuation_that_is_none_is_refused_although_its_hash_is_right(tmp_path, data):
    path = build(tmp_path / "a.hsa", [[1, 2], [3]], is_open=True)
    (path / "continuation-000002.safetensors").write_bytes(data)
    body = body_of(path)
    body["continuation"].update(num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    reframe(path, dumped(body))
    assert_refused(path, "continuation-000002.safetensors", "no continuation")
    assert verify_memory(path)[0].documents == ("'d1'",)


def test_no_memory_is_taken_for_sizes_that_the_files_do_not_have(tmp_path):
    path = build(tmp_path / "a.hsa", [[1, 2]])
    body = body_of(path)
    header = body["shards"][0]["num_bytes"] - 2 * SPEC.row_bytes
    count = 2**50
    from hsa_ultralong.memory.files.shard import shard_layout

    size = shard_layout(SPEC, count).num_bytes
    assert size > header
    body["shards"][0].update(num_chunks=count, num_bytes=size)
    body["documents"][0].update(extents=[[1, 0, count]], num_tokens=count * S)
    reframe(path, dumped(body))
    assert_refused(path, "truncated")


def test_more_memory_than_there_is_is_one_line(tmp_path):
    path = tmp_path / "a.hsa"
    build(path, [[1]])
    with MemoryFile.open(path) as file, pytest.raises(MemoryFileError, match=r"chunks of column 'codes' need"):
        file._room("codes", 2**58)
    assert os.path.isdir(path)


def test_a_name_of_any_length_is_short_in_messages():
    assert MemoryDocument(3, "x" * 10**6).label.count("x") < 160
    assert MemoryDocument(3, "notes.txt").label == "'notes.txt'"
    assert MemoryDocument(3, "").label == "document 3"
