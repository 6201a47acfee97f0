"""The one runner of the decoder: its layers below the memory and its groups above it.

Training, reading, decoding, long rows and rows over processes differ in what stands before the tokens of a call
(`Windows`) and in how a part is run (`nn.upper_group.Parts`), never in the loops. tests/models/test_stack.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from hsa_ultralong.nn.chunk_retriever import Retrieval
from hsa_ultralong.nn.rotary import RotaryTable
from hsa_ultralong.nn.upper_group import MODULES, Parts, UpperGroup
from hsa_ultralong.nn.views import MemoryView

# groups draw their selection noise apart
_SEED_STEP = 7919


class Windows(Protocol):
    """What the windows of all layers read before the tokens of a call.

    An HSACache; the rings of a decoding step (nn/ring_window.py); the border of a piece (train/segmented.py); the
    slices before this one (distributed/context.py). Whole rows have None.
    """

    @property
    def length(self) -> int:
        """Tokens before the call's own that a window holds."""
        ...

    def state(self, layer: int) -> Any:
        """Of one layer, counted from the embedding: a WindowState, or what acts like one."""
        ...


def run_lower(
    layers: Iterable[nn.Module],
    x: torch.Tensor,
    rotary: RotaryTable,
    *,
    segments: torch.Tensor | None = None,
    windows: Windows | None = None,
    parts: Parts = MODULES,
    states: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """The lower decoder, (B, T, M) -> (B, T, M); every layer's output is added to `states`."""
    for number, layer in enumerate(layers):
        x = parts.layer(layer, x, rotary, segments, None if windows is None else windows.state(number))
        if states is not None:
            states.append(x)
    return x


def run_upper(
    groups: Iterable[UpperGroup],
    x: torch.Tensor,
    rotary: RotaryTable,
    views: Sequence[MemoryView],
    *,
    first_layer: int,
    topk: int,
    segments: torch.Tensor | None = None,
    windows: Windows | None = None,
    noise_seed: int | torch.Tensor | None = None,
    noise_start: int = 0,
    parts: Parts = MODULES,
    states: list[torch.Tensor] | None = None,
    note: Callable[[Retrieval], Any] | None = None,
) -> torch.Tensor:
    """The upper decoder over the given memories, (B, T, M) -> (B, T, M).

    Args:
        first_layer: number of the first group's first layer.
        noise_seed: of the selection noise of the rows, None without; noise_start: place of the first token in them.
        states: gets the output of every layer. note: called with what each group retrieved.
    """
    number = first_layer
    for index, group in enumerate(groups):
        kept = None
        if windows is not None:
            kept = [windows.state(number + layer) for layer in range(group.num_layers)]
        number += group.num_layers
        seed = None if noise_seed is None else noise_seed + _SEED_STEP * index
        outputs, retrieval = parts.group(
            group, x, views=views, rotary=rotary, segments=segments, states=kept, topk=topk, noise_seed=seed,
            noise_start=noise_start, collect=states is not None,
        )  # fmt: skip
        x = outputs[-1]
        if states is not None:
            states.extend(outputs)
        if note is not None:
            note(retrieval)
    return x
