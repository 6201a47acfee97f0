"""Runs side by side: pairs where the samples are the same, and nothing compared in silence that differs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hsa_ultralong.eval.comparison_tables import draw_curves, latex, markdown
from hsa_ultralong.eval.html_report import write_page
from hsa_ultralong.eval.html_report.compared import compared
from hsa_ultralong.eval.stored_runs import StoredRun, read_run
from hsa_ultralong.eval.suite_compare import MEAN, compare_runs


def series(runs, task, right, *, length=4096, n=20, **more):
    """Records of one task of which the first `right` are right."""
    return [runs.record(task, length, i, score=float(i < right), **more) for i in range(n)]


def two(runs, first, second, **settings):
    return compare_runs(
        [runs.stored(first, "a"), StoredRun("b", {**runs.settings, "weights": "x", **settings}, second)]
    )


def test_the_same_samples_are_compared_in_pairs(runs):
    found = two(runs, series(runs, "vt", 5), series(runs, "vt", 15))
    cell = found.tables["ruler", 4096]["vt", "exact"]["b"]
    assert (cell.value, cell.difference.value, cell.difference.pairs) == (0.75, 0.5, 20)
    assert (cell.difference.better, cell.difference.worse) == (10, 0) and cell.difference.is_clear
    assert not found.notes


def test_other_samples_are_compared_as_independent_ones_and_named(runs):
    other = [{**r, "sample": f"other {r['index']}"} for r in series(runs, "vt", 15)]
    found = two(runs, series(runs, "vt", 5), other, seed=1)
    assert found.tables["ruler", 4096]["vt", "exact"]["b"].difference.pairs is None
    text = "\n".join(found.notes)
    assert "b beside a: its samples are others: seed 0 / 1." in text
    assert "no sample is the same, so they are compared as independent ones: vt at 4K." in text


def test_samples_without_a_checksum_are_nobodys(runs):
    old = [{k: v for k, v in r.items() if k != "sample"} for r in series(runs, "vt", 5)]
    found = two(runs, old, old)
    assert found.tables["ruler", 4096]["vt", "exact"]["b"].difference.pairs is None
    assert "no sample is the same" in found.notes[0]


def test_likelihoods_of_the_same_items_are_compared_in_pairs(runs):
    def items(right):
        found = series(runs, "piqa", right, length=0, setting="likelihood", metric="acc")
        return [{k: v for k, v in r.items() if k != "sample"} for r in found]

    files = {"files": {"short": "0123"}}
    one, same, other = (
        StoredRun(name, {**runs.settings, "weights": name, **more}, items(right))
        for name, more, right in (("a", files, 5), ("b", files, 15), ("c", {"files": {"short": "4567"}}, 15))
    )
    found = compare_runs([one, same, other])
    (table,) = found.tables.values()
    cells = table["piqa", "acc"]
    assert (cells["b"].difference.pairs, cells["b"].difference.better, cells["b"].difference.worse) == (20, 10, 0)
    assert cells["c"].difference.pairs is None
    assert [note for note in found.notes if "no sample is the same" in note and note.startswith("c beside a")]
    assert not [note for note in found.notes if note.startswith("b beside a")]


def test_of_runs_of_other_sizes_the_shared_samples_are_compared(runs):
    found = two(runs, series(runs, "vt", 5), series(runs, "vt", 5, n=8))
    assert found.tables["ruler", 4096]["vt", "exact"]["b"].difference.pairs == 8
    assert found.notes == [
        "b beside a: only some samples are the same, and the difference is that of these: vt at 4K (8 of 20 and 8)."
    ]


def test_other_scoring_is_never_compared(runs):
    found = two(runs, series(runs, "vt", 5), series(runs, "vt", 5, metric="f1"))
    cell = found.tables["ruler", 4096]["vt", "f1"]["b"]
    assert cell.difference is None and cell.reason == "a scores it exact"
    assert "the scoring differs, so they are not compared: vt at 4K (exact / f1)." in found.notes[0]


def test_a_score_beside_the_tasks_own_is_compared_by_itself_and_counts_in_no_mean(runs):
    def run(own, beside):
        found = [*series(runs, "vt", own), *series(runs, "fwe", own)]
        return [{**r, "metric": "f1", "scores": {"em": float(r["index"] < beside)}} for r in found]

    table = two(runs, run(5, 20), run(15, 10)).tables["ruler", 4096]
    assert [table["vt", metric]["b"].difference.value for metric in ("f1", "em")] == [0.5, -0.5]
    assert table[MEAN, "2 tasks"]["b"].difference.value == 0.5


def test_generated_answers_are_compared_also_where_one_run_is_headed_by_forced_ones(runs):
    forced = [{**r, "metric": "teacher", "scores": {"exact": r["score"]}, "score": 1.0} for r in series(runs, "vt", 15)]
    found = two(runs, series(runs, "vt", 5), forced)
    assert found.tables["ruler", 4096]["vt", "exact"]["b"].difference.value == 0.5
    assert found.tables["ruler", 4096]["vt", "teacher"]["b"].reason == "a scores it exact"
    assert not found.notes


def test_scores_of_another_version_are_named(runs):
    changed = [{**r, "score": 1.0} for r in series(runs, "vt", 0)]
    found = two(runs, series(runs, "vt", 5), changed)
    assert found.notes == ["b was scored by another version, which gives other scores for the same answers: vt at 4K."]


@pytest.mark.parametrize(("name", "value"), [("topk", 8), ("dtype", "bfloat16"), ("setting", "prompt"), ("chat", True)])
def test_other_ways_of_answering_are_named(runs, name, value):
    found = two(runs, series(runs, "vt", 5), series(runs, "vt", 5), **{name: value})
    assert found.notes == [f"b beside a: it answers in another way: {name} {runs.settings[name]!r} / {value!r}."]
    assert found.tables["ruler", 4096]["vt", "exact"]["b"].difference.pairs == 20


def test_what_only_one_was_asked_is_named_and_shown(runs):
    found = two(runs, series(runs, "vt", 5), [*series(runs, "vt", 5), *series(runs, "cwe", 2)])
    assert found.tables["ruler", 4096]["cwe", "exact"]["b"].reason == "a was not asked"
    assert found.notes == ["b beside a: measured by one of the two only: cwe at 4K (b)."]


def test_a_length_that_the_first_run_lacks_is_no_other_scoring(runs):
    def scored(length):
        return [{**r, "scores": {"begins": r["score"]}} for r in series(runs, "vt", 5, length=length)]

    table = two(runs, scored(4096), [*scored(4096), *scored(8192)]).tables["ruler", 8192]
    assert {table["vt", metric]["b"].reason for metric in ("exact", "begins")} == {"a was not asked"}


def test_the_mean_of_the_tasks_takes_those_that_all_were_asked(runs):
    first = [*series(runs, "vt", 0), *series(runs, "fwe", 10), *series(runs, "cwe", 20)]
    second = [*series(runs, "vt", 10), *series(runs, "fwe", 10)]
    row = two(runs, first, second).tables["ruler", 4096][MEAN, "2 tasks"]
    assert (row["a"].value, row["b"].value, row["b"].difference.value) == (0.25, 0.5, 0.25)
    assert row["b"].difference.pairs == 40
    # tasks that all answers of a model are wrong in do not make it certain
    assert row["a"].low < 0.25 < row["a"].high


def test_areas_are_compared_by_drawing_samples_again(runs):
    def absent(gap):
        return [runs.record("recall_absent", index=i, score=None if i % 2 else 1.0, certainty=0.5 + gap * (i % 2 == 0)
                            + 0.001 * (i % 7)) for i in range(20)]  # fmt: skip

    found = two(runs, absent(0.0), absent(0.3)).tables["recall", 2048]["recall_absent", "auroc"]["b"]
    assert found.value == 1.0 and found.difference.value > 0.2 and found.difference.is_clear
    assert found.difference.method == "pairs, bootstrap"


def test_suites_and_lengths_have_tables_of_their_own(runs):
    records = [*series(runs, "recall_form_01", 5), *series(runs, "vt", 5, length=8192), *series(runs, "mine", 5)]
    assert list(two(runs, records, records).tables) == [("ruler", 8192), ("recall", 4096), ("other tasks", 4096)]


def test_one_run_is_no_comparison(runs):
    with pytest.raises(ValueError, match="a comparison needs at least two runs, got a"):
        compare_runs([runs.stored(series(runs, "vt", 5), "a")])


def test_tables_say_scores_differences_and_numbers(tmp_path, runs):
    found = two(runs, series(runs, "vt", 5), series(runs, "vt", 15), topk=8)
    assert "| vt | exact | 25 (11-47) | 75 (53-89) | **+50 (+22 to +67)**, 20 pairs |" in markdown(found)
    assert "- b beside a: it answers in another way" in markdown(found)
    text = latex(found)
    assert r"vt & exact & 25.0 & 75.0 & $\mathbf{+50.0}$" in text and text.count(r"\begin{tabular}") == 1
    draw_curves(found, tmp_path / "curves.svg")
    assert (tmp_path / "curves.svg").read_text().startswith("<?xml")


def test_names_of_runs_do_not_break_tables(runs):
    found = compare_runs([runs.stored(series(runs, "vt", 5), "a|b"), runs.stored(series(runs, "vt", 5), "c_%&{}\\")])
    rows = [line for line in markdown(found).split("\n") if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1
    assert r"c\_\%\&\{\}\textbackslash{}" in latex(found)


def test_three_runs_stand_beside_the_first(tmp_path, runs):
    found = compare_runs([runs.stored(series(runs, "vt", n), name) for n, name in ((5, "a"), (15, "b"), (1, "c"))])
    row = found.tables["ruler", 4096]["vt", "exact"]
    assert [row[name].difference and row[name].difference.value for name in "abc"] == [None, 0.5, -0.2]
    records = [record for record in found.records() if record["metric"] == "exact"]
    assert [r["run"] for r in records] == ["a", "b", "c"] and records[1]["difference"]["pairs"] == 20
    write_page(found.runs, tmp_path / "c.html", first=[("comparison", "Comparison", compared(found))])
    text = (tmp_path / "c.html").read_text()
    assert "b - a" in text and "10 better, 0 worse; exact McNemar p = 0.002" in text


def test_runs_of_perplexity_alone_have_nothing_to_compare():
    results = Path(__file__).resolve().parents[2] / "results"
    runs = [read_run(results / name, name) for name in ("smol-source-ppl", "smol-ppl")]
    with pytest.raises(ValueError, match=r"smol-source-ppl, smol-ppl have no score that is a share"):
        compare_runs(runs)
