"""Figures of a run: written whole in both forms, and left out where there is nothing to show."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hsa_ultralong.cli import figures
from hsa_ultralong.cli.main import app
from hsa_ultralong.eval import suite_plots
from hsa_ultralong.eval.plots import save
from hsa_ultralong.eval.suite_plots import draw_all
from hsa_ultralong.eval.suite_summary import summary_records

ROOT = Path(__file__).resolve().parents[2]


def drawn(folder, records):
    names = draw_all(records, summary_records(records, {}), folder, "nano")
    assert {path.name for path in folder.iterdir()} == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    return names


def test_scores_depths_and_diagnosis_are_drawn_in_both_forms(tmp_path, runs):
    kinds = ["reading", "fusion", "retrieval", "not known"]
    records = [
        runs.record(task, length, i, **(runs.missing(kinds[i % 4]) if i % 3 else {}))
        for task in ("a", "b", "c") for length in (2048, 4096) for i in range(8)
    ]  # fmt: skip
    assert drawn(tmp_path, records) == ["scores", "depths", "diagnosis"]
    assert all(path.stat().st_size > 5000 for path in tmp_path.iterdir())
    text = (tmp_path / "diagnosis.svg").read_text(encoding="utf-8")
    assert "right chunk among the first K" in text or "<use" in text


@pytest.mark.usefixtures("undrawn")
def test_facts_of_no_single_depth_make_no_map(tmp_path, runs):
    assert drawn(tmp_path, [runs.record(depth=None)]) == ["scores", "diagnosis"]


@pytest.mark.parametrize("kind", ["retrieval", "not known"])
def test_tasks_whose_right_chunk_was_never_seen_are_drawn(tmp_path, runs, kind):
    assert "diagnosis" in drawn(tmp_path, [runs.record(index=i, **runs.missing(kind)) for i in range(3)])


@pytest.mark.usefixtures("undrawn")
def test_absent_facts_alone_have_no_diagnosis(tmp_path, runs):
    records = [runs.record("recall_absent", index=i, score=None if i % 2 else 1.0, certainty=0.5) for i in range(4)]
    only_absent = [r for r in records if r["score"] is None]
    assert "diagnosis" in drawn(tmp_path, records)
    (tmp_path / "absent").mkdir()
    assert drawn(tmp_path / "absent", only_absent) == []


def test_a_suite_is_drawn_again_from_its_summary_and_without_one_it_is_refused(tmp_path, monkeypatch):
    folder = ROOT / "results" / "ruler-nano-16m"
    bars = []
    monkeypatch.setattr(suite_plots, "save", lambda figure, *rest: bars.append(figure.axes[1]) or save(figure, *rest))
    drawn = CliRunner().invoke(app, ["plot", str(folder), "-o", str(tmp_path / "scores.png")])
    assert [text.get_text() for text in bars[0].get_yticklabels()][::5] == ["0", "100"], "the bar is in percent"
    assert drawn.exit_code == 0 and (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG"), drawn.output
    assert [path.name for path in tmp_path.iterdir()] == ["scores.png"]
    (tmp_path / "records.jsonl").write_text('{"task": "vt", "length": 4096, "depth": 0.5, "score": 1.0}\n')
    refused = CliRunner().invoke(app, ["plot", str(tmp_path)])
    assert refused.exit_code == 2 and "summary.json" in refused.stderr and refused.stderr.count("\n") == 1


def test_every_committed_figure_of_results_is_drawn_by_the_report():
    drawn = {figure for _, figure, _, _ in figures.all_figures(ROOT)} | {figure for _, figure, _ in figures.COMPARISONS}
    drawn.add("results/twins/recall.png")  # by scripts/twins_report.py
    found = {str(path.relative_to(ROOT)) for path in [*ROOT.glob("results/*/*.png"), *ROOT.glob("benchmarks/**/*.png")]}
    assert found <= drawn, f"nothing draws {sorted(found - drawn)}"


@pytest.mark.usefixtures("undrawn")
def test_plot_all_draws_a_copy_of_the_committed_results_and_nothing_that_is_not_kept(tmp_path, monkeypatch):
    def place(source, target):
        # numbers are read where they lie, figures are written
        (shutil.copyfile if source.endswith(".png") else os.symlink)(source, target)

    for folder in ("results", "benchmarks"):
        shutil.copytree(ROOT / folder, tmp_path / folder, copy_function=place)
    monkeypatch.chdir(tmp_path)
    drawn = CliRunner().invoke(app, ["plot", "--all"])
    assert drawn.exit_code == 0, drawn.output
    written = {line.removeprefix(f"written {tmp_path}/") for line in drawn.output.splitlines()}
    ignored = {line.removeprefix("/") for line in (ROOT / ".gitignore").read_text().splitlines()}
    new = {name for name in written - ignored if not (ROOT / name).is_file()}
    assert len(written) > 15 and not new, f"commit them, or name them in .gitignore: {sorted(new)}"
