"""The training loop: staged, resumable, interruptible, on one device or many. What people see goes through listeners.

Called by cli/train.py and the recipes; tests/train/. Rows and the noise of a selection are functions of the seed and of
the place in the run, so resuming continues exactly where the checkpoint stands, with any number of processes.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hsa_ultralong.data import MixtureConfig, TokenShards
from hsa_ultralong.distributed.mesh import build_mesh, data_rank, data_world, everywhere, total
from hsa_ultralong.train.averaging import RunningMean
from hsa_ultralong.train.batches import (
    Batch,
    check_rows,
    seed_noise,
    stage_mixture,
    step_batches,
)
from hsa_ultralong.train.checkpoint import Checkpoints, load_weights, model_tensors, optimizer_tensors
from hsa_ultralong.train.compilation import uncompiled
from hsa_ultralong.train.config import StageConfig, TrainConfig, as_dict
from hsa_ultralong.train.freezing import prepare_parameters
from hsa_ultralong.train.graphs import require_graphs
from hsa_ultralong.train.lora import is_lora
from hsa_ultralong.train.metrics import Listener, Meter, SpikeGuard, open_writers, peak_flops, training_flops
from hsa_ultralong.train.optim import build_optimizers
from hsa_ultralong.train.parallelize import (
    alone,
    begin_forward,
    clip_gradients,
    gathered,
    parallelize,
    synchronize_buffers,
)
from hsa_ultralong.train.precision import require_blocks, require_precision, set_precision
from hsa_ultralong.train.run_folder import RunFolder, RunLog, write_settings
from hsa_ultralong.train.schedule import learning_rate
from hsa_ultralong.train.stages import (
    balance_experts,
    check_stage,
    enter_stage,
    require_experts,
    spread_experts,
    spread_strength,
)
from hsa_ultralong.train.state import read_state
from hsa_ultralong.train.step_loss import StepLoss
from hsa_ultralong.train.teaching import is_learnt
from hsa_ultralong.train.twins import build_model, require_same_twin

logger = logging.getLogger(__name__)
# (model in eval mode, tokens a row) -> needle_accuracy and what else was measured; "retrieval": numbers a group by name
Probe = Callable[[Any, int], dict[str, Any]]


class TrainingDiverged(RuntimeError):
    """The loss is not finite or stays high; the last checkpoint is intact."""


class Trainer:
    """Runs the stages of `config`, in one process or in all that torchrun started (distributed.mesh).

    No other process can train in the folder of the run from now on until `train` returns.

    Args:
        run: folder of the run, the same one for all processes: config.json, log.jsonl, checkpoints/, tensorboard/.
        shards, tokenizer: tokenised corpus and its tokenizer.
        device: of this process.
        probe: measures needle accuracy at a length; called with the model in eval mode, on every process.
        listener: called with every log record, on the first process.
        folder: of `run`, if the caller holds it already, who then gives it back.
        teacher: transformers' model that the model was converted from, for stages with divergence.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: Path,
        shards: TokenShards,
        tokenizer: Any,
        *,
        device: str | torch.device = "cpu",
        probe: Probe | None = None,
        listener: Listener | None = None,
        folder: RunFolder | None = None,
        teacher: PreTrainedModel | None = None,
    ) -> None:
        self.config, self.run, self.shards, self.tokenizer = config, run, shards, tokenizer
        self.device, self.probe, self.listener = torch.device(device), probe, listener
        self.should_stop = False
        self.mesh = build_mesh(config.parallel, self.device.type)
        self.is_first = self.mesh is None or self.mesh.get_rank() == 0
        torch.manual_seed(config.seed)
        ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        self.preset = config.shape(vocab_size=len(tokenizer), **ids)
        if self.preset.vocab_size < len(tokenizer):
            wanted = self.preset.vocab_size
            raise ValueError(f"model.vocab_size={wanted} has no room for the {len(tokenizer)} tokens of the tokenizer")
        require_experts(config, self.preset)
        require_precision(config.precision, self.device)
        require_blocks(config.precision, self.preset)
        require_graphs(config, self.preset, self.device, 1 if self.mesh is None else self.mesh.size())
        # on the device from the start: the host of 8 processes could not hold 8 large models
        with self.device:
            self.model = build_model(config, self.preset)
        # a stage that cannot run must not come to light after hours of the ones before it
        self.mixtures = [self._checked_mixture(index) for index in range(len(config.stages))]
        self.model.to(self.device).train()
        self.losses = StepLoss(self.model, config, teacher, self.device, self.mesh)
        prepare_parameters(self.model, config)
        set_precision(self.model, config.precision)
        use_compile = config.compile and self.device.type == "cuda"
        parallelize(self.model, self.mesh, config.parallel, use_compile=use_compile)
        self.optimizers = build_optimizers(self.model, config)
        self.mean: RunningMean | None = None
        self.stage_index, self.step, self.global_step, self.tokens_seen = 0, 0, 0, 0
        self.last: dict[str, torch.Tensor] = {}
        self.meter = Meter()
        self.guard = SpikeGuard(config.spike_threshold, config.spike_steps)
        self.log: RunLog | None = None
        self.writers: list[Listener] = []
        self._is_own = folder is None
        self.folder = RunFolder(run) if folder is None else folder
        if not self.folder.is_held:
            self.folder.take()
        try:
            self.checkpoints = Checkpoints(run, config.keep_checkpoints)
            self.resumed_from = self._resume()
        except BaseException:
            self._let_go()
            raise

    @property
    def topk(self) -> int:
        """K of the preset, which an exported model has."""
        return self.preset.chunk_topk

    def _checked_mixture(self, index: int) -> MixtureConfig:
        check_stage(self.config, index, self.preset, data_world(self.mesh))
        return stage_mixture(self.config, index, self.preset.chunk_size)

    def _check_data(self, final: int) -> None:
        """The shards have what the stages to come need, such as documents that are long enough."""
        for index in range(self.stage_index, final + 1):
            check_rows(self.shards, self.tokenizer, self.config.stages[index], self.mixtures[index])

    def _hold(self) -> None:
        """Take the run folder again, after it was given back.

        Raises:
            ValueError: another process trains there, or has done so meanwhile.
        """
        if self.folder.is_held:
            return
        self.folder.take()
        if self.checkpoints.newest() != self.checkpoints.last:
            self._let_go()
            raise ValueError(
                f"another process went on with {self.run} meanwhile: make a new Trainer to go on from there"
            )

    def _let_go(self) -> None:
        """Give the run folder back, unless a checkpoint is still being written into it."""
        if self._is_own and not (hasattr(self, "checkpoints") and self.checkpoints.is_pending):
            self.folder.release()

    def _begin(self) -> None:
        """Settings and log, written once nothing can be refused any more."""
        if self.is_first:
            self.log = RunLog(self.run, self.global_step)
            shares = zip(self.config.stages, self.mixtures, strict=True)
            made = {stage.name: mixture.synthetic_share for stage, mixture in shares}
            settings = {**as_dict(self.config), "synthetic_share": made}
            write_settings(self.run, settings, is_resumed=self.resumed_from is not None)

    def _resume(self) -> Path | None:
        """Go on from the newest checkpoint; returns it."""
        newest = self.checkpoints.newest()
        if newest is None:
            return None
        require_same_twin(self.config, self.run)
        before = read_state(newest)
        kind, begun = before["optimizer"], before.get("stages", [])
        names = [stage.name for stage in self.config.stages]
        if begun != names[: len(begun)] or before["stage_index"] > len(names):
            raise ValueError(
                f"checkpoint {newest} has gone through the stages {', '.join(begun)}, this run has {', '.join(names)}: "
                "stages may be added after those, not before"
            )
        if kind != self.config.optimizer:
            raise ValueError(
                f"checkpoint {newest} has the state of {kind}, this run uses {self.config.optimizer}: keep --set "
                f"optimizer={kind}, or begin a new run from the exported model with --init-from"
            )
        stage = self.config.stages[min(before["stage_index"], len(names) - 1)]
        if before["step"] and stage.average_decay:
            self.mean = RunningMean(self.model)
        others = self.mean.tensors() if self.mean is not None else {}
        state = self.checkpoints.load(newest, self.model, self.optimizers, others)
        self.stage_index, self.step = state["stage_index"], state["step"]
        self.global_step, self.tokens_seen = state["global_step"], state["tokens_seen"]
        self.meter.restore(state["meter"], self.device)
        self.guard.load(state["guard"])
        logger.info("resumed from %s", newest)
        return newest

    def initialize_from(self, weights: dict[str, torch.Tensor]) -> None:
        """Start from the weights of another run (ignored when this run has a checkpoint of its own)."""
        if self.global_step == 0:
            own = {name: part for name, part in model_tensors(self.model).items() if is_lora(name)}
            load_weights(self.model, {**own, **weights})

    def save(self, *, wait: bool = True) -> None:
        """Write a checkpoint of this moment; without `wait`, beside the next steps. None if the run keeps none.

        Raises:
            TrainingDiverged: if the last loss or gradient norm is not finite; nothing is written then.
            CheckpointError: if it, or the one before, cannot be written.
        """
        for what, value in self.last.items():
            if not math.isfinite(value.item()):
                raise TrainingDiverged(self._advice(f"{what} {value.item()}"))
        if not self.config.keep_checkpoints:
            return
        was_held = self.folder.is_held
        self._hold()
        state = {
            "stage_index": self.stage_index,
            "step": self.step,
            "global_step": self.global_step,
            "tokens_seen": self.tokens_seen,
            "stages": [stage.name for stage in self.config.stages[: self.stage_index + 1]],
            "optimizer": self.config.optimizer,
            "meter": self.meter.state(),
            "guard": self.guard.state(),
        }
        tensors = {**model_tensors(self.model), **optimizer_tensors(self.model, self.optimizers)}
        if self.mean is not None:
            tensors.update(self.mean.tensors())
        try:
            self.checkpoints.save(tensors, state, wait=wait)
        finally:
            if not was_held:
                self._let_go()

    def train(self, *, max_minutes: float = math.inf, last_stage: str | None = None) -> bool:
        """Train until the stages are done, `max_minutes` are over or `should_stop` is set; saves before returning.

        Returns True when every stage (up to `last_stage`) is finished.
        """
        deadline = time.monotonic() + 60 * max_minutes
        final = len(self.config.stages) - 1 if last_stage is None else self.config.stage(last_stage)
        self._hold()
        try:
            self._check_data(final)
            everywhere(self._begin, self.checkpoints.group)
            return self._train(final, deadline)
        finally:
            self._let_go()

    def _train(self, final: int, deadline: float) -> bool:
        config = self.config
        if self.is_first and self.stage_index <= final:
            self.writers = open_writers(self.run, config, self.global_step)
        while self.stage_index <= final:
            if not self._train_stage(config.stages[self.stage_index], deadline):
                self.save()
                return False
            if self.mean is not None:
                self.mean.copy_to(self.model)
                self.mean = None
            self.stage_index, self.step = self.stage_index + 1, 0
            self.optimizers = build_optimizers(self.model, config)
            self.guard.restart()
            self.save()
            if self.stage_index <= final and any(self._agreed(self.should_stop or time.monotonic() > deadline)):
                return False
        return True

    def _agreed(self, *flags: bool) -> list[bool]:
        """Each flag, true if it is on any process: all must stop and save at the same step."""
        return [bool(flag) for flag in total(torch.tensor(flags, dtype=torch.int32), self.mesh)]

    def _batches(self, stage: StageConfig) -> Iterator[list[Batch]]:
        is_cuda = self.device.type == "cuda"
        return step_batches(
            self.shards,
            self.tokenizer,
            stage,
            self.mixtures[self.stage_index],
            first_step=self.step,
            rank=data_rank(self.mesh),
            world=data_world(self.mesh),
            num_workers=self.config.num_workers if is_cuda else 0,
            pin_memory=is_cuda,
        )

    def _train_stage(self, stage: StageConfig, deadline: float) -> bool:
        config = self.config
        enter_stage(self.model, config.stages, self.stage_index, self.preset)
        if stage.average_decay and self.mean is None:
            self.mean = RunningMean(self.model)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.meter.restart_clock()
        saved = time.monotonic()
        if self.step >= stage.num_steps:
            logger.warning("stage %r now has %d steps, %d are done: it is over", stage.name, stage.num_steps, self.step)
            return True
        for batches in self._batches(stage):
            rate = learning_rate(stage, self.step)
            self.last = self._optimizer_step(stage, batches, rate)
            self.step, self.global_step = self.step + 1, self.global_step + 1
            self.tokens_seen += stage.batch_tokens
            self.meter.add(stage.batch_tokens, **self.last)
            is_last = self.step == stage.num_steps
            if self.step % config.log_every == 0 or is_last:
                is_last = is_learnt(stage, self._log(stage, rate)) or is_last
            if self.probe is not None and (self.step % config.probe_every == 0 or is_last):
                self._probe(stage)
            now = time.monotonic()
            must_stop, is_due, save_failed = self._agreed(
                self.should_stop or now > deadline,
                now - saved > 60 * config.checkpoint_minutes,
                self.checkpoints.has_failed,
            )
            if save_failed:
                self.checkpoints.wait()
            if must_stop:
                return is_last
            # what is saved amid a spike would be of no use
            if is_due and not self.guard.high and not is_last:
                self.save(wait=False)
                saved = time.monotonic()
                self.meter.restart_clock()
            if is_last:
                break
        return True

    def _optimizer_step(self, stage: StageConfig, batches: list[Batch], rate: float) -> dict[str, torch.Tensor]:
        """One step on this process's micro-batches; loss and gradient norm of the whole step, on the device."""
        counts = self.losses.begin(stage, batches)
        spread_experts(self.model, spread_strength(self.config.router_warmup_steps, self.global_step))
        loss = torch.zeros((), device=self.device)
        for number, batch in enumerate(batches):
            self._seed_noise(stage, number)
            begin_forward(self.model, self.config.parallel, is_last=number + 1 == len(batches))
            loss += self.losses.backward(stage, batch, counts)
        norm = clip_gradients(self.model, self.config.clip_norm)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("rate", 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        synchronize_buffers(self.model, self.mesh)
        measured = {"loss": total(loss, self.mesh), "grad_norm": norm, **self.losses.take()}
        if self.mean is not None:
            self.mean.add(self.model, stage.average_decay)
        return {**measured, **balance_experts(self.model)}

    def _seed_noise(self, stage: StageConfig, number: int) -> None:
        """Noise of a forward by its first row: no two processes draw the same one, however many there are."""
        first = stage.first_row(self.step, number, data_rank(self.mesh), data_world(self.mesh))
        seed_noise(self.config.seed, self.stage_index, first)

    def _log(self, stage: StageConfig, rate: float) -> dict[str, Any]:
        series = self.meter.take()
        speed = self.meter.speed()
        record = {
            "stage": stage.name,
            "step": self.step,
            "global_step": self.global_step,
            "tokens": self.tokens_seen,
            **{name: part.mean().item() for name, part in series.items()},
            "learning_rate": rate,
            "tokens_per_s": speed,
        }
        peak = peak_flops(self.device)
        if peak is not None:
            processes = 1 if self.mesh is None else self.mesh.size()
            record["mfu"] = speed * training_flops(self.model, stage) / (peak * processes)
            record["peak_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        self._write(record)
        if not all(bool(torch.isfinite(part).all()) for part in series.values()):
            raise TrainingDiverged(self._advice(f"loss {record['loss']}, gradient norm {record['grad_norm']}"))
        if spike := self.guard.see(series["loss"].tolist()):
            if self.config.on_spike == "stop":
                raise TrainingDiverged(self._advice(spike, "go on regardless with --set on_spike=warn, or "))
            logger.warning("%s (step %d)", spike, self.global_step)
        return record

    def _advice(self, what: str, alternative: str = "") -> str:
        finite = "" if alternative else " is not finite"
        if not self.config.keep_checkpoints:
            return f"{what}{finite} (step {self.global_step}), and the run keeps no checkpoint: lower the learning rate"
        return (
            f"{what}{finite} (step {self.global_step}); the last checkpoint in {self.run} is intact: {alternative}"
            "lower the learning rate and run again"
        )

    def _probe(self, stage: StageConfig) -> None:
        """Needle accuracy at every length wanted, and what retrieval finds meanwhile."""
        assert self.probe is not None
        self.model.eval()
        for length in sorted({stage.seq_len, *self.config.probe_lengths}):
            with (
                torch.no_grad(),
                torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"),
                gathered(self.model),
                alone(self.model),
                uncompiled(),
            ):
                measured = {"length": length, **self.probe(self.model, length)}
            retrieval: dict[str, list[float]] = measured.pop("retrieval", {})
            position = {"stage": stage.name, "global_step": self.global_step, "tokens": self.tokens_seen}
            self._write({**position, "probe": measured, "retrieval": retrieval})
        self.model.train()
        self.meter.restart_clock()

    def _write(self, record: dict[str, Any]) -> None:
        if self.log is None:
            return
        record["time"] = round(time.time(), 1)
        self.log.write(record)
        for listener in (*self.writers, self.listener):
            if listener is not None:
                listener(record)
