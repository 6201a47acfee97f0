"""scripts/twins_report.py: seeds are pooled, nothing is invented, a table and a figure follow."""

import importlib.util
import json
from pathlib import Path

import pytest

from hsa_ultralong.files.packed import pack

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "twins_report.py"


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("twins_report", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def summary(folder, *records):
    folder.mkdir(parents=True)
    meta = {"command": "hsa", "commit": "abc", "date": "2026", "hardware": "H100"}
    (folder / "summary.json").write_text(json.dumps({"meta": meta, "records": list(records)}))


def score(value, samples=20, **more):
    base = {"task": "vt", "metric": "all", "length": 2048, "depth": None, "samples": samples, "value": value}
    return {**base, "ci_low": 0.0, "ci_high": 1.0, **more}


def test_seeds_are_pooled_and_each_is_shown(report, tmp_path):
    for seed, value in enumerate((0.5, 1.0, 0.75)):
        summary(tmp_path / f"recall-hsa-{seed}", score(value), score(0.1, depth=0.05))
    summary(tmp_path / "recall-window-0", score(0.0))
    trained = {"metric": "tokens_per_s", "stage": "long", "context": 8192, "value": 500_000.0}
    summary(tmp_path / "run-hsa-0", trained, {**trained, "metric": "mfu"})
    (tmp_path / "reading-0").mkdir()
    reading = {"metric": "bytes_per_token", "preset": "hsa-0", "tokens": 65_536, "value": 264.0}
    (tmp_path / "reading-0" / "reading.json").write_text(json.dumps({"meta": {}, "records": [reading]}))
    found = report.collect(tmp_path)
    rows = {(r["task"], r["metric"], r["twin"]): r for r in found["records"]}
    assert set(rows) == {
        ("recall vt", "all", "hsa"), ("recall vt", "all", "window"), ("run long", "tokens_per_s", "hsa"),
        ("reading", "bytes_per_token", "hsa"),
    }  # fmt: skip
    pooled = rows["recall vt", "all", "hsa"]
    assert pooled["value"] == 0.75 and pooled["samples"] == 60 and pooled["seeds"] == {"0": 0.5, "1": 1.0, "2": 0.75}
    assert 0.6 < pooled["ci_low"] < 0.75 < pooled["ci_high"] < 0.9
    assert found["meta"]["hardware"] == ["H100"]
    text = report.tables(found["records"], {})
    assert "| hsa | 75 (63-84) [50, 100, 75] |" in text and "| hsa | 500,000 |" in text
    report.draw(found["records"], tmp_path / "recall.png")
    assert (tmp_path / "recall.png").is_file()


def test_one_stretch_has_no_interval_and_a_figure_shows_each_tasks_own_score(report, tmp_path, monkeypatch):
    ppl = {"metric": "perplexity", "task": "ppl_last_512", "ci_low": None, "ci_high": None}
    beside = score(1.0, task="passkey", metric="begins")
    summary(tmp_path / "recall-hsa-0", score(0.5, task="passkey", metric="exact"), beside, score(9.0, 1, **ppl))
    found = report.collect(tmp_path)["records"]
    assert "| hsa | 9.00 |" in report.tables(found, {})
    drawn = []
    monkeypatch.setattr(report.plt.Axes, "errorbar", lambda self, x, y, *_, **__: drawn.append((x, y)))
    report.draw(found, tmp_path / "recall")
    assert drawn == [([2048], [0.5])]


def test_a_stage_that_was_cut_off_is_named_and_not_pooled(report, tmp_path):
    def trained(stage, step, loss):
        return {"metric": "loss", "stage": stage, "step": step, "context": 2048, "value": loss}

    summary(tmp_path / "run-nsa-0", trained("warmup", 900, 2.0), trained("long", 300, 1.5))
    summary(tmp_path / "run-nsa-1", trained("warmup", 120, 6.0))
    summary(tmp_path / "run-window-0", trained("warmup", 900, 3.0), trained("long", 100, 2.5))
    found = report.collect(tmp_path)
    assert found["meta"]["cut_off"] == {
        "run-nsa-1": {"warmup": [120, 900], "long": [0, 300]}, "run-window-0": {"long": [100, 300]},
    }  # fmt: skip
    values = {(r["task"], r["twin"]): (r["value"], r["seeds"]) for r in found["records"]}
    assert values == {
        ("run warmup", "nsa"): (2.0, {"0": 2.0}), ("run long", "nsa"): (1.5, {"0": 1.5}),
        ("run warmup", "window"): (3.0, {"0": 3.0}),
    }  # fmt: skip
    assert "- run-window-0: 100 of 300 steps of `long`" in report.tables(found["records"], found["meta"]["cut_off"])


def test_training_s_own_needles_are_drawn_after_the_last_stage_without_an_interval(report, tmp_path, monkeypatch):
    def probe(stage, value):
        return {"metric": "needle_accuracy", "stage": stage, "step": 9, "context": 2048, "value": value}

    summary(tmp_path / "run-hsa-0", probe("warmup", 0.25), probe("long", 0.75))
    drawn = []
    monkeypatch.setattr(report.plt.Axes, "errorbar", lambda self, x, y, gaps, **_: drawn.append((x, y, gaps)))
    report.draw(report.collect(tmp_path)["records"], tmp_path / "recall")
    assert drawn == [([2048], [0.75], [[0.0], [0.0]])]


def test_runs_that_were_published_together_are_read_as_folders(report, tmp_path):
    for name in ("recall-hsa-0", "recall-window-0", "other"):
        summary(tmp_path / "apart" / name, score(0.5))
    kept = [
        json.dumps({"run": path.parent.name, "summary.json": json.loads(path.read_text()), "log.jsonl": []})
        for path in (tmp_path / "apart").glob("*/summary.json")
    ]
    (tmp_path / "together").mkdir()
    (tmp_path / "together" / "runs.jsonl.xz").write_bytes(pack("".join(f"{line}\n" for line in kept).encode()))
    assert report.collect(tmp_path / "together") == report.collect(tmp_path / "apart")
    (tmp_path / "together" / "runs.jsonl.xz").write_bytes(pack(f"{kept[0].replace('log.jsonl', 'other')}\n".encode()))
    with pytest.raises(ValueError, match="do not fit"):
        report.collect(tmp_path / "together")


def test_a_folder_without_twins_is_refused(report, tmp_path):
    with pytest.raises(ValueError, match="holds no folder of twins"):
        report.collect(tmp_path)
