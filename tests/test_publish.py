"""scripts/publish.py: what of a run is published, and what is not."""

from __future__ import annotations

import importlib.util
import json
import lzma
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("publish", Path(__file__).parents[1] / "scripts/publish.py")
publish = importlib.util.module_from_spec(spec)
spec.loader.exec_module(publish)

RECORD = {
    "model": "m", "task": "niah_single_1", "length": 64, "index": 0, "depth": 0.5, "setting": "memory",
    "metric": "exact", "query": "a", "expected": ["1"], "answered": " 1", "score": 1.0, "certainty": 0.5,
    "found": True, "rank": 1, "weight": 0.25, "margin": 1.0, "retrieved": [{"start": 0}], "evidence": [{"start": 0}],
}  # fmt: skip


def suite(folder, *records):
    folder.mkdir()
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
    whole, part = ({"task": "a", "metric": "exact", "depth": depth} for depth in (None, 0.05))
    (run / "summary.json").write_text(json.dumps({"meta": {}, "records": [whole, part]}))
    for options in ([], ["--small"]):
        assert publish.main([str(run), "-o", str(tmp_path / "out"), *options]) == 0
        assert json.loads((tmp_path / "out/summary.json").read_text())["records"] == [whole]
        assert (tmp_path / "out/summary.md").exists() == (not options)


def training(folder):
    folder.mkdir()
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
    with pytest.raises(SystemExit, match="eval-none has neither"):
        publish.main([str(out / "eval-none"), "-o", str(tmp_path / "none")])


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
