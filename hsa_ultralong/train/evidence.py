"""Retrieval taught directly: a token that repeats what a row holds should find the chunks that tell it.

Rows say where that stands (data.Row.evidence). The loss is minus the log of the share of these chunks in a softmax over
all chunks of the batch, in every group and retrieval head, so they get a gradient also where they were not kept. Chunks
of other rows are wrong ones too, whether rows read each other or not, so a batch of short rows trains the choice among
hundreds. A memory in use has a thousand times as many: wrong chunks can count as if there were `num_chunks` of them,
which asks for the margin that survives there. Answers and copies count half each, however many tokens they are. Called
by step_loss.py; tests/train/test_evidence.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from hsa_ultralong.models import HSAForCausalLM
from hsa_ultralong.nn.chunk_retriever import Retrieval
from hsa_ultralong.nn.views import GraphView
from hsa_ultralong.ops.chunk_topk.visibility import UNUSED, ChunkVisibility
from hsa_ultralong.train.batches import Batch
from hsa_ultralong.train.config import StageConfig

# at most so many answers and so many copies of a forward are taught, drawn at random, and so many scores of a head
_MOST_TOKENS, _MOST_SCORES = 4096, 1 << 24


class Told(NamedTuple):
    """Tokens whose next one is told somewhere in the row: row and place (n,), first and last chunk (n, 2), and whether
    the next one is part of an answer, (n,)."""

    rows: torch.Tensor
    places: torch.Tensor
    chunks: torch.Tensor
    is_answer: torch.Tensor


def told_tokens(batch: Batch, stage: StageConfig, chunk_size: int) -> Told:
    """Of a batch on the host: tokens before those that are told and counted by the ordinary loss, beside a source
    answers only, where the first chunk that tells them is whole and thus visible."""
    evidence, segments = batch["evidence"][:, 1:], batch["segment_ids"]
    first = evidence[..., 0]
    chunks = evidence.div(chunk_size, rounding_mode="floor").long()  # (B, T - 1, 2)
    places = torch.arange(first.shape[1], device=first.device)
    is_own = segments.gather(1, first.clamp_min(0).long()) == segments[:, :-1]
    # a chunk of the same document is visible once it is whole, those of earlier ones always
    is_visible = ~is_own | ((chunks[..., 0] + 1) * chunk_size <= places)
    isolated = (batch["isolated"] | stage.isolate_documents)[:, None]
    is_answer = batch["answer_mask"][:, 1:]
    is_told = (first >= 0) & is_visible & (is_own | ~isolated) & (batch["labels"][:, 1:] >= 0)
    if stage.needs_teacher:
        is_told = is_told & is_answer
    rows, at = is_told.nonzero(as_tuple=True)
    return Told(rows, at, chunks[rows, at], is_answer[rows, at])


def count_told(batches: Sequence[Batch], stage: StageConfig, chunk_size: int) -> list[int]:
    """Told tokens of these micro-batches that belong to answers, and the others."""
    found = [told_tokens(batch, stage, chunk_size).is_answer for batch in batches]
    answers = sum(int(part.sum()) for part in found)
    return [answers, sum(map(len, found)) - answers]


class EvidenceLoss:
    """Watches what the groups of a model look for.

    By a hook, which `output_retrieval=True` cannot replace: that gives the K chunks which were chosen, after the group;
    the loss scores all chunks that a token sees, and needs the weights of retrieval while they are whole (FSDP2).

    Raises:
        ValueError: the model's fusion is no softmax of plain scores.
    """

    def __init__(self, model: HSAForCausalLM) -> None:
        if model.config.fusion == "stick_breaking" or model.config.position_decay:
            raise ValueError(
                "evidence_loss needs softmax fusion without position decay, whose scores stand for themselves; got "
                f"fusion={model.config.fusion!r}, position_decay={model.config.position_decay}"
            )
        self._chunk_size = model.config.chunk_size
        self._told: Told | None = None
        self._shares: torch.Tensor | None = None
        self._num_chunks = 0
        self._found: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}
        for group in model.model.upper_groups():
            group.retriever.register_forward_hook(self._watch, with_kwargs=True)

    def expect(self, batch: Batch, stage: StageConfig, counts: Sequence[int], device: torch.device) -> None:
        """Of the next forward: its told tokens, and how many answers and copies the whole step has."""
        told, shares = self._draw(batch, stage, counts)
        self.watch(Told(*(part.to(device, non_blocking=True) for part in told)), shares.to(device, non_blocking=True),
                   stage)  # fmt: skip

    def watch(self, told: Told, shares: torch.Tensor, stage: StageConfig) -> None:
        """Of the next forward: told tokens and their shares of the step's loss, (n,), on its device."""
        self._told, self._shares, self._num_chunks, self._found = told, shares, stage.evidence_chunks, {}

    def padded(self, batch: Batch, stage: StageConfig, counts: Sequence[int]) -> dict[str, torch.Tensor]:
        """What `watch` takes, on the host, always as many tokens for rows of one shape: those beyond teach nothing.

        "rows", "places", "chunks" and "is_answer" of Told, and "shares".
        """
        told, shares = self._draw(batch, stage, counts)
        batch_size, length = batch["input_ids"].shape
        more = min(2 * self._most(batch), batch_size * length) - len(shares)
        # each at a place of its own, so that their gradients are not added up one by one
        spread = torch.arange(more)
        parts = {
            "rows": spread // length,
            "places": spread % length,
            "chunks": torch.full((more, 2), -1),
            "is_answer": torch.zeros(more, dtype=torch.bool),
            "shares": torch.zeros(more),
        }
        drawn = {**told._asdict(), "shares": shares}
        return {name: torch.cat((drawn[name], part)) for name, part in parts.items()}

    def _most(self, batch: Batch) -> int:
        """At most so many answers and so many copies of a forward are taught."""
        return min(_MOST_TOKENS, max(1, _MOST_SCORES * self._chunk_size // batch["input_ids"].numel()))

    def _draw(self, batch: Batch, stage: StageConfig, counts: Sequence[int]) -> tuple[Told, torch.Tensor]:
        """On the host: the told tokens that are taught, answers first, and their shares (n,)."""
        told = told_tokens(batch, stage, self._chunk_size)
        kinds = sum(count > 0 for count in counts)
        most = self._most(batch)
        chosen, shares = [], []
        for is_kind, count in zip((told.is_answer, ~told.is_answer), counts, strict=True):
            numbers = is_kind.nonzero()[:, 0]
            total = len(numbers)
            if total > most:
                # drawn on the host, whose random state is that of the step
                numbers = numbers[torch.randperm(total)[:most]]
            chosen.append(numbers)
            share = total / max(1, len(numbers)) / (max(1, count) * max(1, kinds))
            shares.append(torch.full((len(numbers),), share))
        kept = torch.cat(chosen)
        return Told(*(part[kept] for part in told)), torch.cat(shares)

    def take(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The loss of that forward and how many rank a right chunk first, mean over the groups, their shares in the
        step's; None if nothing was told."""
        found, self._found, self._told = list(self._found.values()), {}, None
        return (torch.stack([a for a, _ in found]).mean(), torch.stack([b for _, b in found]).mean()) if found else None

    def _watch(self, retriever: Any, args: tuple[Any, ...], _: dict[str, Any], found: Retrieval) -> None:
        """Inside a group's forward, where cut weights are whole; alignment may run a group once more."""
        x, views = args
        told, shares = self._told, self._shares
        if told is None or shares is None or not len(shares) or not views or retriever in self._found:
            return
        if not torch.is_grad_enabled():
            return
        own = views[-1]
        assert isinstance(own, GraphView)
        rows, places = told.rows, told.places
        # not the instance's, which may be compiled: another number of tokens a step would compile it again each time
        query = type(retriever).queries(retriever, x[rows, places][None])[0]  # (n, Hr, R)
        growth = retriever.growth(x, views)
        if growth is not None:
            query = query * growth[rows, places, None, None]
        seen, right = visible_chunks(told, own)
        losses, firsts = evidence_loss(
            query, own.memory.landmarks.flatten(0, 1), retriever.factor(), seen, right, self._num_chunks
        )
        self._found[retriever] = (losses * shares).sum(), (firsts * shares).sum()


def visible_chunks(told: Told, view: GraphView) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, B * C) bool: chunks that a token may be taught against, and of these the right ones; all on one device."""
    segments, visible, rows = view.memory.segments, view.visible, told.rows
    batch, count = segments.shape
    asking = ChunkVisibility(
        visible.query_segment[rows, told.places][:, None],
        visible.query_position[rows, told.places][:, None],
        visible.chunk_segment.expand(batch, -1)[rows],
        visible.chunk_end.expand(batch, -1)[rows],
        visible.foreign,
    )
    own = asking.mask()[:, 0]  # (n, C)
    numbers = torch.arange(count, device=own.device)
    right = own & (numbers >= told.chunks[:, :1]) & (numbers <= told.chunks[:, 1:])
    is_own = torch.arange(batch, device=own.device)[:, None] == rows[:, None, None]  # (n, B, 1)
    seen = torch.where(is_own, own[:, None], (segments != UNUSED)[None])
    return seen.flatten(1), (is_own & right[:, None]).flatten(1)


def evidence_loss(
    query: torch.Tensor,
    landmarks: torch.Tensor,
    factor: torch.Tensor | None,
    seen: torch.Tensor,
    right: torch.Tensor,
    num_chunks: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-log of the share that the right chunks have in the softmax over all that are seen, and the share of heads that
    rank a right one first; (n,) each, the loss a mean over the heads.

    Args:
        query: (n, Hr, R). landmarks: (C, Hr, R). factor: (Hr,), of the products; None for 1 / sqrt(R).
        seen, right: (n, C) bool. Tokens without a right chunk count nothing.
        num_chunks: wrong chunks count as if there were so many in all, if there are fewer.
    """
    with torch.autocast(query.device.type, enabled=False):
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        scale = query.shape[-1] ** -0.5 if factor is None else factor.to(wide)[:, None]
        scores = torch.einsum("nhr,chr->nhc", query.to(wide), landmarks.to(wide)) * scale  # (n, Hr, C)
    seen, right = seen[:, None], right[:, None]
    is_told = right.any(-1)  # (n, 1)
    best = scores.detach().masked_fill(~seen, -torch.inf).argmax(-1, keepdim=True)
    firsts = (right.expand_as(scores).gather(-1, best)[..., 0] & is_told).to(wide).mean(1)
    if num_chunks:
        wrong = seen & ~right
        count = wrong.sum(-1, keepdim=True)
        more = (num_chunks / count.clamp_min(1)).log().clamp_min(0)
        scores = torch.where(wrong, scores + more, scores)
    # a row without any stays finite, and counts nothing
    seen, right = (part | ~is_told[..., None] for part in (seen, right))
    whole = scores.masked_fill(~seen, -torch.inf).logsumexp(-1)
    own = scores.masked_fill(~right, -torch.inf).logsumexp(-1)
    return ((whole - own) * is_told).mean(1), firsts
