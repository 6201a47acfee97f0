"""The folder of an evaluation: one run, one writer, no record lost or made up."""

from __future__ import annotations

import json

import pytest

from hsa_ultralong.eval.recorded_run import RecordedRun
from hsa_ultralong.files.fields import TEXT

SETTINGS = {"weights": "abc", "seed": 0, "samples": 4}


class Run(RecordedRun):
    FIELDS = {"name": TEXT}


def test_another_run_in_the_same_folder_is_refused_by_what_differs(tmp_path):
    with Run(tmp_path, SETTINGS) as run:
        run.add([{"name": "a"}])
    with pytest.raises(ValueError, match="weights was 'abc', now 'xyz'; give another folder"):
        Run(tmp_path, {**SETTINGS, "weights": "xyz"})
    (tmp_path / "run.json").write_text('{"version": 99}')
    with pytest.raises(ValueError, match="no run of this version"):
        Run(tmp_path, SETTINGS)


def test_records_without_their_settings_are_not_gone_on_with(tmp_path):
    (tmp_path / "records.jsonl").write_text('{"name": "a"}\n')
    with pytest.raises(ValueError, match="records of another study; give an empty folder"):
        Run(tmp_path, SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["records.jsonl"]


def test_two_processes_cannot_write_one_run_nor_mend_what_the_other_is_writing(tmp_path):
    with Run(tmp_path, SETTINGS) as run:
        run.add([{"name": "a"}])
        with (tmp_path / "records.jsonl").open("a") as stream:
            stream.write('{"name": "half')
        before = (tmp_path / "records.jsonl").read_bytes()
        with pytest.raises(ValueError, match="is being written by process"):
            Run(tmp_path, SETTINGS)
        assert (tmp_path / "records.jsonl").read_bytes() == before


def test_a_line_that_a_kill_cut_off_is_taken_away_and_the_others_stay(tmp_path):
    with Run(tmp_path, SETTINGS) as run:
        run.add([{"name": "a"}, {"name": "\u2028b"}])
    for torn in ('{"na', '{"name": "c"}'):
        with (tmp_path / "records.jsonl").open("a") as stream:
            stream.write(torn)
        with Run(tmp_path, SETTINGS) as run:
            assert [record["name"] for record in run.records] == ["a", "\u2028b"]
    with Run(tmp_path, SETTINGS) as run:
        run.add([{"name": "c"}])
    lines = (tmp_path / "records.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line)["name"] for line in lines[:-1]] == ["a", "\u2028b", "c"]
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "records.jsonl"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", "must hold a JSON object"),
        ("{", "is not readable JSON"),
        ("{}", "line 2: lacks 'name'"),
        ('{"name": 3}', "line 2: name must be text, got 3"),
    ],
)
def test_damaged_records_are_refused_by_their_line(tmp_path, line, message):
    with Run(tmp_path, SETTINGS) as run:
        run.add([{"name": "a"}])
    with (tmp_path / "records.jsonl").open("a") as stream:
        stream.write(line + "\n")
    with pytest.raises(ValueError, match=message):
        Run(tmp_path, SETTINGS)


def test_a_run_that_ends_before_its_first_record_leaves_nothing(tmp_path):
    Run(tmp_path / "a" / "b", SETTINGS).close()
    assert not list(tmp_path.iterdir())
    with Run(tmp_path / "a", SETTINGS) as run:
        run.add([{"name": "a"}])
    (tmp_path / "a" / "records.jsonl").unlink()
    Run(tmp_path / "a", SETTINGS).close()
    assert (tmp_path / "a" / "run.json").exists()


def test_packed_records_are_gone_on_with_and_never_begun_anew(tmp_path):
    with Run(tmp_path, SETTINGS) as run:
        run.add([{"name": "a"}])
        run.pack()
    (tmp_path / "records.jsonl").unlink()
    with Run(tmp_path, SETTINGS) as run:
        assert run.records == [{"name": "a"}]
        run.add([{"name": "b"}])
    assert (tmp_path / "records.jsonl").read_text() == '{"name": "a"}\n{"name": "b"}\n'
    (tmp_path / "run.json").unlink()
    (tmp_path / "records.jsonl").unlink()
    with pytest.raises(ValueError, match="records of another study"):
        Run(tmp_path, SETTINGS)
