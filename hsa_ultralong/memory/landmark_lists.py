"""Lookup that scans a part of a large memory, optional: lists of alike chunks, and all chunks like no other.

Of the sketches of landmark_index.py a query scans those of the lists that promise most, and always those of the odd
chunks: far from every other chunk when each direction is measured by its own spread. A sentence hidden in a text is odd
in this sense and belongs to no list; lists alone were measured to lose it (docs/log.md).
Called by opening.py; chunk_topk stays the default and the specification. tests/memory/test_landmark_lists.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from hsa_ultralong.memory.landmark_index import _SCORED_PER_KEPT, LandmarkIndex, best_of
from hsa_ultralong.ops._common import blocks, matmul_wide

# with fewer chunks lists save no time
_LEAST_CHUNKS = 1 << 16
# one of so many chunks is odd, and read by every query
_ODD = 32
# how odd a chunk is: its distance from the 4th nearest, among 128 to 256 chunks like it. So what stands in two
# neighbouring chunks, or is said two or three times, is still odd
_NEAREST, _NEIGHBOURS = 4, 256
# chunks of a list, at most, and lists of a group, whose worth is looked at before that of its lists
_LIST_CHUNKS, _GROUP = 32, 8
# chunks in the lists that a query reads: so many times the root of (chunks kept times chunks)
_READ = 6
# groups whose lists are looked at, by the share of all lists that is read
_GROUPS_PER_READ = 5
# spreads by which the best chunk of a list is expected above its mean
_ABOVE_MEAN = 2.0
# points that show a direction, and steps towards it
_AXIS_POINTS, _POWER_STEPS = 1024, 8
# elements of one block of work: 64 MB in fp32
_BLOCK_ELEMENTS = 1 << 24


@dataclass
class Spans:
    """Runs of chunks in the order of the lists: lists, or groups of them.

    Attributes:
        bounds: (n + 1,) int64, where each begins. mean, variance: (Hr, n, d) of its sketches, fp32.
    """

    bounds: torch.Tensor
    mean: torch.Tensor
    variance: torch.Tensor


@dataclass
class LandmarkLists(LandmarkIndex):
    """Sketches in the order of lists, behind those of odd chunks.

    Attributes (beside those of LandmarkIndex):
        sketches: (Hr, C, d), those of the chunks `members`.
        members: (Hr, C) int32 chunk numbers, odd ones first, then list after list.
        num_odd: odd chunks of each head.
        lists, groups: spans of the chunks behind the odd ones; a group is _GROUP lists.
        spread: (Hr, d) fp32, of the sketches in each direction, by which distances are measured.
        odd_from: (Hr,) fp32, the least squared distance from the 4th nearest chunk that an odd one had.
        num_read: chunks in lists that a query reads, or None for 6 * sqrt(K * C).
    """

    members: torch.Tensor = field(kw_only=True)
    num_odd: int = field(kw_only=True)
    spread: torch.Tensor = field(kw_only=True)
    odd_from: torch.Tensor = field(kw_only=True)
    lists: Spans = field(kw_only=True)
    groups: Spans = field(kw_only=True)
    num_read: int | None = field(kw_only=True, default=None)

    @staticmethod
    def build(
        landmarks: torch.Tensor, *, num_dims: int | None = None, num_read: int | None = None,
        least_chunks: int | None = None,
    ) -> LandmarkIndex:  # fmt: skip
        """Lists over landmarks (C, Hr, R), which are kept, not copied; nothing is random.

        Args:
            num_dims: as in LandmarkIndex.build. num_read: chunks in lists that a query reads; C or more reads all.
            least_chunks: with fewer, no lists; default 65,536, below which they save no time.

        Returns:
            LandmarkLists; of fewer than `least_chunks`, and of landmarks that fill all dimensions, the LandmarkIndex,
            which reads more.

        Raises:
            ValueError: for another shape, num_dims outside 1..R, or num_read < 1.
        """
        if num_read is not None and num_read < 1:
            raise ValueError(f"num_read must be >= 1, got {num_read}")
        plain = LandmarkIndex.build(landmarks, num_dims=num_dims)
        if plain.basis is None or plain.num_chunks < (_LEAST_CHUNKS if least_chunks is None else least_chunks):
            return plain
        num_chunks, heads, _ = landmarks.shape
        num_odd = num_chunks // _ODD
        members = torch.empty((heads, num_chunks), dtype=torch.int32, device=landmarks.device)
        sketches = plain.sketches.new_empty((heads, num_chunks, plain.sketches.shape[-1]))
        rest = num_chunks - num_odd
        depth = max(_GROUP.bit_length() - 1, math.ceil(math.log2(rest / _LIST_CHUNKS)))
        bounds = _halves(rest, depth, landmarks.device)
        spans: tuple[list[Spans], list[Spans]] = [], []
        spread = torch.empty((heads, sketches.shape[-1]), device=landmarks.device)
        odd_from = torch.empty(heads, device=landmarks.device)
        for head in range(heads):
            points = plain.sketches[:, head].float().nan_to_num(0.0, 0.0, 0.0)  # (C, d)
            spread[head] = points.std(0, correction=0).clamp_min(1e-30)
            odd, others, odd_from[head] = _set_apart(points, points / spread[head], num_odd)
            order = _split(points[others], depth)
            members[head] = torch.cat((odd, others[order]))
            points = points[others[order]]
            for found, edges in zip(spans, (bounds, bounds[::_GROUP]), strict=True):
                found.append(_spans(points, edges))
            sketches[head] = plain.sketches[members[head].long(), head]
        lists, groups = (
            Spans(of[0].bounds, torch.stack([one.mean for one in of]), torch.stack([one.variance for one in of]))
            for of in spans
        )
        return LandmarkLists(
            plain.landmarks, plain.num_dims, plain.basis, plain.center, sketches, members=members, num_odd=num_odd,
            spread=spread, odd_from=odd_from, lists=lists, groups=groups, num_read=num_read,
        )  # fmt: skip

    @property
    def num_bytes(self) -> int:
        """Bytes beside the landmarks."""
        spans = [part for span in (self.lists, self.groups) for part in (span.mean, span.variance)]
        return sum(part.nbytes for part in (self.sketches, self.members, *spans))

    def num_scanned(self, topk: int) -> int:
        """Sketches that a query looks at: of odd chunks, of the lists read, and two, mean and variance, for every group
        and for every list of the groups looked at."""
        read, looked = self._num_spans(topk, min(self.num_chunks, _SCORED_PER_KEPT * topk))
        return self.num_odd + read * self._width + 2 * (self.groups.mean.shape[1] + looked * _GROUP)

    @torch.no_grad()
    def distances(self, landmarks: torch.Tensor, near: torch.Tensor | None = None) -> torch.Tensor:
        """How far other landmarks (n, Hr, R) are from the chunks: squared, from the 4th nearest, (n, Hr) fp32.

        A landmark farther than `odd_from` would be odd were it one of the chunks, as `build` looks for neighbours in a
        part of them only; a nearer one may be odd or not.

        Args:
            near: (n, n) bool, which of them stand beside each other and count as neighbours too.
        """
        assert self.basis is not None
        rows = (landmarks.float().transpose(0, 1) @ self.basis).to(self.sketches.dtype).float()  # (Hr, n, d)
        rows = rows / self.spread[:, None]
        nearest = rows.new_full((*rows.shape[:2], _NEAREST), torch.inf)
        if near is not None:
            beside = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square()
            beside = beside.masked_fill(~near | torch.eye(len(near), dtype=torch.bool, device=near.device), torch.inf)
            nearest = torch.cat((nearest, beside), -1).topk(_NEAREST, largest=False).values
        length = rows.square().sum(-1, keepdim=True)
        for start, stop in blocks(self.num_chunks, max(_NEAREST, _BLOCK_ELEMENTS // (rows.shape[1] + rows.shape[2]))):
            others = self.sketches[:, start:stop].float().nan_to_num(0.0, 0.0, 0.0) / self.spread[:, None]  # (Hr, m, d)
            squares = length + others.square().sum(-1)[:, None] - 2 * rows @ others.mT  # (Hr, n, m)
            nearest = torch.cat((nearest, squares), -1).topk(_NEAREST, largest=False).values
        return nearest[..., -1].T

    @property
    def _width(self) -> int:
        return -(-(self.num_chunks - self.num_odd) // self.lists.mean.shape[1])

    def _num_spans(self, topk: int, wanted: int) -> tuple[int, int]:
        """Lists that a query reads, and groups whose lists it looks at."""
        lists, groups = self.lists.mean.shape[1], self.groups.mean.shape[1]
        read = max(wanted, self.num_read or math.ceil(_READ * math.sqrt(topk * self.num_chunks)))
        # shorter lists have one chunk less; there must be enough for all that are scored
        read = min(lists, -(-read // max(1, self._width - 1)))
        return read, min(groups, max(-(-read // _GROUP), _GROUPS_PER_READ * read // _GROUP))

    def _row_elements(self, topk: int, wanted: int) -> int:
        lists, groups = self._num_spans(topk, wanted)
        return self.num_odd + self.sketches.shape[-1] * max(lists * self._width, 2 * groups * _GROUP)

    def _choose(self, small: torch.Tensor, read: int, looked: int) -> torch.Tensor:
        """The `read` lists (Hr, m, n) int64, of `looked` groups, that promise most to queries (Hr, m, d) fp32."""
        heads, num_rows, num_dims = small.shape
        squares = small.square()
        worth = _worth(small @ self.groups.mean.mT, squares @ self.groups.variance.mT)  # (Hr, m, groups)
        found = best_of(worth, looked)[..., None] * _GROUP + torch.arange(_GROUP, device=small.device)
        found = found.flatten(2)  # (Hr, m, n)
        place = (found + torch.arange(heads, device=small.device)[:, None, None] * self.lists.mean.shape[1]).flatten()
        mean, variance = (
            part.flatten(0, 1).index_select(0, place).view(heads, num_rows, -1, num_dims) @ factor[..., None]
            for part, factor in ((self.lists.mean, small), (self.lists.variance, squares))
        )  # (Hr, m, n, 1)
        return found.gather(-1, best_of(_worth(mean, variance).squeeze(-1), read))

    def _candidates(self, query: torch.Tensor, topk: int, wanted: int) -> torch.Tensor:
        small = self._small(query)  # (Hr, m, d)
        heads, num_rows, num_dims = small.shape
        chosen, bounds = self._choose(small.float(), *self._num_spans(topk, wanted)), self.lists.bounds
        places = bounds[chosen][..., None] + torch.arange(self._width, device=query.device)  # (Hr, m, lists, s)
        is_outside = (places >= bounds[chosen + 1][..., None]).flatten(2)
        places = self.num_odd + places.flatten(2).masked_fill(is_outside, 0)  # (Hr, m, n)
        head = torch.arange(heads, device=query.device)[:, None, None] * self.num_chunks
        read = self.sketches.flatten(0, 1).index_select(0, (places + head).flatten())
        inside = matmul_wide(read.view(heads * num_rows, -1, num_dims), small.reshape(heads * num_rows, num_dims, 1))
        inside = inside.view(places.shape).masked_fill_(is_outside, -torch.inf)
        rough = matmul_wide(small, self.sketches[:, : self.num_odd].mT)  # (Hr, m, odd)
        odd = torch.arange(self.num_odd, device=query.device).expand(rough.shape)
        best = best_of(torch.cat((rough, inside), -1), wanted)
        places = torch.cat((odd, places), -1).gather(-1, best)  # (Hr, m, wanted)
        return self.members.gather(1, places.flatten(1)).view(places.shape).long().sort(dim=-1).values


def _worth(mean: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    return mean + _ABOVE_MEAN * variance.clamp_min(0).sqrt()


def _halves(count: int, depth: int, device: torch.device) -> torch.Tensor:
    """Bounds (2^depth + 1,) of `count` things halved so often; sizes differ by at most one."""
    return (torch.arange((1 << depth) + 1, device=device) * count) >> depth


def _set_apart(
    points: torch.Tensor, white: torch.Tensor, num_odd: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The numbers of the points (C, d) that are farthest from all others, of the rest, and the least squared distance
    (), among the same points in units of their spread, `white`, of the first."""
    depth = max(0, math.ceil(math.log2(len(points) / _NEIGHBOURS)))
    bounds = _halves(len(points), depth, points.device)
    # too far where the nearest lies in another run: an odd point never passes for another, only the reverse
    apart = torch.minimum(*(_apart(white, bounds, _split(found, depth)) for found in (white, points)))
    is_odd = torch.zeros_like(apart, dtype=torch.bool)
    farthest = apart.topk(num_odd)
    is_odd[farthest.indices] = True
    return is_odd.nonzero()[:, 0], (~is_odd).nonzero()[:, 0], farthest.values[-1]


def _apart(points: torch.Tensor, bounds: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The squared distance (n,) of every point (n, d) from the _NEAREST-th nearest one in its run."""
    found = torch.empty_like(points[:, 0])
    for _, places, is_none in _runs(bounds, max(points.shape[1], int(bounds.diff().max()))):
        members = order[places]
        part = points[members]  # (r, w, d)
        length = part.square().sum(-1)  # (r, w)
        squares = length[:, :, None] + length[:, None] - 2 * part @ part.mT  # (r, w, w)
        squares.masked_fill_(is_none[:, None], torch.inf).diagonal(dim1=1, dim2=2).fill_(torch.inf)
        nearest = squares.topk(_NEAREST, largest=False).values[..., -1]
        found[members[~is_none]] = nearest[~is_none]
    return found


def _runs(bounds: torch.Tensor, num_dims: int, step: int = 1) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Runs of things a block at a time: which runs, the places (n, w) of every `step`-th of their things, and which of
    these are none."""
    width = int(bounds.diff().max())
    inside = torch.arange(0, width, step, device=bounds.device)
    for first, stop in blocks(len(bounds) - 1, max(1, _BLOCK_ELEMENTS // (len(inside) * num_dims))):
        places = bounds[first:stop, None] + inside  # (n, w)
        is_none = places >= bounds[first + 1 : stop + 1, None]
        yield slice(first, stop), places.masked_fill(is_none, 0), is_none


def _moments(points: torch.Tensor, is_none: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Means and variances (n, d) of runs of points (n, w, d), and the points less their means, 0 for none."""
    count = (~is_none).sum(1, keepdim=True).clamp_min(1)
    mean = points.masked_fill(is_none[..., None], 0).sum(1) / count
    spread = (points - mean[:, None]).masked_fill_(is_none[..., None], 0)
    return mean, spread.square().sum(1) / count, spread


def _spans(points: torch.Tensor, bounds: torch.Tensor) -> Spans:
    """Spans of the points (n, d) of one head, without the dimension of heads."""
    mean, variance = points.new_empty((2, len(bounds) - 1, points.shape[1])).unbind(0)
    for runs, places, is_none in _runs(bounds, points.shape[1]):
        mean[runs], variance[runs], _ = _moments(points[places], is_none)
    return Spans(bounds, mean, variance)


def _split(points: torch.Tensor, depth: int) -> torch.Tensor:
    """An order of the points (n, d) in which those of each run of `_halves(n, depth)` are alike.

    Runs are halved along the direction in which their points vary most.
    """
    count, num_dims = points.shape
    order = torch.arange(count, device=points.device)
    along, moved = points.new_empty(count), torch.empty_like(order)
    for level in range(depth):
        bounds = _halves(count, level, points.device)
        axes = points.new_empty((1 << level, num_dims))
        for runs, places, is_none in _runs(bounds, num_dims, max(1, (count >> level) // _AXIS_POINTS)):
            axes[runs] = _main_axes(_moments(points[places], is_none)[2])
        run = torch.repeat_interleave(torch.arange(1 << level, device=points.device), bounds.diff())
        for start, stop in blocks(count, _BLOCK_ELEMENTS // num_dims):
            # whatever overflows, every point has a place
            along[start:stop] = (points[start:stop] * axes[run[start:stop]]).sum(-1).nan_to_num(0.0, 0.0, 0.0)
        for _, places, is_none in _runs(bounds, 1):
            ranks = along[places].masked_fill_(is_none, torch.inf).argsort(stable=True, dim=1)
            moved[places[~is_none]] = places.gather(1, ranks)[~is_none]
        # points move along: what is read together stays together
        order, points = order[moved], points[moved]
    return order


def _main_axes(spread: torch.Tensor) -> torch.Tensor:
    """Unit vectors (n, d) near the directions in which points (n, w, d) of mean 0 vary most, by the power method."""
    squares = spread.mT @ spread  # (n, d, d)
    widest = squares.diagonal(dim1=1, dim2=2).argmax(1)
    axes = squares[torch.arange(len(widest), device=spread.device), widest]  # (n, d)
    for _ in range(_POWER_STEPS):
        axes = (squares @ torch.nn.functional.normalize(axes, dim=-1)[..., None]).squeeze(-1)
    return torch.nn.functional.normalize(axes, dim=-1)
