"""The rows of a step, read ahead by other processes."""

import multiprocessing
import signal
import subprocess

import pytest

from hsa_ultralong.data import MixtureConfig
from hsa_ultralong.testing.processes import HANG_SECONDS
from hsa_ultralong.train.batches import step_batches


@pytest.fixture
def steps(tiny_runs):
    """40 steps read by two workers, each of which has read one."""
    stage = tiny_runs.stage(tokens=256 * 40)
    mixture = MixtureConfig(weights=stage.mixture, seq_len=stage.seq_len, chunk_size=16)
    places = {"first_step": 0, "rank": 0, "world": 1}
    steps = step_batches(
        tiny_runs.shards, tiny_runs.tokenizer, stage, mixture, **places, num_workers=2, pin_memory=False
    )
    next(steps), next(steps)
    return steps


def test_a_signal_to_the_whole_process_group_leaves_the_rows_coming(steps):
    # torchrun and schedulers send it to all, while the step under way is to end with a checkpoint
    for worker in multiprocessing.active_children():
        subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
        subprocess.run(["kill", "-INT", str(worker.pid)], check=True)
    assert len(list(steps)) == 38


def test_workers_end_when_the_trainer_ends_them(steps):
    workers = multiprocessing.active_children()
    assert len(workers) >= 2
    for worker in workers:
        # as multiprocessing does where a program ends amid a stage
        worker.terminate()
        worker.join(timeout=HANG_SECONDS)
        assert not worker.is_alive() and worker.exitcode in (0, -signal.SIGTERM)
    with pytest.raises(OSError, match="cannot read the rows of step"):
        list(steps)


def test_steps_take_rows_of_several_lengths_in_turn_whatever_the_processes(tiny_runs):
    stage = tiny_runs.stage(seq_len=128, row_lengths=(32, 128, 64), tokens=256 * 6, micro_batch_rows=1)
    mixture = MixtureConfig(weights=stage.mixture, seq_len=128, chunk_size=16)

    def steps(first_step=0, rank=0, world=1):
        places = {"first_step": first_step, "rank": rank, "world": world, "num_workers": 0, "pin_memory": False}
        made = step_batches(tiny_runs.shards, tiny_runs.tokenizer, stage, mixture, **places)
        return [[row for batch in step for row in batch["input_ids"].tolist()] for step in made]

    alone = steps()
    assert [(len(rows), len(rows[0])) for rows in alone] == [(8, 32), (2, 128), (4, 64)] * 2
    assert len({tuple(row[:30]) for rows in alone for row in rows}) == 28
    assert steps(first_step=4) == alone[4:]
    shared = zip(steps(rank=0, world=2), steps(rank=1, world=2), strict=True)
    assert [one + two for one, two in shared] == alone


@pytest.mark.parametrize(
    ("lengths", "message"), [((32, 64), "must be seq_len=128"), ((48, 128), "must divide the 128 tokens of a forward")]
)
def test_lengths_that_do_not_fit_a_step_are_refused(tiny_runs, lengths, message):
    with pytest.raises(ValueError, match=message):
        tiny_runs.stage(row_lengths=lengths)
