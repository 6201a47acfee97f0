"""Ways to spoil files: their bytes, the JSON in them, what stands in their place. All follow from a seed.

A mutation is `f(folder, outside, rng) -> what it did`; `folder` is the mutant's own copy, `outside` a tree that links
may point to. The makers below take a glob inside the folder and, for JSON, how the checksums are put right again.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Mutation = Callable[[Path, Path, random.Random], str]
# after a file changed: put right what says how long it is and what its checksum is; arguments are folder and file
Seal = Callable[[Path, Path], None]


class Raw(str):
    """Text that goes into JSON as it is: NaN, numbers of any length, nesting of any depth."""


class Pairs(list):
    """The entries of an object, in which a key may occur twice."""


NUMBERS = (
    -1,
    0,
    1,
    2,
    255,
    2**15,
    2**31 - 1,
    2**31,
    2**32,
    2**40,
    2**53,
    2**62,
    2**63 - 1,
    2**63,
    2**64,
    -(2**63),
    10**18,
)
STRINGS = (
    "",
    ".",
    "..",
    "../outside/victim",
    "/etc/passwd",
    "a/../../b",
    "a\x00b",
    "a\nb",
    "\x1b[2J\x1b[31m",
    "[red]name[/red] [/]",
    "\ud800",
    "\u202e\u0660",
    "x" * 5000,
    "nan",
    "F32",
    "true",
)
RAW = (
    Raw("NaN"),
    Raw("-Infinity"),
    Raw("1e999"),
    Raw("1" + "0" * 6000),
    Raw("-" + "9" * 30),
    Raw("1.5"),
    Raw("1e3"),
    Raw("-0"),
    Raw("[" * 3000 + "]" * 3000),
    Raw('{"a":' * 500 + "1" + "}" * 500),
    Raw("\\"),
    Raw(""),
)
BYTE_CHANGES = ("flip", "flip", "set", "zero", "noise", "cut", "drop", "insert", "append", "repeat", "empty")
JSON_CHANGES = ("number", "number", "string", "raw", "other", "near", "near", "copy", "grow", "shrink", "rename")
OTHERS = (None, True, False, [], {}, [[]], {"a": {}}, [None], 1.5)


def mutate_bytes(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """One to three changes of bytes: flipped, overwritten, cut, grown, moved; and what was done."""
    result, notes = bytearray(data), []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        size = len(result)
        first = rng.randrange(size) if size else 0
        stop = min(size, first + rng.choice((1, 1, 4, 64, 4096)))
        kind = rng.choice(
            ("flip", "flip", "set", "zero", "noise", "cut", "drop", "insert", "append", "repeat", "empty")
        )
        notes.append(f"{kind} at {first}")
        if kind == "flip" and size:
            result[first] ^= 1 << rng.randrange(8)
        elif kind == "set" and size:
            result[first] = rng.choice((0, 1, 0x22, 0x2C, 0x39, 0x5B, 0x7B, 0x7F, 0x80, 0xFF))
        elif kind == "zero":
            result[first:stop] = bytes(stop - first)
        elif kind == "noise":
            result[first:stop] = rng.randbytes(stop - first)
        elif kind == "cut":
            del result[first:]
        elif kind == "drop":
            del result[first:stop]
        elif kind == "insert":
            result[first:first] = rng.randbytes(rng.choice((1, 8, 100)))
        elif kind == "append":
            result += rng.choice((b"\0", b"\n", b"}", rng.randbytes(3), bytes(2**16)))
        elif kind == "repeat":
            result[first:first] = result[first:stop]
        elif kind == "empty" and rng.random() < 0.2:
            result.clear()
    return bytes(result), ", ".join(notes)


def mutate_json(value: Any, rng: random.Random) -> tuple[str, str]:
    """JSON text of a value after one to three changes of its structure; and what was done."""
    root, notes = [_opened(value)], []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        holder, key, where = rng.choice(_places(root))
        notes.append(f"{where}: {_change(root, holder, key, rng)}")
    return dump(root[0]), "; ".join(notes)


def dump(value: Any) -> str:
    """Compact JSON of a value that may hold Raw and Pairs."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        value = Pairs(value.items())
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{dump(str(key))}:{dump(entry)}" for key, entry in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(dump, value)) + "]"
    return json.dumps(value)


def _opened(value: Any) -> Any:
    """A copy in which objects are Pairs of lists, so that every place can be changed."""
    if isinstance(value, dict):
        return Pairs([key, _opened(entry)] for key, entry in value.items())
    return [_opened(entry) for entry in value] if isinstance(value, list) else value


def _places(holder: list, where: str = "") -> list[tuple[list, int, str]]:
    """Every (list, index, way to it) under a list; of an object's entries the value."""
    found = []
    for number, entry in enumerate(holder):
        if isinstance(holder, Pairs):
            at, target, index = f"{where}.{entry[0]}", entry, 1
        else:
            at, target, index = f"{where}[{number}]" if where else "$", holder, number
        found.append((target, index, at))
        if isinstance(target[index], list):
            found += _places(target[index], at)
    return found


def _change(root: list, holder: list, key: int, rng: random.Random) -> str:
    old = holder[key]
    kind = rng.choice(
        ("number", "number", "string", "raw", "other", "near", "near", "copy", "grow", "shrink", "rename")
    )
    if kind == "near" and isinstance(old, int):
        holder[key] = rng.choice(
            (int(old) + 1, int(old) - 1, -int(old), 2 * int(old), int(old) ^ (1 << rng.randrange(64)))
        )
    elif kind == "near" and isinstance(old, str) and old:
        at = rng.randrange(len(old))
        letters = (chr(rng.randrange(32, 127)), "", "/", "0", old[at] * 2)
        holder[key] = old[:at] + rng.choice(letters) + old[at + 1 :]
    elif kind == "string":
        holder[key] = rng.choice(STRINGS)
    elif kind == "raw":
        holder[key] = rng.choice(RAW)
    elif kind == "other":
        holder[key] = rng.choice(OTHERS)
    elif kind == "copy":
        source, index, _ = rng.choice(_places(root))
        if not isinstance(source[index], list):
            holder[key] = source[index]
    elif kind == "grow" and isinstance(old, list):
        extra = [list(rng.choice(old)) if isinstance(old, Pairs) else rng.choice(old)] if old else []
        old += extra if rng.random() < 0.5 else [["extra", 1]] if isinstance(old, Pairs) else [rng.choice(NUMBERS)]
    elif kind == "shrink" and isinstance(old, list) and old:
        del old[rng.randrange(len(old))]
    elif kind == "rename" and isinstance(old, Pairs) and old:
        rng.choice(old)[0] = rng.choice(("x", "", "__metadata__", "\x1b"))
    else:
        kind = "number"
        holder[key] = rng.choice(NUMBERS)
    return kind


def _chosen(folder: Path, patterns: Sequence[str], rng: random.Random) -> Path:
    files = sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
    return rng.choice(files)


def other_bytes(*patterns: str, seal: Seal | None = None) -> Mutation:
    """Change the bytes of one file; sometimes its checksums are put right."""

    def mutation(folder: Path, outside: Path, rng: random.Random) -> str:
        file = _chosen(folder, patterns, rng)
        data, note = mutate_bytes(file.read_bytes(), rng)
        file.write_bytes(data)
        is_sealed = seal is not None and rng.random() < 0.6
        if seal is not None and is_sealed:
            seal(folder, file)
        return f"bytes of {file.relative_to(folder)}: {note}{', sealed' if is_sealed else ''}"

    return mutation


def other_json(
    *patterns: str,
    seal: Seal | None = None,
    take: Callable[[bytes], Any] = json.loads,
    put: Callable[[bytes, str], bytes] = lambda old, text: text.encode(),
) -> Mutation:
    """Change the structure of the JSON in one file; `take` finds it there, `put` writes it into the old bytes."""

    def mutation(folder: Path, outside: Path, rng: random.Random) -> str:
        file = _chosen(folder, patterns, rng)
        data = file.read_bytes()
        text, note = mutate_json(take(data), rng)
        file.write_bytes(put(data, text))
        if seal is not None:
            seal(folder, file)
        return f"JSON of {file.relative_to(folder)}: {note}"

    return mutation


def swapped(*patterns: str, seal: Seal | None = None) -> Mutation:
    """Two files change places, or one becomes a copy of another."""

    def mutation(folder: Path, outside: Path, rng: random.Random) -> str:
        one, other = _chosen(folder, patterns, rng), _chosen(folder, patterns, rng)
        data = other.read_bytes()
        if rng.random() < 0.5:
            other.write_bytes(one.read_bytes())
        one.write_bytes(data)
        if seal is not None and rng.random() < 0.5:
            seal(folder, one)
        return f"{one.relative_to(folder)} is {other.relative_to(folder)}"

    return mutation


KINDS = (
    "missing",
    "link out",
    "link in",
    "dangling",
    "device",
    "loop",
    "hard link",
    "pipe",
    "socket",
    "folder",
    "empty",
)


def other_kind(*names: str) -> Mutation:
    """Something else stands in a file's or folder's place; `names` are globs, or names that need not exist yet."""

    def mutation(folder: Path, outside: Path, rng: random.Random) -> str:
        found = sorted({entry for name in names for entry in (list(folder.glob(name)) or [folder / name])})
        path, kind = rng.choice(found), rng.choice(KINDS)
        is_folder = path.is_dir()
        same = next(iter(sorted(outside.rglob(path.name))), outside / "victim")
        if is_folder:
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        if kind == "hard link" and not same.is_file():
            kind = "link out"
        if kind == "link out":
            path.symlink_to(same)
        elif kind == "link in":
            path.symlink_to(rng.choice([entry for entry in folder.rglob("*")] or [folder]))
        elif kind == "dangling":
            path.symlink_to(outside / "made")
        elif kind == "device":
            path.symlink_to(rng.choice(("/dev/zero", "/dev/full", "/dev/stdin")))
        elif kind == "loop":
            path.symlink_to(path.name)
        elif kind == "hard link":
            os.link(same, path)
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "socket":
            _bind(path)
        elif kind == "folder":
            path.mkdir()
            (path / "inside").write_bytes(b"stays")
        elif kind == "empty":
            path.write_bytes(b"")
        return f"{path.relative_to(folder)}: {kind}"

    return mutation


def _bind(path: Path) -> None:
    # by its last part alone: the names of sockets are short
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)
