"""`hsa train` refuses what cannot work before the work, in one line, and leaves nothing of it behind."""

import json
import multiprocessing
import os
import shutil
import signal

import pytest
import torch
from typer.testing import CliRunner

from hsa_ultralong.cli.main import app
from hsa_ultralong.data import TokenShards, train_tokenizer
from hsa_ultralong.models import HSAForCausalLM
from hsa_ultralong.models.presets import preset
from hsa_ultralong.train.export import export_model
from hsa_ultralong.train.run_folder import RunFolder
from hsa_ultralong.train.state import list_checkpoints

SHORT = ["--device", "cpu", "--set", "warmup.mixture={'text': 1.0}", "--set", "probe_every=100000", "--set",
         "warmup.tokens=2048", "--set", "tensorboard=false", "--until", "warmup"]  # fmt: skip


# figures are painted in test_command.py
pytestmark = pytest.mark.usefixtures("undrawn")


def hsa(*arguments):
    return CliRunner().invoke(app, [str(one) for one in arguments])


def tree(folder):
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()
        for path in folder.rglob("*")
    }


@pytest.fixture(scope="module")
def model(shards_folder, tmp_path_factory):
    _, tokenizer = shards_folder
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    network = HSAForCausalLM(preset("debug", vocab_size=len(tokenizer), **ids))
    folder = tmp_path_factory.mktemp("models") / "first"
    export_model(network, tokenizer, folder, topk=4)
    return folder


@pytest.fixture
def place(tmp_path, shards_folder, model):
    """A folder with shards, a model, a foreign model, a file and a link to nowhere."""
    shutil.copytree(shards_folder[0], tmp_path / "shards")
    # as after the first training
    TokenShards.open(tmp_path / "shards")
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "file").write_text("mine")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--json"], "--json goes with --dry-run"),
        (["--set", "parallel.cuda_graphs=true"], "parallel.cuda_graphs needs a CUDA device, got cpu"),
        (["-o", "file"], "the run folder cannot be"),
        (["-o", "file/run"], "the run folder cannot be"),
        (["-o", "nowhere"], "the run folder cannot be"),
        (["-o", "model"], "is not that of a run"),
        (["-o", "broken"], "is not readable JSON"),
        (["--export", "file"], "the model cannot be written"),
        (["--export", "file/model"], "the model cannot be written"),
        (["--export", "nowhere"], "the model cannot be written"),
        (["--export", "llama"], "holds something else than a model of this kind"),
        (["--export", "broken"], "is not readable JSON"),
        (["--export", "shards"], "holds something else"),
        (["--export", "run"], "holds something else"),
        (["--export", "new/../run"], "holds something else"),
        (["--init-from", "llama"], "holds another kind of model"),
        (["--init-from", "gone"], "is no model folder"),
        (["--init-from", "broken"], "is not readable JSON"),
        (["--tokenizer", "llama"], "holds no tokenizer.json"),
        (["--set", "model.hidden_size=64", "--init-from", "model"], "does not fit the model"),
        (["--set", "warmup.seq_len=8192", "--set", "warmup.batch_tokens=8192", "--set", "warmup.long_documents=true"],
         "stage 'warmup'"),
        (["--set", "model.vocab_size=10"], "has no room for"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_and_nothing_is_left(place, monkeypatch, arguments, words):
    monkeypatch.chdir(place)
    before = tree(place)
    result = hsa(
        "train", "debug", "--data", "shards", *([] if "-o" in arguments else ["-o", "run"]), *SHORT, *arguments
    )
    assert result.exit_code == 2 and words in result.stderr, result.output
    assert tree(place) == before
    errors = [line for line in result.stderr.splitlines() if not line.startswith("WARNING")]
    assert len(errors) == 1 and errors[0].startswith("error: ")


def test_a_model_with_another_tokenizer_than_the_rows_is_refused(place, monkeypatch):
    monkeypatch.chdir(place)
    words = [a + b for a in ("ka", "lo", "mi") for b in ("bu", "ce", "di")]
    train_tokenizer([" ".join(words) * 9], 270).save_pretrained(place / "model")
    (place / "model" / "checksums.json").unlink()
    before = tree(place)
    result = hsa("train", "debug", "--data", "shards", "-o", "run", *SHORT, "--init-from", "model")
    assert result.exit_code == 2 and "hsa data --tokenizer model" in result.stderr, result.output
    assert tree(place) == before


def test_text_is_tokenised_as_the_model_begun_with_was(place, monkeypatch):
    monkeypatch.chdir(place)
    text = " ".join(f"balond cemurs dinand {number} foperor" for number in range(900))
    (place / "corpus.txt").write_text(f"{text}\n\x1e\n{text[9:]}")
    arguments = (
        "train",
        "debug",
        "--text",
        "corpus.txt",
        "-o",
        "run",
        *SHORT,
        "--init-from",
        "model",
        "--export",
        "new",
    )
    result = hsa(*arguments)
    assert result.exit_code == 0, result.output
    # five different words make no needles: known at the start, not at the first probe
    assert "needle accuracy is not measured in training: the word bank" in result.stderr
    assert (place / "new" / "tokenizer.json").read_bytes() == (place / "model" / "tokenizer.json").read_bytes()
    # a run that goes on needs the first model no more
    shutil.rmtree(place / "model")
    assert hsa(*arguments).exit_code == 0


def test_text_that_cannot_be_read_leaves_no_run_folder(place, monkeypatch):
    monkeypatch.chdir(place)
    before = tree(place)
    result = hsa("train", "debug", "--text", "missing.txt", "-o", "new/run", *SHORT)
    assert result.exit_code == 2 and tree(place) == before, result.output


def test_a_folder_in_which_another_process_trains_is_refused_before_any_text_is_read(place, monkeypatch):
    monkeypatch.chdir(place)
    (place / "corpus.txt").write_text("some words")
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)

    def hold():
        folder = RunFolder(place / "run")
        folder.take()
        send.send(None)
        signal.pause()

    child = context.Process(target=hold)
    child.start()
    receive.recv()
    before = tree(place)
    result = hsa("train", "debug", "--text", "corpus.txt", "-o", "run", *SHORT)
    child.kill()
    child.join()
    assert result.exit_code == 2 and f"run is being trained by process {child.pid} on" in result.stderr, result.output
    assert tree(place) == before


def test_a_damaged_line_of_the_log_is_named_before_the_work(place, monkeypatch):
    monkeypatch.chdir(place)
    assert hsa("train", "debug", "--data", "shards", "-o", "run", *SHORT, "--max-minutes", "0").exit_code == 0
    log = place / "run" / "log.jsonl"
    lines = (
        log.read_text() + '{"stage": "warmup", "step": 9, "global_step": 9, "tokens": 9, "loss": "low"}\n{"unfinished'
    )
    log.write_text(lines)
    result = hsa("train", "debug", "--data", "shards", "-o", "run", *SHORT)
    assert result.exit_code == 2 and "log.jsonl:" in result.stderr and "remove that line" in result.stderr
    assert log.read_text() == lines and len(list_checkpoints(place / "run")) == 1
    log.write_text("".join(line + "\n" for line in lines.splitlines()[:-2]) + '{"unfinished')
    assert hsa("train", "debug", "--data", "shards", "-o", "run", *SHORT).exit_code == 0


def test_links_beside_the_export_and_in_the_run_are_replaced_and_not_followed(place, monkeypatch):
    monkeypatch.chdir(place)
    (place / "outside").mkdir()
    (place / "outside" / "mine").write_text("mine")
    (place / ".partial-new").symlink_to(place / "outside")
    (place / "run").mkdir()
    for name in ("loss.png", "summary.json", "summary.json.tmp", "config.json"):
        (place / "run" / name).symlink_to(place / "outside" / "mine")
    (place / "run" / "log.jsonl").touch()
    (place / "outside" / "mine").write_text("{}")
    result = hsa("train", "debug", "--data", "shards", "-o", "run", *SHORT, "--export", "new")
    assert result.exit_code == 0, result.output
    assert tree(place / "outside") == {"mine": b"{}"}
    assert json.loads((place / "run" / "config.json").read_text())["preset"] == "debug"
    assert HSAForCausalLM.from_pretrained(place / "new").config.chunk_topk == 4
