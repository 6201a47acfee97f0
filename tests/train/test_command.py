"""`hsa train` as people run it: from text to an instructed model with one command, and stopped by a signal."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hsa_ultralong.cli.main import app
from hsa_ultralong.models import HSAForCausalLM
from hsa_ultralong.recipes import RECIPES, recipe
from hsa_ultralong.testing.processes import HANG_SECONDS
from hsa_ultralong.train.checkpoint import list_checkpoints

ROOT = Path(__file__).resolve().parents[2]


def hsa(*arguments):
    return CliRunner().invoke(app, [str(one) for one in arguments])


@pytest.fixture
def prose(tmp_path):
    pages = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))]
    (tmp_path / "corpus.txt").write_text("\n\x1e\n".join(pages), encoding="utf-8")
    return tmp_path / "corpus.txt"


def test_one_command_leads_from_text_through_five_stages_to_a_model_that_loads(prose, tmp_path):
    run, model = tmp_path / "run", tmp_path / "model"
    chats = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "What is a chunk?"}, {"role": "assistant", "content": "64 tokens."}]
    chats.write_text("\n".join(json.dumps({"messages": turns, "number": number}) for number in range(20)))
    arguments = ("train", "debug_stages", "--text", prose, "--chat", chats, "-o", run, "--device", "cpu")
    arguments = (*arguments, "--export", model)
    result = hsa(*arguments)
    assert result.exit_code == 0, result.output
    config = recipe("debug_stages")
    assert json.loads((run / "config.json").read_text())["stages"][-1]["mixture"]["sft"] == 0.8
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    names = [stage.name for stage in config.stages]
    assert list(dict.fromkeys(record["stage"] for record in records)) == names
    assert names == ["warmup", "pretrain", "long", "anneal", "sft"]
    probed = {record["probe"]["length"] for record in records if "probe" in record}
    assert probed == set(config.probe_lengths)
    losses = [record["loss"] for record in records if "loss" in record]
    times = [record["time"] for record in records]
    assert times == sorted(times) and abs(times[-1] - time.time()) < 2 * HANG_SECONDS
    assert losses[-1] < losses[0]
    loaded = HSAForCausalLM.from_pretrained(model)
    assert (loaded.config.chunk_topk, loaded.config.sliding_window) == (4, 16)
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    again = hsa(*arguments)
    last = records[-1]["global_step"]
    assert again.exit_code == 0 and f"finished at step {last}" in again.output
    assert f"going on from {list_checkpoints(run)[-1]}" in again.output and "training on" in again.output


def test_sigterm_saves_and_exits_0(shards_folder, tmp_path):
    shards, _ = shards_folder
    command = ["train", "debug", "--data", shards, "-o", tmp_path / "run", "--device", "cpu", "--set", "log_every=1",
               "--set", "warmup.mixture={'text': 1.0}", "--set", "long.mixture={'text': 1.0}",
               "--set", "warmup.tokens=2000000", "--set", "probe_every=100000"]  # fmt: skip
    child = subprocess.Popen(
        [sys.executable, "-m", "hsa_ultralong.cli.main", *map(str, command)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    log, deadline = tmp_path / "run" / "log.jsonl", time.monotonic() + HANG_SECONDS
    while not (log.is_file() and log.read_text().count("\n") >= 2):
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    output, _ = child.communicate(timeout=HANG_SECONDS)
    assert child.returncode == 0, output
    last = json.loads(log.read_text().splitlines()[-1])["global_step"]
    assert f"stopped at step {last}" in output and "run the same command again to go on" in output
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == [f"step-{last:08d}"]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_shows_its_plan(name):
    shown = hsa("train", name, "--dry-run")
    assert shown.exit_code == 0, shown.output
    as_json = json.loads(hsa("train", name, "--dry-run", "--json").stdout)
    assert [stage["stage"] for stage in as_json["plan"]["stages"]] == [one["name"] for one in as_json["stages"]]
    assert all(stage["total_bytes"] > 0 and stage["seconds"] > 0 for stage in as_json["plan"]["stages"])
    assert "activations" in shown.stdout and '"preset"' in shown.stdout


@pytest.mark.parametrize("arguments", [[], ["--data", "a", "--text", "b.txt"]])
def test_a_run_needs_shards_or_text(arguments):
    result = hsa("train", "debug", *arguments)
    assert result.exit_code == 2 and "needs --data SHARDS" in result.stderr


def test_text_to_train_on_is_read_as_asked(tmp_path, monkeypatch):
    asked = {}

    def data(paths, output, **options):
        asked.update(options, paths=paths)
        raise ValueError("stopped here")

    monkeypatch.setattr("hsa_ultralong.cli.data.data", data)
    options = ("--text-field", "body", "--encoding", "cp1252")
    result = hsa("train", "debug", "--text", "a.csv", *options, "-o", str(tmp_path / "run"))
    assert result.exit_code == 2 and "stopped here" in result.stderr
    assert (asked["paths"], asked["text_field"], asked["encoding"]) == (["a.csv"], "body", "cp1252")
    result = hsa("train", "debug", "--data", "a", *options)
    assert result.exit_code == 2 and "--encoding go with --text" in result.stderr


def test_conversations_go_with_text():
    result = hsa("train", "debug", "--data", "a", "--chat", "b.jsonl")
    assert result.exit_code == 2 and "--chat goes with --text" in result.stderr


def test_the_help_says_what_holds_without_an_option():
    shown = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "200"}).output
    assert "runs/RECIPE" in shown and "that of the shards" in shown
