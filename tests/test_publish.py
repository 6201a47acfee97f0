"""scripts/publish.py: what of a run is published, and what is not."""

from __future__ import annotations

import importlib.util
import json
import lzma
import shutil
from pathlib import Path

import pytest

from hsa_ultralong.eval.stored_runs import records_together, runs_together
from hsa_ultralong.files.durable import write_whole

spec = importlib.util.spec_from_file_location("publish", Path(__file__).parents[1] / "scripts/publish.py")
publish = importlib.util.module_from_spec(spec)
spec.loader.exec_module(publish)

RECORD = {
    "model": "m", "task": "niah_single_1", "length": 64, "index": 0, "depth": 0.5, "setting": "memory",
    "metric": "exact", "query": "a", "expected": ["1"], "answered": " 1", "score": 1.0, "certainty": 0.5,
    "found": True, "rank": 1, "weight": 0.25, "margin": 1.0, "retrieved": [{"start": 0}], "evidence": [{"start": 0}],
}  # fmt: skip


def suite(folder, *records):
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"meta": {}, "records": []}))
    (folder / "summary.md").write_text("# Suite\n")
    (folder / "report.html").write_text("large")
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_places_and_share_alike_texts_are_left_out(tmp_path):
    run = suite(tmp_path / "run", RECORD, RECORD | {"task": "qa_xquad", "score": 0.5}, RECORD | {"task": "qa_1"})
    assert publish.main([str(run), "-o", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "records.jsonl.xz", "summary.json", "summary.md",
    ]  # fmt: skip
    first, *others = lines(tmp_path / "out/records.jsonl.xz")
    assert first == {key: value for key, value in RECORD.items() if key not in ("retrieved", "evidence")}
    for other in others:
        assert (other["query"], other["expected"], other["answered"]) == ("", [], "")
    assert others[0]["score"] == 0.5


def test_scores_by_depth_are_left_out_and_the_table_may_be(tmp_path):
    run = suite(tmp_path / "run", RECORD)
    whole, part = ({"task": "a", "metric": "exact", "depth": depth, "value": 2 / 3} for depth in (None, 0.05))
    (run / "summary.json").write_text(json.dumps({"meta": {}, "records": [whole, part]}))
    for options in ([], ["--small"]):
        assert publish.main([str(run), "-o", str(tmp_path / "out"), *options]) == 0
        assert json.loads((tmp_path / "out/summary.json").read_text())["records"] == [whole | {"value": 0.666667}]
        assert (tmp_path / "out/summary.md").exists() == (not options)


def training(folder):
    folder.mkdir(parents=True)
    for name, text in (("summary.json", '{"meta": {}, "records": []}'), ("config.json", "{}"), ("log.jsonl", "{}\n")):
        (folder / name).write_text(text)
    return folder


def lines(path):
    return [json.loads(line) for line in lzma.decompress(path.read_bytes()).splitlines()]


def test_a_run_of_training_replaces_what_was_published_of_it(tmp_path):
    old = tmp_path / "out"
    old.mkdir()
    (old / "summary.json").write_text("{}")
    (old / "stale").write_text("")
    assert publish.main([str(training(tmp_path / "run")), "-o", str(old)]) == 0
    assert sorted(path.name for path in old.iterdir()) == ["config.json", "log.jsonl.xz", "summary.json"]


def test_several_runs_lie_in_two_files_and_each_is_published_again_as_its_folder(tmp_path):
    first, second = (suite(tmp_path / name, RECORD, RECORD | {"index": 1}) for name in ("eval-hsa-0", "eval-nsa-0"))
    out, trained = tmp_path / "out", training(tmp_path / "run-hsa-0")
    for runs in ([first, second, trained], [second]):
        assert publish.main([*map(str, runs), "-o", str(out), "--together"]) == 0
        assert sorted(path.name for path in out.iterdir()) == ["records.jsonl.xz", "runs.jsonl.xz"]
        assert [(one["run"], one["index"]) for one in lines(out / "records.jsonl.xz")] == [
            ("eval-hsa-0", 0), ("eval-hsa-0", 1), ("eval-nsa-0", 0), ("eval-nsa-0", 1)
        ]  # fmt: skip
        assert {one["run"]: sorted(one) for one in lines(out / "runs.jsonl.xz")} == {
            "eval-hsa-0": ["run", "summary.json", "summary.md"], "eval-nsa-0": ["run", "summary.json", "summary.md"],
            "run-hsa-0": ["config.json", "log.jsonl", "run", "summary.json"],
        }  # fmt: skip
    for run in (first, second, trained):
        assert publish.main([str(run), "-o", str(tmp_path / "own")]) == 0
        assert publish.main([str(out / run.name), "-o", str(tmp_path / "again")]) == 0
        own, again = (
            {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("own", "again")
        )
        assert own == again and len(own) == 3
    assert publish.main([str(out / "eval-hsa-0"), "--together", "-o", str(tmp_path / "all")]) == 0
    assert [(one["run"], one["index"]) for one in lines(tmp_path / "all/records.jsonl.xz")] == [
        ("eval-hsa-0", 0), ("eval-hsa-0", 1)
    ]  # fmt: skip
    with pytest.raises(SystemExit, match="own is one published run"):
        publish.main([str(first), "-o", str(tmp_path / "own"), "--together"])
    with pytest.raises(SystemExit, match="names of their folders, which must differ"):
        publish.main([str(first), str(out / "eval-hsa-0"), "-o", str(out), "--together"])
    with pytest.raises(SystemExit, match="is no published run"):
        publish.main([str(first), "-o", str(out)])
    with pytest.raises(SystemExit, match=r"out has no run eval-none, but 3 others: eval-hsa-0, eval-nsa-0, run-hsa-0$"):
        publish.main([str(out / "eval-none"), "-o", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="out holds several runs published together: name one, FOLDER/RUN"):
        publish.main([str(out), "-o", str(tmp_path / "none")])


def test_records_without_runs_are_not_written_over(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "records.jsonl.xz").write_text("kept")
    with pytest.raises(SystemExit, match=r"out has records\.jsonl\.xz but no runs\.jsonl\.xz"):
        publish.main([str(suite(tmp_path / "run", RECORD)), "-o", str(out), "--together"])
    assert [path.read_text() for path in out.iterdir()] == ["kept"]


def make(kind, folder, score=1.0):
    run = kind(folder, *([RECORD | {"score": score}] if kind is suite else []))
    (run / "summary.json").write_text(json.dumps({"meta": {"commit": folder.parent.name}, "records": []}))
    return run


def stopped(monkeypatch, count, command):
    """Publish, and stop after so many files."""
    left = [False, *[True] * count]

    def write_or_stop(*arguments):
        if not left.pop():
            raise OSError("stopped")
        write_whole(*arguments)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="error: stopped"):
        patch.setattr(publish, "write_whole", write_or_stop)
        publish.main(command)


def test_a_suite_that_a_run_of_training_replaces_leaves_no_records(tmp_path):
    out, alone = tmp_path / "out", tmp_path / "alone"
    command = [str(suite(tmp_path / "other", RECORD)), "-o", str(out), "--together"]
    publish.main([str(suite(tmp_path / "old/one", RECORD)), *command])
    publish.main([str(tmp_path / "old/one"), "-o", str(alone), "--together"])
    again = str(training(tmp_path / "new/one"))
    for folder, names in ((out, ["other"]), (alone, [])):
        assert publish.main([again, "-o", str(folder), "--together"]) == 0
        assert (folder / "records.jsonl.xz").exists() == bool(names)
        assert [one["run"] for name in names for one in lines(folder / "records.jsonl.xz")] == names
        assert publish.main([str(folder / "one"), "-o", str(tmp_path / "made")]) == 0
        assert (tmp_path / "made/log.jsonl.xz").is_file()


@pytest.mark.parametrize("old", [None, suite, training])
@pytest.mark.parametrize("new", [suite, training])
def test_after_a_stop_between_the_files_all_is_as_it_was_or_refused_and_the_same_command_mends_it(
    tmp_path, monkeypatch, old, new
):
    def read(folder):
        runs = runs_together(folder)
        return runs, records_together(folder, runs)

    before = [suite(tmp_path / "other", RECORD), *([make(old, tmp_path / "old/one", 0.0)] if old else [])]
    publish.main([*map(str, before), "-o", str(tmp_path / "before"), "--together"])
    seen = set()
    run = str(make(new, tmp_path / "new/one"))
    for count in range(3 if suite in (old, new) else 1):
        out = tmp_path / str(count)
        shutil.copytree(tmp_path / "before", out)
        stopped(monkeypatch, count, [run, "-o", str(out), "--together"])
        try:
            assert read(out) == read(tmp_path / "before")
            seen.add("as it was")
        except ValueError as error:
            assert f"publish one again, `python scripts/publish.py RUN... -o {out} --together`" in str(error)
            seen.add("refused")
        assert publish.main([run, "-o", str(out), "--together"]) == 0
        runs, records = read(out)
        assert runs["one"]["summary.json"]["meta"] == {"commit": "new"} and "other" in records
        assert [one["score"] for one in records.get("one", [])] == ([1.0] if new is suite else [])
    assert seen == {"as it was", *(["refused"] if suite in (old, new) else [])}


def test_the_first_publication_that_was_stopped_is_mended_by_the_same_command(tmp_path, monkeypatch):
    command = [str(suite(tmp_path / "one", RECORD)), "-o", str(tmp_path / "out"), "--together"]
    for count in range(3):
        stopped(monkeypatch, count, command)
    assert publish.main(command) == 0
    for name in ("runs", "records"):
        assert [one["run"] for one in lines(tmp_path / f"out/{name}.jsonl.xz")] == ["one"]


def test_what_does_not_fit_of_other_names_is_not_written_over(tmp_path):
    out = tmp_path / "out"
    first, second = (suite(tmp_path / name, RECORD) for name in ("first", "second"))
    publish.main([str(first), str(second), "-o", str(out), "--together"])
    runs = runs_together(out)
    publish._write_runs({"first": runs["first"]}, out)
    before = [path.read_bytes() for path in sorted(out.iterdir())]
    with pytest.raises(SystemExit, match="do not fit, as after a stop: publish second again"):
        publish.main([str(first), "-o", str(out), "--together"])
    assert [path.read_bytes() for path in sorted(out.iterdir())] == before
    assert publish.main([str(second), "-o", str(out), "--together"]) == 0
    assert runs_together(out) == runs


def test_small_holds_for_runs_that_lie_together_and_for_what_was_published_small(tmp_path):
    out, small = tmp_path / "out", tmp_path / "small"
    publish.main([str(suite(tmp_path / "run", RECORD)), "-o", str(out), "--together"])
    for name, options in (("summary.md", []), ("", ["--small"])):
        assert publish.main([str(out / "run"), "-o", str(small), *options]) == 0
        assert (small / "summary.md").exists() == bool(name)
    with pytest.raises(SystemExit, match=r"has no summary\.md: let the run end first, or give --small if it was"):
        publish.main([str(small), "-o", str(tmp_path / "again")])
    assert publish.main([str(small), "-o", str(tmp_path / "again"), "--small"]) == 0
    for path in small.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    assert publish.main([str(out / "run"), "-o", str(out), "--together", "--small"]) == 0
    assert sorted(lines(out / "runs.jsonl.xz")[0]) == ["run", "summary.json"]


def test_the_command_of_the_twins_is_the_one_of_the_evidence():
    evidence = (Path(__file__).parents[1] / "docs/evidence-suites.md").read_text()
    command = next(line for line in evidence.splitlines() if line.startswith("python scripts/publish.py runs/twins"))
    assert f"    {command}\n" in publish.__doc__


def test_what_is_no_run_is_refused_before_any_other_is_copied(tmp_path):
    kept = tmp_path / "out"
    kept.mkdir()
    (kept / "summary.json").write_text("kept")
    (tmp_path / "empty").mkdir()
    whole = str(suite(tmp_path / "whole", RECORD))
    with pytest.raises(SystemExit, match="name a run of hsa eval or hsa train"):
        publish.main([str(tmp_path / "empty"), "-o", str(kept)])
    with pytest.raises(SystemExit):  # several without --together
        publish.main([whole, whole, "-o", str(kept)])
    with pytest.raises(SystemExit, match="empty has neither"):
        publish.main([whole, str(tmp_path / "empty"), "-o", str(kept), "--together"])
    (tmp_path / "whole/summary.md").unlink()
    with pytest.raises(SystemExit, match=r"has no summary.md: let the run end first"):
        publish.main([whole, "-o", str(tmp_path / "new")])
    with pytest.raises(SystemExit, match="nothing holds no sample yet"):
        publish.main([str(suite(tmp_path / "nothing")), "-o", str(tmp_path / "new")])
    assert [path.name for path in kept.iterdir()] == ["summary.json"] and not (tmp_path / "new").exists()


def test_a_folder_that_is_no_published_run_is_not_replaced(tmp_path):
    results = tmp_path / "results"
    (results / "other").mkdir(parents=True)
    with pytest.raises(SystemExit, match="is no published run"):
        publish.main([str(suite(tmp_path / "run", RECORD)), "-o", str(results)])
    assert (results / "other").is_dir()


def test_what_is_published_may_be_published_again(tmp_path):
    out = tmp_path / "out"
    publish.main([str(suite(tmp_path / "run", RECORD)), "-o", str(out)])
    first = (out / "records.jsonl.xz").read_bytes()
    assert publish.main([str(out), "-o", str(out)]) == 0
    assert (out / "records.jsonl.xz").read_bytes() == first
