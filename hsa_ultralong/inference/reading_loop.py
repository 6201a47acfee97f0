"""The loop over the text of a document, the same into device memory, onto tiers and into a file: only the sink differs.

Exact at any length: the lower decoder and the encoder run over pieces (fact 5 of docs/architecture.md), compiled where
that pays. Called by reader.py and file_reader.py; tests/inference/test_reader.py, test_reading_loop.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from hsa_ultralong.memory.chunk_memory import Continuation
from hsa_ultralong.models import HSAForCausalLM
from hsa_ultralong.models.reading import DocumentReader, kept_lower_outputs
from hsa_ultralong.models.wrapped import device_of
from hsa_ultralong.nn.views import ChunkTensors

_PIECE_TOKENS = {"cpu": 2048, "cuda": 65_536}
# compiled reading: pieces of this length and its multiples, and from how many tokens on 10 to 20 s of it are won back
_COMPILED_PIECE, _COMPILED_FROM = 2**17, 2**26
_TOKEN_TYPES = (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.int64)
Progress = Callable[[int, int | None], None]


class Text(NamedTuple):
    """Token ids still to be read, in pieces (n,) int32 of any length; num_tokens of the whole text, None: unknown."""

    pieces: Iterator[torch.Tensor]
    num_tokens: int | None


class Sink(Protocol):
    """Where reading puts one document."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the document that were read."""
        ...

    @property
    def num_chunks(self) -> int:
        """Chunks of the document that are here."""
        ...

    def take(self, tokens: torch.Tensor, chunks: ChunkTensors | None, reader: DocumentReader, *, is_last: bool) -> None:
        """The next tokens (n,), and the chunks that are full by them."""
        ...


def read_document(
    model: HSAForCausalLM,
    text: Text,
    sink: Sink,
    *,
    state: Continuation | None,
    number: int,
    label: str,
    piece_tokens: int | None,
    report: Progress,
) -> DocumentReader:
    """Read a text into a sink; the caller puts the model into evaluation mode. The reader knows how to go on.

    Args:
        state: where reading stands; None at the beginning of a document. number: of the document in its memory.
        report: called with the tokens of the document read.

    Raises:
        ValueError: token ids outside the vocabulary, or numbers that are not finite.
    """
    device, step = device_of(model), piece_length(model, piece_tokens, text.num_tokens)
    compiled = step if _is_compiled(device, step) else None
    reader = DocumentReader(model, keep=kept_lower_outputs(model), compiled_piece=compiled)
    if state is not None:
        reader.resume(state)
    for part, is_last in _in_steps(text.pieces, step):
        check_range(part, model.config.vocab_size)
        chunks = reader.complete_chunks(_sent(part, device), sink.num_tokens, sink.num_chunks, number)
        sink.take(part, chunks, reader, is_last=is_last)
        report(sink.num_tokens, None)
    reader.check.require(label)
    return reader


def _is_compiled(device: torch.device, step: int) -> bool:
    # a form is compiled for every length
    return device.type == "cuda" and step % _COMPILED_PIECE == 0


def _sent(part: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Token ids on the device. From pinned memory, as the host would wait for all work before a copy from any other."""
    return part.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else part.to(device)


def _in_steps(pieces: Iterable[torch.Tensor], step: int) -> Iterator[tuple[torch.Tensor, bool]]:
    """The same tokens, `step` at a time, and whether they are the last."""
    waiting: list[torch.Tensor] = []
    count = 0
    for piece in pieces:
        waiting.append(piece)
        count += len(piece)
        # what is read is not the last only if more is there
        if count > step:
            joined = waiting[0] if len(waiting) == 1 else torch.cat(waiting)
            stop = (count - 1) // step * step
            for start in range(0, stop, step):
                yield joined[start : start + step], False
            waiting, count = [joined[stop:]], count - stop
    if count:
        yield torch.cat(waiting), True


def piece_length(model: HSAForCausalLM, piece_tokens: int | None, num_tokens: int | None = None) -> int:
    """Tokens per forward, for a text of `num_tokens` (None: unknown)."""
    if piece_tokens is None:
        kind = device_of(model).type
        if kind == "cuda" and num_tokens is not None and num_tokens >= _COMPILED_FROM:
            return _COMPILED_PIECE
        return _PIECE_TOKENS.get(kind, 2048)
    if piece_tokens < 1:
        raise ValueError(f"piece_tokens must be >= 1, got {piece_tokens}")
    return piece_tokens


def as_tokens(tokens: Any, *, copy: bool = False) -> torch.Tensor:
    """(n,) int32 on the host; without `copy` an int32 tensor that lies there is what is returned.

    Raises:
        ValueError: if it is no one-dimensional sequence of token ids.
    """
    result: Any = tokens if isinstance(tokens, torch.Tensor) else np.asarray(tokens)
    if isinstance(result, np.ndarray) and (result.dtype.kind in "iu" or result.size == 0):
        fits = np.can_cast(result.dtype, np.int32)
        result = torch.from_numpy(result.astype(np.int32 if fits else np.int64))
    if result.ndim == 2 and result.shape[0] == 1:
        result = result[0]
    if result.ndim != 1 or result.dtype not in _TOKEN_TYPES:
        raise ValueError(
            f"a document must be a 1-D sequence of token ids, got shape {tuple(result.shape)} {result.dtype}"
        )
    if result.dtype in (torch.int64, torch.uint32):
        # what does not fit into 32 bits must not wrap around to a valid id
        result = result.to(torch.int64).clamp(-1, 2**31 - 1)
    return result.to(device="cpu", dtype=torch.int32, copy=copy)


def as_text(tokens: Any, vocab_size: int) -> Text:
    """Token ids of one document, or an iterator of pieces of it; whole ones are checked at once.

    Raises:
        ValueError: for anything else, or ids outside the vocabulary.
    """
    if isinstance(tokens, Iterable) and not isinstance(tokens, torch.Tensor | np.ndarray | Sequence):
        # pieces wait for one another, and who gives them may fill one buffer again and again
        return Text((as_tokens(piece, copy=True) for piece in tokens), None)
    whole = as_tokens(tokens)
    check_range(whole, vocab_size)
    return Text(iter([whole]), len(whole))


def check_range(tokens: torch.Tensor, vocab_size: int) -> None:
    if len(tokens) and (int(tokens.min()) < 0 or int(tokens.max()) >= vocab_size):
        raise ValueError(f"token ids must be 0..{vocab_size - 1}, got {int(tokens.min())}..{int(tokens.max())}")


@contextmanager
def show_progress(progress: bool | Progress, total: int | None) -> Iterator[Progress]:
    if callable(progress):
        yield lambda done, _: progress(done, total)
        return
    if not progress:
        yield lambda done, _: None
        return
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    with Bar(
        TextColumn("memorising"), BarColumn(), TextColumn("{task.completed:,.0f} tokens"), TimeRemainingColumn()
    ) as bar:
        task = bar.add_task("", total=total)
        yield lambda done, _: bar.update(task, completed=done)
