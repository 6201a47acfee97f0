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
