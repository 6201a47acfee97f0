"""Short tasks: files, prompts and scores."""

from __future__ import annotations

import bz2
import json
import math
from itertools import pairwise

import pytest
import torch

from hsa_ultralong.distributed.mesh import everywhere, patient_group
from hsa_ultralong.eval.likelihood_suite import check_likelihood, run_likelihood
from hsa_ultralong.eval.short_tasks import SHORT, plain_page, score_items
from hsa_ultralong.eval.suite import FollowedRun, SampleRanks, SuiteRun
from hsa_ultralong.eval.suite_summary import latex, markdown, summary_records
from hsa_ultralong.testing.factories import tiny_model
from hsa_ultralong.testing.processes import launch
from hsa_ultralong.testing.tokenizers import byte_level

TASKS = {task.name: task for task in SHORT}
PAGE = ' = Night = \n \n " Night " , a word - it \'s dark @-@ blue ( as a rule ) . \n \n = = Day = = \n \n Bright . \n'


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "short"
    (place / "wikitext2").mkdir(parents=True)

    def lines(name, rows):
        (place / name).write_text("\n".join(map(json.dumps, rows)) + "\n")

    lines(
        "lambada_openai.jsonl",
        [{"context": f"Sheep {i} sleeps and then it", "continuation": "snores"} for i in range(5)],
    )
    query = [{"query": f"Question: is {i} odd?", "choices": ["no", "yes, it is"], "gold": i % 2} for i in range(6)]
    lines("arc_easy.jsonl", query)
    lines("arc_challenge.jsonl", query)
    lines("piqa.jsonl", [{**row, "query": row["query"] + "\n"} for row in query])
    lines("openbook_qa.jsonl", [{**row, "query": "Odd is"} for row in query])
    lines(
        "winogrande.jsonl",
        [{"context_options": ["Ann saw Eva so Ann", "Ann saw Eva so Eva"], "continuation": "left.", "gold": 1}] * 4,
    )
    text = "".join(f"Running: He runs {i}.\n2\nsits.\nflies.\nruns on and on.\neats.\n" for i in range(3))
    (place / "hellaswag_val_full.txt.bz2").write_bytes(bz2.compress(text.encode()))
    (place / "wikitext2" / "test.txt").write_text(PAGE * 3)
    return place


def test_prompts_and_sizes_are_those_of_lm_eval(folder):
    items = {name: task.items(folder) for name, task in TASKS.items()}
    assert items["piqa"][1].contexts == ["Question: is 1 odd?\nAnswer:"] * 2 == items["arc_easy"][1].contexts
    assert items["piqa"][1].continuations == [" no", " yes, it is"]
    assert items["piqa"][1].sizes == [2, 10] and items["piqa"][1].gold == 1
    assert items["openbookqa"][0].contexts == ["Odd is"] * 2
    assert items["winogrande"][0].contexts == ["Ann saw Eva so Ann", "Ann saw Eva so Eva"]
    assert items["winogrande"][0].continuations == [" left."] * 2
    assert items["hellaswag"][2].continuations == [" sits.", " flies.", " runs on and on.", " eats."]
    assert items["hellaswag"][2].gold == 2
    assert items["lambada_openai"][0].continuations == [" snores"]
    assert len(items["wikitext2"]) == 3


def test_a_page_loses_the_blanks_of_its_tokeniser():
    lines = [" = Night =", "", '"Night", a word - it\'s dark-blue (as a rule).', "", "== Day ==", "", "Bright.", ""]
    assert plain_page(PAGE).split("\n") == lines


def test_scores_follow_the_likelihoods(folder):
    model, tokenizer = tiny_model(vocab_size=len(byte_level())).eval(), byte_level()
    for record, item in zip(
        score_items(TASKS["arc_easy"], TASKS["arc_easy"].items(folder), model, tokenizer),
        TASKS["arc_easy"].items(folder), strict=True,
    ):  # fmt: skip
        logs = record["log_likelihoods"]
        assert record["score"] == float(logs.index(max(logs)) == item.gold)
        norm = [log / size for log, size in zip(logs, item.sizes, strict=True)]
        assert record["scores"]["acc_norm"] == float(norm.index(max(norm)) == item.gold)
    for record in score_items(TASKS["lambada_openai"], TASKS["lambada_openai"].items(folder), model, tokenizer):
        assert record["nats"] > 0 and record["count"] == 1


def test_a_run_holds_short_tasks_and_perplexities_by_length_and_goes_on(folder, tmp_path):
    model, tokenizer = tiny_model(vocab_size=len(byte_level())).eval(), byte_level()
    text = torch.tensor(tokenizer("Sheep sleep. They snore.\n" * 300)["input_ids"], dtype=torch.int32)
    wanted = ("arc_easy", "lambada_openai", "wikitext2", "ppl_last_512", "ppl_last_4096", "ppl_position")
    asked = {"tasks": wanted, "lengths": [600, 2100, 100_000], "samples": 3, "label": "tiny", "folder": folder}
    with SuiteRun(tmp_path / "run", {"samples": 3}) as run:
        run_likelihood(model, tokenizer, text, run, **asked)
        count = len(run.records)
        run_likelihood(model, tokenizer, text, run, **asked)
        assert len(run.records) == count
        found = summary_records(run.records, {})
        skipped = dict(run.skipped)
    by_name = {(r["task"], r["metric"], r["length"]): r for r in found if r["depth"] is None}
    assert by_name["arc_easy", "acc", 0]["samples"] == 3
    assert ("arc_easy", "acc_norm", 0) in by_name
    assert by_name["lambada_openai", "perplexity", 0]["value"] > 1
    words = by_name["wikitext2", "word_perplexity", 0]
    assert words["ci_low"] <= words["value"] <= words["ci_high"]
    assert math.isfinite(words["value"])
    assert ("ppl_last_512", "perplexity", 600) in by_name and ("ppl_last_512", "perplexity", 2100) in by_name
    parts = {name for name, _, length in by_name if name.startswith("ppl_position") and length == 2100}
    assert parts == {"ppl_position_0", "ppl_position_1K", "ppl_position_2K"}
    assert "the text has" in skipped["ppl_last_512", 100_000]
    assert "needs more than 4,096 tokens" in skipped["ppl_last_4096", 600]
    assert "word\\_perplexity" in latex(found) and "perplexities as they are" in markdown(found, {})


def stretches(run, tmp_path, text, samples, ranks=None):
    model = tiny_model(vocab_size=len(byte_level())).eval()
    asked = {"tasks": ("ppl_last_512", "ppl_position"), "lengths": [600], "samples": samples, "label": "tiny"}
    run_likelihood(model, byte_level(), text, run, **asked, ranks=ranks)


def test_stretches_share_no_token_and_what_the_text_lacks_is_said(tmp_path):
    text = torch.arange(2000, dtype=torch.int32) % 97
    with SuiteRun(tmp_path / "run", {"samples": 9}) as run:
        stretches(run, tmp_path, text, 9)
        found = {r["index"]: r["start"] for r in run.records if r["task"] == "ppl_last_512"}
        assert [*found] == [0, 1, 2] and min(b - a for a, b in pairwise(found.values())) >= 600
        assert found[0] == 0 and found[2] == 1400
        assert run.skipped["ppl_last_512", 600].endswith("holds 3 stretches that share nothing, of 9 samples")
        run.records[0]["start"] = 300  # where a version before began
        with pytest.raises(ValueError, match="the run holds other stretches of ppl_last_512 at 600; give another"):
            stretches(run, tmp_path, text, 9)


def test_one_stretch_has_no_interval(tmp_path):
    with SuiteRun(tmp_path / "run", {"samples": 1}) as run:
        stretches(run, tmp_path, torch.arange(700, dtype=torch.int32) % 97, 1)
        (record,) = [r for r in summary_records(run.records, {}) if r["task"] == "ppl_last_512"]
    assert (record["ci_low"], record["ci_high"], record["samples"]) == (None, None, 1)
    assert f"| {record['value']:.2f} |" in markdown([record], {}) and "perplexity" in latex([record])


def on_rank(rank, world, folder):
    group, text = patient_group(), torch.arange(3000, dtype=torch.int32) % 97
    with SuiteRun(folder, {"samples": 5}) if rank == 0 else FollowedRun([]) as run:
        stretches(run, folder, text, 5, SampleRanks(rank, world, lambda work: everywhere(work, group)))
        assert len(run.records) == 10


def test_two_processes_give_the_perplexities_of_one(tmp_path):
    with SuiteRun(tmp_path / "one", {"samples": 5}) as run:
        stretches(run, tmp_path, torch.arange(3000, dtype=torch.int32) % 97, 5)
    launch(2, str(tmp_path / "meet"), on_rank, tmp_path / "two")
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "records.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert [(r["task"], r["index"], r["start"]) for r in one] == [(r["task"], r["index"], r["start"]) for r in two]
    assert [r["nats"] for r in one] == pytest.approx([r["nats"] for r in two])


def test_what_is_missing_is_refused_before_any_work(folder):
    with pytest.raises(ValueError, match="give --data short=FOLDER"):
        check_likelihood(["piqa"], None, 3)
    (folder / "piqa.jsonl").write_text('{"query": "no choices"}\n')
    with pytest.raises(ValueError, match=r"is no file of piqa: 'choices'"):
        check_likelihood(["piqa"], folder, 3)
    (folder / "piqa.jsonl").unlink()
    with pytest.raises(ValueError, match=r"piqa reads piqa.jsonl, which .* does not hold"):
        check_likelihood(["piqa"], folder, 3)
    check_likelihood(["ppl_last_512"], None, 3)
