"""Folders of runs: read whole, refused by what is wrong with them."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest

from hsa_ultralong.eval import stored_runs
from hsa_ultralong.eval.recorded_run import read_records
from hsa_ultralong.eval.stored_runs import find_runs, read_run, read_runs

ROOT = Path(__file__).resolve().parents[2]


def test_a_run_is_read_with_what_was_not_measured(tmp_path, runs):
    summary = {"meta": {"commit": "c"}, "skipped": [{"task": "vt", "length": 64, "reason": "too short"}]}
    folder = runs.write(tmp_path / "nano", [runs.record(index=i) for i in range(3)], summary=summary)
    found = read_run(folder, "nano")
    assert (found.name, len(found.records), found.meta["commit"]) == ("nano", 3, "c")
    assert found.skipped == {("vt", 64): "too short"}
    assert found.summary[0]["value"] == 1.0


def test_a_run_under_way_is_read_without_its_torn_last_line(tmp_path, runs):
    folder = runs.write(tmp_path, [runs.record(index=i) for i in range(3)])
    with (folder / "records.jsonl").open("a") as stream:
        stream.write('{"task": "to')
    assert len(read_run(folder, "x").records) == 3 and not read_run(folder, "x").meta


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": "high"}, "records.jsonl, line 2: score must be a finite number, got 'high'"),
        ({"score": float("nan")}, "records.jsonl, line 2: score must be a finite number, got nan"),
        ({"task": None}, "records.jsonl, line 2: task must be text, got None"),
        ({"depth": 2}, "records.jsonl, line 2: depth must be a number of 0 to 1, got 2"),
        ({"expected": "x"}, "records.jsonl, line 2: expected must be a list of"),
        ({"retrieved": [{"start": 0}]}, r"records.jsonl, line 2: retrieved\[0\] lacks 'document'"),
        ({"evidence": [{"document": 0, "start": 0, "stop": 1, "text": 7}]}, r"evidence\[0\].text must be text, got 7"),
    ],
)
def test_a_damaged_record_is_refused_by_its_line(tmp_path, runs, change, message):
    folder = runs.write(tmp_path, [runs.record(), {**runs.record(index=1), **change}])
    with pytest.raises(ValueError, match=message):
        read_run(folder, "x")


def test_records_of_before_passages_were_kept_are_read(tmp_path, runs):
    old = {name: value for name, value in runs.record().items() if name not in ("sample", "retrieved", "evidence")}
    assert len(read_run(runs.write(tmp_path, [old]), "x").records) == 1


def test_what_is_kept_of_a_run_is_read_as_the_run(tmp_path, runs):
    records = [runs.record(index=i) for i in range(3)]
    folder = runs.write(tmp_path / "run", records, summary={"meta": {"settings": runs.settings}})
    whole = read_run(folder, "x")
    (folder / "records.jsonl.xz").write_bytes(lzma.compress((folder / "records.jsonl").read_bytes()))
    for name in ("run.json", "records.jsonl"):
        (folder / name).unlink()
    kept = read_run(folder, "x")
    assert (kept.records, kept.settings, kept.summary) == (whole.records, whole.settings, whole.summary)
    packed = (folder / "records.jsonl.xz").read_bytes()
    for content, message in ((packed[:-20], "is cut off"), (b"this is no archive", "is damaged"), (b"", "is cut off")):
        (folder / "records.jsonl.xz").write_bytes(content)
        with pytest.raises(ValueError, match=rf"records.jsonl.xz {message}"):
            read_run(folder, "x")


def test_runs_that_lie_together_are_told_apart_and_read_once(tmp_path, runs, monkeypatch):
    kept, records = [{"run": "trained", "summary.json": {"meta": {}}, "log.jsonl": []}], []
    for name, count in (("first", 2), ("second", 3)):
        kept.append({"run": name, "summary.json": {"meta": {"settings": runs.settings, "commit": name}}})
        records += [{"run": name, **runs.record(index=i)} for i in range(count)]
    for name, lines in (("runs", kept), ("records", records)):
        data = "".join(f"{json.dumps(line)}\n" for line in lines).encode()
        (tmp_path / f"{name}.jsonl.xz").write_bytes(lzma.compress(data))
    alone = runs.write(tmp_path / "alone", [runs.record()])
    read = []
    monkeypatch.setattr(stored_runs, "read_records", lambda path, check: read.append(path) or read_records(path, check))
    found = read_runs(find_runs([f"{tmp_path}/first", f"other={tmp_path}/second", str(alone)]))
    assert [(run.name, len(run.records), run.meta.get("commit")) for run in found] == [
        ("first", 2, "first"), ("other", 3, "second"), ("alone", 1, None)
    ]  # fmt: skip
    assert found[0].records[0] == runs.record() and found[0].settings == runs.settings
    # each file once, whatever the number of runs
    assert sorted(path.name for path in read) == ["records.jsonl", "records.jsonl.xz", "runs.jsonl.xz"]
    with pytest.raises(ValueError, match="got several that were published together: name them, FOLDER/RUN"):
        read_run(tmp_path, "all")
    for name in ("third", "trained"):
        with pytest.raises(ValueError, match=f"has no suite {name}, but 2 others: first, second"):
            read_run(tmp_path / name, name)


@pytest.mark.parametrize(
    ("suites", "trained", "recorded", "unfit"),
    [
        (["first"], [], ["first", "second"], "second"), (["first", "second"], [], ["first"], "second"),
        (["first"], ["second"], ["first", "second"], "second"), (["first"], [], [], "first"),
        (["first"], [], ["first", *"abcde"], r"a, b, c, d \.\.\."),
    ],
)  # fmt: skip
def test_runs_that_lie_together_and_records_that_do_not_fit_are_refused(
    tmp_path, runs, suites, trained, recorded, unfit
):
    summary = {"summary.json": {"meta": {"settings": runs.settings}}}
    kept = [{"run": name, **summary} for name in suites]
    kept += [{"run": name, **summary, "log.jsonl": []} for name in trained]
    records = [{"run": name, **runs.record()} for name in recorded]
    for name, lines in (("runs", kept), *([("records", records)] if records else [])):
        data = "".join(f"{json.dumps(line)}\n" for line in lines).encode()
        (tmp_path / f"{name}.jsonl.xz").write_bytes(lzma.compress(data))
    with pytest.raises(ValueError, match=f"do not fit, as after a stop: publish {unfit} again, `python [^\n]*`$"):
        read_runs(find_runs([f"{tmp_path}/first"]))


def test_folders_without_a_run_are_refused_by_what_they_hold(tmp_path, runs):
    # a published study has packed records too
    with pytest.raises(ValueError, match="got a study of hidden sentences"):
        read_run(ROOT / "results" / "needles-averaged", "x")
    with pytest.raises(ValueError, match=r"must hold a run of `hsa eval MODEL --suite` \(run.json\), got none"):
        read_run(tmp_path, "x")
    (tmp_path / "needles.png").touch()
    with pytest.raises(ValueError, match="got a study of hidden sentences, which `hsa plot` draws"):
        read_run(tmp_path, "x")
    with pytest.raises(ValueError, match="holds no sample yet"):
        read_run(runs.write(tmp_path / "empty", []), "x")
    (tmp_path / "empty" / "run.json").write_text('{"version": 99}')
    with pytest.raises(ValueError, match="no run of this version; measure it again"):
        read_run(tmp_path / "empty", "x")


def test_folders_of_runs_and_names_are_understood(tmp_path, runs):
    for place in ("a/nano", "a/smol", "b/nano", "with=sign"):
        runs.write(tmp_path / place, [runs.record()])
    assert list(find_runs([f"{tmp_path}/a"])) == ["nano", "smol"]
    assert list(find_runs([f"{tmp_path}/a/nano", f"new={tmp_path}/b/nano"])) == ["nano", "new"]
    assert list(find_runs([f"new={tmp_path}/a"])) == ["new/nano", "new/smol"]
    assert list(find_runs([f"{tmp_path}/with=sign"])) == ["with=sign"]
    with pytest.raises(ValueError, match=r"two runs are called 'nano' .*; tell them apart: first=\S+ second=\S+"):
        find_runs([f"{tmp_path}/a", f"{tmp_path}/b/nano"])
    with pytest.raises(ValueError, match=r"there is no folder \S*nowhere"):
        find_runs([f"{tmp_path}/nowhere"])
