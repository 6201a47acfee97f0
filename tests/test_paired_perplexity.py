"""scripts/paired_perplexity.py: the same last tokens at every length, and differences from the shortest in pairs."""

import importlib.util
import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from hsa_ultralong.eval.plots import read_jsonl

spec = importlib.util.spec_from_file_location(
    "paired_perplexity", Path(__file__).parents[1] / "scripts/paired_perplexity.py"
)
paired = importlib.util.module_from_spec(spec)
spec.loader.exec_module(paired)


def record(task, length, index, nats):
    return {"task": task, "length": length, "index": index, "nats": nats, "count": 512}


def test_ends_are_the_beginnings_and_the_end_of_the_suite_and_share_no_scored_token():
    assert paired.places(2_484_886, 1 << 20, 2) == [1 << 20, 2_484_886]
    ends = paired.places(100_000, 65_536, 9)
    assert len(ends) == 9 and min(b - a for a, b in itertools.pairwise(ends)) >= 4096
    for tokens, number in ((65_536 + 4_095, 2), (1_000_000, 1)):
        with pytest.raises(ValueError, match="ends of rows of"):
            paired.places(tokens, 65_536, number)


def test_a_difference_counts_ends_that_both_lengths_have():
    records = [record("ppl_last_512", 8192, i, nats) for i, nats in enumerate((512.0, 1024.0, 1536.0))]
    records += [record("ppl_last_512", 16384, i, nats) for i, nats in enumerate((512.0 + 51.2, 1024.0 - 102.4))]
    (pair,) = paired.differences(records)
    assert (pair["length"], pair["over"], pair["samples"], pair["higher"], pair["lower"]) == (16384, 8192, 2, 1, 1)
    assert math.isclose(pair["value"], -0.05) and pair["ci_low"] < pair["value"] < pair["ci_high"]


def test_a_run_scores_the_tokens_that_the_suite_scores_and_goes_on(tmp_path, capsys):
    from hsa_ultralong import default_checkpoint
    from hsa_ultralong.cli.common import haystack, load_model
    from hsa_ultralong.eval.haystack import opticks
    from hsa_ultralong.eval.likelihood import row_losses
    from hsa_ultralong.eval.tasks import Material

    text = tmp_path / "text.txt"
    text.write_text(opticks()[:60_000])
    command = [str(default_checkpoint()), "--text", str(text), "--lengths", "5K,6K", "--ends", "2", "--device", "cpu",
               "--dtype", "fp32", "--topk", "32", "-o", str(tmp_path / "run")]  # fmt: skip
    assert paired.main(command) == 0
    lines = read_jsonl(tmp_path / "run/records.jsonl.xz")
    assert len(lines) == 8 and {(one["length"], one["index"]) for one in lines} == {
        (length, index) for length in (5120, 6144) for index in (0, 1)
    }
    ends = {one["index"]: {other["start"] + other["length"] for other in lines if other["index"] == one["index"]}
            for one in lines}  # fmt: skip
    assert all(len(found) == 1 for found in ends.values())
    model, tokenizer = load_model(default_checkpoint(), "cpu", "fp32")
    tokens = Material(tokenizer, haystack(tokenizer, [text], "text", "auto", None, 1 << 20)).text
    row = torch.cat(list(row_losses(model, tokens[:6144])))
    own = next(one for one in lines if one["task"] == "ppl_last_512" and one["length"] == 6144 and one["index"] == 0)
    assert own["nats"] == pytest.approx(float(row[-512:].sum()), rel=1e-4)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert [(one["task"], one["length"], one["over"]) for one in summary["pairs"]] == [
        (task, 6144, 5120) for task in paired.TAILS
    ]
    capsys.readouterr()
    assert paired.main(command) == 0
    assert "nats, " not in capsys.readouterr().out.split("| task")[0]
    with pytest.raises(SystemExit, match="--topk: 1 or more chunks, got 0"):
        paired.main([*command, "--topk", "0"])
    with pytest.raises(SystemExit, match="two or more of above"):
        paired.main([*command[:3], "--lengths", "4K,8K", "-o", str(tmp_path / "other")])
