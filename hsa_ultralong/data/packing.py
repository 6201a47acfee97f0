"""Documents of any length packed onto the chunk grid: a data collator for transformers' Trainer and for trl.

Every document starts a chunk and is padded to a multiple of the chunk size; `segment_ids` keep documents apart. With
isolated documents the loss of a packed batch is that of its documents one by one. Tests: tests/data/test_packing.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

IGNORE_INDEX = -100


class _Document(NamedTuple):
    tokens: torch.Tensor
    labels: torch.Tensor
    room: int


class PackingCollator:
    """Packs a list of documents into rows, as HSAForCausalLM takes them.

    Args:
        chunk_size: S, that of the model (`model.config.chunk_size`).
        row_tokens: most tokens of a row, a multiple of chunk_size; documents fill as few rows as first-fit finds. None:
            all documents of a batch make one row.
        isolate_documents: True: a document reads itself alone, as without packing. False: it also reads the memory of
            the documents before it in its row.
        pad_token_id: fills the rest of a document's last chunk; masked, so any id of the vocabulary serves.

    Raises:
        ValueError: for sizes that do not fit together.
    """

    def __init__(
        self, chunk_size: int, *, row_tokens: int | None = None, isolate_documents: bool = True, pad_token_id: int = 0
    ) -> None:
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        if row_tokens is not None and (row_tokens < chunk_size or row_tokens % chunk_size):
            raise ValueError(f"row_tokens must be a multiple of chunk_size={chunk_size}, got {row_tokens}")
        self.chunk_size, self.row_tokens = chunk_size, row_tokens
        self.isolate_documents, self.pad_token_id = isolate_documents, pad_token_id

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Args:
            features: documents with `input_ids` (n,), optionally `labels` (n,), -100 = not counted, by default the
                tokens, and `attention_mask` (n,), whose zeros leave tokens out. Documents without tokens take no room.

        Returns:
            input_ids and labels (B, T) int64, attention_mask (B, T) int64, segment_ids (B, T) int32, -1 on padding,
            isolate_documents (B,) bool. T is a multiple of chunk_size; no label is the first token of a document.

        Raises:
            ValueError: for features that do not fit, longer than a row, or without any token in all.
        """
        documents = [document for number, feature in enumerate(features) if (document := self._read(number, feature))]
        if not documents:
            raise ValueError(f"nothing to pack: the {len(features)} documents of this batch hold no tokens")
        rows = self._fill(documents)
        length = max(sum(document.room for document in row) for row in rows)
        shape = (len(rows), length)
        tokens = torch.full(shape, self.pad_token_id, dtype=torch.int64)
        labels = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
        segments = torch.full(shape, -1, dtype=torch.int32)
        for number, row in enumerate(rows):
            start = 0
            for segment, document in enumerate(row):
                place = slice(start, start + len(document.tokens))
                tokens[number, place], labels[number, place] = document.tokens, document.labels
                segments[number, place] = segment
                labels[number, start] = IGNORE_INDEX
                start += document.room
        return {
            "input_ids": tokens,
            "labels": labels,
            "attention_mask": (segments >= 0).long(),
            "segment_ids": segments,
            "isolate_documents": torch.full((len(rows),), self.isolate_documents),
        }

    def _read(self, number: int, feature: Mapping[str, Any]) -> _Document | None:
        if "input_ids" not in feature:
            raise ValueError(f"document {number} of the batch has no input_ids, but {', '.join(feature) or 'nothing'}")
        parts = {name: _numbers(value) for name, value in feature.items() if value is not None}
        tokens = parts.pop("input_ids")
        labels, mask = parts.pop("labels", None), parts.pop("attention_mask", None)
        # tokenizers of models with one type of token say so
        if not parts.get("token_type_ids", tokens[:0]).any():
            parts.pop("token_type_ids", None)
        if parts:
            raise ValueError(
                f"PackingCollator takes input_ids, labels and attention_mask, got {next(iter(parts))!r}; say in labels "
                "what counts (-100: not), and pack here alone (trl: packing=False, padding_free=False)"
            )
        for name, part in (("labels", labels), ("attention_mask", mask)):
            if part is not None and part.shape != tokens.shape:
                raise ValueError(f"document {number} of the batch has {len(tokens)} tokens and {len(part)} {name}")
        if mask is not None:
            if labels is not None and bool((labels[mask == 0] != IGNORE_INDEX).any()):
                raise ValueError(f"document {number} of the batch has labels at masked tokens; make them -100")
            tokens, labels = tokens[mask != 0], None if labels is None else labels[mask != 0]
        if not len(tokens):
            return None
        room = -(-len(tokens) // self.chunk_size) * self.chunk_size
        if self.row_tokens is not None and room > self.row_tokens:
            raise ValueError(
                f"document {number} of the batch has {len(tokens)} tokens, a row of row_tokens={self.row_tokens} holds "
                "fewer: cut it into documents, or take longer rows"
            )
        return _Document(tokens, tokens if labels is None else labels, room)

    def _fill(self, documents: list[_Document]) -> list[list[_Document]]:
        """Rows of documents: the longest first, each in the first row with room; one row without a limit."""
        if self.row_tokens is None:
            return [documents]
        rows: list[list[_Document]] = []
        free: list[int] = []
        for document in sorted(documents, key=lambda document: -document.room):
            index = next((i for i, room in enumerate(free) if room >= document.room), len(rows))
            if index == len(rows):
                rows.append([])
                free.append(self.row_tokens)
            rows[index].append(document)
            free[index] -= document.room
        return rows


def _numbers(value: Any) -> torch.Tensor:
    """(n,) int64 of a list, an array or a tensor (n,) or (1, n)."""
    numbers = torch.as_tensor(value, dtype=torch.int64) if len(value) else torch.zeros(0, dtype=torch.int64)
    numbers = numbers[0] if numbers.dim() == 2 and numbers.shape[0] == 1 else numbers
    if numbers.dim() != 1:
        raise ValueError(f"a document is one sequence of numbers, got shape {tuple(numbers.shape)}")
    return numbers
