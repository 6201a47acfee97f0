"""Spoiled memories through every command that reads one: an answer or one line, and nothing else is touched."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from hsa_ultralong.data import tokenizer_fingerprint
from hsa_ultralong.inference import Library
from hsa_ultralong.memory import ChunkMemory, verify_memory
from tests.fuzz.harness import Target, faults_of, make_outside, seeds_of
from tests.fuzz.mutators import dump, other_bytes, other_json, other_kind, swapped

SENTENCE = "It was a bright cold day in April, and the clocks were striking thirteen. "
CODE = "The secret code of the silver lantern is 4821937. "
PAGE = 2**20
SHARDS, TABLES, STATES = "shards/*.safetensors", "shards/*.pages.json", "continuation-*.safetensors"


def memory(model: Any, tokenizer: Any, key_values: str, landmarks: str, *, is_open: bool) -> Any:
    """Builds a memory of four documents, of which one was edited and one deleted, in three shards."""

    def make(folder: Path) -> None:
        def tokens(text: str) -> Any:
            return tokenizer(text)["input_ids"]

        with Library.create(
            model, folder, key_values=key_values, landmarks=landmarks, tokenizer=tokenizer_fingerprint(tokenizer)
        ) as library:
            for number, name in enumerate(("a.txt", "b.txt", "c.txt")):
                text = f"Document {number}. " + SENTENCE * (9 + 5 * number) + CODE
                library.add(tokens(text), name=name, metadata={"sha256": hashlib.sha256(text.encode()).hexdigest()})
            library.edit("b.txt", 100, 110, tokens("zebra"))
            library.delete("a.txt")
            text = "The last one. " + SENTENCE * 6
            library.add(tokens(text), name="open.txt", metadata={"sha256": "0" * 64}, close=not is_open)

    return make


def another(model: Any, tokenizer: Any, folder: Path, key_values: str, landmarks: str) -> None:
    """A memory of the same form with a document of another name."""
    with Library.create(
        model, folder, key_values=key_values, landmarks=landmarks, tokenizer=tokenizer_fingerprint(tokenizer)
    ) as library:
        library.add(tokenizer("Elsewhere. " + SENTENCE * 3)["input_ids"], name="other.txt")


def reframe(data: bytes, body: str) -> bytes:
    """A manifest with another body and its right checksum."""
    digest = hashlib.sha256(body.encode("utf-8", "surrogatepass")).hexdigest()
    frame = f'{{"format":"hsa-memory","version":1,"sha256":"{digest}","body":{body}}}\n'
    return frame.encode("utf-8", "surrogatepass")


def seal(folder: Path, file: Path) -> None:
    """Put page tables, sizes and hashes right after a file of the memory changed."""
    try:
        body = json.loads((folder / "manifest.json").read_bytes())["body"]
    except (ValueError, OSError, LookupError, TypeError):
        return
    data, name = file.read_bytes(), str(file.relative_to(folder))
    for record in body["shards"]:
        shard, table = (f"shards/{record['number']:06d}.{end}" for end in ("safetensors", "pages.json"))
        if name == shard:
            record["num_bytes"] = len(data)
            sums = [zlib.crc32(data[start : start + PAGE]) for start in range(0, len(data), PAGE)]
            (folder / table).write_text(dump({"crc32": sums, "num_bytes": len(data), "page_bytes": PAGE}) + "\n")
        if (folder / table).is_file():
            record["sha256"] = hashlib.sha256((folder / table).read_bytes()).hexdigest()
    if name.startswith("continuation") and body["continuation"]:
        body["continuation"].update(num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    (folder / "manifest.json").write_bytes(reframe(b"", json.dumps(body, sort_keys=True, separators=(",", ":"))))


def header_of(data: bytes) -> Any:
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def with_header(data: bytes, text: str) -> bytes:
    header = text.encode("utf-8", "surrogatepass")
    return len(header).to_bytes(8, "little") + header + data[8 + int.from_bytes(data[:8], "little") :]


def other_numbers(folder: Path, outside: Path, rng: random.Random) -> str:
    """Extreme numbers in one column of a shard, or in one tensor of the continuation; all checksums right."""
    file = rng.choice(sorted({*folder.glob(SHARDS), *folder.glob(STATES)}))
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    name, entry = rng.choice([item for item in header_of(data).items() if item[0] != "__metadata__"])
    first, stop = (start + offset for offset in entry["data_offsets"])
    place = rng.randrange(first, max(first + 1, stop - 4)) // 4 * 4
    value = rng.choice((-1, 0, 1, 63, 65, 8191, 8192, 2**31 - 1, -(2**31), 0x7FC00000, 0x7F800000, 0x7F7F7F7F))
    for _ in range(rng.choice((1, 3, 200))):
        data[place : place + 4] = (value % 2**32).to_bytes(4, "little")
        place = min(place + 4, max(first, stop - 4))
    file.write_bytes(data)
    seal(folder, file)
    return f"{value} in {name} of {file.relative_to(folder)}"


def other_tensors(folder: Path, outside: Path, rng: random.Random) -> str:
    """The continuation with a tensor of another name, shape or dtype, or without one; all checksums right."""
    files = sorted(folder.glob(STATES))
    if not files:
        return other_numbers(folder, outside, rng)
    data = files[0].read_bytes()
    tensors, metadata = load(data), header_of(data)["__metadata__"]
    name = rng.choice(sorted(tensors))
    kind = rng.choice(("drop", "rename", "dtype", "flat", "cut", "longer", "empty", "more"))
    tensor = tensors.pop(name)
    if kind == "rename":
        name = rng.choice(("x", "window_9_keys", "lower", "tail_tokens", "window_0_keys"))
    elif kind == "dtype":
        tensor = tensor.to(rng.choice((torch.float16, torch.int64, torch.bool, torch.float64, torch.uint8)))
    elif kind == "flat":
        tensor = tensor.flatten() if rng.random() < 0.5 else tensor[None]
    elif kind == "cut":
        tensor = tensor[..., :-1] if rng.random() < 0.5 else tensor[:, 1:] if tensor.ndim > 1 else tensor[1:]
    elif kind == "longer":
        tensor = torch.cat((tensor, tensor), dim=rng.randrange(tensor.ndim))
    elif kind == "empty":
        tensor = tensor[:0]
    elif kind == "more":
        tensors["window_7_keys"] = tensor.clone()
    if kind != "drop":
        tensors[name] = tensor.contiguous()
    files[0].write_bytes(save(tensors, metadata))
    seal(folder, files[0])
    return f"continuation: {kind} {name}"


MUTATIONS = (
    *2 * (other_numbers,),
    other_tensors,
    *3 * (other_json("manifest.json", take=lambda data: json.loads(data)["body"], put=reframe),),
    other_json("manifest.json"),
    other_json(TABLES, seal=seal),
    other_json(SHARDS, seal=seal, take=header_of, put=with_header),
    *2 * (other_json(STATES, SHARDS, seal=seal, take=header_of, put=with_header),),
    other_bytes("manifest.json"),
    *2 * (other_bytes(SHARDS, seal=seal),),
    other_bytes(TABLES, seal=seal),
    other_bytes(STATES, SHARDS, seal=seal),
    other_bytes("writer.lock"),
    swapped("*", "shards/*", seal=seal),
    swapped("*.safetensors", SHARDS, seal=seal),
    *2
    * (
        other_kind(
            "manifest.json", "manifest.json.tmp", "writer.lock", "shards", SHARDS, TABLES, STATES,
            "shards/000009.safetensors.tmp", "shards/000009.pages.json", "continuation-000099.safetensors.tmp",
        ),
    ),
)  # fmt: skip
EXIT_CODES = {"memory verify": 1}


def commands(texts: Path, other: Path) -> Any:
    """All that reads or changes a memory; `other` is a whole one that is merged, and to be left alone."""
    out = texts / "out"

    def all_of_them(folder: Path, rng: random.Random) -> list[list[str]]:
        path, new = str(folder), str(texts / "new.txt")
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(other, out / "other.hsa")
        store, lookup = rng.choice(("file", "host", "device")), rng.choice(("exact", "sketch"))
        question = ["ask", "-m", path, "--store", store, "--lookup", lookup, "--max-new-tokens", "2"]
        append = ["memory", "append", path, new, *rng.choice(([], ["--to-last"]))]
        edit = rng.choice((["--find", "bright cold day", "--replace", "dull"], ["--text", new]))
        name = rng.choice(("b.txt", "c.txt", "open.txt", "2"))
        form = rng.choice(([], ["--key-values", "int8"], ["--landmarks", "bf16"]))
        close = ["memory", "close", path, *rng.choice(([], ["--drop"]))]
        return [
            ["memory", "info", path, *rng.choice(([], ["--json"]))],
            ["memory", "verify", path],
            [*question, "--show-sources", "3", "What is the secret code of the silver lantern?"],
            ["memory", "export", path, rng.choice(("b.txt", "open.txt", "3")), "c.txt", "-o", f"{out}/part.hsa"],
            ["memory", "merge", f"{out}/other.hsa", path],
            ["memory", "rebuild", path, "-o", f"{out}/new.hsa", *form],
            append,
            ["memory", "edit", path, name, *edit],
            ["memory", "edit", path, "c.txt", "--delete"],
            *rng.sample((close, ["memory", "merge", path, str(other)], ["memory", "compact", path]), 3),
            ["memory", "rebuild", path, *form],
        ]

    return all_of_them


def calls(folder: Path) -> dict[str, Any]:
    def selected() -> None:
        memory = ChunkMemory.load(folder, store="device")
        ChunkMemory.concat([memory.select([0]), memory.select(range(1, len(memory.documents)))])

    return {"ChunkMemory.load(folder).select(...)": selected, "verify_memory(folder)": lambda: verify_memory(folder)}


KINDS = {"fp32": ("fp32", "fp32", True), "int8": ("int8", "int8", True), "closed": ("bf16", "int8", False)}


@pytest.fixture
def room() -> Iterator[Path]:
    """A folder in RAM where there is one: nothing here is about disks."""
    root = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=root) as name:
        yield Path(name)


def fuzz(kind: str, one_model: Any, room: Path, seeds: list[int]) -> None:
    texts, pristine, work = room / "texts", room / "made" / "lib.hsa", room / "work"
    for folder in (texts, pristine.parent, work):
        folder.mkdir()
    (texts / "new.txt").write_text("Something new. " + SENTENCE * 3, encoding="utf-8")
    key_values, landmarks, is_open = KINDS[kind]
    make = memory(*one_model, key_values, landmarks, is_open=is_open)
    make(pristine)
    outside = make_outside(room / "outside", pristine)
    another(*one_model, outside / "other.hsa", key_values, landmarks)
    target = Target(f"memory {kind}", make, MUTATIONS, commands(texts, outside / "other.hsa"), EXIT_CODES, calls)
    faults = [fault for seed in seeds for fault in faults_of(target, pristine, outside, work, seed)]
    assert not faults, f"{len(faults)} faults\n" + "\n\n".join(faults[:5])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", range(4))
def test_no_spoiled_memory_ends_in_a_traceback_or_harms_another_file(kind, block, one_model, room):
    fuzz(kind, one_model, room, seeds_of(block, 4, 68))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", range(10))
def test_none_of_five_thousand_spoiled_memories_does(kind, block, one_model, room):
    fuzz(kind, one_model, room, seeds_of(block, 10, 1680))
