"""A memory file and the model that writes it: building that survives a kill, appending, editing, merging.

Every method either commits the whole change or leaves the file as it was. Reading long documents commits now and then,
with the state to go on from; calling `add` again with the same document goes on there. docs/memory-format.md;
tests/inference/test_library.py, test_library_failures.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from hsa_ultralong.inference.editor import EditPlan, continuation_at_end, plan_edit, recompute_chunks
from hsa_ultralong.inference.fingerprint import memory_fingerprint
from hsa_ultralong.inference.reader import (
    DocumentReader,
    Progress,
    as_tokens,
    check_range,
    evaluating,
    kept_lower_outputs,
    segment_length,
    show_progress,
)
from hsa_ultralong.inference.wrapped import computing_dtype, device_of, unwrapped
from hsa_ultralong.memory.columns import memory_spec, to_columns
from hsa_ultralong.memory.files import MemoryDocument, MemoryFile, MemoryWriter
from hsa_ultralong.memory.saving import pack_continuation, unpack_continuation
from hsa_ultralong.models import HSAForCausalLM
from hsa_ultralong.nn.chunk_memory import Continuation

# tokens read between two commits of a document
COMMIT_TOKENS = 2**20


class Library:
    """A memory file opened for writing by the model that it belongs to. A context manager; one writer at a time."""

    def __init__(self, model: HSAForCausalLM, writer: MemoryWriter) -> None:
        self.model, self.writer = unwrapped(model), writer
        # of the open document while it changes: how to go on, and the tokens of its unfinished chunk
        self._staged: tuple[Continuation, torch.Tensor] | None = None

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
        config = model.config
        assert config.head_dim is not None
        spec = memory_spec(
            chunk_size=config.chunk_size,
            num_memory_heads=config.num_memory_heads,
            head_dim=config.head_dim,
            num_retrieval_heads=config.num_retrieval_heads,
            retrieval_dim=config.retrieval_dim,
            key_values=key_values,  # type: ignore[arg-type]
            landmarks=landmarks,  # type: ignore[arg-type]
            fingerprint=memory_fingerprint(model),
            tokenizer=tokenizer,
            is_composable=config.is_composable,
            metadata=metadata,
        )
        return Library(model, MemoryWriter.create(path, spec, exist_ok=exist_ok))

    @staticmethod
    def open(model: HSAForCausalLM, path: str | Path) -> Library:
        """An existing memory file, for writing.

        Raises:
            MemoryFileError: no memory, another model's, damaged, or another writer has it open.
        """
        return Library(model, MemoryWriter.open(path, fingerprint=memory_fingerprint(model)))

    def __enter__(self) -> Library:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let others write; what was not committed is dropped."""
        self.writer.close()

    @property
    def documents(self) -> tuple[MemoryDocument, ...]:
        return self.writer.documents

    def document(self, which: int | str) -> MemoryDocument:
        """A document by id or by name.

        Raises:
            ValueError: none or several of that name.
        """
        found = [document for document in self.documents if which in (document.id, document.name)]
        if len(found) == 1:
            return found[0]
        names = ", ".join(document.label for document in self.documents[:5]) + (", ..." if self.documents[5:] else "")
        if not found:
            raise ValueError(f"document {which!r} does not exist; the memory holds {names or 'no documents'}")
        raise ValueError(f"{len(found)} documents are named {which!r}; use one of the ids {[d.id for d in found]}")

    def tokens(self, which: int | str) -> torch.Tensor:
        """All token ids of a document, (n,) int32, read from the file: what is staged is committed first."""
        self.commit()
        return self.writer.snapshot().document_tokens(self.document(which).id)

    def add(
        self,
        tokens: Any,
        *,
        name: str = "",
        metadata: Mapping[str, Any] | None = None,
        close: bool = True,
        commit: bool = True,
        segment_tokens: int | None = None,
        commit_tokens: int = COMMIT_TOKENS,
        progress: bool | Progress = False,
    ) -> int:
        """Memorise a document at the end of the file; returns its id.

        If an earlier call with the same name, metadata and tokens was killed, reading goes on where it last committed.

        Args:
            tokens: all token ids. close: False leaves the document open for `extend`.
            commit: False leaves a whole document staged for a later commit (`commit`, or that of any other change): for
                many small documents. A change that fails drops them.
            commit_tokens: commit about that often while reading.

        Raises:
            ValueError: empty or malformed input, or an open document that is not to be committed.
            MemoryFileError: the file could not be written; it holds what it held at the last commit.
        """
        if not (close or commit):
            raise ValueError("commit=False is for whole documents; commit a document that stays open")
        tokens = as_tokens(tokens)
        check_range(tokens, self.model.config.vocab_size)
        if len(tokens) == 0:
            raise ValueError(f"document {name!r} is empty: nothing to memorise")
        started = self._started(tokens, name, metadata)
        with self._change(commit), show_progress(progress, len(tokens)) as report:
            if started is None:
                self._close_open()
                id, done, state = self.writer.begin_document(name, metadata), 0, None
            else:
                id, done, state = started.id, started.num_tokens, self._continuation()
            self._read_on(id, tokens, done, state, segment_tokens, commit_tokens, report)
            if close:
                self._close(id)
        return id

    def extend(
        self,
        tokens: Any,
        *,
        close: bool = False,
        metadata: Mapping[str, Any] | None = None,
        segment_tokens: int | None = None,
    ) -> None:
        """Add text at the end of the last document, exactly as if it had been longer; a closed one is opened again.

        Raises:
            ValueError: no documents, or empty or malformed input.
        """
        if not self.documents:
            raise ValueError("the memory holds no document to extend; add one")
        last, new = self.documents[-1], as_tokens(tokens)
        if len(new) == 0:
            raise ValueError(f"{last.label} cannot be extended by nothing: no tokens were given")
        check_range(new, self.model.config.vocab_size)
        whole = torch.cat((self.tokens(last.id), new))
        done, size = last.num_tokens, self.model.config.chunk_size
        with self._change():
            if metadata is not None:
                self.writer.describe_document(last.id, metadata)
            if last.is_open:
                state = self._continuation()
            else:
                with evaluating(self.model):
                    state = continuation_at_end(self.model, whole[:done])
                self.writer.reopen_document(last.id)
                # a short chunk is full now, or waits for more tokens
                self.writer.splice_chunks(last.id, done // size, last.num_chunks, None, done)
            # no commit on the way: a kill leaves the text as it was
            self._read_on(last.id, whole, done, state, segment_tokens, len(whole) + 1, lambda *_: None)
            if close:
                self._close(last.id)

    def close_document(self) -> None:
        """Close the open document, if any: its last m < S tokens become a short chunk."""
        if self.writer.open_document is not None:
            with self._change():
                self._close_open()

    def _close_open(self) -> None:
        """`close_document` inside a change."""
        document = self.writer.open_document
        if document is not None:
            self._close(document.id)

    def _close(self, id: int) -> None:
        document, size = self.document(id), self.model.config.chunk_size
        rest = document.num_tokens - document.num_chunks * size
        if rest:
            state, tokens = self._tail
            reader = DocumentReader(self.model, keep=0)
            with evaluating(self.model):
                short = reader.encode_short(state.lower[:, -rest:], document.num_chunks, 0)
            self.writer.append_chunks(id, to_columns(self.writer.spec, short, tokens), document.num_tokens)
        self.writer.close_document(id)

    def commit(self) -> None:
        """Make documents visible that were added with commit=False.

        Raises:
            ValueError: the model was changed since the file was opened (training, adapters).
        """
        self._check_model()
        self.writer.commit()

    def _check_model(self) -> None:
        if memory_fingerprint(self.model) != self.writer.spec.fingerprint:
            self.writer.discard()
            raise ValueError(
                "the model (its weights or adapters) was changed after this memory was opened; open it again with the "
                "model that wrote it"
            )

    @contextmanager
    def _change(self, commit: bool = True) -> Iterator[None]:
        """Commit what the block staged, or drop it if the block fails."""
        self._staged = None
        if commit:
            self._check_model()
        try:
            yield
            if commit:
                self.commit()
        except BaseException:
            self.writer.discard()
            raise
        finally:
            self._staged = None

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
            ValueError: unknown document, a range outside it, or an edit that would leave it empty.
        """
        document, new = self.document(which), as_tokens(tokens)
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
        progress: bool | Progress = False,
    ) -> EditPlan:
        """Give a document other text; what begins or ends like the old one is kept where the grid allows it.

        Raises:
            ValueError: unknown document, or empty or malformed input.
        """
        document, new = self.document(which), as_tokens(tokens)
        if len(new) == 0:
            raise ValueError("the new text is empty; delete the document instead")
        check_range(new, self.model.config.vocab_size)
        old = self.tokens(document.id)
        start, stop, count = difference(old, new)
        plan = plan_edit(self.model.config, len(old), start, stop, count, is_open=document.is_open)
        self._rewrite(document, new, plan, progress, metadata)
        return plan

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
            MemoryFileError: another model, tokenizer or form, damage, or an open document there.
        """
        with self._change(), ExitStack() as opened:
            files = [opened.enter_context(MemoryFile.open(path)) for path in paths]
            self._close_open()
            return self.writer.merge(files, progress)

    def compact(self, progress: Any = None) -> int:
        """Free the bytes of deleted and replaced chunks for good; returns how many."""
        return self.writer.compact(progress)

    @property
    def _tail(self) -> tuple[Continuation, torch.Tensor]:
        """State and unfinished chunk's tokens of the open document, as staged last or as committed."""
        if self._staged is not None:
            return self._staged
        stored = self.writer.snapshot().continuation()
        assert stored is not None
        return self._unpack(stored[0]), stored[0]["tail_tokens"]

    def _unpack(self, tensors: Mapping[str, torch.Tensor]) -> Continuation:
        return unpack_continuation(tensors, device_of(self.model), computing_dtype(self.model))

    def _continuation(self) -> Continuation:
        stored = self.writer.snapshot().continuation()
        assert stored is not None
        return self._unpack(stored[0])

    def _started(self, tokens: torch.Tensor, name: str, metadata: Mapping[str, Any] | None) -> MemoryDocument | None:
        """The open document that a killed `add` of these tokens left, or None."""
        document = self.writer.open_document
        if document is None or document.name != name or document.metadata != dict(metadata or {}):
            return None
        if document.num_tokens > len(tokens) or self.writer.snapshot().continuation() is None:
            return None
        return document if torch.equal(self.tokens(document.id), tokens[: document.num_tokens]) else None

    def _read_on(
        self,
        id: int,
        tokens: torch.Tensor,
        done: int,
        state: Continuation | None,
        segment_tokens: int | None,
        commit_tokens: int,
        report: Progress,
    ) -> None:
        """Read tokens done.. of a document, with a commit now and then; the end is staged, not committed."""
        model, spec, size = self.model, self.writer.spec, self.model.config.chunk_size
        step, device = segment_length(model, segment_tokens), device_of(model)
        reader = DocumentReader(model, keep=kept_lower_outputs(model))
        if state is not None:
            reader.resume(state)
        committed = done
        with evaluating(model):
            for start in range(done, len(tokens), step):
                part = tokens[start : start + step]
                first = self.writer.documents[-1].num_chunks
                chunks = reader.complete_chunks(part.to(device), start, first, 0)
                stop = start + len(part)
                if chunks is not None:
                    own = tokens[first * size : (first + chunks.landmarks.shape[1]) * size]
                    self.writer.append_chunks(id, to_columns(spec, chunks, own), stop)
                else:
                    self.writer.splice_chunks(id, first, first, None, stop)
                is_last = stop == len(tokens)
                if is_last or stop - committed >= commit_tokens:
                    tail = tokens[self.writer.documents[-1].num_chunks * size : stop]
                    self._stage(reader.continuation(), tail)
                if stop - committed >= commit_tokens and not is_last:
                    self.writer.commit()
                    committed = stop
                report(stop, None)

    def _rewrite(
        self,
        document: MemoryDocument,
        tokens: torch.Tensor,
        plan: EditPlan,
        progress: bool | Progress,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        spec, size, place, stop = self.writer.spec, self.model.config.chunk_size, plan.first, plan.old_stop
        with self._change(), evaluating(self.model), show_progress(progress, plan.num_chunks * size) as report:
            if metadata is not None:
                self.writer.describe_document(document.id, metadata)
            if not plan.num_chunks:
                self.writer.splice_chunks(document.id, plan.first, plan.old_stop, None, len(tokens))
            for chunks in recompute_chunks(self.model, tokens, plan.first, plan.new_stop, 0):
                count = chunks.landmarks.shape[1]
                own = tokens[place * size : min((place + count) * size, len(tokens))]
                self.writer.splice_chunks(document.id, place, stop, to_columns(spec, chunks, own), len(tokens))
                place = stop = place + count
                report((place - plan.first) * size, None)
            if document.is_open:
                tail = tokens[self.document(document.id).num_chunks * size :]
                self._stage(continuation_at_end(self.model, tokens), tail)

    def _stage(self, state: Continuation, tail: torch.Tensor) -> None:
        self._staged = (state, tail)
        self.writer.set_continuation(pack_continuation(state, tail))


def difference(old: torch.Tensor, new: torch.Tensor) -> tuple[int, int, int]:
    """(start, stop, count): replacing old[start:stop] by new[start:start + count] gives `new`, (n,) each."""
    shorter = min(len(old), len(new))
    differs = (old[:shorter] != new[:shorter]).nonzero()
    start = int(differs[0]) if len(differs) else shorter
    rest = shorter - start
    backwards = (old.flip(0)[:rest] != new.flip(0)[:rest]).nonzero()
    same = int(backwards[0]) if len(backwards) else rest
    return start, len(old) - same, len(new) - same - start
