"""What a run measures of itself: loss and speed between log lines, spikes, MFU, retrieval; and who else is told.

All of it reads the device only when a log line is written. Called by loop.py; tests/train/test_metrics.py.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hsa_ultralong.baselines import RivalForCausalLM
from hsa_ultralong.baselines import accounting as rival_accounting
from hsa_ultralong.models import accounting
from hsa_ultralong.train.config import StageConfig, TrainConfig, as_dict
from hsa_ultralong.train.twins import Trained

logger = logging.getLogger(__name__)

Listener = Callable[[dict[str, Any]], None]

# dense bf16 FLOP per second, by what the name of the device holds
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "GH200": 989e12, "A100": 312e12, "B200": 2250e12}
_SPIKE_MEMORY = 100
_LEAST_LOSSES = 20


class Meter:
    """Loss, gradient norm, expert balance and speed since the last log line, all means over steps."""

    def __init__(self) -> None:
        self.values: dict[str, list[torch.Tensor]] = {}
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out of the speed what came before."""
        self.tokens, self.since = 0, time.monotonic()

    def add(self, tokens: int, **values: torch.Tensor) -> None:
        """One optimiser step: scalars that stay on their device."""
        for name, value in values.items():
            self.values.setdefault(name, []).append(value)
        self.tokens += tokens

    def take(self) -> dict[str, torch.Tensor]:
        """Every series since the last call, (steps,) fp32 on the host."""
        taken, self.values = {name: torch.stack(part).float().cpu() for name, part in self.values.items()}, {}
        return taken

    def speed(self) -> float:
        """Tokens per second since the clock was restarted, and restart it."""
        speed = self.tokens / max(time.monotonic() - self.since, 1e-9)
        self.restart_clock()
        return speed

    def state(self) -> dict[str, list[float]]:
        """What a resumed run needs for the same next log line."""
        return {name: torch.stack(part).float().tolist() for name, part in self.values.items()}

    def restore(self, state: dict[str, list[float]], device: torch.device) -> None:
        self.values = {name: list(torch.tensor(part, device=device)) for name, part in state.items()}


class SpikeGuard:
    """Notices a loss that stays above the running median.

    Args:
        threshold: nats above the median of the last 100 losses. steps: so many in a row are a spike.
    """

    def __init__(self, threshold: float, steps: int) -> None:
        self.threshold, self.steps = threshold, steps
        self.restart()

    def restart(self) -> None:
        """Forget what was seen: another stage has another loss."""
        self.recent: deque[float] = deque(maxlen=_SPIKE_MEMORY)
        self.high = 0

    def see(self, losses: list[float]) -> str:
        """Take in the losses of the next steps; what to say if they complete a spike, else ""."""
        for loss in losses:
            median = statistics.median(self.recent) if len(self.recent) >= _LEAST_LOSSES else math.inf
            if loss <= median + self.threshold:
                self.high = 0
                self.recent.append(loss)
                continue
            self.high += 1
            if self.high == self.steps:
                return (
                    f"loss {loss:.3f} has been {self.threshold:g} above its median {median:.3f} for {self.high} steps"
                )
        return ""

    def state(self) -> dict[str, Any]:
        return {"recent": list(self.recent), "high": self.high}

    def load(self, state: dict[str, Any]) -> None:
        self.restart()
        self.recent.extend(state["recent"])
        self.high = state["high"]


def peak_flops(device: torch.device) -> float | None:
    """FLOP per second that MFU counts as 1, dense bf16 (docs/results.md); None for a device that is not listed."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def training_flops(model: Trained, stage: StageConfig) -> float:
    """FLOP per token of a stage as docs/results.md counts them, with the model's present window and K.

    Pooled chunks are left out; rows count as one document.
    """
    if isinstance(model, RivalForCausalLM):
        rival = model.config
        return stage.mean_over_lengths(lambda length: rival_accounting.training_flops(rival, length))
    config = model.config
    return stage.mean_over_lengths(lambda length: accounting.flops_per_token(config, length, training=True))


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """Curves of a log record by name: "train/loss", "needles/2048/accuracy", "retrieval/entropy/0"."""
    if "probe" in record:
        probe = record["probe"]
        found = {f"needles/{probe['length']}/accuracy": probe["needle_accuracy"]}
        if "answer_loss" in probe:
            found[f"needles/{probe['length']}/answer_loss"] = probe["answer_loss"]
        for name, value in probe.items():
            if name.startswith("family/"):
                found[f"needles/{probe['length']}/{name}"] = value
        for name, values in record.get("retrieval", {}).items():
            found.update({f"retrieval/{name}/{number}": value for number, value in enumerate(values)})
        return found
    left_out = ("stage", "step", "global_step", "time")
    return {f"train/{name}": float(value) for name, value in record.items() if name not in left_out}


def open_writers(run: Path, config: TrainConfig, last_step: int) -> list[Listener]:
    """Listeners that take every log record to TensorBoard (if it is installed) and, if asked for, to Weights & Biases.

    Args:
        last_step: curves of later steps, of a run that died, are dropped.

    Raises:
        ImportError: for config.wandb, if it is not installed.
    """
    writers: list[Listener] = []
    if config.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            logger.info("no TensorBoard curves: pip install 'hsa-ultralong[train]' for them")
        else:
            board = SummaryWriter(str(run / "tensorboard"), purge_step=last_step + 1)

            def to_tensorboard(record: dict[str, Any]) -> None:
                for name, value in scalars(record).items():
                    board.add_scalar(name, value, record["global_step"])
                board.flush()

            writers.append(to_tensorboard)
    if config.wandb:
        try:
            import wandb
        except ImportError as error:
            raise ImportError("wandb=... needs Weights & Biases: pip install 'hsa-ultralong[wandb]'") from error
        # one name, one session: a resumed run goes on in it
        session = wandb.init(
            project=config.wandb, name=run.name, id=run.name, resume="allow", dir=str(run), config=as_dict(config)
        )
        writers.append(lambda record: session.log(scalars(record), step=record["global_step"]))
    return writers
