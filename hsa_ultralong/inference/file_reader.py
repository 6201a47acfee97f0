"""Reading documents into a memory file: chunks as they fill, a commit now and then, the state to go on after a kill.

Everything here is staged in the writer except the commits on the way, which note that a document is half-read
(memory/half_read.py). Used by library.py; tests/inference/test_library.py, test_library_failures.py.
"""

from __future__ import annotations

import torch

from hsa_ultralong.inference.editor import EditPlan, continuation_at_end, recompute_chunks
from hsa_ultralong.inference.reading_loop import Progress, Text, read_document
from hsa_ultralong.memory.chunk_memory import Continuation
from hsa_ultralong.memory.columns import to_columns
from hsa_ultralong.memory.files import MemoryWriter
from hsa_ultralong.memory.half_read import with_note
from hsa_ultralong.memory.saving import pack_continuation, stored_continuation
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
        self._staged: tuple[Continuation, torch.Tensor] | None = None

    def forget(self) -> None:
        """Nothing is staged: the committed state of the open document counts."""
        self._staged = None

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
        self._staged = (state, tail)
        self.writer.set_continuation(pack_continuation(state, tail))

    def close(self, id: int) -> None:
        """The last m < S tokens of the open document become a short chunk."""
        document, size = self.writer.document(id), self.model.config.chunk_size
        rest = document.num_tokens - document.num_chunks * size
        if rest:
            state, tokens = self._staged or self.committed()
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
        segment_tokens: int | None,
        commit_tokens: int | None,
        report: Progress,
    ) -> None:
        """Read on in a document, with a commit about every `commit_tokens` (None: none).

        Args:
            text: what is to be read. tail: tokens of the document's unfinished chunk.
            state: where reading stands; None at the beginning.
        """
        sink = _FileSink(self, id, text.num_tokens, tail, commit_tokens)
        label = self.writer.document(id).label
        read_document(
            self.model, text, sink, state=state, number=0, label=label, piece_tokens=segment_tokens, report=report
        )

    def rewrite(self, id: int, tokens: torch.Tensor, plan: EditPlan, report: Progress) -> None:
        """Give a document these tokens (n,) by reading the chunks of the plan again."""
        writer, size, place, stop = self.writer, self.model.config.chunk_size, plan.first, plan.old_stop
        if not plan.num_chunks:
            writer.splice_chunks(id, plan.first, plan.old_stop, None, len(tokens))
        for chunks in recompute_chunks(self.model, tokens, plan.first, plan.new_stop, 0):
            count = chunks.landmarks.shape[1]
            own = tokens[place * size : min((place + count) * size, len(tokens))]
            writer.splice_chunks(id, place, stop, to_columns(writer.spec, chunks, own), len(tokens))
            place = stop = place + count
            report((place - plan.first) * size, None)
        if writer.document(id).is_open:
            self.stage(continuation_at_end(self.model, tokens), tokens[writer.document(id).num_chunks * size :])


class _FileSink:
    """A document of a file: chunks are staged, and committed now and then with the state to go on from."""

    def __init__(
        self, files: FileReader, id: int, total: int | None, tail: torch.Tensor, commit_tokens: int | None
    ) -> None:
        self.files, self.writer, self.id, self.total = files, files.writer, id, total
        self.tail, self.commit_tokens, self.committed = tail, commit_tokens, self.num_tokens

    @property
    def num_tokens(self) -> int:
        return self.writer.document(self.id).num_tokens

    @property
    def num_chunks(self) -> int:
        return self.writer.document(self.id).num_chunks

    def take(self, tokens: torch.Tensor, chunks: ChunkTensors | None, reader: DocumentReader, *, is_last: bool) -> None:
        writer, stop = self.writer, self.num_tokens + len(tokens)
        unfinished = torch.cat((self.tail, tokens))
        if chunks is not None:
            own = chunks.landmarks.shape[1] * reader.size
            writer.append_chunks(self.id, to_columns(writer.spec, chunks, unfinished[:own]), stop)
            unfinished = unfinished[own:]
        else:
            writer.splice_chunks(self.id, self.num_chunks, self.num_chunks, None, stop)
        self.tail = unfinished
        is_commit = not is_last and self.commit_tokens is not None and stop - self.committed >= self.commit_tokens
        if is_last or is_commit:
            self.files.stage(reader.continuation(), unfinished)
        if is_commit:
            writer.commit(with_note(writer.build_state, writer.document(self.id).name, self.total))
            self.committed = stop
