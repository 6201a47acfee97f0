"""Masked tokens: rows are moved together so that each equals itself without them, and moved apart again at the end.

A masked token takes part in nothing, wherever it stands. Called by modeling_hsa.py and causal_lm.py; tests in
tests/models/test_masks.py.
"""

from __future__ import annotations

from typing import Any

import torch

from hsa_ultralong.models.cache_hsa import HSACache

_PACKING = (
    "several documents in one row take segment_ids (B, T) on the chunk grid, which hsa_ultralong.data.PackingCollator "
    "makes"
)


class Rows:
    """The real tokens of rows with masked ones anywhere: moved to the left, and back.

    Attributes:
        order: (B, T) column of each real token, the real ones first.
        place: (B, T) the last real token at or before each column, -1 before the first.
    """

    def __init__(self, is_real: torch.Tensor) -> None:
        self.order = (~is_real).to(torch.uint8).argsort(dim=1, stable=True)
        self.place = is_real.cumsum(1) - 1

    def close_up(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, T, M) with the real tokens of every row at its start, zeros behind them: what stands at masked tokens,
        finite or not, goes no further."""
        is_behind = torch.arange(x.shape[1], device=x.device) > self.place[:, -1:]
        return x.gather(1, self.order[..., None].expand_as(x)).masked_fill(is_behind[..., None], 0)

    def spread(self, x: torch.Tensor, fill: float = 0.0, columns: torch.Tensor | None = None) -> torch.Tensor:
        """x (B, T, ...) back to the columns of the call, or some of them; a masked column repeats the last real token,
        and is `fill` before the first."""
        place = self.place if columns is None else self.place[:, columns]
        place = place.view(*place.shape, *[1] * (x.dim() - 2))
        return x.gather(1, place.clamp_min(0).expand(-1, -1, *x.shape[2:])).masked_fill(place < 0, fill)


class Padding(Rows):
    """The real tokens of a call.

    Attributes:
        counts: real tokens of every row, on the host.
        mask: (B, n + T) bool, False at masked tokens, the n cached ones included.
    """

    def __init__(self, mask: torch.Tensor, num_tokens: int) -> None:
        super().__init__(mask[:, -num_tokens:])
        self.mask, self.counts = mask, (self.place[:, -1] + 1).tolist()

    @property
    def gaps(self) -> list[int]:
        """Masked tokens of the call in every row."""
        return [self.order.shape[1] - count for count in self.counts]


def counted_labels(targets: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Labels (B, T) of what each position predicts; what stands before the first real token predicts nothing, -100."""
    if attention_mask is None:
        return targets
    is_preceded = (attention_mask != 0).cumsum(1)[:, -targets.shape[1] :] > 0
    return targets.masked_fill(~is_preceded, -100)


def real_tokens(attention_mask: Any, batch: int, num_tokens: int, cache: HSACache | None) -> torch.Tensor | None:
    """(B, n + T) bool, True at the real tokens of the n cached and T new ones; None if all new ones are real.

    Raises:
        TypeError, ValueError: for what is no mask of 0 and 1, and for one that contradicts the cache.
    """
    if not isinstance(attention_mask, torch.Tensor):
        raise TypeError(f"attention_mask must be a tensor (B, n + T) of 0 and 1, got {type(attention_mask).__name__}")
    seen, known = (0, None) if cache is None else (cache.num_seen, cache.mask)
    if attention_mask.shape != (batch, seen + num_tokens):
        advice = f"; {_PACKING}" if attention_mask.dim() > 2 else ""
        raise ValueError(
            f"attention_mask must be ({batch}, {seen + num_tokens}) for {seen} cached and {num_tokens} new "
            f"tokens, got {tuple(attention_mask.shape)}{advice}"
        )
    is_real = attention_mask != 0
    before = is_real.new_ones(batch, seen)
    if known is not None:
        before[:, : known.shape[1]] = known
    checks = [(is_real == (attention_mask == 1)).all(), (is_real[:, :seen] == before).all(), is_real[:, seen:].all()]
    if attention_mask.is_floating_point():
        # a mask that is added to scores is 0 at the tokens that are read
        checks[0] = checks[0] & is_real.any()
    is_binary, is_kept, is_full = torch.stack(checks).tolist()
    if not is_binary:
        raise ValueError(
            "attention_mask must hold 1 at real tokens and 0 at masked ones, and no other numbers; a mask to be added "
            f"to scores becomes (mask == 0), and {_PACKING}"
        )
    if not is_kept:
        raise ValueError(
            "attention_mask masks other cached tokens than the calls that cached them; give the mask of those calls, "
            "or start a new cache"
        )
    return None if is_full else is_real


def check_positions(
    position_ids: torch.Tensor,
    shape: tuple[int, int],
    *,
    is_real: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    cache: HSACache | None = None,
) -> None:
    """Refuse positions other than those that follow from the mask, the documents and the cache.

    Args:
        position_ids: (B, T) or (1, T): the number of real tokens before each in its row (or document), or its column.
        shape: (B, T). is_real: (B, n + T), None if all are.

    Raises:
        ValueError: for other positions: attention here knows only the order of the tokens.
    """
    batch, num_tokens = shape
    if position_ids.dim() != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != num_tokens:
        raise ValueError(f"position_ids must be ({batch}, {num_tokens}), got {tuple(position_ids.shape)}")
    seen = 0 if cache is None else cache.num_seen
    column = torch.arange(seen, seen + num_tokens, device=position_ids.device)
    if segment_ids is not None:
        counted = segment_ids >= 0
        is_first = torch.ones_like(counted)
        is_first[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
        allowed = [column, column - torch.where(is_first, column, 0).cummax(1).values]
    else:
        if is_real is None:
            is_real = torch.ones((batch, seen + num_tokens), dtype=torch.bool, device=position_ids.device)
            if cache is not None and cache.mask is not None:
                is_real[:, : cache.mask.shape[1]] = cache.mask
        counted, total = is_real[:, seen:], is_real.cumsum(1)
        # columns count where padding stands on the left only
        is_plain = (column - total[:, seen:] + 1 == (total == 0).sum(1, keepdim=True)) | ~counted
        allowed = [total[:, seen:] - 1, torch.where(is_plain.all(1, keepdim=True), column, -1)]
    fits = torch.stack([((position_ids == positions) | ~counted).all(1) for positions in allowed])
    if not bool(fits.any(0).all()):
        raise ValueError(
            "position_ids do not count the real tokens of their rows, as positions here always do; leave them out; "
            f"{_PACKING}"
        )
