"""Exact gradients of rows of any length with the activations of one segment: recomputation over time, not over layers.

The lower decoder runs over the segments and keeps what crosses their borders: the windows' last keys and values, and
its outputs. The memory of the whole row follows. Then every segment of the upper decoder runs again with gradients,
last one first, as its windows give gradients to the segment before; what reaches the memory and the lower outputs adds
up, and goes back through the encoder and the lower decoder in the same way. Loss and gradients are those of one
ordinary forward and backward (tests/train/test_segmented.py). Kept per token: the lower output and its gradient (M
each) and the memory and its gradient, 2*Hkv*D + Hr*R/S each.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from hsa_ultralong.models import HSAForCausalLM
from hsa_ultralong.models.layout import Layout, chunk_places, packed_layout, plain_layout, restrict
from hsa_ultralong.models.views import own_view
from hsa_ultralong.nn.chunk_memory import ChunkTensors
from hsa_ultralong.nn.moe import MixtureOfExperts
from hsa_ultralong.nn.rotary import RotaryTable, rotary_table
from hsa_ultralong.ops import linear_cross_entropy

IGNORE_INDEX = -100
Pair = tuple[torch.Tensor, torch.Tensor]


class CarriedWindow:
    """The window of one layer at the beginning of a segment, and, after the layer has run, at its end; stands where a
    cache's window stands, but inside the autograd graph."""

    def __init__(self, window: int, carried: Pair | None) -> None:
        self.reach, self.carried = max(window - 1, 0), carried
        self.left: Pair | None = None

    @property
    def length(self) -> int:
        return 0 if self.carried is None else self.carried[0].shape[1]

    def extend(self, keys: torch.Tensor, values: torch.Tensor) -> Pair:
        if self.carried is not None:
            keys, values = torch.cat((self.carried[0], keys), 1), torch.cat((self.carried[1], values), 1)
        first = max(0, keys.shape[1] - self.reach)
        self.left = (keys[:, first:], values[:, first:])
        return keys, values


class Windows:
    """The windows of consecutive layers at one border, as leaves where gradients are wanted."""

    def __init__(self, sizes: list[int], carried: list[Pair | None], with_gradients: bool = False) -> None:
        if with_gradients:
            carried = [None if pair is None else (_leaf(pair[0]), _leaf(pair[1])) for pair in carried]
        self.states = [CarriedWindow(size, pair) for size, pair in zip(sizes, carried, strict=True)]

    def leave(self) -> list[Pair | None]:
        """What the segment leaves to the next one, detached."""
        return [None if s.left is None else (s.left[0].detach(), s.left[1].detach()) for s in self.states]

    def gradients(self) -> list[Pair | None]:
        """What the carried keys and values received; None where nothing was carried."""
        return [None if s.carried is None else (_gradient(s.carried[0]), _gradient(s.carried[1])) for s in self.states]

    def roots(self, gradients: list[Pair | None]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """What was left and the gradients that the next segment gives it."""
        for state, pair in zip(self.states, gradients, strict=True):
            if state.left is not None and pair is not None:
                yield from zip(state.left, pair, strict=True)


class Row(NamedTuple):
    """One call: ids (B, T), labels of the next tokens (B, T), layout, divisor of the loss, and segment borders."""

    ids: torch.Tensor
    targets: torch.Tensor
    layout: Layout
    divisor: torch.Tensor | float
    borders: list[tuple[int, int]]


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().requires_grad_()


def _gradient(leaf: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _backward(roots: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Backward from outputs with their gradients; frozen parts have none."""
    wanted = [root for root in roots if root[0].requires_grad]
    if wanted:
        torch.autograd.backward([output for output, _ in wanted], [gradient for _, gradient in wanted])


def segmented_loss_backward(
    model: HSAForCausalLM,
    batch: dict[str, torch.Tensor],
    segment_tokens: int,
    *,
    loss_scale: float = 1.0,
    num_items: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Loss of a batch; adds its gradients, times `loss_scale`, to the parameters', segment by segment.

    Call it under the autocast that the ordinary forward would have. Upper layers run twice forward, lower layers and
    the encoder twice too, once without gradients.

    Args:
        batch: input_ids and labels (B, T), optionally segment_ids (B, T) and isolate_documents, as HSAForCausalLM takes
            them. segment_tokens: a multiple of chunk_size. num_items: divisor of the summed loss; default the labels.

    Returns:
        The loss, a scalar without graph.

    Raises:
        ValueError: for a segment that is no multiple of chunk_size, or inputs that only the ordinary forward takes.
    """
    config = model.config
    if segment_tokens < 1 or segment_tokens % config.chunk_size:
        raise ValueError(f"segment_tokens must be a multiple of chunk_size={config.chunk_size}, got {segment_tokens}")
    known = {"input_ids", "labels", "segment_ids", "isolate_documents"}
    if extra := sorted(name for name, value in batch.items() if name not in known and value is not None):
        raise ValueError(f"segmented training takes {', '.join(sorted(known))}, not {', '.join(extra)}")
    if model.model.context_ranks is not None or model.model.pool_ranks is not None:
        raise ValueError("segmented training runs on one process: rows and pools cannot be shared over ranks")
    row = _row(model, batch, segment_tokens, num_items)
    pass_ = _Pass(model, row, loss_scale)
    with torch.no_grad():
        lower, borders = pass_.read_lower()
        memory = pass_.encode(lower)
        loss, upper_borders = pass_.read_upper(lower, memory)
    with _experts_counted_once(model):
        grad_lower, grad_memory = pass_.backward_upper(lower, memory, upper_borders)
        del memory
        pass_.backward_encoder(lower, grad_lower, grad_memory)
        del lower, grad_memory
        pass_.backward_lower(grad_lower, borders)
    return loss


def _row(
    model: HSAForCausalLM, batch: dict[str, torch.Tensor], segment_tokens: int, num_items: torch.Tensor | int | None
) -> Row:
    ids, labels = batch["input_ids"], batch["labels"]
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    segment_ids = batch.get("segment_ids")
    if segment_ids is None:
        layout = plain_layout(ids[..., None], None, None)
    else:
        layout = packed_layout(segment_ids, model.config.chunk_size, None, None)
    layout = restrict(layout, batch.get("isolate_documents"))
    divisor = (targets != IGNORE_INDEX).sum().clamp_min(1) if num_items is None else num_items
    total = ids.shape[1]
    borders = [(start, min(start + segment_tokens, total)) for start in range(0, total, segment_tokens)]
    return Row(ids, targets, layout, divisor, borders)


@contextmanager
def _experts_counted_once(model: HSAForCausalLM) -> Iterator[None]:
    """Recomputed tokens do not count again toward the load of experts."""
    parts = [part for part in model.modules() if isinstance(part, MixtureOfExperts)]
    loads = [part.expert_load.clone() for part in parts]
    try:
        yield
    finally:
        for part, load in zip(parts, loads, strict=True):
            part.expert_load.copy_(load)


class _Pass:
    """The phases of one forward and backward over the segments of a batch."""

    def __init__(self, model: HSAForCausalLM, row: Row, loss_scale: float) -> None:
        self.model, self.inner, self.config, self.row = model, model.model, model.config, row
        self.loss_scale = loss_scale
        lower = self.config.num_lower_layers
        self.windows = self.config.layer_windows[:lower], self.config.layer_windows[lower:]
        self.places = chunk_places(row.layout, self.config.chunk_size)
        # one draw on the host generator: the same again when a segment is recomputed
        uses_noise = model.training and self.config.gumbel_noise
        self.noise_seed = int(torch.randint(2**31, ())) if uses_noise else None

    def _rotary(self, windows: Windows, x: torch.Tensor) -> RotaryTable:
        past = max((state.length for state in windows.states), default=0)
        assert self.config.head_dim is not None
        return rotary_table(past + x.shape[1], self.config.head_dim, self.config.rope_theta, x.device, x.dtype)

    def _window_segments(self, start: int, stop: int) -> torch.Tensor | None:
        segments = self.row.layout.window_segments
        return None if segments is None else segments[:, max(0, start - max(self.config.layer_windows)) : stop]

    def _lower(self, start: int, stop: int, windows: Windows) -> torch.Tensor:
        x = self.inner.embed_tokens(self.row.ids[:, start:stop])
        rotary, segments = self._rotary(windows, x), self._window_segments(start, stop)
        for layer, state in zip(self.inner.lower_layers, windows.states, strict=True):
            x = layer(x, rotary, segments, state)
        return x

    def _encoded(self, hidden: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """k, v and raw landmarks of the full chunks of a segment (B, n, M)."""
        size = self.config.chunk_size
        count = hidden.shape[1] // size
        if not count:
            return None
        lengths, first = self.places.lengths, start // size
        lengths = None if lengths is None else lengths[:, first : first + count]
        return self.inner.chunk_encoder.project(hidden[:, : count * size].unflatten(1, (count, size)), lengths)

    def _upper(
        self, x: torch.Tensor, start: int, stop: int, windows: Windows, memory: ChunkTensors | None
    ) -> torch.Tensor:
        """Loss of a segment from its lower outputs and the chunks up to its end."""
        layout = self.row.layout
        part = layout._replace(
            segments=layout.segments[:, start:stop],
            positions=layout.positions[:, start:stop],
            groups=layout.groups[:, start:stop],
        )
        views = [] if memory is None else [own_view(memory, part, is_causal=start == 0)]
        rotary, segments = self._rotary(windows, x), self._window_segments(start, stop)
        per_group = self.config.num_layers_per_group
        for number, group in enumerate(self.inner.upper_groups()):
            seed = None if self.noise_seed is None else self.noise_seed + 7919 * number + 104_729 * start
            states: list[Any] = windows.states[number * per_group : (number + 1) * per_group]
            x = group(x, views, rotary, segments, states, self.config.chunk_topk, seed)
        hidden, targets = self.inner.norm(x).flatten(0, 1), self.row.targets[:, start:stop].flatten()
        return linear_cross_entropy(hidden, self.model.lm_head.weight, targets) / self.row.divisor

    def _until(self, memory: ChunkTensors | None, stop: int) -> ChunkTensors | None:
        """The chunks that end by `stop`."""
        size = self.config.chunk_size
        count = stop // size
        if memory is None or not count:
            return None
        k, v, *rest = memory
        return ChunkTensors(k[:, : count * size], v[:, : count * size], *(part[:, :count] for part in rest))

    # forward, without gradients

    def read_lower(self) -> tuple[torch.Tensor, list[list[Pair | None]]]:
        """Lower outputs (B, T, M), and the windows at the beginning of every segment."""
        carried: list[Pair | None] = [None] * len(self.windows[0])
        outputs, borders = [], []
        for start, stop in self.row.borders:
            borders.append(carried)
            windows = Windows(self.windows[0], carried)
            outputs.append(self._lower(start, stop, windows))
            carried = windows.leave()
        return torch.cat(outputs, 1), borders

    def encode(self, lower: torch.Tensor) -> ChunkTensors | None:
        """The memory of the rows; in training the centre of landmarks moves once."""
        parts = [self._encoded(lower[:, start:stop], start) for start, stop in self.row.borders]
        found = [part for part in parts if part is not None]
        if not found:
            return None
        k, v, raw = (torch.cat(columns, 1) for columns in zip(*found, strict=True))
        landmarks = self.inner.chunk_encoder.center(raw, self.places.lengths).to(v.dtype)
        lengths, segments, ends = self.places
        full = torch.full_like(ends, self.config.chunk_size) if lengths is None else lengths.clamp_min(1)
        return ChunkTensors(k, v, landmarks, full, segments, ends)

    def read_upper(
        self, lower: torch.Tensor, memory: ChunkTensors | None
    ) -> tuple[torch.Tensor, list[list[Pair | None]]]:
        carried: list[Pair | None] = [None] * len(self.windows[1])
        losses, borders = [], []
        for start, stop in self.row.borders:
            borders.append(carried)
            windows = Windows(self.windows[1], carried)
            losses.append(self._upper(lower[:, start:stop], start, stop, windows, self._until(memory, stop)))
            carried = windows.leave()
        return torch.stack(losses).sum(), borders

    # backward, last segment first

    def backward_upper(
        self, lower: torch.Tensor, memory: ChunkTensors | None, borders: list[list[Pair | None]]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Gradients of the lower outputs and of k, v and landmarks."""
        grad_lower = torch.zeros_like(lower)
        wide = torch.float64 if lower.dtype == torch.float64 else torch.float32
        grad_memory = [] if memory is None else [torch.zeros_like(part, dtype=wide) for part in memory[:3]]
        received: list[Pair | None] = [None] * len(self.windows[1])
        for (start, stop), carried in reversed(list(zip(self.row.borders, borders, strict=True))):
            windows = Windows(self.windows[1], carried, with_gradients=True)
            x, past = _leaf(lower[:, start:stop]), self._until(memory, stop)
            leaves = [] if past is None else [_leaf(part) for part in past[:3]]
            if past is not None:
                past = past._replace(k=leaves[0], v=leaves[1], landmarks=leaves[2])
            with torch.enable_grad():
                loss = self._upper(x, start, stop, windows, past)
            _backward([(loss, loss.new_full((), self.loss_scale)), *windows.roots(received)])
            grad_lower[:, start:stop] = _gradient(x)
            for total, leaf in zip(grad_memory, leaves, strict=False):
                if leaf.grad is not None:
                    total[:, : leaf.shape[1]] += leaf.grad
            received = windows.gradients()
        return grad_lower, grad_memory

    def backward_encoder(self, lower: torch.Tensor, grad_lower: torch.Tensor, grad_memory: list[torch.Tensor]) -> None:
        """Adds to `grad_lower` what the memory's gradients mean for the lower outputs."""
        size = self.config.chunk_size
        for start, stop in self.row.borders:
            x = _leaf(lower[:, start:stop])
            with torch.enable_grad():
                outputs = self._encoded(x, start)
            if outputs is None:
                continue
            first, count = start // size, outputs[2].shape[1]
            ranges = [slice(first * size, (first + count) * size)] * 2 + [slice(first, first + count)]
            grads = [total[:, part].to(out) for total, part, out in zip(grad_memory, ranges, outputs, strict=True)]
            _backward(list(zip(outputs, grads, strict=True)))
            grad_lower[:, start:stop] += _gradient(x)

    def backward_lower(self, grad_lower: torch.Tensor, borders: list[list[Pair | None]]) -> None:
        received: list[Pair | None] = [None] * len(self.windows[0])
        for (start, stop), carried in reversed(list(zip(self.row.borders, borders, strict=True))):
            windows = Windows(self.windows[0], carried, with_gradients=True)
            with torch.enable_grad():
                x = self._lower(start, stop, windows)
            _backward([(x, grad_lower[:, start:stop]), *windows.roots(received)])
            received = windows.gradients()
