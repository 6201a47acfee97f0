"""The training loop: one device, staged, resumable, interruptible. Everything shown to people goes through callbacks.

Called by cli/train.py and the recipes; tests/train/. The data order is a function of (seed, stage, step), so resuming
continues exactly where the checkpoint stands.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset

from hsa_ultralong.data import MixtureConfig, MixtureDataset, TokenShards, collate
from hsa_ultralong.models import HSAForCausalLM
from hsa_ultralong.models.presets import preset
from hsa_ultralong.train import checkpoint
from hsa_ultralong.train.compilation import compile_layers
from hsa_ultralong.train.config import FULL_COVERAGE, StageConfig, TrainConfig, as_dict
from hsa_ultralong.train.schedule import learning_rate

logger = logging.getLogger(__name__)
Probe = Callable[[HSAForCausalLM, StageConfig], dict[str, float]]
Listener = Callable[[dict[str, Any]], None]


class TrainingDiverged(RuntimeError):
    """Loss or gradient is not finite; the last checkpoint is intact."""


class Trainer:
    """Runs the stages of `config` on one device.

    Args:
        run: folder of the run: config.json, log.jsonl, checkpoints/.
        shards, tokenizer: tokenised corpus and its tokenizer.
        probe: measures needle accuracy during training; called with the model in eval mode.
        listener: called with every log record.
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
    ) -> None:
        self.config, self.run, self.shards, self.tokenizer = config, run, shards, tokenizer
        self.device, self.probe, self.listener = torch.device(device), probe, listener
        self.should_stop = False
        torch.manual_seed(config.seed)
        ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        self.model = HSAForCausalLM(preset(config.preset, vocab_size=len(tokenizer), **ids, **config.model))
        self.model.to(self.device).train()
        self.topk = self.model.config.chunk_topk
        self.optimizer = self._optimizer()
        self.stage_index, self.step, self.global_step, self.tokens_seen = 0, 0, 0, 0
        self.last_loss: torch.Tensor | None = None
        self.last_norm: torch.Tensor | None = None
        for index in range(len(config.stages)):
            # a stage that cannot run must not come to light after hours of the ones before it
            self._mixture(index)
        run.mkdir(parents=True, exist_ok=True)
        self._resume()
        self._forget_later_records()
        (run / "config.json").write_text(json.dumps(as_dict(config), indent=1))
        if config.compile and self.device.type == "cuda":
            compile_layers(self.model)

    def _optimizer(self) -> torch.optim.AdamW:
        matrices = [p for p in self.model.parameters() if p.dim() >= 2]
        vectors = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [
            {"params": matrices, "weight_decay": self.config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, betas=self.config.betas, lr=0.0, fused=self.device.type == "cuda")

    def _resume(self) -> None:
        saved = checkpoint.list_checkpoints(self.run)
        if not saved:
            return
        model_state, optimizer_state, state = checkpoint.load_checkpoint(saved[-1])
        checkpoint.restore(self.model, self.optimizer, model_state, optimizer_state)
        self.stage_index, self.step = state["stage_index"], state["step"]
        self.global_step, self.tokens_seen = state["global_step"], state["tokens_seen"]
        torch.set_rng_state(torch.tensor(state["rng_state"], dtype=torch.uint8))
        logger.info("resumed from %s", saved[-1])

    def _forget_later_records(self) -> None:
        """Drop log records of steps after the checkpoint: a run that died takes these steps again."""
        log = self.run / "log.jsonl"
        if not log.is_file():
            return
        lines = log.read_text().splitlines(keepends=True)
        # a line without its end was cut off while it was written
        whole = [line for line in lines if line.endswith("\n")]
        kept = [line for line in whole if json.loads(line)["global_step"] <= self.global_step]
        if kept != lines:
            partial = log.with_name(".partial-log.jsonl")
            partial.write_text("".join(kept))
            partial.replace(log)

    def initialize_from(self, weights: dict[str, torch.Tensor]) -> None:
        """Start from the weights of another run (ignored when this run has a checkpoint of its own)."""
        if self.global_step == 0:
            checkpoint.restore(self.model, None, weights, {})

    def save(self) -> Path:
        """Write a checkpoint of this moment.

        Raises:
            TrainingDiverged: if the last loss or gradient norm is not finite; nothing is written then.
        """
        for what, value in (("loss", self.last_loss), ("gradient norm", self.last_norm)):
            if value is not None and not math.isfinite(value.item()):
                raise TrainingDiverged(self._advice(f"{what} {value.item()}"))
        state = {
            "stage_index": self.stage_index,
            "step": self.step,
            "global_step": self.global_step,
            "tokens_seen": self.tokens_seen,
            "rng_state": torch.get_rng_state().tolist(),
        }
        return checkpoint.save_checkpoint(self.run, self.model, self.optimizer, state, self.config.keep_checkpoints)

    def train(self, *, max_minutes: float = math.inf, last_stage: str | None = None) -> bool:
        """Train until the stages are done, `max_minutes` are over or `should_stop` is set; saves before returning.

        Returns True when every stage (up to `last_stage`) is finished.
        """
        deadline = time.monotonic() + 60 * max_minutes
        final = len(self.config.stages) - 1 if last_stage is None else self.config.stage(last_stage)
        while self.stage_index <= final:
            if not self._train_stage(self.config.stages[self.stage_index], deadline):
                self.save()
                return False
            self.stage_index, self.step = self.stage_index + 1, 0
            self.optimizer = self._optimizer()
            self.save()
            if self.stage_index <= final and (self.should_stop or time.monotonic() > deadline):
                return False
        return True

    def _mixture(self, index: int) -> MixtureConfig:
        stage = self.config.stages[index]
        try:
            return MixtureConfig(
                weights=stage.mixture,
                seq_len=stage.seq_len,
                chunk_size=self.model.config.chunk_size,
                seed=self.config.seed + 1000 * index,
                long_documents=stage.long_documents,
            )
        except ValueError as error:
            raise ValueError(f"stage {stage.name!r}: {error}") from error

    def _batches(self, stage: StageConfig) -> Iterator[dict[str, Any]]:
        config = self._mixture(self.stage_index)
        num_rows = stage.num_steps * stage.rows
        dataset = MixtureDataset(self.shards, self.tokenizer, config, split="train", num_rows=num_rows)
        rest = Subset(dataset, range(self.step * stage.rows, num_rows))
        rows = stage.micro_batch_rows or stage.rows
        workers = self.config.num_workers if self.device.type == "cuda" else 0
        return iter(
            DataLoader(
                rest,
                batch_size=rows,
                collate_fn=collate,
                num_workers=workers,
                pin_memory=self.device.type == "cuda",
                prefetch_factor=4 if workers else None,
                # its own generator: starting a loader must not move the run's random state
                generator=torch.Generator(),
            )
        )

    def _train_stage(self, stage: StageConfig, deadline: float) -> bool:
        model, config = self.model, self.model.config
        config.chunk_topk = (
            stage.seq_len // config.chunk_size * stage.rows if stage.chunk_topk == FULL_COVERAGE else stage.chunk_topk
        )
        # a stage without a window of its own keeps that of the last stage that had one, also after a resume
        windows = [earlier.sliding_window for earlier in self.config.stages[: self.stage_index + 1]]
        window = next((size for size in reversed(windows) if size), config.sliding_window)
        if window != config.sliding_window:
            set_window(model, window)
        batches = self._batches(stage)
        meter = _Meter()
        saved = time.monotonic()
        while self.step < stage.num_steps:
            rate = learning_rate(stage, self.step)
            loss, norm = self._optimizer_step(stage, batches, rate)
            self.last_loss, self.last_norm = loss, norm
            self.step, self.global_step = self.step + 1, self.global_step + 1
            self.tokens_seen += stage.batch_tokens
            meter.add(loss, norm, stage.batch_tokens)
            last = self.step == stage.num_steps
            if self.step % self.config.log_every == 0 or last:
                self._log(stage, meter, rate)
            if self.probe is not None and (self.step % self.config.probe_every == 0 or last):
                self._probe(stage)
                meter.restart()
            if self.should_stop or time.monotonic() > deadline:
                return last
            if time.monotonic() - saved > 60 * self.config.checkpoint_minutes:
                self.save()
                saved = time.monotonic()
                meter.restart()
        return True

    def _optimizer_step(self, stage: StageConfig, batches: Iterator[dict[str, Any]], rate: float):
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        parts = stage.rows // (stage.micro_batch_rows or stage.rows)
        total = torch.zeros((), device=self.device)
        for _ in range(parts):
            batch = next(batches)
            inputs = {
                name: batch[name].to(self.device, non_blocking=True) for name in ("input_ids", "labels", "segment_ids")
            }
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                loss = self.model(**inputs, pool_memory=stage.pool_memory).loss
            (loss / parts).backward()
            total += loss.detach() / parts
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.update_router_bias()
        return total, norm

    def _log(self, stage: StageConfig, meter: _Meter, rate: float) -> None:
        loss, norm, speed = meter.read()
        record = {
            "stage": stage.name,
            "step": self.step,
            "global_step": self.global_step,
            "tokens": self.tokens_seen,
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": rate,
            "tokens_per_s": speed,
        }
        if self.device.type == "cuda":
            record["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self._write(record)
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise TrainingDiverged(self._advice(f"loss {loss}, gradient norm {norm}"))

    def _advice(self, what: str) -> str:
        return (
            f"{what} at step {self.global_step} is not finite; the last checkpoint in {self.run} is intact: lower the "
            "learning rate and run again"
        )

    def _probe(self, stage: StageConfig) -> None:
        assert self.probe is not None
        self.model.eval()
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            measured = self.probe(self.model, stage)
        self.model.train()
        self._write(
            {"stage": stage.name, "global_step": self.global_step, "tokens": self.tokens_seen, "probe": measured}
        )

    def _write(self, record: dict[str, Any]) -> None:
        with (self.run / "log.jsonl").open("a") as stream:
            stream.write(json.dumps(record) + "\n")
        if self.listener is not None:
            self.listener(record)


class _Meter:
    """Loss, gradient norm and speed since the last reading; touches the device only when read."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.losses: list[torch.Tensor] = []
        self.norms: list[torch.Tensor] = []
        self.tokens, self.since = 0, time.monotonic()

    def add(self, loss: torch.Tensor, norm: torch.Tensor, tokens: int) -> None:
        self.losses.append(loss)
        self.norms.append(norm)
        self.tokens += tokens

    def read(self) -> tuple[float, float, float]:
        if not self.losses:
            return math.nan, math.nan, 0.0
        loss, norm = torch.stack(self.losses).mean().item(), torch.stack(self.norms).mean().item()
        speed = self.tokens / (time.monotonic() - self.since)
        self.restart()
        return loss, norm, speed


def set_window(model: HSAForCausalLM, window: int) -> None:
    """Change the sliding window of every layer that has the configuration's (stages change it, paper sec. 3.2)."""
    config = model.config
    for layer in [
        *model.model.lower_layers,
        *(layer for group in model.model.upper_groups() for layer in group.layers),
    ]:
        layer.attention.window = window
    config.sliding_window = window
