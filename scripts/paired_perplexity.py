"""Perplexity of the same last tokens of a text with more and more of it before them, and the differences in pairs.

    python scripts/paired_perplexity.py checkpoints/nano --text books --lengths 8K,64K,256K,1M --ends 12 -o runs/paired

The suite `ppl` of `hsa eval` gives every length stretches of its own, so that its rows differ in what is scored. Here
rows of all lengths end at the same places, evenly spaced from the longest length to the end of the text; rows of one
place share their last tokens, and rows of different places may share tokens before those. Written: a run that
scripts/publish.py takes, whose summary.json has `pairs` beside the records of a suite: the mean difference in nats per
token from the shortest length of the same ends, with the bootstrap interval of `hsa compare`, and at how many ends it
is higher. The same command goes on with a run that was cut off. tests/test_paired_perplexity.py.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hsa_ultralong.cli.common import haystack, load_model
from hsa_ultralong.cli.evaluate_suite import parse_lengths
from hsa_ultralong.eval.intervals import paired_difference
from hsa_ultralong.eval.likelihood import tail_losses
from hsa_ultralong.eval.likelihood_suite import TAILS
from hsa_ultralong.eval.metadata import run_metadata, write_json
from hsa_ultralong.eval.plots import human_tokens
from hsa_ultralong.eval.recorded_run import model_settings, tokens_digest
from hsa_ultralong.eval.suite import SuiteRun
from hsa_ultralong.eval.suite_summary import markdown, summary_records
from hsa_ultralong.eval.tasks import Material
from hsa_ultralong.files.durable import write_whole

_MOST_TOKENS = 1 << 24  # of the text, as `hsa eval` reads it


def places(tokens: int, longest: int, number: int) -> list[int]:
    """Where rows end: evenly spaced, the first row of the longest length at the beginning, the last at the end.

    Raises:
        ValueError: the text is too short for so many ends that share no scored token.
    """
    room = tokens - longest
    if number < 2 or room < (number - 1) * max(TAILS.values()):
        raise ValueError(f"{number} ends of rows of {longest:,} need a longer text than {tokens:,} tokens; 2 at least")
    return [longest + i * room // (number - 1) for i in range(number)]


def measure(model: Any, text: torch.Tensor, run: SuiteRun, label: str, lengths: Sequence[int], stop: float) -> None:
    """Add the records that are missing, end by end; after the time `stop` no end is begun."""
    ends = places(len(text), lengths[-1], run.settings["samples"])
    count = max(TAILS.values())
    nothing = dict.fromkeys(("score", "depth", "certainty", "found", "rank", "weight", "margin"))
    empty: dict[str, Any] = {"query": "", "expected": [], "answered": "", **nothing}
    for index, end in enumerate(ends):
        if time.time() > stop:
            print(f"stopped by --max-minutes: {index} of {len(ends)} ends", file=sys.stderr)
            return
        for length in lengths:
            if all(index in run.done(task, length) for task in TAILS):
                continue
            begun = time.time()
            losses = tail_losses(model, text[end - length : end], count).double()
            run.add([
                {"model": label, "task": task, "length": length, "index": index, "setting": "likelihood",
                 "metric": "perplexity", **empty, "start": end - length, "nats": float(losses[-own:].sum()),
                 "count": own}
                for task, own in TAILS.items()
            ])  # fmt: skip
            print(f"end {index} at {human_tokens(length)}: {losses.mean():.4f} nats, {time.time() - begun:.0f} s")


def differences(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of every task and length but the shortest: nats per token more than the shortest has at the same ends."""
    found = []
    for task in TAILS:
        nats: dict[int, dict[int, float]] = {}
        for record in records:
            if record["task"] == task:
                nats.setdefault(record["length"], {})[record["index"]] = record["nats"] / record["count"]
        base = nats.get(min(nats, default=0), {})
        for length in sorted(nats)[1:]:
            both = sorted(base.keys() & nats[length].keys())
            if len(both) < 2:
                continue
            pair = paired_difference([base[i] for i in both], [nats[length][i] for i in both])
            found.append({"task": task, "length": length, "over": min(nats), "metric": "paired_nats", "depth": None,
                          "samples": len(both), "value": pair.value, "ci_low": pair.low, "ci_high": pair.high,
                          "higher": pair.better, "lower": pair.worse, "method": pair.method})  # fmt: skip
    return found


def write(run: SuiteRun, command: str) -> None:
    """summary.json, summary.md and records.jsonl.xz of what the run holds."""
    settings = run.settings
    found = summary_records(run.records, {"topk": settings["topk"], "seed": settings["seed"]})
    pairs = differences(run.records)
    meta = run_metadata(command, settings["seed"], dtype=settings["dtype"], settings=settings)
    write_json(run.folder / "summary.json", {"meta": meta, "records": found, "skipped": [], "pairs": pairs})
    lines = ["", "The same ends, nats per token more than with the shortest length:", "",
             "| task | length | ends | difference | higher at |", "|---|---|---|---|---|"]  # fmt: skip
    lines += [
        f"| {pair['task']} | {human_tokens(pair['length'])} | {pair['samples']} | {pair['value']:+.4f} "
        f"({pair['ci_low']:+.4f} to {pair['ci_high']:+.4f}) | {pair['higher']} |"
        for pair in pairs
    ]
    write_whole(run.folder / "summary.md", markdown(found, {}) + "\n".join(lines) + "\n")
    run.pack()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model folder of this library")
    parser.add_argument("--text", type=Path, required=True, action="append", help="file or folder, as of hsa eval")
    parser.add_argument("--lengths", default="8K,64K,256K,1M", help="tokens of a row, those scored included")
    parser.add_argument("--ends", type=int, default=12, help="places in the text")
    parser.add_argument("--topk", type=int, help="chunks read per token; the model's own without it")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-minutes", type=float, default=float("inf"), help="after it no further end is begun")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the run")
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(given)
    stop = time.time() + 60 * options.max_minutes
    try:
        lengths = parse_lengths(options.lengths)
        if len(lengths) < 2 or lengths[0] <= max(TAILS.values()):
            raise ValueError(f"--lengths: two or more of above {max(TAILS.values()):,} tokens")
        if options.topk is not None and options.topk < 1:
            raise ValueError(f"--topk: 1 or more chunks, got {options.topk}")
        model, tokenizer = load_model(options.model, options.device, options.dtype)
        model.config.chunk_topk = options.topk or model.config.chunk_topk
        text = Material(tokenizer, haystack(tokenizer, options.text, "text", "auto", None, _MOST_TOKENS)).text
        places(len(text), lengths[-1], options.ends)
        settings = {**model_settings(model), "setting": "likelihood", "samples": options.ends, "seed": 0,
                    "haystack": tokens_digest(text), "haystack_tokens": len(text), "lengths": lengths}  # fmt: skip
        with SuiteRun(options.output, settings) as run:
            try:
                measure(model, text, run, options.model.name, lengths, stop)
            finally:
                if run.records:
                    write(run, "python scripts/paired_perplexity.py " + shlex.join(given))
            print((options.output / "summary.md").read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
