"""Runs the commands of `hsa` on mutants, in this process, and says what no command may do.

A target is a folder that is made once, ways to spoil a copy of it, and commands that read the copy. What holds for
every mutant: no traceback, exit code 0 or 2 with one line, no file outside changed, no hang, not over `MEMORY` bytes.
A failure names target, seed, mutation and command; HSA_FUZZ_SEEDS=17,18 runs only these.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import resource
import shutil
import signal
import stat
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

from typer.main import get_command

from hsa_ultralong.cli.main import app
from tests.fuzz.mutators import Mutation

# of one command on a slow machine
SECONDS = 60
MEMORY = 4 * 2**30
# what may stand on standard error beside the line of an error
NOTES = ("WARNING ", "note: ", "memorising ", "compacting ", "merging ", "exporting ", "verifying ", "rebuilding ")


@dataclass(frozen=True)
class Target:
    """What is spoiled and who reads it.

    Attributes:
        name: in messages and seeds.
        make: builds the folder that mutants are copies of; called once.
        mutations: ways to spoil it, all as likely.
        commands: arguments of `hsa`, given the mutant's folder and a generator; run in order on one mutant.
        exit_codes: beside 0 and 2, by the command's words, such as {"memory verify": 1}.
        calls: of the library, by their names, given the mutant's folder; they return, or raise a ValueError or OSError
            of one line. Run before the commands.
    """

    name: str
    make: Callable[[Path], None]
    mutations: Sequence[Mutation]
    commands: Callable[[Path, random.Random], list[list[str]]]
    exit_codes: dict[str, int] = field(default_factory=dict)
    calls: Callable[[Path], dict[str, Callable[[], object]]] = lambda folder: {}


class Hang(BaseException):
    """No `except Exception` on the way swallows it."""


def make_outside(folder: Path, pristine: Path) -> Path:
    """A tree beside the mutant that holds a copy of all that it holds, and files that are nobody's business."""
    shutil.copytree(pristine, folder)
    (folder / "victim").write_bytes(b"precious")
    (folder / "notes").mkdir()
    (folder / "notes" / "diary.txt").write_text("mine\n")
    return folder


def snapshot(folder: Path) -> dict[str, tuple]:
    """Kind, size, times and contents of everything in a tree."""
    found = {}
    for entry in [folder, *folder.rglob("*")]:
        status = entry.lstat()
        digest = hashlib.sha256(entry.read_bytes()).hexdigest() if stat.S_ISREG(status.st_mode) else ""
        found[str(entry.relative_to(folder))] = (status.st_mode, status.st_mtime_ns, status.st_size, digest)
    return found


@contextmanager
def limits() -> Iterator[None]:
    """A watchdog of SECONDS, and MEMORY more bytes of address space than there are now."""

    def stop(*_: object) -> None:
        raise Hang(f"still running after {SECONDS} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else None
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        if pages is not None:
            resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + MEMORY, hard))
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@cache
def _command() -> Any:
    """Made once: making it takes longer than most commands."""
    return get_command(app)


def run(arguments: list[str]) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command whose standard input is empty.

    Raises:
        Hang: after SECONDS. Whatever the command raises.
    """
    # as on a terminal: what cannot be encoded is an error
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(3)]
    code = 0
    with limits(), patch.object(sys, "stdin", streams[0]), redirect_stdout(streams[1]), redirect_stderr(streams[2]):
        try:
            _command().main(arguments, prog_name="hsa")
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1 if stop.code else 0
    out, error = (stream.buffer.getvalue().decode("utf-8", "replace") for stream in streams[1:])
    return code, out, error


def fault_of(target: Target, arguments: list[str], said: list[str]) -> str:
    """What is wrong with how a command ended; empty if nothing. `said` gets what it wrote on standard error."""
    try:
        code, out, error = run(arguments)
    except (Hang, Exception):
        return "".join(traceback.format_exc().splitlines(keepends=True)[-30:])
    said.append(error)
    if code not in {0, 2} | {
        code for words, code in target.exit_codes.items() if " ".join(arguments).startswith(words)
    }:
        return f"exit code {code}: {out[-2000:]}{error[-2000:]}"
    lines = [line for line in error.splitlines() if line and not line.startswith(NOTES)]
    if code == 2 and (len(lines) != 1 or not lines[0].startswith("error: ") or len(lines[0]) > 2000):
        return f"not one line: {error[-2000:]!r}"
    return "Traceback" if "Traceback (most recent" in out + error else ""


def fault_of_call(call: Callable[[], object]) -> str:
    """What is wrong with how a call of the library ended; empty if nothing."""
    try:
        with limits():
            call()
    except (ValueError, OSError) as error:
        said = str(error)
        return "" if said and "\n" not in said and len(said) <= 2000 else f"not one line: {said[-2000:]!r}"
    except (Hang, Exception):
        return "".join(traceback.format_exc().splitlines(keepends=True)[-30:])
    return ""


def faults_of(target: Target, pristine: Path, outside: Path, work: Path, seed: int) -> list[str]:
    """Make the mutant of a seed and run all commands on it; returns what went wrong.

    `work` holds the mutant and nothing else afterwards; `outside` must lie elsewhere.
    """
    rng = random.Random(f"{target.name}-{seed}")
    folder = work / pristine.name
    shutil.copytree(pristine, folder, symlinks=True)
    note = rng.choice(target.mutations)(folder, outside, rng)
    before = snapshot(outside)
    faults, said = [], list[str]()
    try:
        for name, call in target.calls(folder).items():
            if fault := fault_of_call(call):
                faults.append(f"{target.name}, seed {seed}, {note}\n>>> {name}\n{fault}")
        for arguments in target.commands(folder, rng):
            if fault := fault_of(target, arguments, said):
                faults.append(f"{target.name}, seed {seed}, {note}\n$ hsa {' '.join(arguments)}\n{fault}")
        if snapshot(outside) != before:
            faults.append(f"{target.name}, seed {seed}, {note}: a file outside changed")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    # of a rebuild that failed midway, and said so
    kept = work / f".{folder.name}.rebuild"
    if any(error.startswith("error: ") and f" is kept in {kept}: " in error for error in _lines(said)):
        shutil.rmtree(kept)
    if left := [entry.name for entry in work.iterdir()]:
        faults.append(f"{target.name}, seed {seed}, {note}: left behind {left}")
    return faults


def _lines(said: list[str]) -> list[str]:
    return [line for text in said for line in text.splitlines()]


def seeds_of(block: int, blocks: int, count: int) -> list[int]:
    """Every `blocks`-th of `count` seeds, or those of HSA_FUZZ_SEEDS in block 0."""
    if wanted := os.environ.get("HSA_FUZZ_SEEDS"):
        return [int(seed) for seed in wanted.split(",")] if block == 0 else []
    return list(range(block, count, blocks))
