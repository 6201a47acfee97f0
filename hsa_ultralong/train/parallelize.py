"""Everything that spreads a model over processes or saves its memory, applied from outside to single-device code.

Order: context and pool ranks, tiles, recomputation, compilation, experts, FSDP2. Gradients are summed over the ranks,
not averaged: every rank's loss is its share, which `num_items_in_batch` (labels of the whole step on all ranks) makes
of it. docs/distributed.md; tests/distributed/test_parallelize.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from hsa_ultralong.distributed import ContextRanks, PoolRanks
from hsa_ultralong.distributed.collectives import Ranks
from hsa_ultralong.distributed.experts import ExpertRanks, spread
from hsa_ultralong.distributed.mesh import PARAM_DTYPES, ParallelConfig, data_group, weight_mesh
from hsa_ultralong.models import HSAForCausalLM
from hsa_ultralong.models.ranks import ALONE
from hsa_ultralong.nn.chunk_encoder import Total
from hsa_ultralong.nn.moe import MixtureOfExperts
from hsa_ultralong.train.activations import recompute_activations, tile_mlps
from hsa_ultralong.train.compilation import compile_layers
from hsa_ultralong.train.twins import Trained


def parallelize(model: Trained, mesh: DeviceMesh | None, config: ParallelConfig, *, use_compile: bool = False) -> None:
    """Change `model` in place; every rank calls it with the same weights, before the optimiser is made.

    Args:
        mesh: of build_mesh; None for one process, where only memory saving and compilation apply.
        use_compile: torch.compile layer by layer.

    Raises:
        ValueError: if the ranks' weights differ, or the model has what cannot be cut.
    """
    if config.mlp_tile_tokens:
        tile_mlps(model, config.mlp_tile_tokens)
    recompute_activations(model, config.activation_checkpointing, config.checkpointing_tokens)
    if use_compile:
        compile_layers(model, joins=config.activation_checkpointing != "full", is_cut=mesh is not None)
    if mesh is None:
        return
    if not isinstance(model, HSAForCausalLM):
        raise ValueError("a twin trains in one process: leave torchrun out")
    _check(model)
    if config.context > 1:
        model.model.context_ranks = ContextRanks(mesh["context"].get_group())
    if config.pool_over_ranks:
        model.model.pool_ranks = PoolRanks(data_group(mesh))
    _share_landmark_center(model)
    weights = weight_mesh(mesh)
    apart = _spread_experts(model, weights, config) if config.expert > 1 else set()
    _shard(model, weights, config, apart)


def _check(model: HSAForCausalLM) -> None:
    scalars = [name for name, parameter in model.named_parameters() if parameter.dim() == 0]
    if scalars:
        raise ValueError(f"{scalars[0]} is a scalar, which FSDP cannot cut: train without position_decay")
    sums = torch.stack([part.detach().sum(dtype=torch.float64) for part in model.parameters()])
    lowest, highest = sums.clone(), sums.clone()
    dist.all_reduce(lowest, dist.ReduceOp.MIN)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    if not torch.allclose(lowest, highest, rtol=1e-4, atol=1e-3):
        raise ValueError("ranks start from different weights: seed them alike, or load the same ones on all")


def _share_landmark_center(model: HSAForCausalLM) -> None:
    """The centre moves by the mean over the chunks of all ranks, in the forward, as in one process.

    Sums and counts are added over all ranks: what context or pool ranks added before scales both and leaves the mean.
    """
    world, encoder = Ranks(), model.model.chunk_encoder
    center = encoder.center

    def center_of_all(
        landmarks: torch.Tensor, lengths: torch.Tensor | None = None, total: Total | None = None
    ) -> torch.Tensor:
        return center(landmarks, lengths, lambda sums: world.total(sums if total is None else total(sums)))

    encoder.center = center_of_all  # type: ignore[method-assign]


def _spread_experts(model: HSAForCausalLM, mesh: DeviceMesh, config: ParallelConfig) -> set[nn.Parameter]:
    """Cut the experts of every mixture over the ranks that share weights; returns them: FSDP leaves them alone."""
    apart: set[nn.Parameter] = set()
    ranks = ExpertRanks(mesh["shard"].get_group())
    for part in model.modules():
        if not isinstance(part, MixtureOfExperts):
            continue
        if part.num_experts % config.expert:
            raise ValueError(f"expert={config.expert} must divide the {part.num_experts} experts of the model")
        part.expert_ranks = ranks
        for name in ("gate_up", "down"):
            own = spread(getattr(part, name), mesh)
            weight = nn.Parameter(own)
            # copies under "replicate" hold parts of one gradient
            weight.register_hook(lambda grad, placements=own.placements: grad.redistribute(placements=placements))
            setattr(part, name, weight)
            apart.add(weight)
    if not apart:
        raise ValueError(f"expert={config.expert} needs a mixture of experts (num_experts > 0)")
    return apart


def _shard(model: HSAForCausalLM, mesh: DeviceMesh, config: ParallelConfig, apart: set[nn.Parameter]) -> None:
    """FSDP2: a unit for every lower layer, encoder layer and upper window layer, for the rest of a group, for the root.

    Embedding, the encoder's projections, final norm and head (perhaps tied) belong to the root, whose weights stay
    gathered from the forward on: the loss reads the head's weight directly.
    """
    policy = MixedPrecisionPolicy()
    if mesh.device_type == "cuda":
        # inputs keep their precision: rotary tables and retrieval scores are fp32 throughout
        policy = MixedPrecisionPolicy(
            param_dtype=PARAM_DTYPES[config.param_dtype], reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    units: list[nn.Module] = [*model.model.lower_layers, *model.model.chunk_encoder.layers]
    for group in model.model.upper_groups():
        units += [*group.layers, group]
    common: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "ignored_params": apart}
    for unit in units:
        fully_shard(unit, reshard_after_forward=config.reshard_after_forward, **common)
    fully_shard(model, reshard_after_forward=False, **common)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    # what makes `gathered` see the root as FSDP's root; on a card FSDP moves what it is called with: something must be
    model.meet = lambda nothing: nothing  # type: ignore[assignment]
    register_fsdp_forward_method(model, "meet")


def begin_forward(model: nn.Module, config: ParallelConfig, *, is_last: bool) -> None:
    """Before every forward of a step: whether it is the last one, whose backward leaves the gradients of the step.

    Before, gradients are not added over "replicate", and with gradient_sync="last" not over "shard" either.
    """
    if not isinstance(model, FSDPModule):
        return
    if config.gradient_sync == "every":
        model.set_requires_all_reduce(is_last)
        return
    model.set_requires_gradient_sync(is_last)
    model.set_reshard_after_backward(is_last or config.reshard_after_forward)
    # the root's weights are gathered from forward to backward in any case
    model.set_reshard_after_backward(is_last, recurse=False)


@contextmanager
def gathered(model: Trained) -> Iterator[None]:
    """Inside, any part of the model may be called directly on all ranks, with backwards or without.

    Otherwise only the model as a whole may be called. What reads all weights at once (memorize, save_pretrained) needs
    an ordinary model with the whole state instead.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    model.meet(None)
    model.unshard()
    model.set_reshard_after_backward(False, recurse=False)
    try:
        yield
    finally:
        model.set_reshard_after_backward(True, recurse=False)
        # those below as well: with reshard_after_forward=False nothing else frees them where no backward follows
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


@contextmanager
def alone(model: Trained) -> Iterator[None]:
    """Inside, every rank sees whole rows and no others: neither context nor pool ranks share them (probes)."""
    if not isinstance(model, HSAForCausalLM):
        yield
        return
    ranks = model.model.context_ranks, model.model.pool_ranks
    model.model.context_ranks = model.model.pool_ranks = ALONE
    try:
        yield
    finally:
        model.model.context_ranks, model.model.pool_ranks = ranks


@torch.no_grad()
def synchronize_buffers(model: nn.Module, mesh: DeviceMesh | None) -> None:
    """After every optimiser step, before `update_router_bias`: the load of the experts, summed over the ranks."""
    loads = [part.expert_load for part in model.modules() if isinstance(part, MixtureOfExperts)]
    if mesh is None or not loads:
        return
    summed = Ranks().total(torch.stack(loads))
    for load, total in zip(loads, summed, strict=True):
        load.copy_(total)


def clip_gradients(model: nn.Module, max_norm: float) -> torch.Tensor:
    """torch's clip_grad_norm_ over whole gradients; the norm before clipping as an ordinary tensor, on all ranks."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
