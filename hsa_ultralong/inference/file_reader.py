"""Reading documents into a memory file: chunks as they fill, a commit now and then, the state to go on after a kill.

Everything here is staged in the writer except the commits on the way, which note that a document is half-read
(memory/half_read.py). Used by library.py; tests/inference/test_library.py, test_library_failures.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from hsa_ultralong.inference.editor import EditPlan, continuation_at_end, recompute_chunks
from hsa_ultralong.inference.reader import Progress, segment_length
from hsa_ultralong.memory.chunk_memory import Continuation
from hsa_ultralong.memory.columns import to_columns
from hsa_ultralong.memory.files import MemoryWriter
from hsa_ultralong.memory.half_read import with_note
from hsa_ultralong.memory.saving import pack_continuation, stored_continuation
from hsa_ultralong.models import HSAForCausalLM
from hsa_ultralong.models.form import require_state, require_vocabulary
from hsa_ultralong.models.reading import DocumentReader, kept_lower_outputs
from hsa_ultralong.models.wrapped import computing_dtype, device_of


class FileReader:
    """The model reading into a writer; the caller puts the model into evaluation mode and commits the end."""

    def __init__(self, model: HSAForCausalLM, writer: MemoryWriter) -> None:
        self.model, self.writer = model, writer
        # of the open document while it changes: how to go on, and the tokens of its unfinished chunk
        self._staged: tuple[Continuation, torch.Tensor] | None = None

    def forget(self) -> None:
        """Nothing is staged: the committed state of the open document counts."""
        self._staged = None

    def continuation(self) -> Continuation:
        """The committed state of the open document.

        Raises:
            MemoryFileError: it does not fit the document or the model.
        """
        return self._committed()[0]

    def _committed(self) -> tuple[Continuation, torch.Tensor]:
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
            state, tokens = self._staged or self._committed()
            short = DocumentReader(self.model, keep=0).encode_short(state.lower[:, -rest:], document.num_chunks, 0)
            self.writer.append_chunks(id, to_columns(self.writer.spec, short, tokens), document.num_tokens)
        self.writer.close_document(id)

    def read_on(
        self,
        id: int,
        tokens: torch.Tensor,
        done: int,
        state: Continuation | None,
        *,
        segment_tokens: int | None,
        commit_tokens: int | None,
        report: Progress,
    ) -> None:
        """Read tokens done.. of a document (n,), with a commit about every `commit_tokens` (None: none).

        Args:
            state: where reading stands after `done` tokens; None at the beginning.
        """
        writer, size = self.writer, self.model.config.chunk_size
        reader = DocumentReader(self.model, keep=kept_lower_outputs(self.model))
        if state is not None:
            reader.resume(state)
        committed = done
        for start, stop in self._segments(done, len(tokens), segment_tokens):
            part, first = tokens[start:stop], writer.document(id).num_chunks
            chunks = reader.complete_chunks(part.to(device_of(self.model)), start, first, 0)
            if chunks is not None:
                own = tokens[first * size : (first + chunks.landmarks.shape[1]) * size]
                writer.append_chunks(id, to_columns(writer.spec, chunks, own), stop)
            else:
                writer.splice_chunks(id, first, first, None, stop)
            is_last = stop == len(tokens)
            is_commit = not is_last and commit_tokens is not None and stop - committed >= commit_tokens
            if is_last or is_commit:
                self.stage(reader.continuation(), tokens[writer.document(id).num_chunks * size : stop])
            if is_commit:
                writer.commit(with_note(writer.build_state, writer.document(id).name, len(tokens)))
                committed = stop
            report(stop, None)

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

    def _segments(self, done: int, total: int, segment_tokens: int | None) -> Iterator[tuple[int, int]]:
        step = segment_length(self.model, segment_tokens)
        return ((start, min(start + step, total)) for start in range(done, total, step))
