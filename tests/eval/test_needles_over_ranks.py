"""Needles in a text that several processes read: gloo, on the CPU; the same answers as from one memory of the parts."""

import json
import os
import subprocess
import sys

import pytest
import torch

from hsa_ultralong.eval.haystack import count_distinct, opticks, recombined
from hsa_ultralong.eval.needles import run_forms
from hsa_ultralong.eval.needles_over_ranks import part_of_text, run_over_ranks
from hsa_ultralong.testing.factories import random_tokens, tiny_model
from hsa_ultralong.testing.processes import launch
from tests.eval.test_scoring import Letters


def text_of(length, seed=1):
    return random_tokens(1, length, vocab_size=128, seed=seed)[0].int()


def study(rank, world, length, store, form):
    model, text = tiny_model(vocab_size=128), text_of(length)
    part = text[slice(*part_of_text(length, rank, world))]
    kept = []
    options = {"samples": 5, "seed": 5, "form": form, "store": store}
    whole = run_over_ranks(model, Letters(), part, length=length, keep=lambda r: kept.append(len(r.samples)), **options)
    assert kept == [1, 2, 3, 4, 5]
    (result,) = whole.results
    assert (result.length, result.store, result.form) == (length, f"{store}, {world} processes", form)
    assert result.distinct_chunks == sum(
        count_distinct(text[slice(*part_of_text(length, part, world))], model.config.chunk_size)
        for part in range(world)
    )
    assert [sample.depth for sample in result.samples] == [0.1, 0.3, 0.5, 0.7, 0.9]
    # what was known before is not asked again, and all there is known needs no reading
    known = [type(result)(**{**vars(result), "samples": result.samples[:2]})]
    again = run_over_ranks(model, Letters(), part, length=length, known=known, **options).results[0]
    assert [sample.index for sample in again.samples] == [0, 1, 2, 3, 4]
    assert [sample.answered for sample in again.samples] == [sample.answered for sample in result.samples]
    torch.testing.assert_close([s.margin for s in again.samples], [s.margin for s in result.samples])
    assert run_over_ranks(model, Letters(), part, length=length, known=[result], **options).results == [result]
    with pytest.raises(ValueError, match="reads"):
        run_over_ranks(model, Letters(), part[1:], length=length, **options)


@pytest.mark.parametrize(("world", "store", "form"), [(2, "device", ""), (3, "tiered", "int8")])
def test_needles_are_found_over_processes(tmp_path, world, store, form):
    launch(world, tmp_path / "meet", study, 450, store, form)


def same_as_one(rank, world):
    """A text that one process reads alone: the parts are all of it."""
    model, text = tiny_model(vocab_size=128), text_of(300)
    one = run_forms(model, Letters(), text, samples=4, seed=5).results[0]
    other = run_over_ranks(model, Letters(), text, length=300, samples=4, seed=5).results[0]
    for left, right in zip(one.samples, other.samples, strict=True):
        assert (left.answered, left.depth, left.found) == (right.answered, right.depth, right.found)
        assert abs(left.margin - right.margin) < 1e-9 and abs(left.weight - right.weight) < 1e-9
    assert one.distinct_chunks == other.distinct_chunks


def test_one_process_asks_as_without_a_group(tmp_path):
    launch(1, tmp_path / "meet", same_as_one)


def test_parts_of_a_recombined_text_are_those_of_the_whole():
    from hsa_ultralong.cli.common import load_model

    tokenizer = load_model(None, "cpu", "fp32")[1]
    source = torch.tensor(tokenizer(opticks()[:20_000])["input_ids"], dtype=torch.int32)
    length = 3 * len(source) + 77
    whole = recombined(source, length, tokenizer, seed=3)
    for world in (1, 2, 5):
        parts = [part_of_text(length, rank, world) for rank in range(world)]
        found = [recombined(source, stop - first, tokenizer, seed=3, first=first) for first, stop in parts]
        assert torch.equal(torch.cat(found), whole)


def command(folder, *options, processes=2):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    eval_needles = ["-m", "hsa_ultralong", "eval", "needles", "--device", "cpu", "-o", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(
        [*launcher, *eval_needles, *options], capture_output=True, text=True, env=environment, check=False
    )


def test_two_processes_write_one_study(tmp_path):
    done = command(tmp_path / "study", "--lengths", "8K", "--needles", "2", "--store", "tiered", "--forms", "int8")
    assert done.returncode == 0, done.stderr[-2000:]
    records = [json.loads(line) for line in (tmp_path / "study/records.jsonl").read_text().splitlines()]
    assert [record["index"] for record in records] == [0, 1]
    assert all(record["correct"] and record["store"] == "tiered, 2 processes" for record in records)
    summary = json.loads((tmp_path / "study/summary.json").read_text())
    assert summary["records"][0]["value"] == 1.0 and summary["records"][0]["store"] == "tiered, 2 processes"
    assert "2/2" in done.stdout


@pytest.mark.slow
def test_a_folder_of_another_study_is_refused_by_all(tmp_path):
    (tmp_path / "study").mkdir()
    (tmp_path / "study/run.json").write_text('{"version": 1, "settings": {}}')
    done = command(tmp_path / "study", "--lengths", "8K", "--needles", "2")
    told = done.stderr + done.stdout
    assert done.returncode != 0 and told.count("holds another run") >= 1 and "hsa_ultralong/cli" not in told


@pytest.mark.slow
def test_a_study_of_another_text_is_not_gone_on_with(tmp_path):
    """Also where only the part of a later process differs."""
    words, folder = opticks()[:60_000], tmp_path / "study"
    (tmp_path / "a.txt").write_text(words)
    (tmp_path / "b.txt").write_text(words[:20_000] + words[20_000:][::-1])
    options = ("--lengths", "8K", "--needles", "2", "--text")
    assert command(folder, *options, str(tmp_path / "a.txt")).returncode == 0
    records = (folder / "records.jsonl").read_text().splitlines(keepends=True)
    (folder / "records.jsonl").write_text(records[0])
    done = command(folder, *options, str(tmp_path / "b.txt"))
    assert done.returncode != 0 and "tokens of another text" in done.stderr + done.stdout
    assert (folder / "records.jsonl").read_text() == records[0]


def test_what_processes_cannot_share_is_refused(tmp_path):
    done = command(tmp_path / "study", "--lengths", "8K", "--text", "-")
    assert done.returncode != 0 and "cannot read one stdin" in done.stderr + done.stdout
    done = command(tmp_path / "study", "--lengths", "8K", "--notes", processes=1)
    assert done.returncode != 0 and "start it without torchrun" in done.stderr + done.stdout
    assert not (tmp_path / "study").exists()
