"""The tables of docs/evidence-suites.md hold the numbers of the JSON files in results/."""

from __future__ import annotations

import importlib.util
import json
import lzma
import math
import re
import statistics
from collections import Counter
from pathlib import Path

import pytest

from hsa_ultralong import HSAConfig
from hsa_ultralong.eval.stored_runs import TOGETHER, read_runs, runs_together
from hsa_ultralong.eval.suite_summary import auroc, is_share, is_suite
from hsa_ultralong.files.packed import unpacked
from hsa_ultralong.inference.ask import unsure_weight

ROOT = Path(__file__).resolve().parents[2]
LENGTHS = {"4K": 2**12, "16K": 2**14, "64K": 2**16, "256K": 2**18, "1M": 2**20, "16M": 2**24, "128M": 2**27}
FORMS = [f"recall_form_{number:02}" for number in range(1, 13)]
VALUES = [f"recall_value_{kind}" for kind in ("names", "cities", "times", "dates", "digits14", "words2")]
READ = {
    "forms never trained, mean of 12": FORMS,
    "the trained form, other values, mean of 6": VALUES,
    "one of 64 similar facts": ["recall_similar_64"],
    "one of 256 similar facts": ["recall_similar_256"],
}

# what a task is scored by
SCORES = ("exact", "all", "part")

# committed before records were kept: nothing can be looked up in them. No further ones
WITHOUT_RECORDS = {
    "short-smollm2",
}  # fmt: skip


def records(name):
    return json.loads((ROOT / "results" / name / "summary.json").read_text())["records"]


def samples(path):
    # not splitlines(): strings may hold other line separators
    return map(json.loads, lzma.decompress(path.read_bytes()).decode().rstrip("\n").split("\n"))


def tables(title):
    """Of a section: the cells of each row by its name and the head of the column."""
    section = (ROOT / "docs/evidence-suites.md").read_text().split(f"## {title}\n")[1].split("\n## ")[0]
    for part in section.split("\n\n"):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.split("\n") if line[:1] == "|"]
        if rows:
            yield {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[2:]}


def shares(suite, tasks, length, metric, field="value"):
    """In percent, of the tasks at a length, without the parts of a depth; metric: "auroc", or the score itself."""
    # one folder for every run: what was measured at other lengths or of other tasks has a word more
    found = [r for path in (ROOT / "results").glob(f"{suite}*") for r in records(path.name)]
    return [
        100 * r[field] for r in found
        if r["task"] in tasks and r["length"] == LENGTHS[length] and r["depth"] is None
        and r["metric"] in (("auroc",) if metric == "auroc" else SCORES) and field in r
    ]  # fmt: skip


def mean(values, form):
    return form.format(sum(values) / len(values)) if values else ""


@pytest.mark.parametrize(("title", "suite"), [("Recall", "recall-nano"), ("RULER", "ruler-nano")])
def test_every_score_of_a_suite_is_in_its_summary(title, suite):
    (table,) = tables(title)
    for name, row in table.items():
        tasks = FORMS if name == "recall_form_01 to 12, mean" else [name.split()[0]]
        metric = "auroc" if "AUROC" in name else ""
        for length, cell in row.items():
            assert cell == mean(shares(suite, tasks, length, metric), "{:.0f}" if tasks != FORMS else "{:.1f}"), name


def test_every_form_of_the_recall_suite_has_its_score():
    (table,) = tables("Recall by form")
    for length, row in table.items():
        assert row == {
            str(number): mean(shares("recall-nano", [form], length, ""), "{:.0f}")
            for number, form in enumerate(FORMS, 1)
        }


def test_how_often_the_right_chunk_was_read_is_in_the_summary():
    (table,) = tables("Where misses come from")
    for name, row in table.items():
        for length, cell in row.items():
            assert cell == mean(shares("recall-nano", READ[name], length, "", "evidence_found"), "{:.0f}%"), name


def test_why_the_authors_tests_are_missed_is_counted_in_the_records():
    (table,) = tables("Why the authors' tests are missed")
    rows = {name: list(cells.values()) for name, cells in table.items()}
    for column, length in enumerate((2**20, 2**24)):
        own = [r for r in samples(ROOT / "results/paper-nano-16m/records.jsonl.xz") if r["length"] == length]
        needle, several, chain = (
            [r for r in own if r["task"] == task] for task in ("s_niah_authors", "mq_authors", "vt_authors")
        )
        wrong = Counter(r["answered"] for r in needle if r["score"] < 1)
        numbers = [re.findall(r"[\w.]+", r["answered"]) for r in several]
        counted = {
            "single needle: found, ranked first": stood(needle),
            "wrong answers, of these the same number": (sum(wrong.values()), wrong.most_common(1)[0][1]),
            "multi-query: one of the two found, ranked first": stood(several),
            "answers with a comma": (sum("," in r["answered"] for r in several),),
            "first number right; both in order at the beginning; these and no other": (
                sum(said[:1] == r["expected"][:1] for said, r in zip(numbers, several, strict=True)),
                *(sum(r["scores"][name] for r in several) for name in ("begins_in_order", "in_order")),
            ),
            "variable tracking: a line of the chain found, ranked first": stood(chain),
            'answers that are the value itself; "unknown"; that name a variable of the chain': (
                sum(r["answered"].strip().strip(".") == r["query"] for r in chain),
                sum(r["answered"].strip().startswith("unknown") for r in chain),
                sum(any(name in r["answered"] for name in r["expected"]) for r in chain),
            ),
        }
        assert {name: cells[column] for name, cells in rows.items()} == {
            name: ", ".join(f"{one:.0f}" for one in found) for name, found in counted.items()
        }


def stood(records):
    return sum(r["found"] for r in records), sum(r["rank"] == 1 for r in records)


def test_one_date_is_all_that_parts_certainty_at_16m_from_1():
    own = [r for r in samples(ROOT / "results/recall-nano-16m/records.jsonl.xz") if r["task"] == "recall_absent"]
    dated = [r for r in own if not r["expected"] and r["answered"].strip() == "2004-06-18"]
    assert len(dated) == 7 and min(r["certainty"] for r in dated) > 0.9998
    assert auroc([r for r in own if r not in dated]) == 1


def test_scores_of_short_tasks_are_in_their_summaries():
    table, beside = tables("Short tasks, and a model from elsewhere")
    names = {
        "LAMBADA": "lambada_openai", "HellaSwag": "hellaswag", "PIQA": "piqa", "ARC easy": "arc_easy",
        "ARC challenge": "arc_challenge", "WinoGrande": "winogrande", "OpenBookQA": "openbookqa",
    }  # fmt: skip
    for model, row in table.items():
        found = {
            r["task"]: f"{100 * r['value']:.0f}" for r in records(f"short-{model.lower()}") if r["metric"] == "acc"
        }
        assert row == {head: found.get(task, "") for head, task in names.items()}
    tasks = {
        task["task"]: task for task in json.loads((ROOT / "results/short-smollm2/lm_eval.json").read_text())["tasks"]
    }
    for metric in ("acc", "acc_norm"):
        found = {head: tasks[task].get(metric) for head, task in names.items()}
        assert beside[f"`{metric}`"] == {head: "" if x is None else f"{100 * x:g}" for head, x in found.items()}
        assert all(task.get(metric) == task.get(f"{metric}_lm_eval") for task in tasks.values())


def test_scores_of_a_chat_model_in_sentences_are_in_its_summary():
    _, forms, values, similar = tables("RULER of SmolLM2")
    of = {(r["task"], r["metric"]): 100 * r["value"] for r in records("smollm2-recall")}
    for metric in ("exact", "mentions"):
        for table, prefix, tasks in ((forms, "recall_form_", FORMS), (values, "recall_value_", VALUES)):
            row = {task.removeprefix(prefix).lstrip("0"): f"{of[task, metric]:.0f}" for task in tasks}
            row["mean"] = f"{statistics.mean(of[task, metric] for task in tasks):.1f}"
            assert table[f"`{metric}`"] == row
        row = {number: f"{of[f'recall_similar_{number}', metric]:.0f}" for number in ("4", "16", "64")}
        assert similar[f"`{metric}`"] == row


def test_scores_of_smol_are_in_their_summaries():
    (table,) = tables("SmolLM2 with a memory")
    qa = {
        "from memory": "smol-qa", "`--reread 3`": "smol-qa-reread", "no passages": "smol-qa-closed",
        "the tuned source, the passage in its prompt": "smol-tuned-gold",
        "the tuned source, `bm25` in 512 tokens": "smol-tuned-bm25",
        "the tuned source, no passages": "smol-tuned-closed",
    }  # fmt: skip
    for name, row in table.items():
        for length, cell in row.items():
            task, _, setting = name.partition(", ")
            if task == "qa_xquad":
                folder, tasks, metric = qa[setting], [task], "f1"
            elif task.startswith("niah"):
                folder, tasks, metric = "smol-niah", [task], "all"
            else:
                folder, tasks, metric = "smol-recall", READ[name], "mentions"
            if not (ROOT / "results" / folder).is_dir():
                folder = f"{folder}-{length.lower()}"
            found = records(folder) if (ROOT / "results" / folder).is_dir() else []
            values = [
                100 * r["value"] for r in found
                if (r["metric"], r["length"], r["depth"]) == (metric, LENGTHS[length], None) and r["task"] in tasks
            ]  # fmt: skip
            assert cell == mean(values, "{:.0f}"), (name, length)


def test_what_twins_did_is_in_their_summaries():
    runs = runs_together(ROOT / "results/twins")
    parts = dict(zip(("long", "warmup"), tables("Twins of nano's size"), strict=False))
    places = {"1K": 2**10, "2K": 2**11, "4K": 2**12, "8K": 2**13, "32K": 2**15}
    for stage, table in parts.items():
        for name, row in table.items():
            twin, _, seed = name.partition(", seed ")
            summary = runs[f"run-{twin}-{seed or 0}"]["summary.json"]
            found = [r for r in summary["records"] if r["stage"] == stage]
            of = {(r["metric"], r["context"]): r["value"] for r in found}
            last = {"long": 2**13, "warmup": 2**11}[stage]
            assert row == {
                **{head: f"{100 * of['needle_accuracy', place]:.0f}" for head, place in places.items()},
                "loss": f"{of['loss', last]:.2f}", "GiB": f"{of['peak_bytes', last] / 2**30:.1f}",
            }, name  # fmt: skip


def test_what_twins_answered_is_in_their_report():
    section = (ROOT / "docs/evidence-suites.md").read_text().split("### Facts in other words")[1]
    told = [line for line in section.split("\n") if line[:1] == "|"]
    assert len(told) > 30
    assert not set(told) - set((ROOT / "results/twins/summary.md").read_text().split("\n"))


def test_what_is_said_of_perplexities_of_twins_follows_from_their_report():
    found = json.loads(unpacked(ROOT / "results/twins/summary.json.xz"))["records"]
    of = {
        (r["twin"], r["task"].removeprefix("eval ")): r["value"]
        for r in found
        if r["metric"] == "perplexity" and r["length"] == 2**13
    }
    # tokens of rows of 8K: the first 1K, the next, 2K to 4K, 4K to 8K
    shares = {"ppl_position_0": 1 / 8, "ppl_position_1K": 1 / 8, "ppl_position_2K": 1 / 4, "ppl_position_4K": 1 / 2}
    nats = {
        twin: sum(share * math.log(of[twin, task]) for task, share in shares.items()) for twin in ("hsa", "full_rope")
    }
    over = [math.exp(nats["hsa"] - nats["full_rope"]), of["hsa", "ppl_last_4096"] / of["full_rope", "ppl_last_4096"]]
    both = [f"{of['hsa', task]:.1f} for {of['full_rope', task]:.1f}" for task in list(shares)[:3]]
    told = (
        f"in the first 1K ({both[0]}) and behind from 1K to 4K ({both[1]}, {both[2]}); over all 8K it is "
        f"{100 * over[0] - 100:.1f}% above full attention, over the last 4,096 tokens {100 * over[1] - 100:.1f}%"
    )
    assert told in (ROOT / "docs/evidence-suites.md").read_text()


def test_the_report_of_twins_is_made_of_their_runs():
    spec = importlib.util.spec_from_file_location("twins_report", ROOT / "scripts/twins_report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.collect(ROOT / "results/twins")
    assert json.loads(unpacked(ROOT / "results/twins/summary.json.xz")) == json.loads(json.dumps(found))
    text = module.tables(found["records"], found["meta"]["cut_off"])
    assert (ROOT / "results/twins/summary.md").read_text() == text


def test_an_edited_memory_answered_as_a_rebuilt_one():
    edited, rebuilt = (
        list(samples(ROOT / f"results/edit-rebuild-64k/{name}.jsonl.xz")) for name in ("memory", "rebuild")
    )
    assert [(r["sample"], r["answered"]) for r in edited] == [(r["sample"], r["answered"]) for r in rebuilt]
    assert max(abs(a["certainty"] - b["certainty"]) for a, b in zip(edited, rebuilt, strict=True)) <= 3e-7


def test_the_card_says_what_the_line_of_unsure_answers_marks():
    nano, found = HSAConfig.from_pretrained(ROOT / "checkpoints" / "nano"), {}
    for length, name in (("4K", "recall-nano-short"), ("64K", "recall-nano"), ("1M", "recall-nano-1m"),
                         ("16M", "recall-nano-16m")):  # fmt: skip
        line = unsure_weight(nano, LENGTHS[length] // 64)
        marked = {"what was never hidden, 50 questions": [], "wrong answers": [], "right answers": []}
        for record in samples(ROOT / "results" / name / "records.jsonl.xz"):
            if record["length"] == LENGTHS[length] and record["certainty"] is not None:
                is_absent = record["task"] == "recall_absent"
                kind = "right answers" if record["score"] == 1 else "wrong answers"
                if not record["expected"]:
                    kind = "what was never hidden, 50 questions"
                elif is_absent and kind == "right answers":
                    continue
                marked[kind].append(record["certainty"] < line)
        for kind, one in marked.items():
            found.setdefault(kind, []).append(f"{100 * sum(one) / len(one):.0f}")
    card = (ROOT / "checkpoints" / "nano" / "README.md").read_text(encoding="utf-8")
    for kind, cells in found.items():
        assert f"  | {kind} | {' | '.join(cells)} |" in card


def test_published_records_hold_no_text_of_share_alike_questions():
    for path in (ROOT / "results").rglob("records.jsonl.xz"):
        for record in samples(path):
            if record["task"].startswith("qa_"):
                assert (record["query"], record["expected"], record["answered"]) == ("", [], ""), path


def test_a_published_suite_keeps_its_records_which_give_its_summary():
    summaries = [path for path in (ROOT / "results").rglob("summary.json") if is_suite(path)]
    without = {path.parent.name for path in summaries if not path.with_name("records.jsonl.xz").is_file()}
    assert without == WITHOUT_RECORDS
    kept = {path.parent: json.loads(path.read_text()) for path in summaries if path.parent.name not in WITHOUT_RECORDS}
    for path in (ROOT / "results").rglob(TOGETHER):
        for name, files in runs_together(path.parent).items():
            if "log.jsonl" not in files:
                kept[path.parent / name] = files["summary.json"]
    for run in read_runs({str(folder): folder for folder in kept}):
        # scores that came later stand in the records only
        found = {(r["task"], r["metric"], r["length"], r["depth"]): r for r in run.summary}
        for record in kept[Path(run.name)]["records"]:
            if is_share(record["metric"]):
                own = found[tuple(record[name] for name in ("task", "metric", "length", "depth"))]
                # published numbers have six digits
                value = pytest.approx(record["value"], rel=1e-5)
                assert [own[n] for n in ("samples", "value")] == [record["samples"], value]


def smol_tables(title):
    section = (ROOT / "docs/evidence-smol.md").read_text().split(f"## {title}\n")[1].split("\n## ")[0]
    for part in section.split("\n\n"):
        lines = [line for line in part.split("\n") if line[:1] == "|"]
        if lines:
            yield [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_differences_of_smol_from_its_source_are_those_of_the_comparison():
    names = {"LAMBADA": "lambada_openai", "HellaSwag": "hellaswag", "PIQA": "piqa", "ARC-easy": "arc_easy"}
    compared = json.loads((ROOT / "results/smol-language/compare.json").read_text())["records"]
    found = {(r["task"], r["metric"], r["run"]): r for r in compared}
    for name, source, smol, told, counts in next(smol_tables("Language")):
        task, metric = name.split(", ")
        one, two = (found[names[task], metric.strip("`"), run] for run in ("source", "smol"))
        difference = two["difference"]
        assert [source, smol] == [f"{100 * r['value']:.1f}" for r in (one, two)]
        numbers = [float(number) for number in re.findall(r"[+-]?\d+\.\d+", told)]
        assert numbers == [round(100 * difference[key], 1) for key in ("value", "low", "high")], name
        assert difference["pairs"] == 1500 and counts == f"{difference['better']}, {difference['worse']}"


def test_forms_of_smol_are_counted_in_its_records():
    rows = {row[0].split()[0]: row[1:] for row in next(smol_tables("Forms never trained"))}
    for column, folder in enumerate(("smol-recall-64k", "smol-recall-1m")):
        every = [r for r in samples(ROOT / "results" / folder / "records.jsonl.xz") if r["task"] in FORMS]
        for number in [*(form.removeprefix("recall_form_") for form in FORMS), "all,"]:
            own = [r for r in every if number == "all," or r["task"].endswith(number)]
            right, places, weight = rows[number][3 * column : 3 * column + 3]
            told = [int(count) for count in re.findall(r"\d+", right)[:2]]
            assert told == [sum(r["score"] == 1 for r in own), sum(r["scores"]["mentions"] == 1 for r in own)]
            assert places == f"{sum(r['found'] for r in own)}, {sum(r['rank'] == 1 for r in own)}"
            if weight:
                missed = statistics.median(r["weight"] or 0.0 for r in own if r["score"] < 1)
                assert float(weight) == pytest.approx(missed, abs=0.0051)
