"""Samples shared out over processes: the records of one process, whatever the number, also of a run that goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from hsa_ultralong.distributed.mesh import everywhere, on_first, patient_group
from hsa_ultralong.eval.memory_reader import MemoryReader
from hsa_ultralong.eval.suite import FollowedRun, SampleRanks, SuiteRun, run_suite
from hsa_ultralong.eval.tasks import Material
from hsa_ultralong.testing.factories import tiny_model
from hsa_ultralong.testing.processes import HANG_SECONDS, launch
from hsa_ultralong.testing.tokenizers import byte_level

SETTINGS = {"weights": "abc", "seed": 0, "samples": 5, "topk": 3, "dtype": "float64"}
TASKS = ["passkey", "recall_form_10", "recall_similar_256"]


def measure(folder, run, ranks=None, lengths=(1500,), samples=5):
    tokenizer = byte_level()
    text = "\n".join(f"Sheep {i * 7919 % 997} sleeps. It snores." for i in range(40))
    material = Material(tokenizer, torch.tensor(tokenizer(text)["input_ids"], dtype=torch.int32))
    model = tiny_model(vocab_size=len(tokenizer), chunk_size=8).double().eval()
    run_suite(
        MemoryReader(model, material, batch=2), material, run, tasks=TASKS, lengths=lengths, samples=samples,
        model="tiny", ranks=ranks,
    )  # fmt: skip


def on_rank(rank, world, folder, lengths):
    group, opened = patient_group(), []

    def known():
        opened.append(SuiteRun(folder, SETTINGS))
        return opened[0].records

    records = on_first(known, group)
    with opened[0] if rank == 0 else FollowedRun(records) as run:
        measure(folder, run, SampleRanks(rank, world, lambda work: everywhere(work, group)), lengths)
        assert run.skipped == {("recall_similar_256", length): run.skipped["recall_similar_256", length]
                               for length in lengths}  # fmt: skip
        counts = [None] * world
        dist.all_gather_object(counts, [(r["task"], r["length"], r["index"]) for r in run.records], group=group)
        assert counts.count(counts[0]) == world


def lines(folder):
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


def assert_same(found, wanted):
    assert [(r["task"], r["length"], r["index"]) for r in found] == [
        (r["task"], r["length"], r["index"]) for r in wanted
    ]
    for one, other in zip(found, wanted, strict=True):
        for name, value in one.items():
            if isinstance(value, float):
                assert value == pytest.approx(other[name]), name
            elif name != "retrieved":
                assert value == other[name], name


def test_two_processes_give_the_records_of_one(tmp_path):
    with SuiteRun(tmp_path / "one", SETTINGS) as run:
        measure(tmp_path / "one", run)
    launch(2, str(tmp_path / "meet"), on_rank, tmp_path / "two", (1500,))
    assert_same(lines(tmp_path / "two"), lines(tmp_path / "one"))


def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    with SuiteRun(tmp_path / "one", SETTINGS) as run:
        measure(tmp_path / "one", run)
    whole = lines(tmp_path / "one")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "run.json").write_text((tmp_path / "one" / "run.json").read_text())
    kept = [json.dumps(record) + "\n" for record in whole[:3]]  # what was written before a kill
    (tmp_path / "two" / "records.jsonl").write_text("".join(kept) + '{"torn')
    launch(3, str(tmp_path / "meet"), on_rank, tmp_path / "two", (1500,))
    assert_same(lines(tmp_path / "two"), whole)


def fails(rank, world, folder):
    group = patient_group()
    with pytest.raises(ValueError if rank == 0 else OSError, match="holds another run: weights was 'xyz', now 'abc'"):
        on_first(lambda: SuiteRun(folder, SETTINGS).records, group)


def test_a_folder_of_another_run_is_refused_by_all_processes(tmp_path):
    with SuiteRun(tmp_path / "run", {**SETTINGS, "weights": "xyz"}) as run:
        run.add([{"task": "t"}])
    launch(2, str(tmp_path / "meet"), fails, tmp_path / "run")


@pytest.mark.slow
def test_torchrun_measures_the_shipped_model_and_shows_progress_once(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m",
               "hsa_ultralong", "eval", "--tasks", "passkey", "--lengths", "1K", "--samples", "5", "--batch", "2",
               "--device", "cpu", "-o", str(tmp_path / "run")]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=HANG_SECONDS, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert [r["index"] for r in lines(tmp_path / "run")] == [0, 1, 2, 3, 4]
    assert done.stdout.count("| passkey | exact |") == 1 and done.stderr.count("passkey at 1,024: 5 samples") == 1
    assert (tmp_path / "run" / "report.html").exists()
