"""A suite's run: resumable, honest about what is missing, and its numbers."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from hsa_ultralong.eval.answers import Reply
from hsa_ultralong.eval.suite import SuiteRun, distinct_chunks, run_settings, run_suite, write_summary
from hsa_ultralong.eval.suite_summary import auroc, headlines, latex, markdown, summary_records
from hsa_ultralong.eval.tasks import Material, make_samples
from hsa_ultralong.testing.factories import tiny_model
from hsa_ultralong.testing.tokenizers import byte_level

pytest.importorskip("wonderwords")

LENGTH = 2000


@pytest.fixture(scope="module")
def material() -> Material:
    tokenizer = byte_level()
    text = "\n".join(f"Sheep {i * 7919 % 997} sleeps. It snores." for i in range(120))
    return Material(tokenizer, torch.tensor(tokenizer(text)["input_ids"], dtype=torch.int32))


class Oracle:
    """Answers rightly at depths below one half; knows present facts by their certainty."""

    batch, setting, limit, chunk_size = 2, "memory", None, 64

    def __init__(self, stop_after: int = 10**9) -> None:
        self.left, self.answered = stop_after, []

    def answer(self, samples):
        if self.left <= 0:
            raise KeyboardInterrupt
        self.left -= len(samples)
        self.answered += [(sample.task, sample.length, sample.index) for sample in samples]
        return [
            Reply(
                sample.answers[0] if sample.answers and (sample.depth or 0) < 0.5 else "no",
                [1], 0.9 if sample.answers else 0.1, bool(sample.answers), 1, 0.9, 2.0,
            )
            for sample in samples
        ]  # fmt: skip


SETTINGS = {"weights": "abc", "seed": 0, "samples": 4, "topk": 3, "dtype": "float64"}
TASKS = ["recall_form_01", "recall_absent", "recall_similar_256"]


def test_a_run_that_was_cut_off_goes_on_and_asks_nothing_twice(tmp_path, material):
    first = Oracle(stop_after=4)
    with pytest.raises(KeyboardInterrupt), SuiteRun(tmp_path, SETTINGS) as run:
        run_suite(first, material, run, tasks=TASKS, lengths=[LENGTH], samples=4)
    with (tmp_path / "records.jsonl").open("a") as stream:
        stream.write('{"task": "torn')  # what a kill leaves
    second = Oracle()
    run = SuiteRun(tmp_path, SETTINGS)
    run_suite(second, material, run, tasks=TASKS, lengths=[LENGTH, 2 * LENGTH], samples=4)
    asked = first.answered + second.answered
    assert len(asked) == len(set(asked)) == 2 * 2 * 4
    lines = (tmp_path / "records.jsonl").read_text().strip().split("\n")
    assert {(r["task"], r["length"], r["index"]) for r in map(json.loads, lines)} == set(asked)


def test_a_length_that_is_too_short_for_a_task_is_named_and_the_others_go_on(tmp_path, material):
    run = SuiteRun(tmp_path, SETTINGS)
    run_suite(Oracle(), material, run, tasks=TASKS, lengths=[LENGTH], samples=4)
    assert list(run.skipped) == [("recall_similar_256", LENGTH)]
    assert "no room for 257 facts" in run.skipped["recall_similar_256", LENGTH]
    assert "Not measured" in markdown(summary_records(run.records, {}), run.skipped)


def test_lengths_beyond_the_positions_of_a_model_are_named_and_not_asked(tmp_path, material):
    run, oracle = SuiteRun(tmp_path, SETTINGS), Oracle()
    oracle.limit = LENGTH
    run_suite(oracle, material, run, tasks=TASKS[:1], lengths=[LENGTH, 2 * LENGTH], samples=4)
    assert {length for _, length, _ in oracle.answered} == {LENGTH}
    assert run.skipped == {(TASKS[0], 2 * LENGTH): "the model has positions for 2,000 tokens"}


def test_unknown_tasks_are_refused_before_the_first_sample(tmp_path, material):
    oracle = Oracle()
    with pytest.raises(ValueError, match="unknown task 'nope'"), SuiteRun(tmp_path, SETTINGS) as run:
        run_suite(oracle, material, run, tasks=[*TASKS, "nope"], lengths=[LENGTH], samples=4)
    assert not oracle.answered


def test_the_summary_has_wholes_depths_diagnosis_and_an_auroc(tmp_path, material):
    run = SuiteRun(tmp_path, SETTINGS)
    run_suite(Oracle(), material, run, tasks=TASKS, lengths=[LENGTH], samples=4, model="oracle")
    found = summary_records(run.records, {"topk": 3, "seed": 0})
    wholes = [r for r in found if r["task"] == "recall_form_01" and r["depth"] is None]
    assert [r["metric"] for r in wholes] == ["exact", "begins", "mentions"]
    whole = wholes[0]
    assert (whole["value"], whole["samples"], whole["distinct_chunks"]) == (0.5, 4, 30)
    assert all(r["distinct_chunks"] == 30 for r in found if r["task"] == "recall_form_01")
    assert whole["ci_low"] < 0.5 < whole["ci_high"]
    assert (whole["evidence_found"], whole["evidence_first"], whole["missed_though_found"]) == (1.0, 1.0, 1.0)
    cells = {r["depth"]: r["value"] for r in found if r["task"] == "recall_form_01" and r["depth"] is not None}
    assert cells == {0.15: 1.0, 0.35: 1.0, 0.65: 0.0, 0.85: 0.0}
    (area,) = [r for r in found if r["metric"] == "auroc"]
    assert area["value"] == 1.0
    assert "recall\\_form\\_01 & exact & 50.0" in latex(found)


class Forced(Oracle):
    """Says the answer and goes on; the right answer is the likeliest at every second sample."""

    def answer(self, samples):
        return [Reply(f"{' '.join(sample.answers)}| One of", [1]) for sample in samples]

    def forced(self, samples):
        return [None if sample.forced is None else sample.index % 2 == 0 for sample in samples]


def test_the_authors_tests_are_headed_by_the_forced_answer_with_what_is_generated_beside_it(tmp_path, material):
    with SuiteRun(tmp_path, SETTINGS) as run:
        tasks = ["s_niah_authors", "vt_authors", "passkey"]
        run_suite(Forced(), material, run, tasks=tasks, lengths=[LENGTH], samples=4)
        found = {(r["task"], r["metric"]): r["value"] for r in summary_records(run.records, {}) if r["depth"] is None}
    assert found == {
        ("s_niah_authors", "teacher"): 0.5, ("s_niah_authors", "exact"): 0.0, ("s_niah_authors", "begins"): 1.0,
        ("s_niah_authors", "mentions"): 1.0, ("s_niah_authors", "teacher_agrees"): 0.5,
        ("vt_authors", "teacher"): 0.5, ("vt_authors", "in_order"): 1.0, ("vt_authors", "begins_in_order"): 1.0,
        ("vt_authors", "mentions_all"): 1.0, ("vt_authors", "teacher_agrees"): 0.5,
        ("passkey", "exact"): 0.0, ("passkey", "begins"): 1.0, ("passkey", "mentions"): 1.0,
    }  # fmt: skip
    assert [(r["task"], r["metric"]) for r in headlines(summary_records(run.records, {})) if r["depth"] is None] == [
        ("s_niah_authors", "teacher"), ("vt_authors", "teacher"), ("passkey", "exact")]  # fmt: skip


def test_scores_that_a_run_was_made_before_come_from_the_answers_that_it_kept(runs):
    old = [
        runs.record(index=i, answered=text, score=0.0) for i, text in enumerate(["1234567|", "no", "It is 1234567."])
    ]
    found = {r["metric"]: r["value"] for r in summary_records(old, {}) if r["depth"] is None}
    assert found == {"exact": 0.0, "begins": pytest.approx(1 / 3), "mentions": pytest.approx(2 / 3)}


def test_tasks_without_a_single_answer_are_named_where_answers_are_forced(tmp_path, material):
    run = SuiteRun(tmp_path, SETTINGS)
    tasks = ["niah_multivalue", "mq_authors"]
    run_suite(Forced(), material, run, tasks=tasks, lengths=[LENGTH], samples=2, scoring="teacher")
    assert list(run.skipped) == [("niah_multivalue", LENGTH)]
    assert [r["score"] for r in run.records if r["task"] == "mq_authors"] == [1.0, 0.0]


@pytest.mark.parametrize("name", ["passkey", "niah_single_1", "niah_multikey_2", "recall_form_01"])
def test_different_chunks_are_those_of_the_tasks_own_context(material, name):
    (sample,) = make_samples(name, material, 8 * LENGTH, 1)
    own = {tuple(sample.context[i : i + 16].tolist()) for i in range(0, len(sample.context), 16)}
    assert distinct_chunks(sample, 16) == len(own)
    # five sentences come back, a text with other numbers does not
    assert (len(own) < 120) == (name in ("passkey", "niah_single_1"))


def test_chunks_of_documents_count_too_and_repeat_where_documents_do(material):
    (sample,) = make_samples("recall_documents", material, LENGTH, 1)
    twice = replace(sample, notes=sample.notes * 2)
    notes = {note[i : i + 64] for note in sample.notes for i in range(0, len(note), 64)}
    assert distinct_chunks(twice, 64) == distinct_chunks(sample, 64)
    assert distinct_chunks(sample, 64) == distinct_chunks(replace(sample, notes=()), 64) + len(notes)


def test_the_auroc_counts_pairs_and_ties_by_half():
    present = [{"score": 1.0, "certainty": c} for c in (0.9, 0.5)]
    absent = [{"score": None, "certainty": c} for c in (0.5, 0.1)]
    assert auroc(present + absent) == pytest.approx((1 + 1 + 0.5 + 1) / 4)
    assert auroc(present) is None


def test_a_real_model_writes_all_files_of_a_run(tmp_path, material):
    from hsa_ultralong.eval.memory_reader import MemoryReader

    model = tiny_model(vocab_size=len(material.tokenizer), chunk_size=8).eval()
    reader = MemoryReader(model, material, batch=2)
    settings = run_settings(model, material, reader, samples=2, seed=0)
    assert settings != run_settings(tiny_model(seed=1, vocab_size=len(material.tokenizer), chunk_size=8), material,
                                    reader, samples=2, seed=0)  # fmt: skip
    run = SuiteRun(tmp_path, settings)
    run_suite(reader, material, run, tasks=["passkey", "recall_form_10"], lengths=[LENGTH], samples=2, model="tiny")
    write_summary(run, seed=0, label="tiny")
    run.close()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {r["task"] for r in summary["records"]} == {"passkey", "recall_form_10"}
    assert summary["meta"]["settings"]["haystack_tokens"] == len(material.text)
    assert (tmp_path / "scores.png").stat().st_size > 5000
    assert {p.name for p in tmp_path.iterdir()} == {
        "run.json", "records.jsonl", "records.jsonl.xz", "summary.json", "summary.md", "summary.tex", "report.html",
        *(f"{name}.{kind}" for name in ("scores", "depths", "diagnosis") for kind in ("png", "svg")),
    }  # fmt: skip
