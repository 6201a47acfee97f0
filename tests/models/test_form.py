"""Files that say they are this model's and are not: one line, before a layer meets a wrong shape."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from hsa_ultralong.inference import Library, append, last_logits
from hsa_ultralong.memory import MemoryFileError
from hsa_ultralong.memory.chunk_memory import ChunkMemory
from hsa_ultralong.testing.factories import random_tokens, tiny_model
from tests.fuzz.harness import run
from tests.fuzz.mutators import dump
from tests.fuzz.test_memory_fuzz import reframe, seal


def made(path: Path, close: bool = False):
    """A tiny model and a memory of two documents of 30 and 11 tokens, of which the last is open."""
    model = tiny_model()
    memory = model.memorize([random_tokens(1, 30)[0], random_tokens(1, 11, seed=1)[0]], close=close)
    memory.save(path)
    return model


def change_body(path: Path, change) -> None:
    body = json.loads((path / "manifest.json").read_text())["body"]
    change(body)
    (path / "manifest.json").write_bytes(reframe(b"", dump(body)))


def change_state(path: Path, change) -> None:
    (file,) = path.glob("continuation-*.safetensors")
    data = file.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    tensors = load(data)
    change(tensors)
    file.write_bytes(save(tensors, header["__metadata__"]))
    seal(path, file)


def change_column(path: Path, name: str, number: int) -> None:
    """Write a number over the column's first entry, with right checksums."""
    (file,) = path.glob("shards/*.safetensors")
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    offset = start + json.loads(data[8:start])[name]["data_offsets"][0]
    data[offset : offset + 4] = (number % 2**32).to_bytes(4, "little")
    file.write_bytes(data)
    seal(path, file)


@pytest.mark.parametrize(
    ("formats", "word"),
    [
        ("fp32", "metadata.formats"),
        ({"key_values": "fp32"}, "metadata.formats"),
        ({"key_values": "fp4", "landmarks": "fp32"}, "formats 'fp4'"),
        ({"key_values": [], "landmarks": "fp32"}, r"formats \[\]"),
        ({"key_values": "bf16", "landmarks": "fp64"}, r"\(keys_values\)"),
        ({"key_values": "int8", "landmarks": "fp64"}, r"\(keys_values, keys_values_scale\)"),
    ],
)
def test_a_memory_whose_columns_are_no_models_is_refused(tmp_path, formats, word):
    model = made(tmp_path / "a.hsa")
    change_body(tmp_path / "a.hsa", lambda body: body["spec"]["metadata"].update(formats=formats))
    for opening in (ChunkMemory.load, lambda path: Library.open(model, path)):
        with pytest.raises(MemoryFileError, match=word):
            opening(tmp_path / "a.hsa")
    # the refused writer gave the lock back
    with pytest.raises(MemoryFileError, match=word):
        Library.open(model, tmp_path / "a.hsa")


@pytest.mark.parametrize("formats", [7, "fp32", None, [], {"key_values": 1}])
def test_info_of_a_memory_without_known_formats_is_one_line(tmp_path, formats):
    made(tmp_path / "a.hsa")
    change_body(tmp_path / "a.hsa", lambda body: body["spec"]["metadata"].update(formats=formats))
    code, _, error = run(["memory", "info", str(tmp_path / "a.hsa")])
    assert code == 2 and len(error.splitlines()) == 1 and "metadata.formats" in error


def test_the_fingerprint_alone_opens_no_memory_of_another_form(tmp_path):
    other, path = tiny_model(num_memory_heads=2), tmp_path / "a.hsa"
    model = made(tmp_path / "b.hsa")
    other.memorize([random_tokens(1, 30)[0]]).save(path)
    mine = json.loads((tmp_path / "b.hsa" / "manifest.json").read_text())["body"]["spec"]["fingerprint"]
    change_body(path, lambda body: body["spec"].update(fingerprint=mine))
    for store in ("device", "host", "file"):
        memory = ChunkMemory.load(path, store=store)
        with pytest.raises(MemoryFileError, match=r"this memory's keys have the shape \(2, \d+\), the model's"):
            model.generate(random_tokens(1, 3), memory=memory, max_new_tokens=1)
    with pytest.raises(MemoryFileError, match=r"another form \(columns keys_values\)"):
        Library.open(model, path)


@pytest.mark.parametrize("number", [-1, 0, 3, 2**31 - 1])
def test_lengths_that_contradict_the_document_table_are_refused(tmp_path, number):
    made(tmp_path / "a.hsa")
    change_column(tmp_path / "a.hsa", "lengths", number)
    with pytest.raises(MemoryFileError, match=rf"chunk 0 has the length {number}, 4 by the document table"):
        ChunkMemory.load(tmp_path / "a.hsa")


@pytest.mark.parametrize("number", [-1, 2**31 - 1])
def test_token_ids_that_the_model_does_not_have_are_refused(tmp_path, number):
    model = made(tmp_path / "a.hsa")
    change_column(tmp_path / "a.hsa", "tokens", number)
    with Library.open(model, tmp_path / "a.hsa") as library, pytest.raises(MemoryFileError, match="holds token ids"):
        library.edit(0, 1, 3, [1])


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("lower"),
        lambda state: state.pop("tail_tokens"),
        lambda state: state.pop("window_0_values"),
        lambda state: state.update(window_7_keys=torch.zeros(1)),
        lambda state: state.update(tail_tokens=state["tail_tokens"].long()),
        lambda state: state.update(tail_tokens=state["tail_tokens"][:-1]),
        lambda state: state.update(tail_tokens=state["tail_tokens"][None]),
        lambda state: state.update(lower=state["lower"].int()),
        lambda state: state.update(lower=state["lower"][..., :-1].contiguous()),
        lambda state: state.update(lower=state["lower"][:, :1].contiguous()),
        lambda state: state.update(lower=torch.cat([state["lower"]] * 3, 1)),
        lambda state: state.update(window_0_keys=state["window_0_keys"][:, 1:].contiguous()),
        lambda state: state.update(window_0_keys=state["window_0_keys"][0].contiguous()),
        lambda state: [state.pop(f"window_0_{part}") for part in ("keys", "values")],
    ],
)
def test_a_continuation_that_no_reading_gives_is_refused_and_its_document_can_be_deleted(tmp_path, change):
    path = tmp_path / "a.hsa"
    model = made(path)
    change_state(path, change)
    with pytest.raises(MemoryFileError, match="continuation") as refused:
        last_logits(model, ChunkMemory.load(path, store="device"))
    assert "\n" not in str(refused.value)
    with Library.open(model, path) as library:
        for call in (lambda: library.extend([1, 2, 3]), library.close_document, lambda: library.add([1, 2], name="b")):
            with pytest.raises(MemoryFileError, match="continuation"):
                call()
        library.delete(1)
        library.add([1, 2, 3], name="after")
    append(model, ChunkMemory.load(path, store="device"), [1, 2])


def test_an_open_document_without_a_continuation_is_refused_until_it_is_deleted(tmp_path):
    path = tmp_path / "a.hsa"
    model = made(path)
    change_body(path, lambda body: body.update(continuation=None))
    with pytest.raises(MemoryFileError, match="there is none"):
        ChunkMemory.load(path)
    with Library.open(model, path) as library:
        with pytest.raises(MemoryFileError, match="8 stored token ids, 11 by the document table"):
            library.extend([1, 2])
        with pytest.raises(MemoryFileError, match="there is none"):
            library.close_document()
        library.delete(1)
    assert len(ChunkMemory.load(path).documents) == 1
