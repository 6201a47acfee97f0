"""Bring a library up to date with files: what it knows already, what changed, and what a killed run left half-read.

Called by `hsa memorize` and `hsa memory append`; tests/cli/test_updating.py.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hsa_ultralong.data.inputs import file_label

if TYPE_CHECKING:
    from hsa_ultralong.cli.memorize import Bar
    from hsa_ultralong.data import InputFile, Source
    from hsa_ultralong.data.sources import OnBad
    from hsa_ultralong.inference import Library
    from hsa_ultralong.memory import MemoryDocument

# of small documents: a kill costs at most so many tokens
_COMMIT_TOKENS = 2**18


class _Place(NamedTuple):
    """Where a source comes from: the file without links and detours, and the number of the record in it."""

    file: str
    record: str

    @property
    def path(self) -> str:
        return self.file + self.record


def _real_place(file: InputFile) -> str | None:
    """A file without links and detours; None for standard input and pipes."""
    return None if file.digest else file_label(Path(os.path.realpath(file.path)))


def _place_of(source: Source, file: InputFile, real: str | None) -> _Place | None:
    """The place of a document of a file, whose `_real_place` is asked for once, not for each of its documents."""
    return None if real is None else _Place(real, source.name.removeprefix(file.name))


class KnownDocuments:
    """The documents of a library by where they come from.

    One file is one document however its path is spelled; two files of one spelling, given from different folders, are
    two as long as both exist. A text out of a pipe is known by what it says.
    """

    def __init__(self, library: Library) -> None:
        self.library = library
        self._by_path: dict[str, int] = {}
        self._by_name: dict[str, int] = {}
        self._by_digest: dict[str, int] = {}
        for document in library.documents:
            self.put(document)

    def put(self, document: MemoryDocument) -> None:
        metadata = document.metadata
        # documents of earlier versions have no path
        path = metadata.get("path", document.name if document.name.startswith("/") else None)
        digest = metadata.get("file_sha256", metadata.get("sha256"))
        self._by_name.setdefault(document.name, document.id)
        if isinstance(path, str):
            self._by_path.setdefault(os.path.normpath(path), document.id)
        elif isinstance(digest, str):
            self._by_digest.setdefault(digest, document.id)

    def forget(self, document: MemoryDocument) -> None:
        for table in (self._by_path, self._by_name, self._by_digest):
            for key in [key for key, id in table.items() if id == document.id]:
                del table[key]

    def find(self, source: Source, place: _Place | None) -> MemoryDocument | None:
        """The document of this source, changed or not."""
        if place is None:
            id = self._by_digest.get(source.digest)
        else:
            id = self._by_path.get(place.path)
            if id is None and (id := self._by_name.get(source.name)) is not None:
                # moved with its memory, unless the file that it was read from is still there
                before = self.library.document(id).metadata.get("path")
                if isinstance(before, str) and os.path.exists(before.removesuffix(place.record)):
                    id = None
        return None if id is None else self.library.document(id)

    def free_name(self, source: Source, place: _Place | None) -> str:
        """The name that a new document gets."""
        if source.name not in self._by_name:
            return source.name
        if place is not None:
            return place.path
        number = 2
        while f"{source.name}#{number}" in self._by_name:
            number += 1
        return f"{source.name}#{number}"


def memorize_files(
    library: Library,
    tokenizer: Any,
    files: list[InputFile],
    bar: Bar,
    *,
    text_field: str = "text",
    max_bad: int = 0,
) -> dict[str, Any]:
    """Bring a library up to date with the documents of files; returns what was done.

    Raises:
        ValueError: a record that cannot be read, after `max_bad` others: the documents before it are kept; or a
            half-read document that is not among the files.
    """
    from hsa_ultralong.data.sources import BadRecords

    bad = BadRecords(max_bad) if max_bad else None
    update, start = _Update(library, tokenizer, bar), time.monotonic()
    update.finish_half_read(files, text_field, is_lenient=bad is not None)
    for file in files:
        real = _real_place(file)
        for source in _sources(library, file, text_field, bad):
            update.take(source, _place_of(source, file, real))
        bar.finish_file(file.num_bytes)
    library.commit()
    return {**update.counts, "bad": bad.count if bad else 0, "seconds": time.monotonic() - start}


def _sources(library: Library, file: InputFile, text_field: str, bad: OnBad | None) -> Iterator[Source]:
    """The documents of a file; those before an unreadable one are committed before the error goes on."""
    from hsa_ultralong.data import read_sources

    sources = read_sources(file, text_field=text_field, on_bad=bad)
    while True:
        try:
            source = next(sources, None)
        except ValueError:
            library.commit()
            raise
        if source is None:
            return
        yield source


class _Update:
    """Takes one source after the other into a library."""

    def __init__(self, library: Library, tokenizer: Any, bar: Bar) -> None:
        self.library, self.tokenizer, self.bar = library, tokenizer, bar
        self.known = KnownDocuments(library)
        self.counts = {"added": 0, "changed": 0, "unchanged": 0, "tokens_read": 0}
        self._uncommitted = 0
        # documents that were finished ahead of their turn
        self._finished: set[int] = set()

    def finish_half_read(self, files: list[InputFile], text_field: str, is_lenient: bool) -> None:
        """Finish what a killed run left half-read, or drop it if its text is another now.

        Raises:
            ValueError: its text is not among the files.
        """
        from hsa_ultralong.memory.half_read import way_on

        half = self.library.half_read
        if half is None:
            return
        document = half.document
        found = self._find_half_read(document, files, text_field, is_lenient) if "sha256" in document.metadata else None
        if found is None:
            raise ValueError(f"{half}, and its text is not given now; {way_on(self.library.writer.path)}")
        if document.metadata["sha256"] == found.digest:
            self._add(found, document.name, document.metadata)
            self._finished.add(document.id)
        else:
            self.bar.note(f"{half} and its text is another now: it is read anew")
            self.known.forget(document)
            self.library.delete(document.id)

    def _find_half_read(
        self, document: MemoryDocument, files: list[InputFile], text_field: str, is_lenient: bool
    ) -> Source | None:
        from hsa_ultralong.data import read_sources

        path = str(document.metadata.get("path", ""))
        for file in files:
            real = _real_place(file)
            if not (real is None or path.startswith(real) or document.name.startswith(file.name)):
                continue
            # bad records are reported when their turn comes
            for source in read_sources(file, text_field=text_field, on_bad=(lambda _: None) if is_lenient else None):
                found = self.known.find(source, _place_of(source, file, real))
                if found is not None and found.id == document.id:
                    return source
        return None

    def take(self, source: Source, place: _Place | None) -> None:
        """Add a source, read it again where it changed, or pass over it."""
        document = self.known.find(source, place)
        if document is not None and document.id in self._finished:
            return
        if document is not None and _is_current(document, source.digest):
            self.counts["unchanged"] += 1
            return
        metadata = {"sha256": source.digest} if place is None else {"sha256": source.digest, "path": place.path}
        half = self.library.half_read
        if document is None:
            self._add(source, self.known.free_name(source, place), metadata)
        elif half is not None and half.document.id == document.id:
            self._add(source, document.name, document.metadata)
        else:
            self._replace(document, source, metadata)

    def _replace(self, document: MemoryDocument, source: Source, metadata: dict[str, Any]) -> None:
        if "file_sha256" in document.metadata:
            self.bar.note(f"{document.name}: what was changed in the memory gives way to the new text of its file")
        tokens = self.tokenizer(source.text)["input_ids"]
        plan = self.library.replace(document.id, tokens, metadata=metadata, commit=False)
        self.counts["changed"] += 1
        self._count(plan.num_chunks * self.library.model.config.chunk_size)

    def _add(self, source: Source, name: str, metadata: dict[str, Any]) -> None:
        library = self.library
        tokens = self.tokenizer(source.text)["input_ids"]
        half = library.half_read
        before = half.document.num_tokens if half is not None and half.document.name == name else 0
        self.bar.start(name, len(tokens), len(source.text), before)
        id = library.add(tokens, name=name, metadata=metadata, commit=False, progress=self.bar.report)
        self.known.put(library.document(id))
        self.counts["added"] += 1
        self._count(len(tokens) - before)

    def _count(self, num_tokens: int) -> None:
        self.counts["tokens_read"] += num_tokens
        self._uncommitted += num_tokens
        if self._uncommitted >= _COMMIT_TOKENS:
            self.library.commit()
            self._uncommitted = 0


def _is_current(document: MemoryDocument, digest: str) -> bool:
    """Whether a document holds this text, or was made from it and changed by hand since."""
    known = (document.metadata.get("file_sha256"), document.metadata.get("sha256"))
    return digest in known and not document.is_open and "closed_early" not in document.metadata


def changed_by_hand(document: MemoryDocument, digest: str) -> dict[str, Any]:
    """Metadata of a document that is changed in the memory: the text that its file had when it was read stays known."""
    before = document.metadata.get("file_sha256", document.metadata.get("sha256"))
    return {**document.metadata, **({} if before is None else {"file_sha256": before}), "sha256": digest}
