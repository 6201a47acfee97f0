"""Points of training speed: tokens per second, MFU and peak memory of optimiser steps, beside the full-attention twin.

Records have the form of docs/results.md (suite training). Tokens are random: speed does not depend on them, but for
retrieval, whose lists are those of an untrained model. Called by `hsa bench training`, its table and figure are in
training_report.py; tests/bench/test_training_benchmark.py.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from hsa_ultralong.baselines import FullAttentionLM
from hsa_ultralong.baselines.twins import twin_config
from hsa_ultralong.bench.timing import MakeCapture
from hsa_ultralong.models import HSAConfig, HSAForCausalLM, accounting

PEAK_FLOPS = 989e12  # H200 and H100, dense bf16 (docs/results.md), of steps in fp8 too
CHECKPOINTING = ("none", "full")
# the model; a transformer of its window layers with full attention; one with as many layers and parameters as the model
ATTENTIONS = ("hsa", "full", "full_rope")
TimedModel = HSAForCausalLM | FullAttentionLM
# what the trainer does to a model before its first step, given the kind of checkpointing
Prepare = Callable[[TimedModel, str], None]
# steps before a graph is made, as in the trainer
_STEPS_BEFORE = 3


@dataclass(frozen=True)
class TrainingSettings:
    """contexts: tokens a row. batch_tokens: of an optimiser step (at least one row). micro_tokens: tokens of a forward
    that are tried; the fastest counts. steps: timed, after two that are not. precision: of training, as `hsa train`
    calls it, which `prepare` sets."""

    contexts: tuple[int, ...] = (8192, 16_384, 32_768, 131_072)
    batch_tokens: int = 131_072
    micro_tokens: tuple[int, ...] = (16_384, 32_768)
    steps: int = 4
    checkpointing: str = "none"
    seed: int = 0
    precision: str = "bf16"


def full_attention_twin(config: HSAConfig, attention: str = "full") -> FullAttentionLM:
    """A transformer of the config's width with full attention: "full" has its window layers alone, "full_rope" as many
    layers as decoder and encoder together and as many parameters within 2%, as the twin that `hsa train` calls so."""
    assert config.head_dim is not None
    layers, intermediate = config.num_hidden_layers - config.num_upper_groups, config.intermediate_size
    if attention == "full_rope":
        twin = twin_config(config, attention)
        assert twin.layers is not None
        layers, intermediate = len(twin.layers), twin.intermediate_size
    return FullAttentionLM(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=intermediate,
        num_layers=layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        rope_theta=config.rope_theta,
        use_qk_norm=config.use_qk_norm,
        rms_norm_eps=config.rms_norm_eps,
    )


def require_attentions(kinds: Sequence[str], config: HSAConfig) -> None:
    """Every kind is one of ATTENTIONS, and the config has such a twin; called before anything is measured.

    Raises:
        ValueError: otherwise.
    """
    for kind in kinds:
        if kind not in ATTENTIONS:
            raise ValueError(f"attention is one of {', '.join(ATTENTIONS)}; got {kind!r}")
    if "full_rope" in kinds:
        twin_config(config, "full_rope")


def build(attention: str, config: HSAConfig, device: torch.device, checkpointing: str) -> TimedModel:
    """The model ("hsa") or a twin ("full", "full_rope"), random weights in fp32, in training mode.

    Checkpointing is set on the twin only; on the model it is the trainer's (Prepare).

    Raises:
        ValueError: for another attention or kind of checkpointing.
    """
    require_attentions([attention], config)
    if checkpointing not in CHECKPOINTING:
        raise ValueError(f"checkpointing is one of {', '.join(CHECKPOINTING)}; got {checkpointing!r}")
    with torch.device(device):
        model = HSAForCausalLM(config) if attention == "hsa" else full_attention_twin(config, attention)
    if isinstance(model, FullAttentionLM):
        model.gradient_checkpointing = checkpointing == "full"
    return model.train()


def parameters(model: torch.nn.Module) -> int:
    """Numbers that train; tied embeddings count once."""
    return sum(part.numel() for part in model.parameters())


def loss_of(model: TimedModel, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """Loss of token ids (B, T) under the trainer's autocast; options are those of the model's forward."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.device.type == "cuda"):
        return model(ids, labels=ids, **options).loss if isinstance(model, HSAForCausalLM) else model(ids, ids)


class Bench:
    """Times optimiser steps of one model."""

    def __init__(
        self, model: TimedModel, vocab_size: int, settings: TrainingSettings, make_capture: MakeCapture | None = None
    ) -> None:
        self.model, self.vocab_size, self.settings, self._make_capture = model, vocab_size, settings, make_capture
        self.device = next(model.parameters()).device
        is_cuda = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=is_cuda)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _update(self, keeps_gradients: bool) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        # a graph adds to gradients that stay where they are
        self.optimizer.zero_grad(set_to_none=not keeps_gradients)

    def _step(self, ids: torch.Tensor, rows: int) -> None:
        parts = ids.split(rows)
        for part in parts:
            (loss_of(self.model, part) / len(parts)).backward()
        self._update(False)

    def _drawn_seed(self) -> int | None:
        """As a forward without a graph draws it, for models with selection noise."""
        return self.model.model.draw_noise_seed() if isinstance(self.model, HSAForCausalLM) else None

    def _graphed(self, ids: torch.Tensor, rows: int) -> Callable[[], None]:
        """A step whose forwards and backwards are replays of one CUDA graph."""
        assert self._make_capture is not None
        capture, parts = self._make_capture(self.device), ids.split(rows)
        part = parts[0].clone()
        seed = torch.zeros((), dtype=torch.int64, device=self.device)
        has_noise = isinstance(self.model, HSAForCausalLM) and self.model.config.gumbel_noise
        options = {"noise_seed": seed} if has_noise else {}

        def run() -> torch.Tensor:
            loss = loss_of(self.model, part, **options) / len(parts)
            loss.backward()
            return loss.detach()

        def step(forward: Callable[[], Any]) -> None:
            for one in parts:
                part.copy_(one)
                if (drawn := self._drawn_seed()) is not None:
                    seed.fill_(drawn)
                forward()
            self._update(True)

        for number in range(_STEPS_BEFORE):
            with capture.aside(may_wait=number + 1 < _STEPS_BEFORE):
                step(run)
        return partial(step, capture(run)[0])

    def measure(self, context: int, rows: int) -> tuple[float, int]:
        """Tokens per second and peak bytes of steps in micro-batches of `rows` rows."""
        count = max(1, self.settings.batch_tokens // (context * rows)) * rows
        generator = torch.Generator().manual_seed(self.settings.seed)
        ids = torch.randint(3, self.vocab_size, (count, context), generator=generator).to(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        step = partial(self._step, ids, rows) if self._make_capture is None else self._graphed(ids, rows)
        for _ in range(2):
            step()
        self._synchronize()
        start = time.perf_counter()
        for _ in range(self.settings.steps):
            step()
        self._synchronize()
        speed = self.settings.steps * ids.numel() / (time.perf_counter() - start)
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0
        return speed, peak


def training_records(
    config: HSAConfig,
    name: str,
    attention: str,
    settings: TrainingSettings,
    device: torch.device,
    on_record: Callable[[dict[str, Any]], None],
    prepare: Prepare,
    on_failure: Callable[[str], None] | None = None,
    make_capture: MakeCapture | None = None,
) -> None:
    """Every context with its best micro-batch; with make_capture by CUDA graphs."""
    torch.manual_seed(settings.seed)
    model = build(attention, config, device, settings.checkpointing)
    prepare(model, settings.checkpointing)
    bench = Bench(model, config.vocab_size, settings, make_capture)
    for context in settings.contexts:
        best: tuple[float, int, int] | None = None
        for rows in sorted({max(1, tokens // context) for tokens in settings.micro_tokens}):
            try:
                speed, peak = bench.measure(context, rows)
            except torch.OutOfMemoryError:
                bench.optimizer.zero_grad(set_to_none=True)
                gc.collect()
                torch.cuda.empty_cache()
                if on_failure is not None:
                    on_failure(f"{attention} {context:,} tokens, {rows} rows: out of memory")
                continue
            if best is None or speed > best[0]:
                best = (speed, peak, rows)
        if best is None:
            continue
        flops = (
            accounting.flops_per_token(config, context, training=True)
            if isinstance(model, HSAForCausalLM)
            else accounting.full_attention_training_flops(config, context, parameters(model), len(model.layers))
        )
        shared = {
            "preset": name, "attention": attention, "context": context, "gpus": 1,
            "parallel": f"checkpointing {settings.checkpointing}" + (", CUDA graphs" if make_capture else "")
            + (f", {settings.precision}" if settings.precision != "bf16" else ""),
            "micro_batch_rows": best[2],
        }  # fmt: skip
        on_record({"metric": "tokens_per_s", **shared, "value": best[0]})
        on_record({"metric": "mfu", **shared, "value": best[0] * flops / PEAK_FLOPS})
        on_record({"metric": "peak_bytes", **shared, "value": best[1]})
