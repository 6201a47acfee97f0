"""Exact gradients of rows of any length with the activations of one piece: recomputation over time, not over layers.

The lower decoder runs over the pieces and keeps what crosses their borders: the windows' last keys and values, and
its outputs, from which the memory of the whole row follows. Then every piece of the upper decoder runs with
gradients, last one first, as its windows give gradients to the piece before; what reaches the memory adds up. Last,
the lower decoder and the encoder run again in the same way. Loss and gradients are those of one ordinary forward and
backward (tests/train/test_segmented.py). Kept per token: the lower output, whose gradient takes its place (M, on the
host if asked), and the memory with its gradient, 2*Hkv*D + Hr*R/S each; per border, the windows of all layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from hsa_ultralong.models import HSAForCausalLM
from hsa_ultralong.models.head import head_loss
from hsa_ultralong.models.layout import Layout, chunk_places, packed_layout, plain_layout, restrict
from hsa_ultralong.models.views import own_view
from hsa_ultralong.nn.moe import MixtureOfExperts
from hsa_ultralong.nn.views import ChunkTensors

IGNORE_INDEX = -100
Pair = tuple[torch.Tensor, torch.Tensor]
# per piece and layer, the window at the beginning
Borders = list[list[Pair | None]]


class CarriedWindow:
    """The window of one layer at the beginning of a piece, and, after the layer has run, at its end; stands where a
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


class BorderWindows:
    """The windows of consecutive layers, from `first` on, at one border, as leaves where gradients are wanted."""

    def __init__(self, first: int, sizes: list[int], carried: list[Pair | None], with_gradients: bool = False) -> None:
        if with_gradients:
            carried = [None if pair is None else (_leaf(pair[0]), _leaf(pair[1])) for pair in carried]
        self.first = first
        self.states = [CarriedWindow(size, pair) for size, pair in zip(sizes, carried, strict=True)]

    @property
    def length(self) -> int:
        return max((state.length for state in self.states), default=0)

    def state(self, layer: int) -> CarriedWindow:
        return self.states[layer - self.first]

    def leave(self) -> list[Pair | None]:
        """What the piece leaves to the next one, detached; copied, as a slice would keep the piece's keys alive."""
        lefts = [state.left for state in self.states]
        return [None if left is None else (left[0].detach().clone(), left[1].detach().clone()) for left in lefts]

    def gradients(self) -> list[Pair | None]:
        """What the carried keys and values received; None where nothing was carried."""
        return [None if s.carried is None else (_gradient(s.carried[0]), _gradient(s.carried[1])) for s in self.states]

    def roots(self, gradients: list[Pair | None]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """What was left and the gradients that the next piece gives it."""
        for state, pair in zip(self.states, gradients, strict=True):
            if state.left is not None and pair is not None:
                yield from zip(state.left, pair, strict=True)


class LongRow(NamedTuple):
    """One call: ids (B, T), labels of the next tokens (B, T), layout, divisor of the loss, and piece borders."""

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
    piece_tokens: int,
    *,
    loss_scale: float = 1.0,
    num_items: torch.Tensor | int | None = None,
    offload: bool = False,
) -> torch.Tensor:
    """Loss of a batch; adds its gradients, times `loss_scale`, to the parameters', piece by piece.

    Call it under the autocast that the ordinary forward would have. All layers run twice forward, once without
    gradients; the head runs once.

    Args:
        batch: input_ids and labels (B, T), optionally segment_ids (B, T) and isolate_documents, as HSAForCausalLM takes
            them. piece_tokens: a multiple of chunk_size. num_items: divisor of the summed loss; default the labels.
        offload: keep lower outputs and their gradients in pinned host memory, T*M numbers.

    Returns:
        The loss, a scalar without graph.

    Raises:
        ValueError: for a piece that is no multiple of chunk_size, or inputs that only the ordinary forward takes.
    """
    config = model.config
    if piece_tokens < 1 or piece_tokens % config.chunk_size:
        raise ValueError(f"piece_tokens must be a multiple of chunk_size={config.chunk_size}, got {piece_tokens}")
    known = {"input_ids", "labels", "segment_ids", "isolate_documents"}
    if extra := sorted(name for name, value in batch.items() if name not in known and value is not None):
        raise ValueError(f"segmented training takes {', '.join(sorted(known))}, not {', '.join(extra)}")
    if model.model.context_ranks.size > 1 or model.model.pool_ranks.size > 1:
        raise ValueError("segmented training runs on one process: rows and pools cannot be shared over ranks")
    pass_ = _Pass(model, _row(model, batch, piece_tokens, num_items), loss_scale, offload)
    with torch.no_grad():
        lower, memory, lower_borders = pass_.read_lower()
    # every token counts once toward the load of experts: in the first lower and the last upper run
    with torch.no_grad(), _experts_uncounted(model):
        upper_borders = pass_.read_upper(lower, memory)
    loss, grad_memory = pass_.backward_upper(lower, memory, upper_borders)
    del memory, upper_borders
    with _experts_uncounted(model):
        pass_.backward_lower(lower, grad_memory, lower_borders)
    return loss


def _row(
    model: HSAForCausalLM, batch: dict[str, torch.Tensor], piece_tokens: int, num_items: torch.Tensor | int | None
) -> LongRow:
    ids, labels = batch["input_ids"], batch["labels"]
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    segment_ids = batch.get("segment_ids")
    if segment_ids is None:
        layout = plain_layout(ids)
    else:
        layout = packed_layout(segment_ids, model.config.chunk_size, None, None)
    layout = restrict(layout, batch.get("isolate_documents"))
    divisor = ((targets != IGNORE_INDEX).sum() if num_items is None else torch.as_tensor(num_items)).clamp_min(1)
    total = ids.shape[1]
    borders = [(start, min(start + piece_tokens, total)) for start in range(0, total, piece_tokens)]
    return LongRow(ids, targets, layout, divisor, borders)


@contextmanager
def _experts_uncounted(model: HSAForCausalLM) -> Iterator[None]:
    """Leaves the load of experts as it was."""
    parts = [part for part in model.modules() if isinstance(part, MixtureOfExperts)]
    loads = [part.expert_load.clone() for part in parts]
    try:
        yield
    finally:
        for part, load in zip(parts, loads, strict=True):
            part.expert_load.copy_(load)


class _Pass:
    """The phases of one forward and backward over the pieces of a batch."""

    def __init__(self, model: HSAForCausalLM, row: LongRow, loss_scale: float, offload: bool) -> None:
        self.model, self.inner, self.config, self.row = model, model.model, model.config, row
        self.loss_scale, self.offload = loss_scale, offload
        lower, windows = self.config.num_lower_layers, self.config.layer_windows
        self.lower_windows = partial(BorderWindows, 0, windows[:lower])
        self.upper_windows = partial(BorderWindows, lower, windows[lower:])
        # what nothing before a row leaves to each half
        self.nothing: tuple[list[Pair | None], list[Pair | None]] = [None] * lower, [None] * (len(windows) - lower)
        self.places = chunk_places(row.layout, self.config.chunk_size)
        # one draw on the host generator, as for a whole row
        self.noise_seed = self.inner.draw_noise_seed()

    def _window_segments(self, start: int, stop: int) -> torch.Tensor | None:
        segments = self.row.layout.window_segments
        return None if segments is None else segments[:, max(0, start - max(self.config.layer_windows)) : stop]

    def _lower(self, start: int, stop: int, windows: BorderWindows) -> torch.Tensor:
        x = self.inner.embed_tokens(self.row.ids[:, start:stop])
        return self.inner.read_lower(x, self.inner.rotary(x, windows), self._window_segments(start, stop), windows)

    def _encoded(self, hidden: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """k, v and raw landmarks of the full chunks of a piece (B, n, M)."""
        size = self.config.chunk_size
        count = hidden.shape[1] // size
        if not count:
            return None
        lengths, first = self.places.lengths, start // size
        lengths = None if lengths is None else lengths[:, first : first + count]
        return self.inner.chunk_encoder.project(hidden[:, : count * size].unflatten(1, (count, size)), lengths)

    def _upper(
        self, x: torch.Tensor, start: int, stop: int, windows: BorderWindows, memory: ChunkTensors | None
    ) -> torch.Tensor:
        """Upper outputs (B, n, M) of a piece from its lower outputs and the chunks up to its end."""
        layout = self.row.layout
        part = layout._replace(
            segments=layout.segments[:, start:stop],
            positions=layout.positions[:, start:stop],
            groups=layout.groups[:, start:stop],
        )
        views = [] if memory is None else [own_view(memory, part, is_causal=start == 0)]
        rotary, segments = self.inner.rotary(x, windows), self._window_segments(start, stop)
        noise = {"noise_seed": self.noise_seed, "noise_start": start}
        return self.inner.decode_upper(x, rotary, views, segments, windows, **noise)

    def _loss(self, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        targets = self.row.targets[:, start:stop]
        return head_loss(self.model.lm_head, self.inner.norm(x), targets, self.config.vocab_size) / self.row.divisor

    def _until(self, memory: ChunkTensors | None, stop: int) -> ChunkTensors | None:
        """The chunks that end by `stop`."""
        size = self.config.chunk_size
        count = stop // size
        if memory is None or not count:
            return None
        k, v, *rest = memory
        return ChunkTensors(k[:, : count * size], v[:, : count * size], *(part[:, :count] for part in rest))

    def _keep(self, part: torch.Tensor) -> torch.Tensor:
        """A lower output or its gradient until it is needed again, on the host if asked."""
        if not (self.offload and part.is_cuda):
            return part.detach()
        return torch.empty(part.shape, dtype=part.dtype, pin_memory=True).copy_(part, non_blocking=True)

    def _take(self, part: torch.Tensor) -> torch.Tensor:
        return part.to(self.row.ids.device, non_blocking=True)

    # forward, without gradients

    def read_lower(self) -> tuple[list[torch.Tensor], ChunkTensors | None, Borders]:
        """Lower outputs of every piece, the memory of the rows, and the windows at the beginning of every piece."""
        carried = self.nothing[0]
        outputs, encoded, borders = [], [], []
        for start, stop in self.row.borders:
            borders.append(carried)
            windows = self.lower_windows(carried)
            x = self._lower(start, stop, windows)
            outputs.append(self._keep(x))
            if (found := self._encoded(x, start)) is not None:
                encoded.append(found)
            carried = windows.leave()
        return outputs, self._memory(encoded), borders

    def _memory(self, encoded: Sequence[tuple[torch.Tensor, ...]]) -> ChunkTensors | None:
        """Chunks of all pieces as one memory; in training the centre of landmarks moves once."""
        if not encoded:
            return None
        k, v, raw = (torch.cat(parts, 1) for parts in zip(*encoded, strict=True))
        landmarks = self.inner.chunk_encoder.center(raw, self.places.lengths).to(v.dtype)
        lengths, segments, ends = self.places
        full = torch.full_like(ends, self.config.chunk_size) if lengths is None else lengths.clamp_min(1)
        return ChunkTensors(k, v, landmarks, full, segments, ends)

    def read_upper(self, lower: list[torch.Tensor], memory: ChunkTensors | None) -> Borders:
        """The windows at the beginning of every piece; so the last piece need not run."""
        carried = self.nothing[1]
        borders = [carried]
        for (start, stop), part in zip(self.row.borders[:-1], lower, strict=False):
            windows = self.upper_windows(carried)
            self._upper(self._take(part), start, stop, windows, self._until(memory, stop))
            carried = windows.leave()
            borders.append(carried)
        return borders

    # backward, last piece first

    def backward_upper(
        self, lower: list[torch.Tensor], memory: ChunkTensors | None, borders: Borders
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The loss, and gradients of k, v and landmarks; those of the lower outputs take their places in `lower`."""
        losses = []
        dtype = torch.float64 if memory is not None and memory.v.dtype == torch.float64 else torch.float32
        grad_memory = [] if memory is None else [torch.zeros_like(part, dtype=dtype) for part in memory[:3]]
        received = self.nothing[1]
        for number, (start, stop) in reversed(list(enumerate(self.row.borders))):
            windows = self.upper_windows(borders[number], with_gradients=True)
            x, past = _leaf(self._take(lower[number])), self._until(memory, stop)
            leaves = [] if past is None else [_leaf(part) for part in past[:3]]
            if past is not None:
                past = past._replace(k=leaves[0], v=leaves[1], landmarks=leaves[2])
            with torch.enable_grad():
                loss = self._loss(self._upper(x, start, stop, windows, past), start, stop)
            _backward([(loss, loss.new_full((), self.loss_scale)), *windows.roots(received)])
            losses.append(loss.detach())
            lower[number] = self._keep(_gradient(x))
            for total, leaf in zip(grad_memory, leaves, strict=False):
                if leaf.grad is not None:
                    total[:, : leaf.shape[1]] += leaf.grad
            received = windows.gradients()
        return torch.stack(losses).sum(), grad_memory

    def backward_lower(self, gradients: list[torch.Tensor], grad_memory: list[torch.Tensor], borders: Borders) -> None:
        """Gradients of lower outputs and memory go on through encoder and lower decoder; uses up `gradients`."""
        size = self.config.chunk_size
        received = self.nothing[0]
        for number, (start, stop) in reversed(list(enumerate(self.row.borders))):
            windows = self.lower_windows(borders[number], with_gradients=True)
            with torch.enable_grad():
                x = self._lower(start, stop, windows)
                encoded = self._encoded(x, start) or ()
            first, last = start // size, stop // size
            ranges = [slice(first * size, last * size)] * 2 + [slice(first, last)]
            grads = [total[:, part] for total, part in zip(grad_memory, ranges, strict=False)]
            roots = [(output, grad.to(output)) for output, grad in zip(encoded, grads, strict=False)]
            _backward([(x, self._take(gradients.pop())), *roots, *windows.roots(received)])
            received = windows.gradients()
