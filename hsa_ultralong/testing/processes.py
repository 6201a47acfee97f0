"""Start a few processes that talk over gloo or NCCL, and compare what they sum up to with one process."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# a guard against hangs: no test may depend on how fast the machine is
HANG_SECONDS = 600


def _enter(rank: int, world: int, address: str, work: Callable[..., None], args: Any, device: str) -> None:
    backend = "gloo"
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    if device == "cuda":
        backend = "cpu:gloo,cuda:nccl"
        count = torch.cuda.device_count()
        torch.cuda.set_device(rank % count)
        if count < world:
            # NCCL refuses two ranks on one card of one host: let each be a host of its own, that talk over sockets
            os.environ.update(NCCL_HOSTID=f"rank{rank}", NCCL_SOCKET_IFNAME="lo", NCCL_IB_DISABLE="1")
    meet: dict[str, Any] = {"init_method": f"file://{address}", "rank": rank, "world_size": world}
    dist.init_process_group(backend, timeout=timedelta(seconds=HANG_SECONDS), **meet)
    try:
        work(rank, world, *args)
    finally:
        dist.destroy_process_group()


def launch(world: int, address: str, work: Callable[..., None], *args: Any, device: str = "cpu") -> None:
    """Run work(rank, world, *args) in `world` processes; an assertion in any of them fails the test. With "cuda" they
    share the GPUs out, one card to several if there are not enough: right, and slow."""
    start = "fork" if device == "cpu" else "spawn"
    context = mp.start_processes(
        _enter, (world, address, work, args, device), nprocs=world, start_method=start, join=False
    )
    while not context.join(timeout=60):
        pass


def run(model: torch.nn.Module, **inputs: Any) -> Any:
    """Loss, gradient of every parameter, and the running statistics, of one forward and backward."""
    model.zero_grad()
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    load = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("expert_load")}
    return {"loss": loss.detach(), **found, **load}


def assert_sums_equal(parts: Mapping[str, torch.Tensor], whole: Mapping[str, torch.Tensor], group: Any = None) -> None:
    """The sum over the ranks of every entry of `parts` is that of `whole`."""
    assert parts.keys() == whole.keys()
    for name, part in parts.items():
        total = part.clone()
        dist.all_reduce(total, group=group)
        torch.testing.assert_close(total, whole[name], rtol=1e-9, atol=1e-11, msg=f"{name} differs from one process")
