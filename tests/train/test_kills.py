"""`hsa train` killed at random moments, tokenising and exporting included, and two at once: one run, bit for bit."""

import hashlib
import json
import multiprocessing
import random
import shutil
import time

import pytest
import torch
from typer.testing import CliRunner

from hsa_ultralong.cli.main import app
from tests.train.conftest import WORDS

OPTIONS = ["--device", "cpu", "--set", "log_every=1", "--set", "checkpoint_minutes=0.0", "--set", "tensorboard=false",
           "--set", "warmup.tokens=1536", "--set", "long.tokens=1024", "--set", "probe_every=1000", "--set",
           "warmup.mixture={'text': 0.5, 'self_copy': 0.5}", "--set", "long.mixture={'text': 1.0}",
           "--set", "long.seq_len=256", "--set", "long.batch_tokens=512", "--set", "long.chunk_topk=2"]  # fmt: skip


# figures are painted in test_command.py
pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture
def corpus(tmp_path):
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=900)) for _ in range(4)]
    (tmp_path / "corpus.txt").write_text("\n\x1e\n".join(texts), encoding="utf-8")
    return tmp_path / "corpus.txt"


def start(corpus, folder):
    """A forked process that runs the command in `folder`, and where its exit code and output come from."""
    arguments = ["train", "debug", "--text", corpus, "-o", folder / "run", "--export", folder / "model", *OPTIONS]
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)

    def work():
        # nothing may depend on the state of the random generator
        torch.manual_seed(time.monotonic_ns())
        result = CliRunner().invoke(app, [str(one) for one in arguments])
        send.send((result.exit_code, result.output))

    child = context.Process(target=work)
    child.start()
    return child, receive


def finish(corpus, folder):
    child, receive = start(corpus, folder)
    code, output = receive.recv()
    child.join()
    assert code == 0, output


def made(folder):
    """Losses by step, and what the files of shards and model hold."""
    records = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    losses = [(one["global_step"], one["loss"], one["grad_norm"]) for one in records if "loss" in one]
    files = [file for name in ("run/shards", "model") for file in sorted((folder / name).rglob("*")) if file.is_file()]
    digests = {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        # where and when the files lie is no part of the run
        if file.name != ".verified.json"
    }
    return losses, digests


def check_kills(corpus, folder, seed, times):
    begun = time.monotonic()
    finish(corpus, folder / "whole")
    duration, expected = time.monotonic() - begun, made(folder / "whole")
    generator, killed = random.Random(seed), 0
    while killed < times:
        child, receive = start(corpus, folder / "killed")
        child.join(generator.uniform(0, 0.8 * duration))
        is_running = child.exitcode is None
        killed += is_running
        child.kill()
        child.join()
        if not is_running:
            code, output = receive.recv()
            assert code == 0, f"seed {seed}, after {killed} kills: {output}"
        if not is_running or killed == times:
            finish(corpus, folder / "killed")
            assert made(folder / "killed") == expected, f"seed {seed}, after {killed} kills"
            assert sorted(path.name for path in (folder / "killed").iterdir()) == ["model", "run"]
            shutil.rmtree(folder / "killed")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_command_killed_twenty_times_ends_as_if_it_never_was(corpus, tmp_path):
    check_kills(corpus, tmp_path, seed=random.SystemRandom().randrange(10**6), times=20)


def test_of_two_commands_at_once_one_is_refused_and_the_other_is_not_harmed(corpus, tmp_path):
    finish(corpus, tmp_path / "whole")
    both = [start(corpus, tmp_path / "both") for _ in range(2)]
    answers = sorted(receive.recv() for _, receive in both)
    for child, _ in both:
        child.join()
    assert [code for code, _ in answers] == [0, 2], answers
    (refusal,) = [line for line in answers[1][1].splitlines() if line.startswith("error: ")]
    assert "is being trained by process" in refusal
    assert made(tmp_path / "both") == made(tmp_path / "whole")
