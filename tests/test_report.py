"""scripts/report.py: docs/report.md says what the files say, in numbers, a figure and a PDF; nothing else."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from hsa_ultralong.files.packed import pack
from hsa_ultralong.recipes.findings import FINDINGS

ROOT = Path(__file__).resolve().parents[1]


sys.path.insert(0, str(ROOT / "scripts"))


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def report():
    return script("report")


def record(variant, seed, task, value, length=4096, depth=None, metric="exact", samples=20):
    found = {"variant": variant, "seed": seed, "task": task, "metric": metric, "length": length, "depth": depth,
             "value": value}  # fmt: skip
    return {**found, "samples": samples, "ci_low": value * 0.9, "ci_high": value * 1.1} if samples else found


@pytest.fixture
def measured(tmp_path):
    """A project in which effective_length was run with two variants and two seeds."""
    records = []
    for variant, values in (("rows_4k", (0.5, 0.7)), ("rows_32k", (1.0, 0.9))):
        for seed, value in enumerate(values):
            records += [
                record(variant, seed, "s_niah", value),
                record(variant, seed, "s_niah", value, depth=0.05, samples=2),
                record(variant, seed, "ppl_last_512", 10 + value, metric="perplexity"),
                record(variant, seed, "training", value, metric="needle_accuracy", samples=0),
                record(variant, seed, "training", 2e5, metric="tokens_per_s", samples=0),
            ]
    folder = tmp_path / "results" / "findings" / "effective_length"
    folder.mkdir(parents=True)
    sources = {
        f"{variant}-{seed}": {"commit": "abcdefabcdef"} for variant in ("rows_4k", "rows_32k") for seed in (0, 1)
    }
    meta = {"seeds": [0, 1], "hardware": ["H100"], "commits": ["abcdefabcdef"], "runs": sources}
    configs = {run: {"parallel": {"cuda_graphs": run.endswith("1")}} for run in sources}
    (folder / "summary.json.xz").write_bytes(
        pack(json.dumps({"meta": meta, "configs": configs, "records": records}).encode())
    )
    return tmp_path


def page(root):
    """A page with every block, empty."""
    names = ["lengths", "operators", "targets", "models", "misses", *script("report_figures").FIGURES, *FINDINGS]
    return "# Title\n\n" + "\n\n".join(f"<!-- begin {name} -->\n<!-- end {name} -->" for name in names) + "\n"


def test_seeds_are_pooled_with_intervals_and_each_is_shown(report, measured):
    text, figures = report.render(page(measured), measured)
    assert "| rows_4k | 60 (45-77) [50, 70] |" in text and "| rows_32k | 95 (81-110) [100, 90] |" in text
    assert "| rows_4k | 10.60 (9.45-11.77) [10.50, 10.70] |" in text
    assert "Seed 0: abcdefa, without CUDA graphs; Seed 1: abcdefa, by CUDA graphs; H100; " in text
    assert "Not run yet: rows_8k, rows_128k." in text
    folder = measured / "results" / "findings" / "effective_length"
    for path, draw in figures.items():
        draw(path)
    assert (folder / "figure.png").is_file() and (folder / "depths.png").is_file()


def test_differences_are_claimed_of_three_seeds_with_intervals_apart_only(report):
    def tasks(values, others, **more):
        found = [record("a", seed, "s_niah", value, **more) for seed, value in enumerate(values)]
        return report.shown(found + [record("b", seed, "s_niah", value, **more) for seed, value in enumerate(others)])

    low, high = (0.1, 0.2, 0.1), (0.9, 0.8, 0.9)
    text = report.differences(tasks(low, high), ["a", "b"])
    assert "answered exactly, %: `b` above `a` at 4K" in text
    assert "`b` below `a` at 4K" in report.differences(tasks(high, low), ["a", "b"])
    for one, other in ((low, (0.9, 0.05, 0.9)), (low, low)):
        assert report.differences(tasks(one, other), ["a", "b"]).startswith("No run differs")
    assert "three seeds of both runs, and there are two" in report.differences(tasks(low[:2], high[:2]), ["a", "b"])
    assert "and there are two" in report.differences(tasks(low, high[:2]), ["a", "b"]), "a third seed of one alone"
    assert "no two have more than one" in report.differences(tasks(low, high[:1]), ["a", "b"])


def test_what_has_one_sign_in_three_seeds_is_listed_with_mean_and_range_and_counted(report):
    def told(task, values, others, **more):
        found = [record("a", seed, task, value, **more) for seed, value in enumerate(values)]
        found += [record("b", seed, task, value, **more) for seed, value in enumerate(others)]
        return report.same_sign(report.shown(found), ["a", "b"], {"s_niah": "needles, %"})

    text = told("s_niah", (0.1, 0.5, 0.4), (0.2, 0.8, 0.45))
    assert text.startswith(
        "Of 1 differences from `a` of the same seed 1 are 0 with no seed, and 1 of these have one sign"
    )
    assert text.endswith("| needles, % | b | 4K: +15.0 (+5.0 to +30.0) |")
    text = told("ppl_last_512", (9.0, 9.0, 9.0), (8.0, 8.5, 7.5), metric="perplexity")
    assert text.endswith("| ppl_last_512 | b | 4K: -1.00 (-1.50 to -0.50) |")
    tied = told("s_niah", (0.1, 0.5, 0.4), (0.2, 0.5, 0.5))
    assert tied.startswith("Of 1 differences from `a` of the same seed 0 are 0 with no seed, and 0 of"), (
        "a tie is no sign"
    )
    assert told("s_niah", (0.1, 0.5, 0.4), (0.1, 0.5, 0.4)) == "", "nothing differs"
    assert told("s_niah", (0.1, 0.5), (0.2, 0.8)) == told("s_niah", (0.1, 0.5, 0.4), (0.2, 0.8)) == "", "two seeds"


def test_when_recall_began_says_which_seeds_were_not_measured_and_which_never_began(report):
    half = {"metric": "half_answered_tokens", "samples": 0}
    records = [record("a", seed, "training", 26e6, **half) for seed in (0, 1)]
    records += [record("b", 0, "training", 39e6, **half)]
    records += [record(run, 2, "training", 0.4, metric="needle_accuracy", samples=0) for run in "ab"]
    assert report.begun(records, ["a", "b"]).endswith("`a` 26M, 26M, none; `b` 39M, -, none.")
    assert report.begun(records[3:], ["a", "b"]) == ""


def test_a_run_asked_at_another_commit_than_it_was_trained_at_says_so(report):
    runs = {"a-0": {"commit": "abcdefab"}, "a-1": {"commit": "abcdefab", "asked": ["0123456789"]}}
    text = report._origins({"meta": {"runs": runs}, "configs": {"a-0": {}, "a-1": {}}})
    assert text == "Seed 0: abcdefa, without CUDA graphs; Seed 1: abcdefa, without CUDA graphs, asked at 0123456"


def test_a_seed_that_was_not_measured_has_a_dash_and_halves_go_up(report):
    records = [record("a", seed, "s_niah", value) for seed, value in ((0, 0.5), (2, 0.65))]
    rows = report.shown([*records, record("b", 1, "s_niah", 0.125)])["s_niah"]
    assert [report.cell(row) for row in rows] == ["58 (45-72) [50, -, 65]", "13 (11-14) [-, 13, -]"]


def test_what_was_not_run_says_so_and_everything_says_what_would_be(report, measured):
    text, _ = report.render(page(measured), measured)
    # lengths, operators, targets, models and misses have no files either
    others = len(script("report_figures").FIGURES) + 5
    assert text.count("*Not run yet.*") == len(FINDINGS) - 1 + others
    for finding in FINDINGS.values():
        assert finding.question in text and all(f"| `{variant}` |" in text for variant in finding.variants)


def test_writing_again_changes_nothing(report, measured):
    once, _ = report.render(page(measured), measured)
    assert report.render(once, measured)[0] == once


def test_a_missing_or_unknown_block_is_refused(report, tmp_path):
    with pytest.raises(ValueError, match="window"):
        report.render(page(tmp_path).replace("begin window", "begin windows"), tmp_path)


def test_the_committed_page_is_what_the_committed_files_say(report):
    text = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    written, figures = report.render(text, ROOT)
    assert written == text and all(path.is_file() for path in figures), "run `make report`"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    first = readme[readme.index("\n![") :].partition("](")[2].partition(")")[0]
    assert ROOT / first in figures and "](docs/report.md)" in readme
    assert (ROOT / "docs" / "report.pdf").stat().st_size < 2**20


def test_figures_show_every_length_that_was_measured(report):
    maps = report.shapes.hidden_sentences(ROOT)
    assert list(maps["nano"]) == [4096, 32_768, *(2**power for power in (18, 20, 23, 24, 26, 28, 30, 32))]
    before = maps["nano before 2026-11-28"]
    assert list(before) == [2**20, 2**24, 2**26, 2**30]
    assert {len(own) for own in (*maps["nano"].values(), *before.values())} == {10}
    shares = report.shapes.recalled(ROOT)
    ends = dict.fromkeys(shares, 2**24) | dict.fromkeys(("twelve forms never trained", "the authors' needle"), 2**27)
    assert len(shares) == 4 and {name: line.x[-1] for name, line in shares.items()} == ends
    assert all(max(line.y) <= 100 for line in shares.values())
    now = report.shapes.margins(ROOT)["nano"]
    assert now.x[0] == 4096 and now.x[-1] == 2**32 and min(now.y) > 0 and now.low[-1] > 0
    margins = report.shapes.margins(ROOT)["nano before 2026-11-28"]
    assert margins.x == [2**20, 2**24, 2**26, 2**30] and margins.y == sorted(margins.y, reverse=True)
    speed = report.shapes.memory_speed(ROOT)
    assert all(value > 0 for curves in speed.values() for own in curves.values() for value in own.values())
    anew, question, step = (speed[name]["nano, H200"] for name in ("anew_s", "question_s", "decode_ms"))
    assert list(step) == list(anew) == [2**13, 2**20, 2**24, 2**27]
    assert anew[2**24] > 30 * question[2**24]


def test_the_map_of_tasks_has_every_task_of_both_protocols_at_every_length(report):
    scores, lengths = sys.modules["report_tasks"].task_scores(ROOT), [2**power for power in (12, 14, 16, 18, 20, 24)]
    rows = {}
    for record in scores:
        rows.setdefault(record["task"], []).append(record["length"])
    assert sorted(rows.pop("authors: S-NIAH, forced")) == [*lengths, 2**27]
    assert len(rows) == 19 and all(sorted(own) == lengths for own in rows.values())


def test_figures_are_drawn_from_what_is_there(report, tmp_path):
    for own in report.shapes.FIGURES.values():
        assert own(tmp_path) is None and own(ROOT) is not None
    report.shapes.FIGURES["summary"](ROOT)[1](tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


def test_the_speed_that_readme_quotes_counts_retrieval_and_is_in_the_file(report):
    results = ROOT / "benchmarks" / "results"
    graphs, plain = (
        report.shapes.operator_times(report.read_json(results / name)["records"])
        for name in ("ops-graphs-h200.json", "ops-h200.json")
    )

    def quoted(times, lengths, lists, *others):
        shares = (report.shapes.share_of_full(times, "fwd_bwd", length, lists, *others) for length in lengths)
        return ", ".join(f"{share:.2f}" for share in shares)

    readme, lengths = (ROOT / "README.md").read_text(encoding="utf-8"), (8192, 16_384, 32_768)
    for others in (("chunk_topk",), ()):
        found = (quoted(graphs, lengths, lists, *others) for lists in ("shared", "random"))
        assert f"| {'; '.join(found)} |" in readme
    longest = (quoted(plain, (131_072,), lists, "chunk_topk") for lists in ("shared", "random"))
    assert f"| {'; '.join(longest)} |" in readme
    both = [quoted(graphs, (length,), "shared", "chunk_topk") for length in (32_768, 8192)]
    assert f"take {both[0]} of the time of cuDNN full attention at 32K" in readme and f"and {both[1]} at 8K" in readme
    for name in ("ops-graphs-h200.json", "ops-h200.json"):
        meta = report.read_json(results / name)["meta"]
        assert f"({meta['commit'][:7]}, {meta['date'][:10]})" in readme


def test_operators_have_their_times_at_every_length_that_was_measured(report):
    rows = [line.split(" | ") for line in report.operators_block(ROOT, {}).splitlines() if line.startswith("| 1M |")]
    assert len(rows) == 2 and all(row[1] and row[2] for row in rows)


def test_the_pdf_has_pages_and_is_the_same_every_time(report, measured, monkeypatch):
    monkeypatch.setitem(sys.modules, "report", report)
    printer = script("report_pdf")
    text, figures = report.render(page(measured), measured)
    for path, draw in figures.items():
        draw(path)
    text = text.replace("../results", "results")
    text += "\n- an *item* with `code`\n\n```bash\nhsa plot\n```\n" + "A paragraph of words. " * 250
    files = [measured / "one.pdf", measured / "two.pdf"]
    for file in files:
        printer.print_pdf(text, measured, file)
    one, two = (file.read_bytes() for file in files)
    assert one.startswith(b"%PDF") and one == two and one.count(b"/Type /Page ") >= 3


def test_marks_of_markdown_are_left_out_of_print(report):
    printer = script("report_pdf")
    assert printer.plain("**a** `b*c` [d](e.md) *f* 2 * 3 * 4") == "a b*c d f 2 * 3 * 4"
    room = printer.width("two words", 9.0)
    assert printer.wrapped("two words more", 9.0, room) == ["two words", "more"]
