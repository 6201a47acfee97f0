"""Commands that change a memory, killed at any moment and run again: nothing is lost, glued or doubled; two at once."""

import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest
import torch

from hsa_ultralong.cli import updating
from hsa_ultralong.data import load_tokenizer
from hsa_ultralong.inference import rebuilding
from hsa_ultralong.inference.file_reader import FileReader
from hsa_ultralong.memory import MemoryFile, verify_memory
from hsa_ultralong.models import HSAForCausalLM
from hsa_ultralong.train.export import export_model
from tests.cli.test_memory_commands import SENTENCE, assert_same, contents, hsa
from tests.memory.test_files_crash import die_at, in_child

READ_ON = FileReader.read_on
# in this order, each on what the ones before it left
COMMANDS = {
    "memorize": ("memorize", "a.txt", "b.txt", "-o", "lib.hsa"),
    "append": ("memory", "append", "lib.hsa", "c.txt"),
    "extend": ("memory", "append", "lib.hsa", "--to-last", "more.txt"),
    "edit": ("memory", "edit", "lib.hsa", "a.txt", "--find", "Document 0.", "--replace", "The first document."),
    "merge": ("memory", "merge", "lib.hsa", "other.hsa"),
    "delete": ("memory", "edit", "lib.hsa", "1", "--delete"),
    "compact": ("memory", "compact", "lib.hsa"),
    "rebuild": ("memory", "rebuild", "lib.hsa"),
}


@pytest.fixture
def place(checkpoint, monkeypatch):
    """An empty folder, in RAM where there is one, with texts, a memory to merge, and another model."""
    root = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=root) as name:
        folder = Path(name)
        start = folder / "start"
        start.mkdir()
        for number, text in enumerate("abc"):
            (start / f"{text}.txt").write_text(f"Document {number}. " + SENTENCE * (12 + 5 * number))
        (start / "more.txt").write_text("And then it rained. " * 5)
        model = HSAForCausalLM.from_pretrained(checkpoint)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        export_model(model, load_tokenizer(checkpoint), folder / "model", topk=4)
        # transformers loads in threads, of which torch knows none in a forked process
        monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
        # many commits: a kill finds something to go on with
        monkeypatch.setattr(updating, "_COMMIT_TOKENS", 1)
        monkeypatch.setattr(rebuilding, "_COMMIT_TOKENS", 1)

        def in_small_steps(self, *arguments, piece_tokens, commit_tokens, report):
            commit_tokens = None if commit_tokens is None else 64
            READ_ON(self, *arguments, piece_tokens=64, commit_tokens=commit_tokens, report=report)

        monkeypatch.setattr(FileReader, "read_on", in_small_steps)
        monkeypatch.chdir(start)
        assert call("memorize", "b.txt", "-o", "other.hsa", model=checkpoint) == 0
        yield folder


def call(*arguments, model):
    more = () if arguments[1] in ("merge", "compact") else ("--model", model, "--dtype", "fp32")
    return hsa(*arguments, *more).exit_code


def tokens(path):
    return [part.tolist() for part in contents(path)[1]]


class Chain:
    """What the memory is before and after each command when nothing is killed."""

    def __init__(self, place, checkpoint, monkeypatch):
        self.place, self.models, self.patch = place, {"old": checkpoint, "new": place / "model"}, monkeypatch
        self.before = {}
        folder = place / "start"
        for name in COMMANDS:
            self.before[name] = folder
            folder = place / f"after-{name}"
            shutil.copytree(self.before[name], folder)
            monkeypatch.chdir(folder)
            assert self.run(name) == 0, name
        self.after = dict(zip(COMMANDS, [*list(self.before.values())[1:], folder], strict=True))

    def run(self, name):
        return call(*COMMANDS[name], model=self.models["new" if name == "rebuild" else "old"])

    def seconds(self, name):
        folder = self.fresh(name)
        begin = time.monotonic()
        assert in_child(lambda: os._exit(self.run(name))) == 0
        shutil.rmtree(folder)
        return time.monotonic() - begin

    def fresh(self, name):
        folder = self.place / "run"
        self.patch.chdir(self.place)
        shutil.copytree(self.before[name], folder)
        self.patch.chdir(folder)
        return folder

    def check(self, name, note):
        """After a kill: whole documents, and of the last at most a beginning that is marked as such."""
        if not Path("lib.hsa/manifest.json").exists():
            assert name == "memorize", note
            return
        assert verify_memory("lib.hsa") == [], note
        found, before, after = (
            tokens("lib.hsa"),
            [] if name == "memorize" else tokens(self.before[name] / "lib.hsa"),
            tokens(self.after[name] / "lib.hsa"),
        )
        if found not in (before, after):
            assert name in ("memorize", "append"), note
            assert found[:-1] == after[: len(found) - 1], note
            with MemoryFile.open("lib.hsa") as file:
                last = file.documents[-1]
                assert found[-1] == after[len(found) - 1][: len(found[-1])], note
                assert last.is_open == (len(found[-1]) < len(after[len(found) - 1])), note

    def is_done(self, name):
        """Whether a command that is no pass over files has done its work before the kill."""
        return name in ("extend", "edit", "merge", "delete") and tokens("lib.hsa") == tokens(
            self.after[name] / "lib.hsa"
        )

    def kill(self, name, death, note):
        """One killed run, a check, and a run to the end; returns whether it was killed."""
        folder = self.fresh(name)
        is_killed = death(lambda: os._exit(self.run(name)))
        self.check(name, note)
        if not self.is_done(name):
            assert self.run(name) == 0, note
        assert tokens("lib.hsa") == tokens(self.after[name] / "lib.hsa"), note
        assert_same("lib.hsa", self.after[name] / "lib.hsa")
        assert not list(folder.glob(".*")), note
        self.patch.chdir(self.place)
        shutil.rmtree(folder)
        return is_killed


def at_step(step):
    """Dead at the step-th change of the file system."""

    def death(action):
        def run():
            die_at(step)
            action()

        status = in_child(run)
        assert status in (0, signal.SIGKILL)
        return status == signal.SIGKILL

    return death


def after_seconds(seconds):
    def death(action):
        child = os.fork()
        if child == 0:
            try:
                action()
            finally:
                os._exit(1)
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGKILL)
        return status == signal.SIGKILL

    return death


def num_steps(chain, name):
    """Changes of the file system that a command makes."""
    counted = chain.place / "count"

    def run():
        calls = []
        die_at(-1, calls)
        code = chain.run(name)
        counted.write_text(str(len(calls)))
        os._exit(code)

    folder = chain.fresh(name)
    assert in_child(run) == 0
    chain.patch.chdir(chain.place)
    shutil.rmtree(folder)
    return int(counted.read_text())


def test_each_command_survives_a_kill(place, checkpoint, monkeypatch):
    chain, seed = Chain(place, checkpoint, monkeypatch), 0
    generator, kills = random.Random(seed), 0
    for name in COMMANDS:
        step = generator.randrange(num_steps(chain, name))
        kills += chain.kill(name, at_step(step), f"seed {seed}, {name}, step {step}")
    assert kills == len(COMMANDS)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_sixty_kills_of_commands_at_random_moments_lose_nothing(place, checkpoint, monkeypatch, seed):
    chain, generator, kills = Chain(place, checkpoint, monkeypatch), random.Random(seed), 0
    steps = {name: num_steps(chain, name) for name in COMMANDS}
    seconds = {name: chain.seconds(name) for name in COMMANDS}
    attempts = 0
    while kills < 60:
        attempts += 1
        assert attempts < 200
        name = list(COMMANDS)[attempts % len(COMMANDS)]
        if attempts % 16 < 8:
            step = generator.randrange(steps[name])
            kills += chain.kill(name, at_step(step), f"seed {seed}, attempt {attempts}, {name}, step {step}")
        else:
            moment = generator.uniform(0, seconds[name])
            kills += chain.kill(name, after_seconds(moment), f"seed {seed}, attempt {attempts}, {name}, {moment:.3f} s")


@pytest.mark.slow
def test_a_memory_killed_again_and_again_ends_as_if_nothing_had_been(place, checkpoint, monkeypatch):
    chain, kills = Chain(place, checkpoint, monkeypatch), 0
    for name in ("memorize", "rebuild"):
        folder, step = chain.fresh(name), 8
        while at_step(step)(lambda name=name: os._exit(chain.run(name))):
            kills += 1
            chain.check(name, f"{name}, step {step}")
            # every run gets a little further
            step += 8
        assert_same("lib.hsa", chain.after[name] / "lib.hsa")
        monkeypatch.chdir(place)
        shutil.rmtree(folder)
    assert kills > 10


def test_two_writers_at_once_one_is_refused_and_its_work_is_done_later(place, checkpoint, monkeypatch):
    monkeypatch.chdir(place / "start")
    slow = FileReader.read_on

    def waiting(self, *arguments, report, **options):
        def wait(done, total):
            time.sleep(0.3)
            report(done, total)

        slow(self, *arguments, report=wait, **options)

    monkeypatch.setattr(FileReader, "read_on", waiting)
    children = {}
    for text in ("a.txt", "b.txt", "c.txt"):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                result = hsa("memorize", text, "-o", "lib.hsa", "--model", checkpoint, "--dtype", "fp32")
                Path(f"{text}.said").write_text(result.stderr)
                code = result.exit_code
            finally:
                os._exit(code)
        children[child] = text
    codes = {text: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child, text in children.items()}
    assert sorted(codes.values()) == [0, 2, 2]
    monkeypatch.setattr(FileReader, "read_on", slow)
    for text, code in codes.items():
        if code == 2:
            said = Path(f"{text}.said").read_text().strip().splitlines()
            assert len(said) == 1 and "is being written by process" in said[0]
            assert call("memorize", text, "-o", "lib.hsa", model=checkpoint) == 0
    assert verify_memory("lib.hsa") == []
    assert sorted(name for name, _ in contents("lib.hsa")[0]) == ["a.txt", "b.txt", "c.txt"]
