"""Resumable checkpoints: every process writes its own part of weights and optimiser state while training goes on.

A checkpoint is a folder `step-<n>`: safetensors files of torch.distributed.checkpoint, one a process, and state.json
(state.py: position in the run, size and SHA-256 of every file). It is written beside its final name and renamed when
all is on disk, so what carries the name is whole. Any number of processes reads it, whatever the number that wrote it.
No file is a pickle: DCP's own files are, its Hugging Face form is not. Called by loop.py;
tests/train/test_checkpoint.py.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
import uuid
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor, distribute_tensor

from hsa_ultralong.distributed.mesh import everywhere, on_first, patient_group
from hsa_ultralong.files.checksum import file_record
from hsa_ultralong.files.durable import write_whole
from hsa_ultralong.files.messages import reason
from hsa_ultralong.files.regular import open_regular
from hsa_ultralong.train.state import STATE_FILE, advice, encode_state, list_checkpoints, read_state

logger = logging.getLogger(__name__)

_OPTIMIZER = "optimizer/"
# what one host writes may show up late on another
_VISIBLE_SECONDS = 30.0


class CheckpointError(OSError):
    """A checkpoint could not be written; those before it are untouched."""


def model_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters, tied ones once, and persistent buffers, by name; they share memory with the model."""
    tensors: dict[str, torch.Tensor] = {name: part.detach() for name, part in model.named_parameters()}
    every_name = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {name: part for name, part in model.state_dict().items() if name not in every_name}
    return {**tensors, **buffers}


def optimizer_tensors(model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    """Optimiser state by parameter: "optimizer/exp_avg/<name>" and so on."""
    tensors = {}
    for name, parameter in model.named_parameters():
        for optimizer in optimizers:
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{_OPTIMIZER}{key}/{name}"] = torch.as_tensor(value)
    return tensors


class Checkpoints:
    """The checkpoints of one run folder.

    Args:
        run: folder of the run, the same one for all processes.
        keep: how many to keep.

    Raises:
        ValueError: if the processes do not share the folder.
    """

    def __init__(self, run: Path, keep: int) -> None:
        self.run, self.folder, self.keep = run, run / "checkpoints", keep
        self._is_distributed = dist.is_initialized()
        self._rank, self._world = (dist.get_rank(), dist.get_world_size()) if self._is_distributed else (0, 1)
        # saving goes on beside training: its exchanges must not mix with the others'
        self.group = patient_group()
        self._pending: Future[Path] | None = None
        # the newest checkpoint as far as this process knows
        self.last: Path | None = None
        self._check_shared()
        # one process is no mistake
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")

    def _check_shared(self) -> None:
        if not self._is_distributed:
            return
        mark = self.run / on_first(lambda: f".shared-{uuid.uuid4().hex}", self.group)
        on_first(mark.touch, self.group)
        sees = everywhere(lambda: _appears(mark), self.group)
        if self._rank == 0:
            mark.unlink()
        if not all(sees):
            raise ValueError(
                f"process {sees.index(False)} does not see what the first one writes to {self.run}: the run folder "
                "must be one that all hosts share"
            )

    def newest(self) -> Path | None:
        """The newest complete checkpoint, the same one on every process; None if there is none."""
        name = on_first(lambda: max((path.name for path in list_checkpoints(self.run)), default=None), self.group)
        return None if name is None else self.folder / name

    def save(self, tensors: dict[str, torch.Tensor], state: dict[str, Any], *, wait: bool) -> None:
        """Write `run/checkpoints/step-<global_step>` and delete all but the newest; every process calls it.

        The tensors are copied to the host before this returns; with `wait`, the files are written too.

        Raises:
            CheckpointError: if this one or the one before could not be written.
        """
        self.wait()
        final = self.folder / f"step-{state['global_step']:08d}"
        partial = self.folder / f".partial-{final.name}"
        on_first(self._make_room, self.group)
        writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
        options: dict[str, Any] = {"process_group": self.group, "no_dist": not self._is_distributed}
        written = dcp.async_save(dict(tensors), storage_writer=writer, **options)
        assert isinstance(written, Future)
        executor = ThreadPoolExecutor(1)
        self._pending = executor.submit(self._finish, written, partial, final, state)
        executor.shutdown(wait=False)
        if wait:
            self.wait()

    def _make_room(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        # what an interrupted save left behind would keep its room on a full disk
        for stale in self.folder.glob(".partial-*"):
            if stale.is_symlink():
                stale.unlink()
            else:
                shutil.rmtree(stale, ignore_errors=True)

    def _finish(self, written: Future[Any], partial: Path, final: Path, state: dict[str, Any]) -> Path:
        """Once the files of all processes are on disk, the checkpoint gets its name; it ends alike on all processes."""
        try:
            written.result()
            # every process surely sees what it wrote itself
            listings = everywhere(lambda: [file.name for file in partial.iterdir()], self.group)
            own = sorted({name for names in listings for name in names})[self._rank :: self._world]
            parts = everywhere(lambda: {name: file_record(partial / name) for name in own}, self.group)
            files = dict(sorted(item for part in parts for item in part.items()))
            on_first(lambda: self._publish(partial, final, {"files": files, **state}), self.group)
        except (Exception, CheckpointException) as error:
            if self._rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
            saved = list_checkpoints(self.run)
            kept = f"the last one, {saved[-1].name}, is intact" if saved else "there is none before it"
            remedy = "make room or permit writing there and run the same command again"
            raise CheckpointError(f"checkpoint {final} could not be written ({cause}); {kept}; {remedy}") from error
        self.last = final
        return final

    def _publish(self, partial: Path, final: Path, state: dict[str, Any]) -> None:
        write_whole(partial / STATE_FILE, encode_state(state))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in list_checkpoints(self.run)[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)

    @property
    def has_failed(self) -> bool:
        """Whether a save has failed meanwhile, known earlier on some processes than on others; `wait` says why."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait(self) -> None:
        """Return when the last save is complete.

        Raises:
            CheckpointError: if it failed.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    @property
    def is_pending(self) -> bool:
        """Whether a checkpoint is still being written."""
        return self._pending is not None and not self._pending.done()

    def load(
        self,
        path: Path,
        model: torch.nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        others: Mapping[str, torch.Tensor],
    ) -> dict[str, Any]:
        """Read weights and optimiser state into `model` and `optimizers`; returns the rest of the state.

        others: further tensors by their names, which the checkpoint must have too.

        Raises:
            ValueError: if the checkpoint is damaged, of another format, or of another model.
        """
        state = read_state(path)
        own = sorted(state["files"])[self._rank :: self._world]
        parts = everywhere(
            lambda: [name for name in own if not _is_whole(path / name, state["files"][name])], self.group
        )
        if damaged := [name for part in parts for name in part]:
            raise ValueError(f"checkpoint file {path / damaged[0]} is missing, truncated or corrupt; {advice(path)}")
        shapes = _stored_shapes(path)
        targets = {**model_tensors(model), **others}
        _check_fit({name: size for name, size in shapes.items() if not name.startswith(_OPTIMIZER)}, targets)
        slots = _optimizer_slots(model, optimizers, shapes)
        targets.update({name: tensor for name, (_, _, _, tensor) in slots.items()})
        reader = HuggingFaceStorageReader(str(path))
        dcp.load(targets, storage_reader=reader, process_group=self.group, no_dist=not self._is_distributed)
        for optimizer, parameter, key, tensor in slots.values():
            optimizer.state[parameter][key] = tensor
        broken = everywhere(lambda: [name for name, tensor in targets.items() if not _is_finite(tensor)], self.group)
        if names := [name for part in broken for name in part]:
            raise ValueError(f"checkpoint {path} holds numbers that are not finite ({names[0]}); {advice(path)}")
        self.last = path
        return state


def _stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a checkpoint, all of whose parts are there.

    Raises:
        ValueError: a file is no safetensors file, or lacks a part.
    """
    try:
        stored = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
        shapes = {}
        for name, entry in stored.items():
            assert isinstance(entry, TensorStorageMetadata)
            if sum(chunk.sizes.numel() for chunk in entry.chunks) != entry.size.numel():
                raise ValueError(f"{name} is not whole")
            shapes[name] = tuple(entry.size)
    # whatever a file that follows no rule makes the reader stumble over
    except Exception as error:
        cause = f"{type(error).__name__}: {reason(error)}"
        raise ValueError(f"checkpoint {path} cannot be read ({cause}); {advice(path)}") from error
    return shapes


def _is_finite(tensor: torch.Tensor) -> bool:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return not local.is_floating_point() or bool(torch.isfinite(local).all())


def _optimizer_slots(
    model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[torch.optim.Optimizer, torch.nn.Parameter, str, torch.Tensor]]:
    """Room for every stored optimiser tensor: like its parameter, or a number."""
    owner = {part: one for one in optimizers for group in one.param_groups for part in group["params"]}
    parameters, slots = dict(model.named_parameters()), {}
    for name, shape in shapes.items():
        if not name.startswith(_OPTIMIZER):
            continue
        key, _, parameter_name = name.removeprefix(_OPTIMIZER).partition("/")
        parameter = parameters.get(parameter_name)
        if parameter is None or parameter not in owner or shape not in ((), tuple(parameter.shape)):
            raise ValueError(
                f"checkpoint does not fit the model: no optimiser here keeps {name} of shape {shape}; go on with the "
                "settings of the command that wrote it"
            )
        optimizer = owner[parameter]
        if shape == tuple(parameter.shape) and key != "step":
            tensor = torch.zeros_like(parameter, requires_grad=False)
        else:
            is_fused = optimizer.defaults.get("fused")
            tensor = torch.zeros(shape, device=parameter.device if is_fused else "cpu")
        slots[name] = (optimizer, parameter, key, tensor)
    _check_complete(slots)
    return slots


def _check_complete(slots: Mapping[str, tuple[torch.optim.Optimizer, torch.nn.Parameter, str, torch.Tensor]]) -> None:
    """Every parameter of an optimiser that has a state at all has all of it."""
    wanted: dict[torch.optim.Optimizer, set[str]] = {}
    found: dict[torch.nn.Parameter, set[str]] = {}
    for optimizer, parameter, key, _ in slots.values():
        wanted.setdefault(optimizer, set()).add(key)
        found.setdefault(parameter, set()).add(key)
    for name, (optimizer, parameter, _, _) in slots.items():
        if missing := sorted(wanted[optimizer] - found[parameter]):
            raise ValueError(f"checkpoint does not fit the model: beside {name} it lacks {missing[0]}")


def _check_fit(stored: Mapping[str, tuple[int, ...]], own: Mapping[str, torch.Tensor]) -> None:
    for name, shape in stored.items():
        if name in own and tuple(own[name].shape) != shape:
            raise ValueError(
                f"checkpoint does not fit the model: {name} is {shape} there, {tuple(own[name].shape)} here"
            )
    missing, unexpected = sorted(own.keys() - stored.keys()), sorted(stored.keys() - own.keys())
    if missing or unexpected:
        raise ValueError(f"checkpoint does not fit the model: missing {missing[:3]}, unexpected {unexpected[:3]}")


def load_weights(model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Copy whole tensors, the same ones on every process, into a model that may be spread over processes.

    Raises:
        ValueError: if they are those of another model.
    """
    own = model_tensors(model)
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - own.keys()
    given = {name: tensor for name, tensor in weights.items() if name not in tied}
    _check_fit({name: tuple(tensor.shape) for name, tensor in given.items()}, own)
    for name, target in own.items():
        source = given[name].to(device=target.device, dtype=target.dtype)
        if isinstance(target, DTensor):
            source = distribute_tensor(source, target.device_mesh, target.placements)
        target.copy_(source)


def _appears(file: Path) -> bool:
    """Whether the file is there, perhaps after a while."""
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _is_whole(file: Path, expected: dict[str, Any]) -> bool:
    try:
        os.close(open_regular(file, os.O_RDONLY | os.O_NOFOLLOW))
        return file.stat().st_size == expected["bytes"] and file_record(file) == expected
    except (OSError, ValueError):
        return False
