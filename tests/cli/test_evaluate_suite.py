"""`hsa eval MODEL... --suite`."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from hsa_ultralong.cli.evaluate_suite import parse_lengths
from hsa_ultralong.cli.main import app


def run(*arguments: object):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def test_lengths_are_listed_or_doubled():
    assert parse_lengths("4K,64K") == [4096, 65536]
    assert parse_lengths("4K..64K") == [4096, 8192, 16384, 32768, 65536]
    assert parse_lengths("8K,4K..8K") == [4096, 8192]
    with pytest.raises(ValueError, match="--lengths must rise"):
        parse_lengths("8K..4K")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "4K"], "give --suite"),
        (["--suite", "glue"], "--suite must be of ruler, paper, recall, prompt, got 'glue'"),
        (["--tasks", "niah"], "--tasks has no 'niah'"),
        (["--suite", "recall", "--setting", "reread"], "--setting must be one of auto, memory, continue, prompt"),
        (["--suite", "ruler", "--data", "squad"], "--data must be squad=FILE or hotpot=FILE"),
        (["--suite", "ruler", "--data", "squad=nowhere.json"], "there is no file nowhere.json"),
        (["--suite", "recall", "--data", "squad=nowhere.json"], "is read by qa_1, which is not among the tasks"),
        (["--suite", "prompt", "--setting", "prompt", "--batch", 4], "prompt answers samples one by one: leave it out"),
        (["--suite", "recall", "--lengths", "1K", "--chat"], "no chat template"),
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


def test_lengths_of_which_none_can_be_measured_are_refused_and_leave_nothing(tmp_path):
    pytest.importorskip("wonderwords")
    result = run("--tasks", "recall_similar_256", "--lengths", "1K", "-o", tmp_path / "run", "--device", "cpu")
    assert result.exit_code != 0
    assert "nothing can be measured: " in result.output + str(result.exception)
    assert not (tmp_path / "run").exists()
