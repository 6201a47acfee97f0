"""Training speed over processes: the same optimiser step in one process and spread over all, on the same machine.

Every process first measures alone, all at once, then all together by every way of spreading a step. The rate is 0, so
that weights stay; ways whose steps have the same rows (batch_tokens fills a forward of every process) have the same
loss, but for the noise of retrieval. Records as in training.py, with "scaling": times as fast as one process. A pool
over processes is compared with one process whose forward holds the rows of all in one pool; it comes last, as the
fastest forward of the pool says how many rows that are. Called by `hsa bench training` under torchrun;
tests/bench/test_training_ranks.py.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from hsa_ultralong.bench.training import PEAK_FLOPS, TrainingSettings
from hsa_ultralong.models import HSAConfig, HSAForCausalLM, accounting

SPREADS = ("shard", "replicate", "context", "pool")


@dataclass(frozen=True)
class Way:
    """How a step is spread: over `gpus` processes, of which `slices` share every row.

    Attributes:
        name: in the records, "" for one process, `against` for one that holds the pool of all.
        spread: changes a model in place, before its optimiser is made.
        place: of this process: (part of the rows, slice of every row).
        total: the sum of a tensor over the processes. clip: (model, largest norm) -> the norm of the whole gradient.
        begin: (model, whether the next forward is the last of its step), as the trainer does.
        pool_world: processes whose rows read each other's chunks in a forward, 0 if rows read their own only.
        saving: how it saves memory, besides checkpointing, for the records: ", tiles of 64K".
        around: entered around every forward.
    """

    name: str
    gpus: int
    slices: int
    spread: Callable[[HSAForCausalLM], None]
    place: tuple[int, int]
    total: Callable[[torch.Tensor], torch.Tensor]
    clip: Callable[[HSAForCausalLM, float], torch.Tensor]
    begin: Callable[[HSAForCausalLM, bool], None]
    pool_world: int = 0
    saving: str = ""
    around: Callable[[], AbstractContextManager[Any]] = nullcontext

    @property
    def data_world(self) -> int:
        """Parts that the rows of a step are shared out in."""
        return self.gpus // self.slices

    @property
    def against(self) -> str:
        """Name of the way of one process that "scaling" is over."""
        return f"pool {self.pool_world} in one process" if self.pool_world else ""


class Speed(NamedTuple):
    """tokens_per_s: of all processes, by the mean of their times. peak_bytes: of this process. loss, grad_norm: of the
    step."""

    tokens_per_s: float
    peak_bytes: int
    loss: float
    grad_norm: float


class RankedBench:
    """Times optimiser steps of one model, spread by one way."""

    def __init__(self, config: HSAConfig, way: Way, settings: TrainingSettings, device: torch.device) -> None:
        self.config, self.way, self.settings, self.device = config, way, settings, device
        torch.manual_seed(settings.seed)
        with device:
            self.model = HSAForCausalLM(config).train()
        way.spread(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, fused=device.type == "cuda")

    def _rows(self, context: int, rows: int) -> tuple[torch.Tensor, int]:
        """This process's tokens of a step in forwards of `rows` rows, and the rows of all processes."""
        way = self.way
        count = max(1, self.settings.batch_tokens // (context * rows * way.data_world)) * rows * way.data_world
        generator = torch.Generator().manual_seed(self.settings.seed)
        ids = torch.randint(3, self.config.vocab_size, (count, context), generator=generator)
        # a forward of all processes holds the rows that one process has in as large a forward
        own = ids.view(-1, way.data_world, rows, context)[:, way.place[0]].flatten(0, 1)
        return own.chunk(way.slices, 1)[way.place[1]].contiguous().to(self.device), count

    def _step(self, own: torch.Tensor, rows: int, labels: int) -> tuple[torch.Tensor, torch.Tensor]:
        loss = torch.zeros((), device=self.device)
        parts = own.split(rows)
        pool = {"pool_memory": "attended"} if self.way.pool_world else {}
        for number, part in enumerate(parts):
            self.way.begin(self.model, number + 1 == len(parts))
            autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")
            with self.way.around(), autocast:
                share = self.model(part, labels=part, num_items_in_batch=labels, **pool).loss
            share.backward()
            loss += share.detach()
        norm = self.way.clip(self.model, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return self.way.total(loss), norm

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def measure(self, context: int, rows: int) -> Speed:
        """Steps in forwards of `rows` rows."""
        own, count = self._rows(context, rows)
        labels, is_cuda = count * (context - 1), self.device.type == "cuda"
        if is_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        for _ in range(2):
            loss, norm = self._step(own, rows, labels)
        self._synchronize()
        start = time.perf_counter()
        for _ in range(self.settings.steps):
            self._step(own, rows, labels)
        self._synchronize()
        # the processes wait for each other in every step: their times differ by little, and must agree
        seconds = float(self.way.total(torch.tensor(time.perf_counter() - start, device=self.device))) / self.way.gpus
        peak = torch.cuda.max_memory_allocated(self.device) if is_cuda else 0
        return Speed(self.settings.steps * count * context / seconds, peak, float(loss), float(norm))

    def choices(self, context: int) -> list[int]:
        """Rows of the forwards to be tried."""
        slices = self.way.slices
        return sorted({max(1, tokens * slices // context) for tokens in self.settings.micro_tokens})

    def best(self, context: int, choices: list[int], on_failure: Callable[[str], None]) -> tuple[Speed, int] | None:
        """The fastest of the forwards of so many rows, and its rows; None if none fits."""
        found: tuple[Speed, int] | None = None
        for rows in choices:
            try:
                speed = self.measure(context, rows)
            except torch.OutOfMemoryError:
                # one process that gives up leaves the others waiting: torchrun ends them
                if self.way.gpus > 1:
                    raise
                self.optimizer.zero_grad(set_to_none=True)
                on_failure(f"{context:,} tokens, {rows} rows, {self.way.name or 'one process'}: out of memory")
                continue
            if found is None or speed.tokens_per_s > found[0].tokens_per_s:
                found = speed, rows
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return found


def ranks_records(
    config: HSAConfig,
    name: str,
    ways: list[Way],
    settings: TrainingSettings,
    device: torch.device,
    on_record: Callable[[dict[str, Any]], None],
    on_failure: Callable[[str], None],
) -> None:
    """Every way at every context, with "scaling" as soon as a way and that of one process are known.

    At a context all ways with a pool have the same one, of the rows that the first of them was fastest with.
    """
    speeds: dict[tuple[str, int], tuple[Speed, int]] = {}
    pools: dict[int, int] = {}

    def keep(way: Way, context: int, metric: str, value: float) -> None:
        kept = f"checkpointing {settings.checkpointing}{way.saving}"
        on_record({
            "metric": metric, "preset": name, "attention": "hsa", "context": context, "gpus": way.gpus,
            "parallel": f"{way.name}, {kept}" if way.name else kept,
            "micro_batch_rows": speeds[way.name, context][1], "value": value,
        })  # fmt: skip

    for way in ways:
        bench = RankedBench(config, way, settings, device)
        for context in settings.contexts:
            choices = bench.choices(context)
            if way.pool_world and context in pools:
                choices = [pools[context] * way.pool_world // way.gpus]
            found = bench.best(context, choices, on_failure)
            if found is None:
                continue
            speed, rows = speeds[way.name, context] = found
            if way.pool_world:
                pools.setdefault(context, rows)
            flops = accounting.flops_per_token(config, context, training=True)
            keep(way, context, "tokens_per_s", speed.tokens_per_s)
            keep(way, context, "mfu", speed.tokens_per_s * flops / (PEAK_FLOPS * way.gpus))
            keep(way, context, "peak_bytes", speed.peak_bytes)
            keep(way, context, "loss", speed.loss)
            keep(way, context, "grad_norm", speed.grad_norm)
            for other in ways:
                pair = (other.name, context), (other.against, context)
                # known since now, by either of the two
                if other.gpus > 1 and way.name in (other.name, other.against) and all(one in speeds for one in pair):
                    spread, alone = (speeds[one][0].tokens_per_s for one in pair)
                    keep(other, context, "scaling", spread / alone)
        del bench
        # compiled and recomputing layers stand in cycles
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
