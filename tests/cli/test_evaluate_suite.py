"""`hsa eval MODEL... --suite`."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from hsa_ultralong.cli.common import held_out
from hsa_ultralong.cli.evaluate_suite import parse_lengths
from hsa_ultralong.cli.main import app
from hsa_ultralong.data import TokenShards, build_shards, load_tokenizer

# test_suite.py and test_suite_plots.py are of the figures
pytestmark = pytest.mark.usefixtures("undrawn")


def run(*arguments: object):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def test_lengths_are_listed_or_doubled():
    assert parse_lengths("4K,64K") == [4096, 65536]
    assert parse_lengths("4K..64K") == [4096, 8192, 16384, 32768, 65536]
    assert parse_lengths("8K,4K..8K") == [4096, 8192]
    assert parse_lengths("0,4K") == parse_lengths("4K,0k") == [0, 4096]
    with pytest.raises(ValueError, match="--lengths: from 1"):
        parse_lengths("0..4K")
    with pytest.raises(ValueError, match="--lengths must rise"):
        parse_lengths("8K..4K")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "4K"], "give --suite"),
        (["--suite", "glue"], "--suite must be of ruler, paper, recall, prompt, babilong, qa, short, ppl, got 'glue'"),
        (["--tasks", "niah"], "--tasks has no 'niah'"),
        (
            ["--suite", "recall", "--setting", "reread"],
            "--setting must be one of auto, memory, rebuild, continue, prompt, closed, gold, bm25, dense",
        ),
        (["--suite", "ruler", "--data", "squad"], "--data must be one of squad=PATH, hotpot=PATH"),
        (["--suite", "ruler", "--data", "squad=nowhere.json"], "there is no file nowhere.json"),
        (["--suite", "babilong", "--data", "babi=nowhere"], "there is no folder nowhere"),
        (["--suite", "short"], "lambada_openai needs the files of the short tasks: give --data short=FOLDER"),
        (["--suite", "recall", "--setting", "gold"], "--setting gold is of the suite qa; leave recall_form_01 out"),
        (["--suite", "recall", "--scoring", "beam"], "must be one of auto, generate, teacher, both, got 'beam'"),
        (["--suite", "recall", "--data", "squad=nowhere.json"], "is read by qa_1, none of which is to be measured"),
        (["--suite", "prompt", "--setting", "prompt", "--batch", 4], "prompt answers samples one by one: leave it out"),
        (["--suite", "recall", "--lengths", "1K", "--chat"], "no chat template"),
        (["--suite", "qa", "--setting", "bm25", "--reread", 2], "--reread is of the settings memory and rebuild"),
        (["--suite", "recall", "--passage-tokens", 512], "--passage-tokens is of the settings bm25 and dense, not of"),
        (["--suite", "ppl", "--reread", 2], "the suites ppl and short ask nothing"),
        (["--suite", "ppl", "--answer-tokens", 48], "leave --answer-tokens out"),
        (["a/same", "b/same", "--suite", "recall"], "two models are called 'same'"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line_and_leaves_nothing(tmp_path, arguments, message):
    result = run(*arguments, "-o", tmp_path / "run")
    assert result.exit_code == 2 or isinstance(result.exception, ValueError)
    assert message in result.output + str(result.exception)
    assert not (tmp_path / "run").exists()


def test_the_shipped_model_is_measured_and_a_second_command_goes_on(tmp_path):
    pytest.importorskip("wonderwords")
    place = tmp_path / "run"
    result = run("--tasks", "passkey", "--lengths", "1K", "--samples", 2, "-o", place, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "| passkey | exact |" in result.output
    result = run("--tasks", "passkey,recall_form_02", "--lengths", "1K", "--samples", 2, "-o", place, "--device", "cpu")
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in (place / "records.jsonl").read_text().strip().split("\n")]
    assert [(r["task"], r["index"]) for r in records] == [
        ("passkey", 0), ("passkey", 1), ("recall_form_02", 0), ("recall_form_02", 1)
    ]  # fmt: skip
    result = run("--tasks", "passkey", "--lengths", "1K", "--samples", 3, "-o", place, "--device", "cpu")
    assert result.exit_code != 0
    assert "samples was 2, now 3" in result.output + str(result.exception)


def test_passages_in_the_prompt_are_a_setting_of_the_run(tmp_path):
    place = tmp_path / "run"
    arguments = ("--tasks", "recall_form_02", "--lengths", "512", "--samples", 1, "-o", place, "--device", "cpu")
    result = run(*arguments, "--reread", 2)
    assert result.exit_code == 0, result.output
    assert json.loads((place / "run.json").read_text())["settings"]["reread"] == 2
    result = run(*arguments)
    assert f"{place} holds another run: reread was 2, now" in result.output + str(result.exception)


def test_lengths_of_which_none_can_be_measured_are_refused_and_leave_nothing(tmp_path):
    pytest.importorskip("wonderwords")
    result = run("--tasks", "recall_similar_256", "--lengths", "1K", "-o", tmp_path / "run", "--device", "cpu")
    assert result.exit_code != 0
    assert "nothing can be measured: " in result.output + str(result.exception)
    assert not (tmp_path / "run").exists()


def test_answers_are_forced_instead_of_generated_or_beside_it_and_perplexities_are_measured(tmp_path):
    place = tmp_path / "run"
    arguments = ("--tasks", "recall_form_02,recall_changed,ppl_last_512", "--lengths", "1K", "--samples", 2)
    result = run(*arguments, "--scoring", "both", "-o", place, "--device", "cpu")
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in (place / "records.jsonl").read_text().strip().split("\n")]
    assert {r["teacher"] for r in records if r["task"] == "recall_form_02"} <= {True, False}
    summary = json.loads((place / "summary.json").read_text())["records"]
    names = {(r["task"], r["metric"]) for r in summary if r["depth"] is None}
    assert ("recall_form_02", "teacher_agrees") in names
    assert ("ppl_last_512", "perplexity") in names
    other = tmp_path / "other"
    result = run("--tasks", "recall_form_02", "--lengths", "1K", "--samples", 2, "--scoring", "teacher", "-o", other)
    assert result.exit_code == 0, result.output
    forced = [json.loads(line) for line in (other / "records.jsonl").read_text().strip().split("\n")]
    assert [r["score"] for r in forced] == [float(r["teacher"]) for r in records if r["task"] == "recall_form_02"]
    assert all((r["metric"], r["answered"]) == ("teacher", "") for r in forced)


def test_a_run_that_is_terminated_writes_the_summary_of_what_it_has(tmp_path, monkeypatch):
    from hsa_ultralong.eval.suite import SuiteRun

    add, before = SuiteRun.add, signal.getsignal(signal.SIGTERM)

    def stopped(run, records):
        add(run, records)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(SuiteRun, "add", stopped)
    place = tmp_path / "run"
    result = run("--tasks", "recall_form_02", "--lengths", "1K", "--samples", 2, "--setting", "prompt", "-o", place)
    assert result.exit_code == 130
    assert f"cut off; the 1 samples so far are in {place}" in result.output
    assert [r["samples"] for r in json.loads((place / "summary.json").read_text())["records"]][:1] == [1]
    assert signal.getsignal(signal.SIGTERM) == before


def test_perplexity_from_shards_is_of_held_out_documents_alone(tmp_path):
    lines = [f"Document {i} tells of sheep number {i * 7919 % 997} and of nothing else at all." for i in range(80)]
    tokenizer = load_tokenizer(Path(__file__).parents[2] / "checkpoints/nano")
    (tmp_path / "corpus").mkdir()
    for number in range(0, 80, 20):
        (tmp_path / "corpus" / f"{number}.txt").write_text("\n".join(lines[number : number + 20]))
    build_shards([tmp_path / "corpus"], tokenizer, tmp_path / "shards", validation_fraction=0.3)
    shards = TokenShards.open(tmp_path / "shards")
    kept = held_out(tokenizer, tmp_path / "shards", is_needed=True)
    own = torch.cat([torch.from_numpy(shards.tokens(i)[1:-1].astype("int32")) for i in shards.documents("validation")])
    assert torch.equal(kept, own)
    arguments = ("--tasks", "ppl_position", "--lengths", 64, "--samples", 1, "--device", "cpu")
    result = run(*arguments, "--shards", tmp_path / "shards", "-o", tmp_path / "run")
    assert result.exit_code == 0, result.output
    settings = json.loads((tmp_path / "run/run.json").read_text())["settings"]
    assert settings["haystack_split"] == {"haystack": "train and validation", "ppl": "validation"}
    build_shards([tmp_path / "corpus"], tokenizer, tmp_path / "all", validation_fraction=0.0)
    result = run(*arguments, "--shards", tmp_path / "all", "-o", tmp_path / "none")
    assert "holds no validation document" in result.output + str(result.exception)
    assert not (tmp_path / "none").exists()
