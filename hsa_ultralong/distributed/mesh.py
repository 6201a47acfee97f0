"""Which process does what: sizes of every kind of parallelism, start of the process group, the mesh of all ranks.

Started by torchrun, one process a GPU. Dimensions, from the slowest to the fastest: "replicate" (copies of the
weights), "shard" (weights cut over these ranks), "context" (slices of the same rows). Used by train/parallelize.py and
the training loop; tests/distributed/test_parallelize.py, test_mesh.py; docs/distributed.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

CHECKPOINTING = ("none", "selective", "full")
GRADIENT_SYNC = ("every", "last")
PARAM_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
T = TypeVar("T")


@dataclass
class ParallelConfig:
    """How one training step is spread over processes, and what it keeps in memory.

    Attributes:
        replicate: groups of ranks that each hold all weights (hybrid sharding if shard > 1).
        shard: ranks that the weights, gradients and optimiser state are cut over; 0 = all that remain.
        context: ranks that share the tokens of every row. They hold parts of the weights like `shard` ranks.
        expert: 1, or shard * context: then each of these ranks holds whole experts and tokens travel to them;
            with 1 the experts' weights are cut over the ranks like all others and travel to the tokens.
        pool_over_ranks: with pool_memory, the rows of all data ranks make one pool.
        param_dtype: on CUDA, dtype in which weights are gathered and layers compute: "bfloat16", or "float32", which
            leaves precision to autocast, as on one device. Gradients are summed in fp32 in both.
        reshard_after_forward: free gathered weights after a layer's forward and gather them again in the backward.
        gradient_sync: the forwards of a step after which gradients are reduce-scattered: "every", or the "last" one.
            Until then they stay whole on every rank, and so do gathered weights unless reshard_after_forward is set.
        activation_checkpointing: "none"; "selective": recompute feed-forward blocks, norms and rotary positions, keep
            projections, attention and retrieval; "full": keep the inputs of layers and the retrieval only.
        checkpointing_tokens: forwards of fewer tokens keep everything; 0 = checkpointing acts on all of them.
        offload_activations: keep large activations in host memory between forward and backward (CUDA only).
        mlp_tile_tokens: run feed-forward blocks this many tokens at a time, each recomputed in the backward; 0 = whole.
        cuda_graphs: forward and backward of every shape of rows as one CUDA graph, in one process (train/graphs.py).
    """

    replicate: int = 1
    shard: int = 0
    context: int = 1
    expert: int = 1
    pool_over_ranks: bool = False
    param_dtype: str = "bfloat16"
    reshard_after_forward: bool = True
    gradient_sync: str = "every"
    activation_checkpointing: str = "none"
    checkpointing_tokens: int = 0
    offload_activations: bool = False
    mlp_tile_tokens: int = 0
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        least_sizes = {"replicate": 1, "shard": 0, "context": 1, "expert": 1}
        for name, least in {**least_sizes, "checkpointing_tokens": 0, "mlp_tile_tokens": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")
        choices_of = (
            ("activation_checkpointing", CHECKPOINTING),
            ("param_dtype", tuple(PARAM_DTYPES)),
            ("gradient_sync", GRADIENT_SYNC),
        )
        for name, choices in choices_of:
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        if self.checkpointing_tokens and self.activation_checkpointing == "none":
            raise ValueError("checkpointing_tokens goes with activation_checkpointing, which is none: set both")

    def checkpointing(self, tokens: int) -> str:
        """activation_checkpointing of a forward of so many tokens on one process."""
        return "none" if tokens < self.checkpointing_tokens else self.activation_checkpointing


def init_distributed(device: str | torch.device = "cpu", *, timeout_minutes: float = 30.0) -> torch.device:
    """Join the processes that torchrun started: gloo on a CPU, NCCL on GPUs (and gloo for what lies on the host).

    Returns:
        The device of this process: cuda:LOCAL_RANK on GPUs. Without torchrun, `device` itself, and nothing starts.

    Raises:
        ValueError: if torchrun's variables are incomplete or the host has fewer GPUs than local ranks.
    """
    device = torch.device(device)
    if "WORLD_SIZE" not in os.environ:
        return device
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(f"WORLD_SIZE is set but {', '.join(missing)} is not: start the processes with torchrun")
    backend = "gloo"
    if device.type == "cuda":
        local, found = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= found:
            raise ValueError(f"local rank {local} has no GPU, the host shows {found}: use --nproc-per-node={found}")
        device, backend = torch.device("cuda", local), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))
    return device


def build_mesh(config: ParallelConfig, device_type: str) -> DeviceMesh | None:
    """All ranks as ("replicate", "shard", "context"), or None for a single process.

    Raises:
        ValueError: if the sizes do not multiply to the number of processes.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    fixed = config.replicate * config.context
    shard = config.shard or max(1, world // fixed)
    if fixed * shard != world:
        raise ValueError(
            f"replicate={config.replicate} x shard={config.shard or 'rest'} x context={config.context} does not fit "
            f"{world} process{'es' if world > 1 else ''}: change the sizes, or start {fixed * shard} with torchrun"
        )
    if config.expert not in (1, shard * config.context):
        raise ValueError(
            f"expert must be 1 or shard * context = {shard * config.context}, got {config.expert}: experts are spread "
            "over all ranks between which weights are cut; use replicate for smaller groups"
        )
    if world == 1:
        return None
    sizes = (config.replicate, shard, config.context)
    return init_device_mesh(device_type, sizes, mesh_dim_names=("replicate", "shard", "context"))


def weight_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The ranks by what they hold of the weights: ("replicate", "shard") or ("shard",), context ranks among them."""
    replicate = mesh["replicate"].size()
    shard = mesh.size() // replicate
    if replicate == 1:
        return init_device_mesh(mesh.device_type, (shard,), mesh_dim_names=("shard",))
    return init_device_mesh(mesh.device_type, (replicate, shard), mesh_dim_names=("replicate", "shard"))


def data_group(mesh: DeviceMesh) -> dist.ProcessGroup:
    """The ranks that hold other rows than this one and the same slice of them, itself included."""
    sizes = (data_world(mesh), mesh["context"].size())
    return init_device_mesh(mesh.device_type, sizes, mesh_dim_names=("data", "context"))["data"].get_group()


def data_world(mesh: DeviceMesh | None) -> int:
    """How many parts the rows of a step are shared out in."""
    return 1 if mesh is None else mesh["replicate"].size() * mesh["shard"].size()


def data_rank(mesh: DeviceMesh | None) -> int:
    """Which of these parts this process loads: the same one on all ranks of a context group."""
    if mesh is None:
        return 0
    return mesh.get_local_rank("replicate") * mesh["shard"].size() + mesh.get_local_rank("shard")


@torch.no_grad()
def context_place(mesh: DeviceMesh | None) -> int:
    """Which slice of a row this process has."""
    return 0 if mesh is None else mesh.get_local_rank("context")


def total(part: torch.Tensor, mesh: DeviceMesh | None) -> torch.Tensor:
    """The sum of a tensor over all ranks (a loss, a number of labels), without gradient."""
    part = part.detach().clone()
    if mesh is not None:
        dist.all_reduce(part)
    return part


def patient_group() -> dist.ProcessGroup | None:
    """All processes over gloo, for what may take hours, such as tokenising or a slow disk; None for a single process.

    A process that dies closes its connections, so its peers fail at once all the same.
    """
    return dist.new_group(backend="gloo", timeout=timedelta(days=7)) if dist.is_initialized() else None


def everywhere(work: Callable[[], T], group: dist.ProcessGroup | None) -> list[T]:
    """What `work` gives on every process, by rank; all of them call it with a group of `patient_group`.

    Raises:
        Exception: that of `work` here. OSError: naming the rank and its error, if `work` failed elsewhere only, so
            that no process goes on to wait for one that failed.
    """
    done: Any = None
    error: Exception | None = None
    try:
        done = work()
    except Exception as caught:
        error = caught
    own = (done, None if error is None else f"{type(error).__name__}: {error}")
    parts = [own]
    if group is not None:
        parts = parts * dist.get_world_size(group)
        dist.all_gather_object(parts, own, group=group)
    if error is not None:
        raise error
    for rank, (_, message) in enumerate(parts):
        if message is not None:
            raise OSError(f"process {rank}: {message}")
    return [part for part, _ in parts]


def on_first(work: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """What `work` gives on the first process, which alone does it while the others wait; errors as in `everywhere`."""
    is_first = group is None or dist.get_rank() == 0
    found: list[Any] = everywhere(lambda: work() if is_first else None, group)
    return found[0]  # type: ignore[no-any-return]
