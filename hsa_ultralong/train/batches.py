"""The rows of every optimiser step, read ahead, as one process needs them. Row i is a function of the seed, the stage
and i, so a run goes on with any number of processes where its checkpoint stands. Called by loop.py.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import DataLoader

from hsa_ultralong.data import LengthsDataset, MixtureConfig, MixtureDataset, TokenShards, collate
from hsa_ultralong.data.seeds import namespaced_rng
from hsa_ultralong.train.config import StageConfig, TrainConfig

IGNORE_INDEX = -100
Batch = dict[str, Any]


def stage_mixture(config: TrainConfig, index: int, chunk_size: int) -> MixtureConfig:
    """What rows stage `index` draws.

    Raises:
        ValueError: naming the stage, if they cannot be made.
    """
    stage = config.stages[index]
    try:
        mixture = MixtureConfig(
            weights=stage.mixture,
            seq_len=stage.seq_len,
            chunk_size=chunk_size,
            seed=config.seed + 1000 * index,
            long_documents=stage.long_documents,
            questions=config.questions,
            sentences=config.sentences,
            chats=config.chats,
            **stage.data_options,
        )
        for length in stage.lengths:
            replace(mixture, seq_len=length)
        return mixture
    except (TypeError, ValueError) as error:
        raise ValueError(f"stage {stage.name!r}: {error}") from error


def step_batches(
    shards: TokenShards,
    tokenizer: Any,
    stage: StageConfig,
    mixture: MixtureConfig,
    *,
    first_step: int,
    rank: int,
    world: int,
    num_workers: int,
    pin_memory: bool,
) -> Iterator[list[Batch]]:
    """For every optimiser step from `first_step` on, the micro-batches of one of `world` processes.

    Raises:
        OSError: naming the shards, if a row cannot be read.
    """
    dataset = _dataset(shards, tokenizer, stage, mixture)
    loader = DataLoader(
        dataset,
        batch_sampler=_forwards(stage, first_step, rank, world),
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if num_workers else None,
        worker_init_fn=_leave_signals_to_the_trainer,
        # its own generator: starting a loader must not move the run's random state
        generator=torch.Generator(),
    )
    batches = iter(loader)
    for step in range(first_step, stage.num_steps):
        try:
            yield [next(batches) for _ in range(stage.num_forwards(world, step))]
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise OSError(
                f"cannot read the rows of step {step} of stage {stage.name!r} from {shards.path} ({reason}); the last "
                "checkpoint is intact: repair or rebuild the shards, then run the same command again"
            ) from error


def check_rows(shards: TokenShards, tokenizer: Any, stage: StageConfig, mixture: MixtureConfig) -> None:
    """The shards have what the rows of a stage need, such as documents that are long enough.

    Raises:
        ValueError: naming the stage, if they have not.
    """
    try:
        _dataset(shards, tokenizer, stage, mixture)
    except ValueError as error:
        raise ValueError(f"stage {stage.name!r}: {error}") from error


def _dataset(shards: TokenShards, tokenizer: Any, stage: StageConfig, mixture: MixtureConfig) -> LengthsDataset:
    """The rows of a stage by length and number."""
    mixtures = {length: replace(mixture, seq_len=length) for length in stage.lengths}
    return LengthsDataset({n: MixtureDataset(shards, tokenizer, one, split="train") for n, one in mixtures.items()})


def _forwards(stage: StageConfig, first_step: int, rank: int, world: int) -> Iterator[list[tuple[int, int]]]:
    """Length and number of the rows of every forward of one process; no number comes twice, whatever the length."""
    for step in range(first_step, stage.num_steps):
        length, _ = stage.shape(step)
        for part in range(stage.num_forwards(world, step)):
            first = stage.first_row(step, part, rank, world)
            yield [(length, number) for number in range(first, first + stage.forward_rows(world, step))]


def _leave_signals_to_the_trainer(_worker: int) -> None:
    """torchrun, job schedulers and Ctrl-C signal the whole process group; the step under way still needs its rows.

    A worker ends with SIGTERM from its own trainer only.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_when_the_trainer_says, daemon=True).start()


def _end_when_the_trainer_says() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def seed_noise(*place: int) -> None:
    """Noise and other draws of a forward follow from its place in the run."""
    torch.default_generator.manual_seed(int(namespaced_rng("noise", *place).integers(2**63)))


def model_inputs(
    batch: Batch, stage: StageConfig, device: torch.device, place: int = 0, slices: int = 1
) -> dict[str, Any]:
    """What the model takes of a batch, on the device: whole rows, or slice `place` of `slices`."""
    tensors = {name: batch[name] for name in ("input_ids", "labels", "segment_ids")}
    if slices > 1:
        tensors = {name: part.chunk(slices, dim=1)[place].contiguous() for name, part in tensors.items()}
    inputs: dict[str, Any] = {name: part.to(device, non_blocking=True) for name, part in tensors.items()}
    isolated = batch["isolated"] | stage.isolate_documents
    if bool(isolated.any()):
        inputs["isolate_documents"] = isolated.to(device, non_blocking=True)
    return inputs


def count_labels(batches: list[Batch]) -> int:
    """Labels that the loss of these micro-batches counts; the first token of a row is nobody's next."""
    return sum(int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) for batch in batches)
