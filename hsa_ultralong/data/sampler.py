"""Drawing slices of documents: every token of a split is equally likely to be where a slice begins.

Called by ``rows.py``; tested in ``tests/data/test_rows.py``.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from hsa_ultralong.data.shards import TokenShards


class DocumentSampler:
    """Draws random slices of the documents of one split.

    Args:
        shards: opened token shards.
        split: ``"train"`` or ``"validation"``.
        long_tokens: if above 0, prefer documents of at least so many tokens: every draw comes from them, with room for
            that many tokens after its start.
        length_weights: {tokens: weight}: a token of a document of at least so many tokens is drawn with this relative
            weight (the largest such number counts), 1 below the smallest: more of long documents, or less of short
            ones.

    Raises:
        ValueError: the split has no document, or none is long enough.
    """

    def __init__(
        self,
        shards: TokenShards,
        split: str = "train",
        *,
        long_tokens: int = 0,
        length_weights: Mapping[int, float] | None = None,
    ) -> None:
        documents = shards.documents(split)
        if len(documents) == 0:
            raise ValueError(
                f"the {split} split of {shards.path} holds no document; build the shards from more documents"
                f"{' or with a larger validation_fraction' if split == 'validation' else ''}"
            )
        # bos and eos belong to the row that is built, not to the text.
        starts = shards.offsets[documents] + 1
        lengths = shards.offsets[documents + 1] - 1 - starts
        longest = int(lengths.max())
        keep = lengths >= max(long_tokens, 1)
        if not keep.any():
            raise ValueError(
                f"no {split} document has {max(long_tokens, 1):,} tokens (the longest has {longest:,}); use a shorter "
                f"seq_len, long_documents=False, or text with longer documents"
            )
        self._data = shards.data
        self._starts: np.ndarray = starts[keep]
        self._lengths: np.ndarray = lengths[keep]
        self._is_long = long_tokens > 0
        choices = self._lengths - (long_tokens - 1) if self._is_long else self._lengths
        self._choices: np.ndarray = choices
        self._weighted: np.ndarray | None = None
        if length_weights:
            borders = np.array(sorted(length_weights), dtype=np.int64)
            weights = np.array([1.0, *(length_weights[int(border)] for border in borders)])
            self._weighted = np.cumsum(choices * weights[borders.searchsorted(self._lengths, side="right")])
            if not self._weighted[-1] > 0:
                raise ValueError(f"length_weights {dict(length_weights)} leave no document of the {split} split")
        self._bounds: np.ndarray = np.cumsum(choices)

    def slice(self, rng: np.random.Generator, num_tokens: int, min_tokens: int = 64) -> np.ndarray:
        """Draw the tokens from a random place of a random document on, without bos and eos.

        The document is chosen with probability proportional to its length, the place uniformly, but at least
        ``min_tokens`` before the end of the document where it has as many.

        Returns:
            (length,) uint16 or uint32 view with 1 <= length <= num_tokens.
        """
        if self._weighted is None:
            draw = int(rng.integers(0, self._bounds[-1]))
            document = int(np.searchsorted(self._bounds, draw, side="right"))
            offset = draw - (int(self._bounds[document - 1]) if document else 0)
        else:
            document = int(np.searchsorted(self._weighted, rng.random() * self._weighted[-1], side="right"))
            document = min(document, len(self._lengths) - 1)
            offset = int(rng.integers(0, self._choices[document]))
        length = int(self._lengths[document])
        offset = max(0, min(offset, length - min(min_tokens, num_tokens)))
        start = int(self._starts[document]) + offset
        return self._data[start : start + min(num_tokens, length - offset)]

    def fill(self, rng: np.random.Generator, num_tokens: int) -> np.ndarray:
        """Draw exactly ``num_tokens`` tokens: one slice, or several joined where documents end early, (n,) int32."""
        out: np.ndarray = np.empty(num_tokens, dtype=np.int32)
        filled = 0
        while filled < num_tokens:
            part = self.slice(rng, num_tokens - filled, min_tokens=num_tokens - filled)
            out[filled : filled + len(part)] = part
            filled += len(part)
        return out
