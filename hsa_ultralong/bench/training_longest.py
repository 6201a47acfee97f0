"""The longest row that trains on one card, by what a step keeps in memory and by a cap on the card's memory.

Doubling from a short row, then bisection between the longest row that fitted and the shortest that did not. Every trial
is a record (docs/results.md), so that a search that was cut off goes on where it stood. Random weights and tokens, one
row a step, AdamW, bf16 autocast on a GPU. Called by `hsa bench training --longest`;
tests/bench/test_training_longest.py.
"""

from __future__ import annotations

import gc
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from hsa_ultralong.bench.training import ATTENTIONS, Prepare, TimedModel, build, loss_of
from hsa_ultralong.models import HSAConfig

METHODS = ("plain", "checkpointing", "segmented", "offloaded")
_UNITS = {"GB": 10**9, "GIB": 2**30, "MB": 10**6, "MIB": 2**20}
# the row that a search begins with, and on which kernels are compiled and tuned
_SHORT = 8192
# a step that takes longer is not repeated: what was compiled or tuned on the way is a small part of it
_REPEATED_BELOW_S = 30.0
# the seconds of a step grow with this power of the row, about, where the attention over it all decides
_GROWTH = {"hsa": 1.5, "full": 2.0, "full_rope": 2.0}
LengthRecord = dict[str, Any]
# (model, {"input_ids", "labels"}, tokens of a piece, offload=...) -> loss; adds the gradients
SegmentedBackward = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Method:
    """What a step keeps: `checkpointing` as ParallelConfig has it, or pieces of so many tokens, on the host or not;
    compiled: with torch.compile, only part of the name here."""

    checkpointing: str = "none"
    piece_tokens: int = 0
    offload: bool = False
    compiled: bool = False

    @property
    def parallel(self) -> str:
        """Its name in the records."""
        kept = f"segments of {self.piece_tokens}" if self.piece_tokens else f"checkpointing {self.checkpointing}"
        return kept + (", offloaded" if self.offload else "") + (", compiled" if self.compiled else "")


class Cap(NamedTuple):
    """A limit on the memory of the device: name in the records, bytes; None where it is neither set nor measured."""

    name: str
    bytes: int | None


@dataclass(frozen=True)
class LongestSettings:
    """max_tokens: no longer row is tried. first: the row that doubling begins with, short if None. deadline: of
    time.monotonic; no trial begins that may end later. precision: the search ends when the shortest row that failed is
    at most this part longer than the longest that fitted."""

    max_tokens: int
    methods: tuple[Method, ...]
    caps: tuple[Cap, ...]
    first: int | None = None
    deadline: float = math.inf
    precision: float = 1 / 8
    seed: int = 0


class Trial(NamedTuple):
    """fits: a step ran. tokens_per_s, peak_bytes: of the last step, None where unknown."""

    fits: bool
    tokens_per_s: float | None = None
    peak_bytes: int | None = None


def choose_methods(names: Sequence[str], piece_tokens: int, compiled: bool = False) -> tuple[Method, ...]:
    """The methods called `names`, of METHODS.

    Raises:
        ValueError: for another name, or pieces without tokens.
    """
    kinds = (("none", 0, False), ("full", 0, False), ("none", piece_tokens, False), ("none", piece_tokens, True))
    known = {name: Method(*kind, compiled) for name, kind in zip(METHODS, kinds, strict=True)}
    if piece_tokens < 1:
        raise ValueError(f"pieces need at least one chunk of tokens, got {piece_tokens}")
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"methods are {', '.join(METHODS)}; got {', '.join(unknown)}")
    return tuple(known[name] for name in dict.fromkeys(names))


def choose_caps(text: str | None, device: torch.device) -> tuple[Cap, ...]:
    """Caps such as "80GB,card", the smallest first; those above the card's memory are left out.

    On a CPU nothing is capped or measured: the one cap is called "host".

    Raises:
        ValueError: for anything but "card" and numbers of GB, GiB, MB or MiB; for any cap on a CPU.
    """
    if device.type != "cuda":
        if text is not None:
            raise ValueError("--caps needs a GPU: on a CPU memory is neither capped nor measured, --max-tokens bounds")
        return (Cap("host", None),)
    card = torch.cuda.get_device_properties(device).total_memory
    caps = {parse_cap(part.strip(), card) for part in (text or "80GB,card").split(",")}
    fitting = sorted((cap for cap in caps if cap.bytes is not None and cap.bytes <= card), key=lambda cap: cap[::-1])
    if not fitting:
        raise ValueError(f"every one of --caps {text} is above this card's {card / 1e9:.1f} GB: use --caps card")
    return tuple(fitting)


def parse_cap(text: str, card_bytes: int) -> Cap:
    """ "card" or "80GB", "74.5GiB".

    Raises:
        ValueError: for anything else.
    """
    if text == "card":
        return Cap("card", card_bytes)
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B)", text, re.IGNORECASE)
    if match is None or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise ValueError(f"a cap is card, or a number with GB, GiB, MB or MiB such as 80GB; got {text!r}")
    return Cap(text, int(float(match[1]) * _UNITS[match[2].upper()]))


def next_length(longest: int, failed: int | None, *, first: int, last: int, unit: int, precision: float) -> int | None:
    """The row to try next, or None if the search is done.

    Args:
        longest: row that fitted, 0 if none did. failed: shortest row that did not, None if all did. first, last: of the
            doubling, multiples of `unit`, as all that is tried.
    """
    if longest >= last:
        return None
    if failed is None:
        tokens = first
        while tokens <= longest:
            tokens *= 2
        return min(tokens, last)
    middle = min((longest + failed) // 2 // unit * unit, last)
    is_close = failed - longest <= max(unit, precision * longest)
    return None if is_close or middle <= longest else middle


class RowTrainer:
    """Optimiser steps on single rows of random tokens."""

    def __init__(
        self, model: TimedModel, vocab_size: int, method: Method, segmented: SegmentedBackward, seed: int
    ) -> None:
        self.model, self.vocab_size, self.method, self.segmented = model, vocab_size, method, segmented
        self.device = next(model.parameters()).device
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=self.device.type == "cuda")
        self.generator = torch.Generator().manual_seed(seed)

    def trial(self, tokens: int) -> Trial:
        """Whether a step on a row of `tokens` tokens fits; its speed without what was compiled on the way."""
        seconds: float | None
        try:
            seconds = self._step(tokens)
            if seconds < _REPEATED_BELOW_S:
                seconds = self._step(tokens)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            seconds = None
        # after the handler, whose traceback would keep the step's tensors alive
        is_cuda = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.device) if is_cuda else None
        self.optimizer.zero_grad(set_to_none=True)
        _free_memory(self.device)
        return Trial(False) if seconds is None else Trial(True, tokens / seconds, peak)

    def _step(self, tokens: int) -> float:
        """Seconds of forward, backward and optimiser."""
        ids = torch.randint(3, self.vocab_size, (1, tokens), generator=self.generator).to(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        if self.method.piece_tokens:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                batch = {"input_ids": ids, "labels": ids}
                self.segmented(self.model, batch, self.method.piece_tokens, offload=self.method.offload)
        else:
            loss_of(self.model, ids).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start


def _is_out_of_memory(error: Exception) -> bool:
    # pinned host memory that cannot be had is a plain RuntimeError
    kinds = torch.OutOfMemoryError | MemoryError
    return isinstance(error, kinds) or "out of memory" in str(error).lower()


def _free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def _limited(device: torch.device, cap: Cap) -> Iterator[None]:
    """Inside, torch's allocator takes no more than the cap, its cache included."""
    if device.type != "cuda" or cap.bytes is None:
        yield
        return
    _free_memory(device)
    card = torch.cuda.get_device_properties(device).total_memory
    # torch takes numbered devices only
    index = torch.cuda.current_device() if device.index is None else device.index
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap.bytes / card), index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, index)


def usable_trials(result: dict[str, Any], preset: str) -> list[LengthRecord]:
    """Trials of a preset by runs of the commit of `result`'s newest run; those of other commits are taken out of it."""
    commits = [run["commit"] for run in result["meta"]["runs"]]

    def is_stale(record: LengthRecord) -> bool:
        is_trial = record["metric"] == "trial" and record["preset"] == preset
        return is_trial and commits[record["run"]] != commits[-1]

    result["records"] = [record for record in result["records"] if not is_stale(record)]
    return [record for record in result["records"] if record["metric"] == "trial" and record["preset"] == preset]


class LongestSearch:
    """The longest row of every method and cap for one preset; what an earlier run tried is not tried again.

    Args:
        name: of the preset, in the records. attention: "hsa", or "full" or "full_rope" for a twin, which has no pieces.
        segmented: train.segmented.segmented_loss_backward. prepare: what the trainer does to a model.
        known: trials to start from, records of an earlier run.
        on_record: gets every trial and, per method and cap, the result. say: gets lines of progress.

    Raises:
        ValueError: for another attention, rows shorter than a chunk, or pieces that are no multiple of it.
    """

    def __init__(
        self,
        config: HSAConfig,
        name: str,
        attention: str,
        settings: LongestSettings,
        device: torch.device,
        *,
        segmented: SegmentedBackward,
        prepare: Prepare,
        on_record: Callable[[LengthRecord], None],
        say: Callable[[str], None],
        known: Sequence[LengthRecord] = (),
    ) -> None:
        self.config, self.name, self.attention, self.settings = config, name, attention, settings
        self.device, self.segmented, self.prepare = device, segmented, prepare
        self.on_record, self.say = on_record, say
        self.trials = [one for one in known if one["metric"] == "trial"]
        self.unit = config.chunk_size
        self.last = settings.max_tokens // self.unit * self.unit
        if attention not in ATTENTIONS:
            raise ValueError(f"attention is one of {', '.join(ATTENTIONS)}, got {attention!r}")
        if not self.last:
            raise ValueError(f"--max-tokens must be at least one chunk of {self.unit} tokens")
        for method in settings.methods:
            if method.piece_tokens % self.unit:
                raise ValueError(f"--piece-tokens must be a multiple of chunk_size={self.unit}")
        # at least three doublings, so that a small bound is searched too
        short = min(_SHORT, self.last // 8)
        self.first = max(self.unit, min(settings.first or short, self.last) // self.unit * self.unit)

    def run(self) -> None:
        for method in self.settings.methods:
            if self.attention != "hsa" and method.piece_tokens:
                continue
            trainer: RowTrainer | None = None
            for cap in self.settings.caps:
                trainer, limit = self._search(method, cap, trainer)
                self.on_record(self._result(method, cap, limit))
            del trainer
            _free_memory(self.device)

    def _search(self, method: Method, cap: Cap, trainer: RowTrainer | None) -> tuple[RowTrainer | None, str]:
        """Try rows until the longest is known; the trainer, if one was needed, and what ended the search."""
        while True:
            longest, failed = self._bounds(method, cap)
            tokens = next_length(
                longest, failed, first=self.first, last=self.last, unit=self.unit, precision=self.settings.precision
            )
            if tokens is None:
                return trainer, "max_tokens" if longest >= self.last else "memory"
            if time.monotonic() + self._expected_seconds(method, cap, tokens) > self.settings.deadline:
                self.say(f"{self._label(method, cap)} {tokens:,} tokens: not begun, the time is up; run again to go on")
                return trainer, "time"
            if trainer is None:
                trainer = self._trainer(method)
            with _limited(self.device, cap):
                found = trainer.trial(tokens)
            record = self._record("trial", method, cap, tokens, float(found.fits))
            self.trials.append({**record, "tokens_per_s": found.tokens_per_s, "peak_bytes": found.peak_bytes})
            self.on_record(self.trials[-1])
            self.say(f"{self._label(method, cap)} {tokens:,} tokens: {describe_trial(self.trials[-1])}")

    def _trainer(self, method: Method) -> RowTrainer:
        """A fresh model of this method that has compiled and tuned its kernels on a short row."""
        torch.manual_seed(self.settings.seed)
        model = build(self.attention, self.config, self.device, method.checkpointing)
        self.prepare(model, method.checkpointing)
        trainer = RowTrainer(model, self.config.vocab_size, method, self.segmented, self.settings.seed)
        trainer.trial(min(self.first, _SHORT))
        return trainer

    def _of(self, method: Method) -> list[LengthRecord]:
        wanted = (self.name, self.attention, method.parallel)
        return [one for one in self.trials if (one["preset"], one["attention"], one["parallel"]) == wanted]

    def _fitted(self, method: Method, cap: Cap) -> LengthRecord | None:
        """The trial of the longest row that fits: what fits under a cap fits under a larger one."""
        found = [one for one in self._of(method) if one["value"] and _bytes(one["cap_bytes"]) <= _bytes(cap.bytes)]
        return max(found, key=lambda one: (one["context"], _bytes(one["cap_bytes"])), default=None)

    def _bounds(self, method: Method, cap: Cap) -> tuple[int, int | None]:
        """The longest row that fits and the shortest that does not: nor does it under a smaller cap."""
        fitted, known = self._fitted(method, cap), self._of(method)
        failed = [one["context"] for one in known if not one["value"] and _bytes(one["cap_bytes"]) >= _bytes(cap.bytes)]
        return 0 if fitted is None else fitted["context"], min(failed, default=None)

    def _expected_seconds(self, method: Method, cap: Cap, tokens: int) -> float:
        """Of a trial, from the longest one before."""
        fitted = self._fitted(method, cap)
        if fitted is None:
            return 0.0
        growth = max(1.0, tokens / fitted["context"]) ** _GROWTH[self.attention]
        step = fitted["context"] / fitted["tokens_per_s"] * growth
        return step * (2 if step < _REPEATED_BELOW_S else 1)

    def _record(self, metric: str, method: Method, cap: Cap, context: int | None, value: float) -> LengthRecord:
        return {
            "metric": metric, "preset": self.name, "attention": self.attention, "context": context, "gpus": 1,
            "parallel": method.parallel, "micro_batch_rows": 1, "cap": cap.name, "cap_bytes": cap.bytes, "value": value,
        }  # fmt: skip

    def _result(self, method: Method, cap: Cap, limit: str) -> LengthRecord:
        fitted = self._fitted(method, cap) or {"context": 0, "tokens_per_s": None, "peak_bytes": None}
        longest, failed = self._bounds(method, cap)
        record = self._record("longest_sequence", method, cap, None, longest)
        speed = {key: fitted[key] for key in ("tokens_per_s", "peak_bytes")}
        return {**record, **speed, "shortest_failed": failed, "limit": limit}

    def _label(self, method: Method, cap: Cap) -> str:
        return f"{self.attention}, {method.parallel}, {cap.name}:"


def _bytes(cap: int | None) -> float:
    return math.inf if cap is None else cap


def describe_trial(trial: LengthRecord) -> str:
    """What became of it, in a few words."""
    if not trial["value"]:
        return "out of memory"
    peak = "" if trial["peak_bytes"] is None else f", {trial['peak_bytes'] / 1e9:.1f} GB"
    return f"trains, {trial['tokens_per_s']:,.0f} tokens/s{peak}"
