"""Memories that commands write: refused before the work, and a command that fails leaves nothing behind."""

import json
import os

import pytest
import torch

from hsa_ultralong.cli.outputs import nothing_left
from hsa_ultralong.memory import Column, MemoryFile, MemoryFileError, MemorySpec, MemoryWriter
from tests.cli.test_memory_commands import SENTENCE, assert_one_clear_line, hsa, run


@pytest.fixture
def texts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(SENTENCE)
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xfa no text \xff")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "bad.jsonl").write_text('{"text": null}\n{"body": "x"}\n')
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    return tmp_path


def everything(folder):
    return sorted((str(path), path.read_bytes() if path.is_file() else b"") for path in folder.rglob("*"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("a.txt", "-o", "a.txt"), ("a.txt is no folder",)),
        (("a.txt", "-o", "full"), ("full is not empty",)),
        (("a.txt", "-o", "a.txt/lib.hsa"), ("is no folder",)),
        (("no.txt", "-o", "new.hsa"), ("no.txt does not exist",)),
    ],
)
def test_an_impossible_output_is_refused_before_the_model_is_loaded(texts, arguments, words):
    there = everything(texts)
    assert_one_clear_line(hsa("memorize", *arguments, "--model", "no-model"), *words)
    assert everything(texts) == there


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_refused_at_once(texts):
    (texts / "full").chmod(0o500)
    assert_one_clear_line(hsa("memorize", "a.txt", "-o", "full/new.hsa", "--model", "no-model"), "cannot be written")


@pytest.mark.parametrize(
    "sources",
    [("empty.txt",), ("bad.jsonl",), ("bad.jsonl", "--max-bad", "5"), ("bad.jsonl", "--max-bad", "1"), ("-",)],
)
@pytest.mark.parametrize("output", ["new.hsa", "deep/er/new.hsa", "made"])
def test_a_command_that_memorises_nothing_leaves_nothing(texts, checkpoint, sources, output):
    (texts / "made").mkdir()
    there = everything(texts)
    result = hsa("memorize", *sources, "-o", output, "--model", checkpoint)
    assert result.exit_code == 2 and result.stderr.splitlines()[-1].startswith("error: ")
    assert everything(texts) == there


def test_a_command_refused_beside_a_running_one_takes_nothing_from_it(texts):
    spec = MemorySpec(64, {"x": Column((1,), torch.float32)})
    with pytest.raises(MemoryFileError, match="being written"), nothing_left(texts / "new.hsa"):
        running = MemoryWriter.create(texts / "new.hsa", spec)
        MemoryWriter.open(texts / "new.hsa")
    running.begin_document("mine")
    running.commit()
    running.close()
    assert len(MemoryFile.open("new.hsa").documents) == 1


@pytest.mark.parametrize(
    "traces", [("writer.lock",), ("writer.lock", "shards/"), ("writer.lock", "manifest.json.tmp", "shards/")]
)
def test_what_a_command_left_that_was_killed_while_it_made_the_memory_is_gone_on_with(texts, checkpoint, traces):
    (texts / "new.hsa").mkdir()
    for trace in traces:
        (texts / "new.hsa" / trace).mkdir() if trace.endswith("/") else (texts / "new.hsa" / trace).touch()
    run("memorize", "a.txt", "-o", "new.hsa", "--model", checkpoint)
    assert len(json.loads(run("memory", "info", "new.hsa", "--json"))["documents"]) == 1


def test_what_was_there_before_a_failure_stays(texts, checkpoint):
    run("memorize", "a.txt", "-o", "lib.hsa", "--model", checkpoint)
    there = everything(texts)
    assert hsa("memorize", "bad.jsonl", "-o", "lib.hsa", "--model", checkpoint).exit_code == 2
    assert everything(texts) == there
    # what comes before a bad text is kept, in a new memory too
    assert hsa("memorize", "a.txt", "bad.jsonl", "-o", "new.hsa", "--model", checkpoint).exit_code == 2
    assert len(json.loads(run("memory", "info", "new.hsa", "--json"))["documents"]) == 1
    # an empty memory that is the user's own stays
    run("memory", "edit", "lib.hsa", "a.txt", "--delete", "--model", checkpoint)
    assert hsa("memorize", "empty.txt", "-o", "lib.hsa", "--model", checkpoint).exit_code == 2
    assert MemoryFile.open("lib.hsa").documents == ()


@pytest.mark.parametrize(
    "command",
    [
        ("memory", "append", "lib.hsa", "bad.jsonl", "--model"),
        ("memory", "append", "lib.hsa", "--to-last", "empty.txt", "--model"),
        ("memory", "edit", "lib.hsa", "a.txt", "--text", "empty.txt", "--model"),
        ("memory", "edit", "lib.hsa", "a.txt", "--find", "zebra", "--replace", "x", "--model"),
        ("memory", "merge", "lib.hsa", "no.hsa"),
        ("memory", "merge", "no.hsa", "lib.hsa"),
        ("memory", "export", "lib.hsa", "a.txt", "-o", "full"),
        ("memory", "export", "lib.hsa", "a.txt", "-o", "a.txt/x.hsa"),
        ("memory", "export", "lib.hsa", "nobody", "-o", "new.hsa"),
        ("memory", "close", "lib.hsa", "--model"),
        ("memory", "close", "lib.hsa", "--drop"),
        ("memory", "compact", "full"),
        ("memory", "verify", "full"),
        ("memory", "info", "no.hsa"),
        ("ask", "-m", "full", "What?", "--model"),
    ],
)
def test_a_refused_command_changes_and_leaves_nothing(texts, checkpoint, command):
    run("memorize", "a.txt", "-o", "lib.hsa", "--model", checkpoint)
    there = everything(texts)
    result = hsa(*command, *([checkpoint] if command[-1] == "--model" else []))
    assert_one_clear_line(result)
    assert everything(texts) == there
