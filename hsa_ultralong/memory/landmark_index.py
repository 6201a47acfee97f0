"""Faster lookup, optional: scan landmarks in few dimensions, then score the best candidates exactly.

Trained landmarks fill few of their R dimensions (nano: 32 of 256 hold all but 4e-5 of the variance), the same ones for
any text. The principal directions of the first chunks give a sketch of d numbers a chunk; a query scans the sketches
and reads the full landmarks of the best `num_scored` only. Linear in C, with R / d times less to read;
landmark_lists.py scans a part of the sketches. Called by the stores of memory/ for large memories; chunk_topk stays the
default and the specification. tests/memory/test_landmark_index.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from hsa_ultralong.ops import ChunkVisibility, chunk_topk
from hsa_ultralong.ops._common import blocks, matmul_wide, require_shape
from hsa_ultralong.ops.chunk_topk.visibility import READABLE_BY_ALL

# directions come from at most so many chunks; with fewer in all, every search is exact
_FIT_CHUNKS = 4096
# share of the variance that the sketch may leave out (int8 rounding alone makes about 5e-5), and the step of d
_LEFT_OUT, _STEP = 3e-4, 16
# written landmarks of which the sketch leaves out more than this share bring new directions
_NEW_DIRECTIONS = 10 * _LEFT_OUT
# candidates scored exactly for every chunk kept
_SCORED_PER_KEPT = 4
# elements of one block of work: 64 MB in fp32
_BLOCK_ELEMENTS = 1 << 24


@dataclass
class LandmarkIndex:
    """Sketches of C landmarks, all of them visible to every query; no gradients.

    The directions come from the first 4,096 chunks; only landmarks outside of these directions make it fit again, to
    chunks evenly spread over all.

    Attributes:
        landmarks: (C, Hr, R), any float dtype.
        basis: (Hr, R, d) fp32 orthonormal directions, or None while the index is an exact scan.
        center: (Hr, 1, R) fp32, mean of the landmarks that the directions were fitted to.
        sketches: (C, Hr, d) in the landmarks' dtype, landmarks times basis.
        num_dims: d asked for, or None to choose it from the landmarks.
    """

    landmarks: torch.Tensor
    num_dims: int | None
    basis: torch.Tensor | None
    center: torch.Tensor
    sketches: torch.Tensor

    @staticmethod
    def build(landmarks: torch.Tensor, *, num_dims: int | None = None) -> LandmarkIndex:
        """Index of landmarks (C, Hr, R), which are kept, not copied; C may be 0.

        Work memory is one block of 64 MB; nothing is random.

        Args:
            num_dims: d, 1..R. Default: the smallest multiple of 16 that leaves out at most 3e-4 of the variance of the
                first 4,096 chunks, in every head; above R / 2 there is nothing to gain and searches stay exact.

        Raises:
            ValueError: for another shape or num_dims outside 1..R.
        """
        require_shape("landmarks", landmarks, (None, None, None))
        num_chunks, heads, dim = landmarks.shape
        if num_dims is not None and not 1 <= num_dims <= dim:
            raise ValueError(f"num_dims must be within 1..{dim}, got {num_dims}")
        nothing = landmarks.new_empty((0, heads, 0))
        index = LandmarkIndex(landmarks.detach(), num_dims, None, nothing.float(), nothing)
        if num_chunks >= _FIT_CHUNKS:
            index._fit(_FIT_CHUNKS)
            if index.basis is not None and index._sketch() > _NEW_DIRECTIONS and num_dims is None:
                # these directions leave out too much
                index._fit(num_chunks)
                if index.basis is not None:
                    index._sketch()
        return index

    # which candidates are read is known on the host only
    is_capturable = False

    @property
    def num_chunks(self) -> int:
        return self.landmarks.shape[0]

    @property
    def num_bytes(self) -> int:
        """Bytes beside the landmarks: d / R of theirs."""
        return self.sketches.nbytes

    def _fit(self, num_chunks: int) -> None:
        """Find directions from at most 4,096 chunks, evenly spread over the first `num_chunks`."""
        _, heads, dim = self.landmarks.shape
        picked = torch.arange(_FIT_CHUNKS, device=self.landmarks.device) * num_chunks // _FIT_CHUNKS
        # on the host and in fp64: small, and the same everywhere
        sample = self.landmarks[picked].transpose(0, 1).to(device="cpu", dtype=torch.float64)  # (Hr, n, R)
        sample = sample.nan_to_num(0.0, 0.0, 0.0)
        # a vector common to all landmarks moves all scores of a query alike
        center = sample.mean(1, keepdim=True)
        sample = sample - center
        variance, directions = torch.linalg.eigh(sample.transpose(1, 2) @ sample)  # (Hr, R) ascending, (Hr, R, R)
        num_dims = self.num_dims
        if num_dims is None:
            # share outside of the d largest directions, for d = 0..R-1
            left_out = variance.clamp_min(0).cumsum(-1).flip(-1) / variance.sum(-1, keepdim=True).clamp_min(1e-300)
            needed = int((left_out > _LEFT_OUT).sum(-1).max())
            num_dims = max(1, -(-needed // _STEP)) * _STEP
            if num_dims > dim // 2:
                self.basis, self.sketches = None, self.landmarks.new_empty((0, heads, 0))
                return
        self.basis = directions[..., dim - num_dims :].to(device=self.landmarks.device, dtype=torch.float32)
        self.center = center.to(device=self.landmarks.device, dtype=torch.float32)
        self.sketches = self.landmarks.new_empty((self.landmarks.shape[0], heads, num_dims))

    def _sketch(self) -> float:
        """Make the sketches; the share of the variance that they leave out, the largest of the heads."""
        assert self.basis is not None
        num_chunks, heads, dim = self.landmarks.shape
        inside, total = (torch.zeros(heads, device=self.landmarks.device) for _ in range(2))
        for start, stop in blocks(num_chunks, max(1, _BLOCK_ELEMENTS // (heads * dim))):
            part = self.landmarks[start:stop].float().transpose(0, 1)  # (Hr, n, R)
            self.sketches[start:stop] = (part @ self.basis).transpose(0, 1)  # (n, Hr, d)
            part = part.nan_to_num(0.0, 0.0, 0.0) - self.center
            inside += (part @ self.basis).square().sum((1, 2))
            total += part.square().sum((1, 2))
        return float((1 - inside / total.clamp_min(1e-30)).where(total > 0, 0.0).max())

    @torch.no_grad()
    def search(
        self,
        query: torch.Tensor,
        topk: int,
        *,
        visible: ChunkVisibility | None = None,
        num_scored: int | None = None,
        scale: torch.Tensor | float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The best of the candidates, in the order and format of chunk_topk.

        Args:
            query: (B, T, Hr, R), any float dtype. topk, scale: as in chunk_topk, the factor positive.
            visible: tokens of a negative segment find nothing; all others may read every chunk.
            num_scored: candidates per query and head whose full landmarks are read, at least K; default 4 * K. C or
                more makes the search exact.

        Returns:
            indices (B, T, Hr, min(K, C)) int32 in descending chunk index; scores of the same shape, fp32, exact for
            the chunks found. Ties go to the lower chunk index, among the candidates.

        Raises:
            ValueError: on shapes that do not fit, topk < 1, num_scored < 1, or a scale <= 0.
        """
        heads, dim = self.landmarks.shape[1:]
        require_shape("query", query, (None, None, heads, dim))
        if topk < 1 or (num_scored is not None and num_scored < 1):
            raise ValueError(f"topk and num_scored must be >= 1, got {topk} and {num_scored}")
        if isinstance(scale, float | int) and scale <= 0:
            raise ValueError(f"scale must be positive, got {scale}")
        wanted = min(self.num_chunks, max(topk, num_scored or _SCORED_PER_KEPT * topk))
        if self.basis is None or wanted == self.num_chunks:
            everyone = see_all(query, self.num_chunks)
            if visible is not None:
                everyone = replace(everyone, query_segment=visible.query_segment)
            return chunk_topk(query, self.landmarks[None], everyone, topk=topk, scale=scale)
        batch, num_tokens = query.shape[:2]
        rows = query.permute(2, 0, 1, 3).reshape(heads, batch * num_tokens, dim)  # (Hr, B*T, R)
        indices = torch.empty((heads, batch * num_tokens, topk), dtype=torch.int32, device=query.device)
        products = torch.empty(indices.shape, device=query.device)
        work = heads * max(self._row_elements(topk, wanted), wanted * dim)
        for start, stop in blocks(batch * num_tokens, max(1, _BLOCK_ELEMENTS // work)):
            candidates = self._candidates(rows[:, start:stop], topk, wanted)
            exact = self._products(rows[:, start:stop], candidates)
            indices[:, start:stop], products[:, start:stop] = best_chunks(candidates, exact, topk)
        return scored(indices, products, (batch, num_tokens), dim, scale, visible)

    def _row_elements(self, topk: int, wanted: int) -> int:
        """Numbers that a row of queries needs room for while its candidates are found, per head."""
        return self.num_chunks

    def _small(self, query: torch.Tensor) -> torch.Tensor:
        """Queries (Hr, m, R) in the directions of the sketches: (Hr, m, d)."""
        assert self.basis is not None
        return (query.float() @ self.basis).to(self.sketches.dtype)

    def _candidates(self, query: torch.Tensor, topk: int, wanted: int) -> torch.Tensor:
        """The `wanted` chunks (Hr, m, n) int64, ascending, whose sketches fit the rows (Hr, m, R) best."""
        rough = matmul_wide(self._small(query), self.sketches.permute(1, 2, 0))  # (Hr, m, C)
        return best_of(rough, wanted).sort(dim=-1).values

    def _products(self, query: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """The exact products of rows (Hr, m, R) with the landmarks of candidates (Hr, m, n), fp32."""
        heads, num_rows, dim = query.shape
        head = torch.arange(heads, device=query.device)[:, None, None]
        place = (candidates * heads + head).flatten()
        read = self.landmarks.flatten(0, 1).index_select(0, place).to(query.dtype)
        exact = matmul_wide(read.view(heads * num_rows, -1, dim), query.reshape(heads * num_rows, dim, 1))
        return exact.view(candidates.shape).float()  # (Hr, m, n)


def scored(
    indices: torch.Tensor, products: torch.Tensor, shape: tuple[int, int], dim: int,
    scale: torch.Tensor | float | None, visible: ChunkVisibility | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """indices and products (Hr, B*T, K) in the format of chunk_topk, (B, T, Hr, K) with scores; shape: (B, T)."""
    factor: torch.Tensor | float = dim**-0.5 if scale is None else scale
    if isinstance(factor, torch.Tensor):
        factor = factor.float().reshape(-1, 1)  # (Hr or 1, 1)
    indices, products = (x.unflatten(1, shape).permute(1, 2, 0, 3) for x in (indices, products))  # (B, T, Hr, K)
    scores = products * factor
    if visible is not None:
        is_padding = (visible.query_segment < 0)[:, :, None, None]
        indices, scores = indices.masked_fill(is_padding, -1), scores.masked_fill(is_padding, -torch.inf)
    return indices.contiguous(), scores.contiguous()


def best_of(products: torch.Tensor, count: int) -> torch.Tensor:
    """Places of the `count` best along the last dimension, in any order; what is not finite comes last, as in
    chunk_topk. Overwrites the products."""
    products = products.nan_to_num_(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)
    return products.topk(count, dim=-1, sorted=False).indices


def see_all(query: torch.Tensor, num_chunks: int) -> ChunkVisibility:
    nobody = torch.zeros(query.shape[:2], dtype=torch.int32, device=query.device)
    chunks = torch.full((1, num_chunks), READABLE_BY_ALL, dtype=torch.int32, device=query.device)
    return ChunkVisibility(nobody, nobody, chunks, torch.zeros_like(chunks))


def best_chunks(candidates: torch.Tensor, products: torch.Tensor, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `keep` best of ascending candidates, ties to the lower chunk; in descending index; -1 and -inf where the
    product is not finite."""
    products = products.nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)
    # stable: of equal products the first, lower chunk stays in front
    kept = products.sort(dim=-1, descending=True, stable=True).indices[..., :keep]
    products = products.gather(-1, kept)
    indices, order = candidates.gather(-1, kept).masked_fill(products == -torch.inf, -1).sort(dim=-1, descending=True)
    return indices.to(torch.int32), products.gather(-1, order)
