"""Forward and backward of a micro-batch as one CUDA graph, which the host starts with one call in place of thousands.

A stage's rows have few shapes (StageConfig.shapes), each of which gets a graph of its own; they share one memory pool.
The first three steps of a shape run as ever, and are steps of the run: what is compiled is compiled in them, and the
last one stops at whatever waits for the device, which no graph can hold. Gradients are added up in buffers that stay,
zeroed once a step. The divisor of the loss and the seed of gumbel_noise, numbers of the host, are written to the device
before every forward. Clipping and the optimisers stay outside: their rate is a number of the host. What cannot be held
is refused, never run otherwise: docs/training.md. Called by step_loss.py; tests/train/test_graphs.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from hsa_ultralong.models import HSAConfig, HSAForCausalLM
from hsa_ultralong.train.batches import Batch
from hsa_ultralong.train.config import StageConfig, TrainConfig
from hsa_ultralong.train.evidence import EvidenceLoss, Told

OPTION = "parallel.cuda_graphs"
# steps of a shape that run without a graph; in the last of them nothing may wait for the device
WARMUP_STEPS = 3
_ROWS = ("input_ids", "labels", "segment_ids")
# of told tokens among a graph's inputs
_EVIDENCE = "evidence_"


def require_graphs(config: TrainConfig, preset: HSAConfig, device: torch.device, num_processes: int) -> None:
    """The run can have the graphs that it asks for, if it does.

    Args:
        preset: the model's configuration before any stage.

    Raises:
        ValueError: it cannot, with the reason.
    """
    if not config.parallel.cuda_graphs:
        return
    if device.type != "cuda":
        raise ValueError(f"{OPTION} needs a CUDA device, got {device.type}: --set {OPTION}=false")
    if num_processes > 1:
        raise ValueError(
            f"{OPTION} is for one process, no graph holds the exchanges of {num_processes}: --set {OPTION}=false"
        )
    for stage in config.stages:
        _check_stage(config, stage, preset)


def _check_stage(config: TrainConfig, stage: StageConfig, preset: HSAConfig) -> None:
    obstacles = {
        "piece_tokens, whose pieces have backwards of their own": stage.piece_tokens,
        "divergence, whose tokens are counted on the host": stage.needs_teacher,
        "a mixture of experts, whose rows are cut where the host reads": preset.num_experts,
        "parallel.offload_activations, whose copies go to the host": config.parallel.offload_activations,
    }
    if found := [reason for reason, is_there in obstacles.items() if is_there]:
        raise ValueError(f"stage {stage.name!r}: {OPTION} cannot hold {found[0]}; leave one of them out")


def row_shapes(stage: StageConfig) -> set[tuple[int, int]]:
    """(rows, tokens of a row) of all forwards of a stage in one process."""
    return {(stage.forward_rows(1, step), stage.shape(step)[0]) for step in range(max(1, len(stage.shapes)))}


class CudaCapture:
    """Makes graphs that share a memory pool, on a stream of their own, where the steps before them run as well."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def aside(self, *, may_wait: bool) -> Iterator[None]:
        """Work on that stream; without may_wait, what makes the host wait for the device is a RuntimeError."""
        current, before = torch.cuda.current_stream(self.device), torch.cuda.get_sync_debug_mode()
        self.stream.wait_stream(current)
        if not may_wait:
            torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
            current.wait_stream(self.stream)

    def __call__(self, function: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        """What runs `function` again on the same tensors, and where its result then stands."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        try:
            # other threads, such as the one that pins rows, may meanwhile ask the device
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                result = function()
        except Exception:
            self._abandon(current)
            raise
        return graph.replay, result

    def _abandon(self, current: torch.cuda.Stream) -> None:
        """Undo what a failed capture leaves until torch 2.12: its stream, its pool, and random numbers that wait."""
        # whatever fails here, the first error is the one to tell; a pool whose capture has ended is torch's to release
        with suppress(Exception):
            torch._C._cuda_endAllocateToPool(self.stream.device_index, self.pool)
            torch._C._cuda_releasePool(self.stream.device_index, self.pool)
        with suppress(Exception):
            torch.cuda.synchronize(self.device)
            # a whole capture ends the wait
            with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
                torch.zeros((), device=self.device)
        torch.cuda.set_stream(current)


@dataclass
class _Rows:
    """What forwards of one shape read and leave: inputs, numbers of the host, and the graph with its losses."""

    inputs: dict[str, torch.Tensor]
    numbers: dict[str, torch.Tensor]
    num_steps: int = 0
    learning: list[torch.nn.Parameter] = field(default_factory=list)
    replay: Callable[[], None] | None = None
    loss: torch.Tensor | None = None

    def read(self, tensors: dict[str, torch.Tensor], numbers: dict[str, int]) -> None:
        """Copy a micro-batch in. The backward reads the numbers too, so it comes before the next one."""
        for name, target in self.inputs.items():
            source = tensors[name]
            if source.shape != target.shape or source.dtype != target.dtype:
                raise ValueError(f"{OPTION}: {name} of a forward changed from {target.shape} to {source.shape}")
            target.copy_(source, non_blocking=True)
        for name, target in self.numbers.items():
            # a copy from the host would wait for the card
            target.fill_(numbers[name])


class GraphedSteps:
    """Runs the micro-batches of a run, as StepLoss.backward does, by graphs.

    Args:
        evidence: what teaches retrieval, in stages with evidence_loss.
    """

    def __init__(self, model: Any, device: torch.device, evidence: EvidenceLoss | None = None) -> None:
        self.model, self.device, self._evidence = model, device, evidence
        self._stage: StageConfig | None = None
        self._capture: CudaCapture | None = None
        self._options: dict[str, Any] = {}
        self._rows: dict[torch.Size, _Rows] = {}
        self._gradients: dict[torch.nn.Parameter, torch.Tensor] = {}
        self._is_first = True

    def begin(self, stage: StageConfig) -> None:
        """A step begins: no parameter has a gradient."""
        self._is_first = True
        if stage is not self._stage:
            # windows and the like are parts of a graph
            self._rows.clear()
            self._stage, self._capture = stage, CudaCapture(self.device)
            # the pool of a forward is as large as its rows make it
            self._options = {"pool_memory": stage.pool_memory} if stage.pool_memory else {}

    def backward(self, stage: StageConfig, batch: Batch, counts: list[int]) -> torch.Tensor:
        """Add the gradients of one micro-batch.

        Args:
            counts: of StepLoss.begin, the first of which divides the loss.

        Returns:
            (3,): the loss, with evidence_loss that of the evidence and the share that ranks a right chunk first, or 0.

        Raises:
            ValueError: the rows have a shape that the stage does not say, or the step cannot be captured.
        """
        assert stage is self._stage and self._capture is not None
        tensors = self._tensors(batch, stage, counts)
        numbers = {"num_items_in_batch": max(1, counts[0]), **self._drawn()}
        rows = self._rows_of(stage, batch, tensors, numbers)
        rows.read(tensors, numbers)
        is_first, self._is_first = self._is_first, False
        if is_first and rows.num_steps >= WARMUP_STEPS:
            self._lend_gradients(rows)
            if rows.replay is None:
                with self._refusing(stage, rows):
                    rows.replay, rows.loss = self._capture(lambda: self._run(rows, stage))
        elif is_first:
            rows.num_steps += 1
        if rows.replay is not None and rows.loss is not None:
            rows.replay()
            return rows.loss.clone()
        with self._refusing(stage, rows), self._capture.aside(may_wait=rows.num_steps < WARMUP_STEPS):
            loss = self._run(rows, stage)
        rows.learning = [part for part in self.model.parameters() if part.grad is not None]
        return loss

    def _drawn(self) -> dict[str, int]:
        """What a forward draws on the host, after what teaches retrieval does."""
        seed = self.model.model.draw_noise_seed() if isinstance(self.model, HSAForCausalLM) else None
        return {} if seed is None else {"noise_seed": seed}

    def _rows_of(
        self, stage: StageConfig, batch: Batch, tensors: dict[str, torch.Tensor], numbers: dict[str, int]
    ) -> _Rows:
        shape = batch["input_ids"].shape
        if tuple(shape) not in row_shapes(stage):
            known = ", ".join(map(str, sorted(row_shapes(stage))))
            raise ValueError(f"stage {stage.name!r}: {OPTION} needs forwards of {known}, got {tuple(shape)}")
        if shape not in self._rows:
            inputs = {name: torch.empty_like(part, device=self.device) for name, part in tensors.items()}
            places = {name: torch.ones((), dtype=torch.int64, device=self.device) for name in numbers}
            self._rows[shape] = _Rows(inputs, places)
        return self._rows[shape]

    def _tensors(self, batch: Batch, stage: StageConfig, counts: list[int]) -> dict[str, torch.Tensor]:
        """Inputs on the host; whether documents are isolated is always said, so that no forward is another program."""
        tensors = {name: batch[name] for name in _ROWS}
        isolated = batch["isolated"] | stage.isolate_documents
        if self._evidence is not None and stage.evidence_loss:
            told = self._evidence.padded(batch, stage, counts[-2:])
            # as the loader's rows: a copy from other memory would wait for the card
            is_cuda = self.device.type == "cuda"
            tensors |= {_EVIDENCE + name: part.pin_memory() if is_cuda else part for name, part in told.items()}
        if isinstance(self.model, HSAForCausalLM):
            return {**tensors, "isolate_documents": isolated}
        if bool(isolated.any()):
            raise ValueError("a rival reads a row as one text: it takes no isolated documents")
        return tensors

    def _run(self, rows: _Rows, stage: StageConfig) -> torch.Tensor:
        inputs = {name: part for name, part in rows.inputs.items() if not name.startswith(_EVIDENCE)}
        evidence = self._evidence if len(inputs) < len(rows.inputs) else None
        if evidence is not None:
            told = Told(*(rows.inputs[_EVIDENCE + name] for name in Told._fields))
            evidence.watch(told, rows.inputs[_EVIDENCE + "shares"], stage)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss: torch.Tensor = self.model(**inputs, **rows.numbers, **self._options).loss
            # rows of less than a chunk have nothing to look for
            found = evidence.take() if evidence is not None else None
            taught, first = found or (torch.zeros_like(loss), torch.zeros_like(loss))
            whole = loss + stage.evidence_loss * taught if found else loss
        whole.backward()
        return torch.stack((loss, taught, first)).detach()

    def _lend_gradients(self, rows: _Rows) -> None:
        """Zeros, always at the same places, for what learns from rows of this shape; the rest has no gradient."""
        for part in rows.learning:
            if part not in self._gradients:
                self._gradients[part] = torch.empty_like(part)
            part.grad = self._gradients[part]
        torch._foreach_zero_([self._gradients[part] for part in rows.learning])

    @contextmanager
    def _refusing(self, stage: StageConfig, rows: _Rows) -> Iterator[None]:
        """Errors of CUDA say in one line what cannot be held; a card without memory says that itself."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            shape = tuple(rows.inputs["input_ids"].shape)
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(
                f"stage {stage.name!r}: {OPTION} cannot hold a forward of {shape} ({reason}); leave it out"
            ) from error
