"""The exact lookup on a CPU that multiplies 16-bit numbers: it finds what chunk_topk finds, several times as fast.

chunk_topk turns 16-bit landmarks into fp32, which takes ten times as long as the product itself. Here the product is in
16 bits, with sums in fp32 and results rounded to 8 bits. How far these can be from the exact ones is bounded, so
every chunk that may be among the K best is known; those are scored exactly. Only what is exact decides: the bound is
never too small, and where it leaves many chunks the work grows. Called by opening.py for memories that are read from
files; tests/memory/test_landmark_scan.py.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from hsa_ultralong.memory.landmark_index import best_chunks, scored, see_all
from hsa_ultralong.ops import ChunkVisibility, chunk_topk
from hsa_ultralong.ops._common import matmul_wide, require_shape

# chunks from which on a search gains; queries at once up to which it does, and one of how many chunks it may score
FEWEST_CHUNKS, _FEW_QUERIES, _MANY = 16_384, 16, 8
# a number rounded to bf16 loses at most this share of itself, an addition in fp32 half of that one
_ROUNDING, _ADDING = 2.0**-8, 2.0**-23


def has_native_products(landmarks: torch.Tensor) -> bool:
    """Whether these landmarks lie on a CPU that multiplies numbers of their dtype, bf16, as they are."""
    return landmarks.is_cpu and landmarks.dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()


class LandmarkScan:
    """C landmarks in bf16, all of them visible to every query.

    Args:
        landmarks: (C, Hr, R) bf16, kept, not copied, and not to be changed.

    Raises:
        ValueError: for another shape or dtype.
    """

    # which candidates are read is known on the host only
    is_capturable = False

    def __init__(self, landmarks: torch.Tensor) -> None:
        require_shape("landmarks", landmarks, (None, None, None))
        if landmarks.dtype != torch.bfloat16:
            raise ValueError(f"landmarks must be bf16, got {landmarks.dtype}")
        self._landmarks = landmarks.detach()
        norms = torch.linalg.vector_norm(self._landmarks, dim=-1).float()  # (C, Hr), rounded to bf16
        for chunk, head in (~norms.isfinite()).nonzero().tolist():
            # its square is too large, or it is not finite: no product with it is one of the best, and it is scored
            own = self._landmarks[chunk, head].float()
            norms[chunk, head] = own.abs().max() * len(own) ** 0.5 if own.isfinite().all() else 0.0
        self._norm = norms.amax(0)[:, None] * (1 + 2 * _ROUNDING) if len(norms) else norms.new_zeros(1, 1)

    def search(
        self, query: torch.Tensor, topk: int, *, visible: ChunkVisibility, scale: torch.Tensor | float | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As LandmarkIndex.search, of all chunks; scores have gradients where the query has. Many queries at once, and
        those for which many chunks may be among the best, are left to chunk_topk.

        Raises:
            ValueError: on shapes that do not fit, topk < 1, or a scale <= 0.
        """
        num_chunks, heads, dim = self._landmarks.shape
        require_shape("query", query, (None, None, heads, dim))
        if topk < 1:
            raise ValueError(f"topk must be >= 1, got {topk}")
        if isinstance(scale, float | int) and scale <= 0:
            raise ValueError(f"scale must be positive, got {scale}")
        shape = (query.shape[0], query.shape[1])
        has_gradient = torch.is_grad_enabled() and query.requires_grad
        is_small = num_chunks <= _MANY * topk or shape[0] * shape[1] > _FEW_QUERIES
        found = None if has_gradient or is_small else self._search(query, topk)
        if found is None:
            everyone = replace(see_all(query, num_chunks), query_segment=visible.query_segment)
            return chunk_topk(query, self._landmarks[None], everyone, topk=topk, scale=scale)
        return scored(*found, shape, dim, scale, visible)

    @torch.no_grad()
    def _search(self, query: torch.Tensor, topk: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Indices and products (Hr, B*T, K); None where more than one of _MANY chunks would be scored."""
        num_chunks, heads, dim = self._landmarks.shape
        rows = query.permute(2, 0, 1, 3).reshape(heads, -1, dim)  # (Hr, m, R)
        indices = torch.empty((*rows.shape[:2], topk), dtype=torch.int32)
        products = torch.empty(indices.shape)
        for head in range(heads):
            for row, own in enumerate(rows[head]):
                found = self._candidates(own, head, topk)
                if len(found) * _MANY > num_chunks:
                    return None
                exact = matmul_wide(self._landmarks[found, head].to(own.dtype)[None], own[None, :, None])[0, :, 0]
                indices[head, row], products[head, row] = best_chunks(found, exact.float(), topk)
        return indices, products

    def _candidates(self, query: torch.Tensor, head: int, topk: int) -> torch.Tensor:
        """Chunks (n,) int64, ascending, that hold all those whose products with a query (R,) are the K best."""
        short = query.to(torch.bfloat16)
        rough = (short[None] @ self._landmarks[:, head].T)[0].float()  # (C,)
        is_finite = rough.isfinite()
        usable = torch.where(is_finite, rough, -torch.inf)
        best = usable.topk(topk).values
        norm, lost = query.float().norm(), (query.float() - short.float()).norm()
        # rounding of products that are as large as these, additions, and what the query lost in 16 bits
        bound = _ROUNDING * best.abs().max() + self._norm[head] * (len(query) * _ADDING * norm + 2 * lost)
        # the K-th best is at least best[-1] - bound, and who reaches it is rounded to no less than that - bound
        return ((usable >= best[-1] - 2 * bound) | ~is_finite).nonzero()[:, 0]
