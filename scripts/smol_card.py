"""The card of the model that `make smol` makes: its scores, what trained it, and the licences of its data.

    python scripts/smol_card.py [--run RUN ...] [--results results] [-o checkpoints/smol/README.md]

Settings are those of the config.json of each run, tokens those of its summary.json; scores those of results/smol-*.
tests/test_smol_card.py compares the committed card with what this writes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
CARD = ROOT / "checkpoints" / "smol" / "README.md"
# of files of questions and conversations, by name: what they are, and their licence
SOURCES = {
    "new_wiki_v1.0.json": ("SQuADShifts, new Wikipedia", "CC BY 4.0, text of Wikipedia CC BY-SA"),
    "nq-open-oracle.jsonl.gz": (
        "NQ-open with gold passages of Lost in the Middle",
        "MIT, NQ and Wikipedia CC BY-SA 3.0",
    ),
    "Synthetic-Persona-Chat_valid.csv": ("Synthetic-Persona-Chat, validation part", "CC BY 4.0"),
    "dolly_hhrlhf_train_small.jsonl": ("dolly-15k and hh-rlhf, 1,000 pairs", "CC BY-SA 3.0"),
    "seed_tasks.jsonl": ("seed tasks of self-instruct", "Apache-2.0"),
    "own-chat.jsonl": (
        "what the source answered to the users of Synthetic-Persona-Chat and dolly (`hsa write chat`)",
        "Apache-2.0, users' words as above",
    ),
    "sentences.jsonl": (
        "answers of the questions above in a sentence, by the source (`hsa write sentences`)",
        "that of the questions",
    ),
}
# what trained it, in order: each run goes on from the one before, the second from half of its change of old layers
RUNS = ("training-smol", "training-smol-answers", "training-smol-sentences")
ROWS = {
    "text": "text of the shards, on which the source's words are followed",
    "span_copy": "spans of the same text that come twice (made)",
    "chat_facts": "made facts, asked as chat",
    "passage_questions": "questions that people asked about passages, from memory",
    "passage_chat": "the same with the passage in the prompt",
    "chat": "conversations, on which the source's words are followed",
}
FORMS = tuple(f"recall_form_{number:02}" for number in range(1, 13))
SHORT = {"lambada_openai": "LAMBADA", "hellaswag": "HellaSwag", "piqa": "PIQA", "arc_easy": "ARC-easy"}
VALUES = {"names": "a name", "cities": "a city", "digits14": "14 digits", "words2": "two words"}


class Score(NamedTuple):
    """A row of the table: what, the mean of which tasks, by which metric, in which folders of results by length."""

    what: str
    tasks: tuple[str, ...]
    metric: str
    folders: dict[str, str]


_RECALL, _QA = (
    {"64K": "smol-recall-64k", "1M": "smol-recall-1m"},
    {"64K": "smol-qa-64k", "1M": "smol-qa-1m", "16M": "smol-qa-16m"},
)
SCORES = (
    Score("facts in forms never trained, mean of 12", FORMS, "mentions", _RECALL),
    Score("the same, nothing but the fact", FORMS, "exact", _RECALL),
    *(
        Score(f"the trained form, {what}", (f"recall_value_{kind}",), "mentions", _RECALL)
        for kind, what in VALUES.items()
    ),
    Score("one of 64 facts that look alike", ("recall_similar_64",), "mentions", _RECALL),
    Score("a fact that was changed later", ("recall_changed",), "mentions", _RECALL),
    *(
        Score(f"RULER {task}", (task,), "all", dict.fromkeys(("64K", "1M", "16M"), "smol-niah"))
        for task in ("niah_single_1", "niah_single_2", "niah_single_3")
    ),
    Score("XQuAD, F1, passages among the text that was read", ("qa_xquad",), "f1", _QA),
    Score("the same, the 3 best places read again", ("qa_xquad",), "f1", {"64K": "smol-qa-reread"}),
    Score("the same without passages", ("qa_xquad",), "f1", {"64K": "smol-qa-closed"}),
    Score("the source, tuned on such questions, given the passage", ("qa_xquad",), "f1", {"64K": "smol-tuned-gold"}),
    Score("the same with passages found by BM25", ("qa_xquad",), "f1", {"64K": "smol-tuned-bm25"}),
)  # fmt: skip
LENGTHS = {"2K": 2**11, "8K": 2**13, "64K": 2**16, "512K": 2**19, "1M": 2**20, "16M": 2**24}
USE = """**Good for** finding what a text said once, far back: numbers, times, dates and needles, up to 16M tokens,
and the place that it was read from. Questions about passages are answered better where these are read again
(`--reread 3`, two fifths of the F1 of a model that was tuned on such questions and given the passage). It answers in
a sentence, or in a few words if asked to. **Not good for** questions about what a passage means from memory alone,
for identifiers of many characters, names that it never saw, or as a language model: it is weaker than its source but
on ARC-easy. Check answers against the sources that `hsa ask` prints."""
SCORED = """**Scores** in percent, 95% intervals where one task is one row; recall and RULER in the form of chat. A fact
counts where the answer mentions it, as half of the trained answers are sentences, unless the row says otherwise."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--run", type=Path, action="append", help="folder of what trained it; several in order, by default all three"
    )
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of the studies smol-*")
    parser.add_argument("-o", "--output", type=Path, default=CARD)
    options = parser.parse_args(arguments)
    runs = [settings_of(run) for run in options.run or [ROOT / "results" / name for name in RUNS]]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(card(runs, options.results), encoding="utf-8")
    print(f"Written: {options.output}")


def settings_of(run: Path) -> tuple[dict[str, Any], int]:
    """Settings of a run, and the tokens that it was trained on: fewer than planned where a clock stopped it."""
    for file in (run / "config.json", run / "summary.json"):
        if not file.is_file():
            sys.exit(f"error: {run} is no folder of a run: it has no {file.name}")
    settings = json.loads((run / "config.json").read_text(encoding="utf-8"))
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    steps = {record["stage"]: record["step"] for record in summary["records"] if record["metric"] == "loss"}
    return settings, sum(steps.get(stage["name"], 0) * stage["batch_tokens"] for stage in settings["stages"])


def card(runs: list[tuple[dict[str, Any], int]], results: Path) -> str:
    """The page as Markdown, of runs in order: their settings and the tokens that they were trained on."""
    every = [stage for settings, _ in runs for stage in settings["stages"]]
    kinds = [kind for kind in ROWS if any(kind in stage["mixture"] for stage in every)]
    kinds += sorted({kind for stage in every for kind in stage["mixture"]} - {*ROWS})
    trained, planned = sum(tokens for _, tokens in runs), sum(stage["tokens"] for stage in every)
    parts = ", ".join(f"{tokens / 1e6:.1f}M" for _, tokens in runs)
    last = runs[-1][0]
    chained = (
        f" in {len(runs)} runs ({parts}), each from the one before, the second from half of what the first had changed "
        "of the source's layers"
        if len(runs) > 1
        else ""
    )
    lines = [
        "---", "license: apache-2.0", "base_model: HuggingFaceTB/SmolLM2-135M-Instruct", "library_name: transformers",
        "tags: [hsa, long-context, memory]", "---",
        "# smol: SmolLM2-135M-Instruct with a memory", "",
        "The source (Apache-2.0) is fetched by pip; this folder holds what training changed of it. `make smol` puts "
        "both together ([guide](../../docs/own-memory.md)). Written by `python scripts/smol_card.py`.", "",
        " ".join(USE.split()), "",
        " ".join(SCORED.split()), "",
        *_scores(results), "", *_language(results), "",
        f"**Training.** {trained / 1e6:.1f}M tokens of {planned / 1e6:.0f}M planned{chained}; low rank "
        f"{last['lora_rank']} for the source's layers, everything of the memory; seed {last['seed']}. By plan:", "",
        "| stage | tokens | row | " + " | ".join(f"`{kind}`" for kind in kinds) + " |",
        "|---|---|---|" + "---|" * len(kinds),
        *(_stage(stage, kinds) for stage in every), "",
        "| rows | what |", "|---|---|",
        *(f"| `{kind}` | {ROWS.get(kind, 'see docs/data.md')} |" for kind in kinds), "",
        "**Data and licences.** Text: `corpus-permissive`, code and documentation under permissive licences. Passages "
        "that evaluation asks about are left out of the questions.", "",
        "| file | what | licence |", "|---|---|---|", *_sources([settings for settings, _ in runs]), "",
    ]  # fmt: skip
    return "\n".join(lines)


def _scores(results: Path) -> list[str]:
    heads = ("64K", "1M", "16M")
    rows = ["| what | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for score in SCORES:
        cells = (
            _cell(_found(results / score.folders[head], score.tasks, score.metric, head))
            if head in score.folders
            else ""
            for head in heads
        )
        rows.append(f"| {score.what} | " + " | ".join(cells) + " |")
    return rows


def _language(results: Path) -> list[str]:
    """What the memory cost of the source's language."""
    rows = ["| language | smol | source |", "|---|---|---|"]
    for task, name in SHORT.items():
        metric = "acc" if task == "lambada_openai" else "acc_norm"
        both = (_cell(_found(results / folder, (task,), metric, "")) for folder in ("smol-short", "smol-source-short"))
        rows.append(f"| {name}, `{metric}` | " + " | ".join(both) + " |")
    for length, folders in (("8K", ("smol-ppl", "smol-source-ppl")), ("512K", ("smol-ppl", ""))):
        both = (
            _cell(_found(results / folder, ("ppl_last_4096",), "perplexity", length), 1) if folder else ""
            for folder in folders
        )
        rows.append(f"| perplexity of books, last 4,096 of {length} | " + " | ".join(both) + " |")
    return rows


def _found(folder: Path, tasks: tuple[str, ...], metric: str, length: str) -> list[dict[str, Any]]:
    records = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["records"]
    found = [
        record
        for record in records
        if record["task"] in tasks and record["metric"] == metric and record["depth"] is None
        and record["length"] == LENGTHS.get(length, record["length"])
    ]  # fmt: skip
    if len(found) != len(tasks):
        sys.exit(f"error: {folder} has {len(found)} of {len(tasks)} scores ({metric}, {length})")
    return found


def _cell(records: list[dict[str, Any]], scale: int = 100) -> str:
    mean = scale * sum(record["value"] for record in records) / len(records)
    if len(records) > 1:
        return f"{mean:.0f}"
    return f"{mean:.0f} ({scale * records[0]['ci_low']:.0f}-{scale * records[0]['ci_high']:.0f})"


def _stage(stage: dict[str, Any], kinds: list[str]) -> str:
    total = sum(stage["mixture"].values())
    shares = (stage["mixture"].get(kind, 0) / total for kind in kinds)
    told = " | ".join(f"{share:.1%}".replace(".0%", "%") if share else "" for share in shares)
    return f"| {stage['name']} | {stage['tokens'] / 1e6:.0f}M | {stage['seq_len']:,} | {told} |"


def _sources(runs: list[dict[str, Any]]) -> list[str]:
    """The files that the runs read."""
    files = [file for run in runs for kind in ("questions", "sentences", "chats") for file in run.get(kind, [])]
    names = dict.fromkeys(Path(file).name for file in files)
    unknown = ("not described here", "state it before this is shared")
    return [f"| {name} | {' | '.join(SOURCES.get(name, unknown))} |" for name in names]


if __name__ == "__main__":
    main()
