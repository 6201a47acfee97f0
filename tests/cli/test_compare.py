"""`hsa compare`: what it prints, writes and refuses."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from hsa_ultralong.cli.main import app
from tests.eval.conftest import SETTINGS, record, write


def run(*arguments: object):
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


@pytest.fixture
def folders(tmp_path):
    """Two runs of the same twenty samples in one folder."""
    for name, right in (("nano", 5), ("other", 15)):
        records = [record("vt", 4096, i, score=float(i < right)) for i in range(20)]
        write(tmp_path / "runs" / name, records, {**SETTINGS, "weights": name})
    return tmp_path / "runs"


def test_two_runs_are_printed_and_written_in_every_form(tmp_path, folders):
    result = run(folders / "nano", folders / "other", "-o", tmp_path / "out", "--html", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    assert "**+50 (+22 to +67)**, 20 pairs" in result.output
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "compare.json", "compare.md", "compare.tex", "curves.png", "curves.svg"
    }  # fmt: skip
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [one["name"] for one in found["meta"]["runs"]] == ["nano", "other"]
    assert found["records"][1]["difference"]["pairs"] == 20
    assert "other - nano" in (tmp_path / "page.html").read_text()


def test_a_folder_of_runs_names_and_json_are_taken(folders):
    result = run(folders, f"again={folders}/nano", "--json")
    assert result.exit_code == 0, result.output
    assert [one["name"] for one in json.loads(result.output)["meta"]["runs"]] == ["nano", "other", "again"]


def test_of_one_run_only_a_page_is_made(tmp_path, folders):
    assert run(folders / "nano", "--html", tmp_path / "page.html").exit_code == 0
    assert "Evaluation of" in (tmp_path / "page.html").read_text()
    for more in ([], ["--json"], ["-o", tmp_path / "out"]):
        result = run(folders / "nano", *more)
        assert result.exit_code == 2 and "needs at least two runs, got nano" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "runs/nano"], "there is no folder nowhere"),
        (["runs/nano", "runs/nano"], "two runs are called 'nano'"),
        (["runs/nano", "."], "must hold a run of `hsa eval MODEL --suite`"),
        (["runs", "--html", "page.txt"], "--html page.txt: the name must end in .html or .htm"),
        (["runs", "-o", "runs/nano/run.json"], "is no folder; choose another name"),
        ([], "Missing argument"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(folders, monkeypatch, arguments, message):
    monkeypatch.chdir(folders.parent)
    result = run(*arguments)
    assert result.exit_code == 2 and message in result.output and result.output.count("\n") <= 1
    assert {p.name for p in folders.parent.iterdir()} == {"runs"}
