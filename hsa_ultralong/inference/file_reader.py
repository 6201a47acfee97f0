"""Reading documents into a memory file: chunks as they fill, a commit now and then, the state to go on after a kill.

Everything here is staged in the writer except the commits on the way, which note that a document is half-read
(memory/half_read.py). Checks, hashing and the disk run behind the model, which reads on meanwhile. Used by library.py;
tests/inference/test_library.py, test_library_failures.py, test_reading_loop.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from hsa_ultralong.inference.editor import EditPlan, continuation_at_end, recompute_chunks
from hsa_ultralong.inference.reading_loop import Progress, Text, read_document
from hsa_ultralong.memory.chunk_memory import Continuation
from hsa_ultralong.memory.columns import on_host, to_columns
from hsa_ultralong.memory.files import MemoryWriter
from hsa_ultralong.memory.files.behind import Behind
from hsa_ultralong.memory.half_read import with_note
from hsa_ultralong.memory.opening import stored_continuation
from hsa_ultralong.memory.saving import pack_continuation
from hsa_ultralong.models import HSAForCausalLM
from hsa_ultralong.models.form import require_state, require_vocabulary
from hsa_ultralong.models.reading import DocumentReader
from hsa_ultralong.models.wrapped import computing_dtype, device_of
from hsa_ultralong.nn.views import ChunkTensors


class FileReader:
    """The model reading into a writer; the caller puts the model into evaluation mode and commits the end."""

    def __init__(self, model: HSAForCausalLM, writer: MemoryWriter) -> None:
        self.model, self.writer = model, writer
        # of the open document while it changes: how to go on, and the tokens of its unfinished chunk
        self.staged: tuple[Continuation, torch.Tensor] | None = None

    def forget(self) -> None:
        """Nothing is staged: the committed state of the open document counts."""
        self.staged = None

    def committed(self) -> tuple[Continuation, torch.Tensor]:
        """The committed state of the open document, and the tokens of its unfinished chunk.

        Raises:
            MemoryFileError: it does not fit the document or the model.
        """
        config = self.model.config
        with self.writer.snapshot() as snapshot:
            state, tail = stored_continuation(snapshot, device_of(self.model), computing_dtype(self.model))
            require_state(config, state, snapshot.documents[-1].num_tokens)
        require_vocabulary(config, tail, f"{self.writer.path}: the open document")
        return state, tail

    def stage(self, state: Continuation, tail: torch.Tensor) -> None:
        """Keep how to go on with the open document; tail: tokens of its unfinished chunk."""
        self.staged = (state, tail)
        self.writer.set_continuation(pack_continuation(state, tail))

    def close(self, id: int) -> None:
        """The last m < S tokens of the open document become a short chunk."""
        document, size = self.writer.document(id), self.model.config.chunk_size
        rest = document.num_tokens - document.num_chunks * size
        if rest:
            state, tokens = self.staged or self.committed()
            short = DocumentReader(self.model, keep=0).encode_short(state.lower[:, -rest:], document.num_chunks, 0)
            self.writer.append_chunks(id, to_columns(self.writer.spec, short, tokens), document.num_tokens)
        self.writer.close_document(id)

    def read_on(
        self,
        id: int,
        text: Text,
        tail: torch.Tensor,
        state: Continuation | None,
        *,
        piece_tokens: int | None,
        commit_tokens: int | None,
        report: Progress,
    ) -> None:
        """Read on in a document, with a commit about every `commit_tokens` (None: none).

        Args:
            text: what is to be read. tail: tokens of the document's unfinished chunk.
            state: where reading stands; None at the beginning.
        """
        label = self.writer.document(id).label
        sink = _FileSink(self, id, text.num_tokens, tail, commit_tokens)
        with sink:
            read_document(
                self.model, text, sink, state=state, number=0, label=label, piece_tokens=piece_tokens, report=report
            )

    def rewrite(self, id: int, tokens: torch.Tensor, plan: EditPlan, report: Progress) -> None:
        """Give a document these tokens (n,) by reading the chunks of the plan again."""
        writer, size, place, stop = self.writer, self.model.config.chunk_size, plan.first, plan.old_stop
        if not plan.num_chunks:
            writer.splice_chunks(id, plan.first, plan.old_stop, None, len(tokens))
        staging = _Staging(writer, id)
        with staging:
            for chunks in recompute_chunks(self.model, tokens, plan.first, plan.new_stop, 0):
                count = chunks.landmarks.shape[1]
                own = tokens[place * size : min((place + count) * size, len(tokens))]
                staging.put(place, stop, to_columns(writer.spec, chunks, own), len(tokens))
                place = stop = place + count
                report((place - plan.first) * size, None)
        if writer.document(id).is_open:
            self.stage(continuation_at_end(self.model, tokens), tokens[writer.document(id).num_chunks * size :])


class _Staging(Behind):
    """Chunks of a document on their way into the writer, which nobody else touches meanwhile."""

    def __init__(self, writer: MemoryWriter, id: int) -> None:
        # as much as the writer itself may hold
        super().__init__(writer.shard_bytes)
        self.writer, self.id = writer, id

    def put(
        self,
        first: int,
        stop: int,
        columns: Mapping[str, torch.Tensor],
        num_tokens: int,
        state: Mapping[str, torch.Tensor] | None = None,
        then: Callable[[], object] = lambda: None,
        *,
        is_last: bool = False,
    ) -> None:
        """`splice_chunks`, and `set_continuation` of a state, once the device has made them; then what follows.

        The last are waited for: most documents are one piece, and nothing would run beside it.
        """
        rows, wait_for_rows = on_host(columns)
        kept, wait = on_host(state or {})

        def write() -> None:
            wait_for_rows()
            self.writer.splice_chunks(self.id, first, stop, rows or None, num_tokens)
            if kept:
                wait()
                self.writer.set_continuation(kept)
            then()

        if is_last:
            self.finish()
            write()
        else:
            self.run(write, sum(part.nbytes for part in (*rows.values(), *kept.values())))


class _FileSink(_Staging):
    """A document of a file: staged, and committed now and then with the state to go on from, while the model reads."""

    def __init__(
        self, files: FileReader, id: int, total: int | None, tail: torch.Tensor, commit_tokens: int | None
    ) -> None:
        super().__init__(files.writer, id)
        document = files.writer.document(id)
        self.num_tokens, self.num_chunks = document.num_tokens, document.num_chunks
        self.files, self.total, self.tail = files, total, tail
        self.commit_tokens, self.committed = commit_tokens, self.num_tokens

    def take(self, tokens: torch.Tensor, chunks: ChunkTensors | None, reader: DocumentReader, *, is_last: bool) -> None:
        place, columns, state = self.num_chunks, {}, None
        self.num_tokens, self.tail = self.num_tokens + len(tokens), torch.cat((self.tail, tokens))
        if chunks is not None:
            self.num_chunks += chunks.landmarks.shape[1]
            own = (self.num_chunks - place) * reader.size
            columns, self.tail = to_columns(self.writer.spec, chunks, self.tail[:own]), self.tail[own:]
        read = self.num_tokens - self.committed
        is_commit = not is_last and self.commit_tokens is not None and read >= self.commit_tokens
        if is_last or is_commit:
            self.files.staged = (reader.continuation(), self.tail)
            state = pack_continuation(*self.files.staged)
        if is_commit:
            self.committed = self.num_tokens
        then = self._commit if is_commit else lambda: None
        self.put(place, place, columns, self.num_tokens, state, then, is_last=is_last)

    def _commit(self) -> None:
        name = self.writer.document(self.id).name
        self.writer.commit(with_note(self.writer.build_state, name, self.total))
