"""A memory file and the model that writes it: building that survives a kill, appending, editing, merging.

Every method either commits the whole change or leaves the file as it was. Reading long documents commits now and then,
with the state to go on from; calling `add` again with the same document goes on there, and nothing else touches a
half-read document but `close_document` and `delete`. docs/memory-format.md; tests/inference/test_library.py,
test_library_failures.py, test_half_read.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from hsa_ultralong.inference.editor import EditPlan, continuation_at_end, difference, plan_edit
from hsa_ultralong.inference.file_reader import FileReader
from hsa_ultralong.inference.reading_loop import Progress, Text, as_text, as_tokens, check_range, show_progress
from hsa_ultralong.memory.files import MemoryDocument, MemoryFile, MemoryWriter
from hsa_ultralong.memory.half_read import HalfRead, half_read, way_on, without_note
from hsa_ultralong.models import HSAForCausalLM
from hsa_ultralong.models.evaluation import evaluating
from hsa_ultralong.models.fingerprint import memory_fingerprint
from hsa_ultralong.models.form import model_spec, require_model_spec, require_vocabulary
from hsa_ultralong.models.wrapped import unwrapped

# tokens read between two commits of a document
COMMIT_TOKENS = 2**20
_NOTHING = torch.empty(0, dtype=torch.int32)


class Library:
    """A memory file opened for writing by the model that it belongs to. A context manager; one writer at a time."""

    def __init__(self, model: HSAForCausalLM, writer: MemoryWriter) -> None:
        self.model, self.writer = unwrapped(model), writer
        self._reader = FileReader(self.model, writer)
        # JSON for the build state, committed together with the next change
        self.notes: dict[str, Any] = {}
        # a committed state whose token ids can be read, as long as it holds the documents asked for
        self._snapshot: MemoryFile | None = None

    @staticmethod
    def create(
        model: HSAForCausalLM,
        path: str | Path,
        *,
        key_values: str = "bf16",
        landmarks: str = "bf16",
        tokenizer: str = "",
        metadata: Mapping[str, Any] | None = None,
        exist_ok: bool = False,
    ) -> Library:
        """A new memory file for this model.

        Args:
            key_values, landmarks: "bf16", "fp16", "fp32", "int8" or "fp8" (docs/memory-format.md, accuracy).
            tokenizer: its fingerprint. metadata: free JSON.
            exist_ok: open a file of the same kind that exists already, to go on building it.

        Raises:
            MemoryFileError: it exists (or is of another kind), is being written, or cannot be written.
            ValueError: an unknown format.
        """
        model = unwrapped(model)
        others = {"fingerprint": memory_fingerprint(model), "tokenizer": tokenizer, "metadata": metadata}
        spec = model_spec(model.config, key_values, landmarks, **others)
        return Library(model, MemoryWriter.create(path, spec, exist_ok=exist_ok))

    @staticmethod
    def open(model: HSAForCausalLM, path: str | Path) -> Library:
        """An existing memory file, for writing.

        Raises:
            MemoryFileError: no memory, another model's, damaged, or another writer has it open.
        """
        writer = MemoryWriter.open(path, fingerprint=memory_fingerprint(model))
        try:
            require_model_spec(unwrapped(model).config, writer.spec, str(path))
        except BaseException:
            writer.close()
            raise
        return Library(model, writer)

    def __enter__(self) -> Library:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let others write; what was not committed is dropped."""
        self._snapshot = None
        self.writer.close()

    @property
    def documents(self) -> tuple[MemoryDocument, ...]:
        return self.writer.documents

    @property
    def half_read(self) -> HalfRead | None:
        """The document that a killed `add` left, with the number of tokens of its whole text."""
        return half_read(self.writer.open_document, self.writer.build_state)

    def document(self, which: int | str) -> MemoryDocument:
        """A document by id or by name.

        Raises:
            ValueError: none or several of that name.
        """
        if isinstance(which, int):
            with suppress(ValueError):
                return self.writer.document(which)
        found = [document for document in self.documents if document.name == which]
        if len(found) == 1:
            return found[0]
        names = ", ".join(document.label for document in self.documents[:5]) + (", ..." if self.documents[5:] else "")
        if not found:
            raise ValueError(f"document {which!r} does not exist; the memory holds {names or 'no documents'}")
        raise ValueError(f"{len(found)} documents are named {which!r}; use one of the ids {[d.id for d in found]}")

    def tokens(self, which: int | str) -> torch.Tensor:
        """All token ids of a document, (n,) int32, read from the file: what is staged is committed first if need be."""
        document = self.document(which)
        known = self._snapshot
        if known is None or document.is_open or not known.holds(document):
            self.commit()
            known = self._snapshot = self.writer.snapshot()
        tokens = known.document_tokens(document.id)
        require_vocabulary(self.model.config, tokens, f"{self.writer.path}: {document.label}")
        return tokens

    def add(
        self,
        tokens: Any,
        *,
        name: str = "",
        metadata: Mapping[str, Any] | None = None,
        close: bool = True,
        commit: bool = True,
        piece_tokens: int | None = None,
        commit_tokens: int = COMMIT_TOKENS,
        progress: bool | Progress = False,
    ) -> int:
        """Memorise a document at the end of the file; returns its id.

        If an earlier call with the same name, metadata and tokens was killed, reading goes on where it last committed.

        Args:
            tokens: all token ids, or an iterator of pieces of them, read as they come.
            close: False leaves the document open for `extend`.
            commit: False leaves a whole document staged for a later commit (`commit`, or that of any other change): for
                many small documents. A change that fails drops them.
            commit_tokens: commit about that often while reading.

        Raises:
            ValueError: empty or malformed input, an open document that is not to be committed, or a half-read document
                of another text.
            MemoryFileError: the file could not be written; it holds what it held at the last commit.
        """
        if not (close or commit):
            raise ValueError("commit=False is for whole documents; commit a document that stays open")
        text = as_text(tokens, self.model.config.vocab_size)
        return self.add_text(
            text, name=name, metadata=metadata, close=close, commit=commit, piece_tokens=piece_tokens,
            commit_tokens=commit_tokens, progress=progress,
        )  # fmt: skip

    def add_text(
        self,
        text: Text,
        *,
        name: str,
        close: bool,
        metadata: Mapping[str, Any] | None = None,
        commit: bool = True,
        piece_tokens: int | None = None,
        commit_tokens: int = COMMIT_TOKENS,
        progress: bool | Progress = False,
    ) -> int:
        """See `add`."""
        if text.num_tokens == 0:
            raise ValueError(f"document {name!r} is empty: nothing to memorise")
        text, started = self._started(text, name, metadata)
        if started is None:
            self._require_whole()
        with self._change(commit), show_progress(progress, text.num_tokens) as report:
            if started is None:
                self._close_open()
                id, state, tail = self.writer.begin_document(name, metadata), None, _NOTHING
            else:
                id, (state, tail) = started.id, self._reader.committed()
            self._reader.read_on(
                id, text, tail, state, piece_tokens=piece_tokens, commit_tokens=commit_tokens, report=report
            )
            if self.writer.document(id).num_tokens == 0:
                raise ValueError(f"document {name!r} is empty: nothing to memorise")
            if close:
                self._reader.close(id)
        return id

    def extend(
        self,
        tokens: Any,
        *,
        close: bool = False,
        metadata: Mapping[str, Any] | None = None,
        piece_tokens: int | None = None,
    ) -> None:
        """Add text at the end of the last document, exactly as if it had been longer; a closed one is opened again.

        Raises:
            ValueError: no documents, or empty or malformed input.
        """
        if not self.documents:
            raise ValueError("the memory holds no document to extend; add one")
        self._require_whole()
        last, new = self.documents[-1], as_tokens(tokens)
        if len(new) == 0:
            raise ValueError(f"{last.label} cannot be extended by nothing: no tokens were given")
        check_range(new, self.model.config.vocab_size)
        old, size = self.tokens(last.id), self.model.config.chunk_size
        full = len(old) // size
        with self._change():
            if metadata is not None:
                self.writer.describe_document(last.id, metadata)
            if last.is_open:
                state, tail = self._reader.committed()
            else:
                state, tail = continuation_at_end(self.model, old), old[full * size :]
                self.writer.reopen_document(last.id)
                # a short chunk is full now, or waits for more tokens
                self.writer.splice_chunks(last.id, full, last.num_chunks, None, len(old))
            # no commit on the way: a kill leaves the text as it was
            self._reader.read_on(
                last.id, Text(iter([new]), len(old) + len(new)), tail, state,
                piece_tokens=piece_tokens, commit_tokens=None, report=lambda *_: None,
            )  # fmt: skip
            if close:
                self._reader.close(last.id)

    def close_document(self) -> None:
        """Close the open document, if any: its last m < S tokens become a short chunk.

        A half-read one keeps what was read, and its metadata says so: `closed_early`, the tokens of its whole text
        ("unknown" of a stream).
        """
        half = self.half_read
        if self.writer.open_document is not None:
            with self._change():
                if half is not None:
                    early = {**half.document.metadata, "closed_early": half.whole}
                    self.writer.describe_document(half.document.id, early)
                self._close_open()

    def _close_open(self) -> None:
        """`close_document` inside a change."""
        document = self.writer.open_document
        if document is not None:
            self._reader.close(document.id)

    def _require_whole(self, which: MemoryDocument | None = None) -> None:
        """Refuse while a document is half-read; only if it is `which`, where one is given."""
        half = self.half_read
        if half is not None and (which is None or which.id == half.document.id):
            raise ValueError(f"{half}; {way_on(self.writer.path)}")

    def commit(self) -> None:
        """Make documents visible that were added with commit=False.

        Raises:
            ValueError: the model was changed since the file was opened (training, adapters).
        """
        self._check_model()
        state = {**self.writer.build_state, **self.notes}
        self.writer.commit(state if self.half_read is not None else without_note(state))

    def _check_model(self) -> None:
        if memory_fingerprint(self.model) != self.writer.spec.fingerprint:
            self.writer.discard()
            raise ValueError(
                "the model (its weights or adapters) was changed after this memory was opened; open it again with the "
                "model that wrote it"
            )

    @contextmanager
    def _change(self, commit: bool = True) -> Iterator[None]:
        """Read in evaluation mode; commit what the block staged, or drop it if the block fails."""
        self._reader.forget()
        if commit:
            self._check_model()
        try:
            with evaluating(self.model):
                yield
            if commit:
                self.commit()
        except BaseException:
            self.writer.discard()
            raise
        finally:
            self._reader.forget()

    def plan(self, which: int | str, start: int, stop: int, num_new: int) -> EditPlan:
        """What `edit` would cost.

        Raises:
            ValueError: unknown document, or a range outside it.
        """
        document = self.document(which)
        return plan_edit(self.model.config, document.num_tokens, start, stop, num_new, is_open=document.is_open)

    def edit(
        self, which: int | str, start: int, stop: int, tokens: Any, *, progress: bool | Progress = False
    ) -> EditPlan:
        """Replace tokens start..stop of a document by others (start == stop inserts, no tokens delete).

        Raises:
            ValueError: unknown or half-read document, a range outside it, or an edit that would leave it empty.
        """
        document, new = self.document(which), as_tokens(tokens)
        self._require_whole(document)
        plan = self.plan(which, start, stop, len(new))
        check_range(new, self.model.config.vocab_size)
        old = self.tokens(document.id)
        self._rewrite(document, torch.cat((old[:start], new, old[stop:])), plan, progress)
        return plan

    def replace(
        self,
        which: int | str,
        tokens: Any,
        *,
        metadata: Mapping[str, Any] | None = None,
        commit: bool = True,
        progress: bool | Progress = False,
    ) -> EditPlan:
        """Give a document other text; what begins or ends like the old one is kept where the grid allows it.

        Args:
            commit: False leaves the change staged for a later commit, as `add` does.

        Raises:
            ValueError: unknown or half-read document, or empty or malformed input.
        """
        document, new = self.document(which), as_tokens(tokens)
        self._require_whole(document)
        if len(new) == 0:
            raise ValueError("the new text is empty; delete the document instead")
        check_range(new, self.model.config.vocab_size)
        old = self.tokens(document.id)
        start, stop, count = difference(old, new)
        plan = plan_edit(self.model.config, len(old), start, stop, count, is_open=document.is_open)
        self._rewrite(document, new, plan, progress, metadata, commit)
        return plan

    def _rewrite(
        self,
        document: MemoryDocument,
        tokens: torch.Tensor,
        plan: EditPlan,
        progress: bool | Progress,
        metadata: Mapping[str, Any] | None = None,
        commit: bool = True,
    ) -> None:
        total = plan.num_chunks * self.model.config.chunk_size
        with self._change(commit), show_progress(progress, total) as report:
            if metadata is not None:
                self.writer.describe_document(document.id, metadata)
            self._reader.rewrite(document.id, tokens, plan, report)

    def delete(self, which: int | str) -> None:
        """Remove a document; `compact` frees its bytes.

        Raises:
            ValueError: unknown document.
            MemoryFileError: others follow it and the model depends on the order of chunks.
        """
        id = self.document(which).id
        with self._change():
            self.writer.delete_document(id)

    def merge(self, paths: Sequence[str | Path], progress: Any = None) -> list[int]:
        """Add the documents of other memory files, after checking every byte of them; returns the new ids.

        Raises:
            ValueError: a half-read document here.
            MemoryFileError: another model, tokenizer or form, damage, or an open document there.
        """
        self._require_whole()
        with self._change(), ExitStack() as opened:
            files = [opened.enter_context(MemoryFile.open(path)) for path in paths]
            self._close_open()
            return self.writer.merge(files, progress)

    def compact(self, progress: Any = None) -> int:
        """Free the bytes of deleted and replaced chunks for good; returns how many."""
        self.commit()
        return self.writer.compact(progress)

    def _started(self, text: Text, name: str, metadata: Mapping[str, Any] | None) -> tuple[Text, MemoryDocument | None]:
        """What is to be read of a text, and the open document that a killed `add` of its beginning left, or None."""
        document = self.writer.open_document
        if document is None or document.name != name or document.metadata != dict(metadata or {}):
            return text, None
        known, count, pieces = self.tokens(document.id), 0, []
        while count < len(known) and (piece := next(text.pieces, None)) is not None:
            pieces.append(piece)
            count += len(piece)
        begin = torch.cat([_NOTHING, *pieces])
        assert self._snapshot is not None
        if torch.equal(begin[: len(known)], known) and self._snapshot.continuation() is not None:
            return Text(chain([begin[len(known) :]], text.pieces), text.num_tokens), document
        return Text(chain([begin], text.pieces), text.num_tokens), None
