"""What a training step keeps between forward and backward: recomputed layers, tiled feed-forward blocks, host memory.

Applied to the modules of a model from outside; names in its state_dict stay as they are. All of it is exact (tiles of
blocks in fp8 up to their scales). Called by
parallelize.py; tests/train/test_activations.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from hsa_ultralong.baselines import RivalForCausalLM
from hsa_ultralong.distributed.mesh import ParallelConfig
from hsa_ultralong.nn.decoder_layer import DecoderLayer
from hsa_ultralong.nn.mlp import SwiGLU
from hsa_ultralong.nn.window_attention import extends_a_cache
from hsa_ultralong.train.twins import Trained

# smaller tensors cost more to move than to keep
_LEAST_OFFLOADED_BYTES = 1 << 20
_KEPT = {
    getattr(torch.ops.aten, name).default
    for name in (
        "mm",
        "addmm",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
        "_scaled_dot_product_flash_attention_for_cpu",
    )
}
# the kernels of ops/sliding_window, an operator that exists where triton is
_KEPT_KERNEL = "hsa_ultralong.sliding_window.default"


def _keep_products(_context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    is_kept = operation in _KEPT or str(operation) == _KEPT_KERNEL
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


_keeping_products = functools.partial(create_selective_checkpoint_contexts, _keep_products)


def _recompute(module: Any, method: str = "forward", least_tokens: int = 0, **options: Any) -> None:
    """Make a method run again in the backward instead of keeping what it computes, from so many tokens on."""
    function: Callable[..., Any] = getattr(module, method)

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        if not torch.is_grad_enabled() or extends_a_cache(args) or args[0].shape[:-1].numel() < least_tokens:
            return function(*args)
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **options)

    setattr(module, method, run)


def _layers(model: Trained) -> list[Any]:
    """All layers that have a feed-forward block: of the lower decoder, the encoder and the upper decoder."""
    if isinstance(model, RivalForCausalLM):
        return list(model.model.layers)
    groups = model.model.upper_groups()
    upper = [layer for group in groups for layer in (group.hsa_layer, *group.layers)]
    return [*model.model.lower_layers, *model.model.chunk_encoder.layers, *upper]


def recompute_activations(model: Trained, mode: str, least_tokens: int = 0) -> None:
    """Activation checkpointing, see ParallelConfig.activation_checkpointing and checkpointing_tokens.

    Retrieval is never recomputed: its cost grows with the number of chunks, what it keeps does not.
    """
    if mode == "none":
        return
    for layer in _layers(model):
        if mode == "full":
            _recompute(layer, least_tokens=least_tokens)
            continue
        _recompute(layer.mlp, least_tokens=least_tokens)
        if isinstance(layer, DecoderLayer):
            _recompute(layer.attention, least_tokens=least_tokens, context_fn=_keeping_products)
        elif getattr(layer, "window_attention", None) is not None:
            _recompute(layer.window_attention, least_tokens=least_tokens, context_fn=_keeping_products)


def tile_mlps(model: nn.Module, tile_tokens: int) -> None:
    """Run every dense feed-forward block and shared expert `tile_tokens` tokens at a time.

    Only the input is kept for the backward; the (tokens, intermediate_size) tensors exist for one tile.
    """

    def tile(module: Any) -> None:
        function: Callable[[torch.Tensor], torch.Tensor] = module.forward

        @functools.wraps(function)
        def run(x: torch.Tensor) -> torch.Tensor:
            rows = x.flatten(0, -2)  # (N, M)
            if rows.shape[0] <= tile_tokens:
                return function(x)
            if torch.is_grad_enabled():
                parts = [
                    checkpoint(function, part, use_reentrant=False, preserve_rng_state=False)
                    for part in rows.split(tile_tokens)
                ]
            else:
                parts = [function(part) for part in rows.split(tile_tokens)]
            return torch.cat(parts).view(*x.shape[:-1], -1)

        module.forward = run

    for module in model.modules():
        if isinstance(module, SwiGLU):
            tile(module)


def _is_weight(tensor: torch.Tensor) -> bool:
    """A parameter, autocast's copy of one, or a view of either."""
    source = tensor if tensor._base is None else tensor._base
    if isinstance(source, nn.Parameter):
        return True
    made_by = source.grad_fn
    return made_by is not None and "ToCopy" in made_by.name() and hasattr(made_by.next_functions[0][0], "variable")


class _Offload(torch.autograd.graph.saved_tensors_hooks):
    """Large activations on a GPU wait in pinned host memory; weights and what shares memory with them stay."""

    def __init__(self) -> None:
        self.stream: torch.cuda.Stream | None = None
        super().__init__(self._pack, self._unpack)

    # called between compiled layers too, where the compiler would trace them and stop at record_stream
    @torch.compiler.disable
    def _pack(self, tensor: torch.Tensor) -> Any:
        num_bytes = tensor.numel() * tensor.element_size()
        is_expanded = tensor.untyped_storage().nbytes() < num_bytes
        if not tensor.is_cuda or num_bytes < _LEAST_OFFLOADED_BYTES or is_expanded or _is_weight(tensor):
            return tensor
        if self.stream is None:
            self.stream = torch.cuda.Stream(tensor.device)
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(self.stream)
        return tensor.device, host

    @torch.compiler.disable
    def _unpack(self, packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        device, host = packed
        assert self.stream is not None
        # the copy to the host may still be under way
        torch.cuda.current_stream().wait_stream(self.stream)
        return host.to(device, non_blocking=True)


def activation_context(config: ParallelConfig) -> AbstractContextManager[Any]:
    """Enter this around the forward (the backward may be outside): see ParallelConfig.offload_activations."""
    return _Offload() if config.offload_activations else nullcontext()
