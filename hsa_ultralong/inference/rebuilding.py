"""A memory file read again by another model, from the token ids that it stores.

The new memory grows beside the old one in `.NAME.rebuild`, as any library does, so that a killed rebuild goes on; when
it is whole it takes the old one's place in one commit, or the name of the output. docs/library.md;
tests/inference/test_rebuilding.py.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hsa_ultralong.files.durable import sync_folder
from hsa_ultralong.inference.library import Library
from hsa_ultralong.inference.reading_loop import Progress, as_tokens, check_range, show_progress
from hsa_ultralong.memory.files import MemoryDocument, MemoryFile, MemoryFileError, MemorySpec, MemoryWriter
from hsa_ultralong.memory.files.housekeeping import remove_unfinished
from hsa_ultralong.memory.files.manifest import read_manifest
from hsa_ultralong.memory.files.spec import clear_errors
from hsa_ultralong.memory.files.takeover import number_documents, take_over
from hsa_ultralong.memory.half_read import half_read, way_on
from hsa_ultralong.memory.quantization import bytes_per_token
from hsa_ultralong.models import HSAForCausalLM
from hsa_ultralong.models.fingerprint import memory_fingerprint
from hsa_ultralong.models.wrapped import unwrapped

# tokens of small documents between two commits
_COMMIT_TOKENS = 2**18
# of a document of the old memory, with its name for messages
Retokenize = Callable[[torch.Tensor, str], Any]


class Rebuilt(NamedTuple):
    """What `rebuild` did; `num_tokens_read` is less than all where an earlier run had begun."""

    path: Path
    num_documents: int
    num_tokens: int
    num_tokens_read: int


def rebuild(
    model: HSAForCausalLM,
    path: str | Path,
    output: str | Path | None = None,
    *,
    tokenizer: str = "",
    retokenize: Retokenize | None = None,
    key_values: str | None = None,
    landmarks: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    piece_tokens: int | None = None,
    progress: bool | Progress = False,
) -> Rebuilt:
    """Read all documents of a memory file again by `model`; the result equals memorising their token ids anew.

    Documents keep ids, names, metadata and order; an open or half-read one stays so. Called again after a kill it goes
    on; until the new memory is whole the old one stays as it is, and can be read.

    Args:
        output: a new memory; None puts the result in the old one's place, in one step.
        tokenizer: fingerprint of the model's tokenizer; "" if it is not known: the ids are taken as they are.
        retokenize: turns the ids of another tokenizer into the model's.
        key_values, landmarks: their form; default that of the memory.
        metadata: free JSON that replaces what the memory has under the same keys, such as the model's name.

    Raises:
        ValueError: token ids of another tokenizer without `retokenize`, a half-read document with it, ids outside the
            vocabulary, or too little room.
        MemoryFileError: no memory of a model, damage in its token ids, or something that cannot be written.
            An error names what was read and is kept for the next call.
    """
    model, source_path = unwrapped(model), Path(path)
    target = Path(os.path.realpath(source_path)) if output is None else Path(output).absolute()
    partial = unfinished(target)
    with ExitStack() as stack:
        if output is None:
            writer = stack.enter_context(MemoryWriter.open(source_path))
            source = stack.enter_context(writer.snapshot())
        else:
            _require_absent(target)
            source = stack.enter_context(MemoryFile.open_unverified(source_path))
        options = _options(source, key_values, landmarks, tokenizer, metadata)
        _require_readable(source, tokenizer, retokenize, model.config.vocab_size)
        if output is None and _is_of(source.spec, model, options):
            remove_unfinished(partial)
            return Rebuilt(source_path, len(source.documents), source.num_tokens, 0)
        with _says_what_is_kept(partial):
            num_read = _Rebuild(model, source, retokenize, piece_tokens).run(partial, options, progress)
            if output is None:
                with MemoryFile.open_unverified(partial) as built:
                    take_over(writer, built)
                remove_unfinished(partial)
            else:
                with clear_errors(target, "rebuilding"):
                    os.rename(partial, target)
                    sync_folder(target.parent)
        return Rebuilt(source_path if output is None else target, len(source.documents), source.num_tokens, num_read)


def unfinished(path: Path) -> Path:
    """Where a rebuilt memory grows that is to take this place."""
    place = Path(os.path.realpath(path))
    return place.with_name(f".{place.name}.rebuild")


@contextmanager
def _says_what_is_kept(partial: Path) -> Iterator[None]:
    """Name the unfinished memory in the error of a rebuild that leaves one."""
    try:
        yield
    except (ValueError, OSError) as error:
        if not _holds_documents(partial):
            raise
        kind = ValueError if type(error) is ValueError else MemoryFileError
        raise kind(
            f"{error}; what was read is kept in {partial}: the same command goes on there, or remove that folder"
        ) from error


def _holds_documents(partial: Path) -> bool:
    """Whether there is a memory with at least one document."""
    try:
        return os.path.lexists(partial) and bool(read_manifest(partial).documents)
    except MemoryFileError:
        return False


def _options(
    source: MemoryFile,
    key_values: str | None,
    landmarks: str | None,
    tokenizer: str,
    metadata: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What `Library.create` gets for the new memory."""
    forms = source.spec.metadata.get("formats")
    if not isinstance(forms, dict) or "tokens" not in source.spec.columns:
        raise MemoryFileError(f"{source.path} is no memory of a model with token ids; memorise its texts again")
    free = {key: value for key, value in source.spec.metadata.items() if key != "formats"}
    return {
        "key_values": key_values or str(forms.get("key_values")),
        "landmarks": landmarks or str(forms.get("landmarks")),
        "tokenizer": tokenizer or source.spec.tokenizer,
        "metadata": {**free, **(metadata or {})},
    }


def _require_readable(source: MemoryFile, tokenizer: str, retokenize: Retokenize | None, vocab_size: int) -> None:
    """Refuse token ids that the model cannot take, before the work."""
    half = half_read(source.manifest.open_document, source.build_state)
    if retokenize is not None and half is not None:
        raise ValueError(f"{half} and would be cut elsewhere by another tokenizer; {way_on(source.path)}")
    if retokenize is not None:
        return
    if tokenizer and source.spec.tokenizer and tokenizer != source.spec.tokenizer:
        raise ValueError(
            f"{source.path} holds token ids of another tokenizer than the model's; give the folder of the model that "
            "built it (--old-tokenizer FOLDER), so that they are turned into text and read anew, or memorise the texts "
            "again"
        )
    if not (tokenizer and source.spec.tokenizer):
        for document in source.documents:
            check_range(source.document_tokens(document.id), vocab_size)


def _is_of(spec: MemorySpec, model: HSAForCausalLM, options: Mapping[str, Any]) -> bool:
    """Whether a memory is one that this model would build in this form."""
    forms = {"key_values": options["key_values"], "landmarks": options["landmarks"]}
    kind = (memory_fingerprint(model), options["tokenizer"], forms)
    return kind == (spec.fingerprint, spec.tokenizer, spec.metadata.get("formats"))


def _require_absent(target: Path) -> None:
    if os.path.lexists(target) and (not target.is_dir() or any(target.iterdir())):
        raise MemoryFileError(f"{target} exists already; choose another name")


class _Rebuild:
    """One pass over the documents of a memory into the unfinished one."""

    def __init__(
        self, model: HSAForCausalLM, source: MemoryFile, retokenize: Retokenize | None, piece_tokens: int | None
    ) -> None:
        self.model, self.source, self.piece_tokens = model, source, piece_tokens
        self.retokenize = retokenize
        # documents of an earlier run
        self.kept: tuple[MemoryDocument, ...] = ()
        # old token ids that are done, those read now, those read since the last commit
        self.done = self.read = self.uncommitted = 0

    def run(self, partial: Path, options: Mapping[str, Any], progress: bool | Progress) -> int:
        """Make or finish the unfinished memory; returns how many tokens were read for it now."""
        if os.path.lexists(partial) and not self._is_begun(partial, options):
            remove_unfinished(partial)
        self._require_room(partial, options)
        try:
            with Library.create(self.model, partial, exist_ok=True, **options) as library:
                self.kept = library.documents
                with show_progress(progress, self.source.num_tokens) as report:
                    for number, document in enumerate(self.source.documents):
                        self._take(library, number, document, report)
                library.commit()
                manifest = self.source.manifest
                ids = [document.id for document in manifest.documents]
                number_documents(library.writer, ids, manifest.next_document, manifest.build_state)
        except BaseException:
            # a refusal leaves nothing; what was read stays for the next run
            if os.path.lexists(partial) and not read_manifest(partial).documents:
                remove_unfinished(partial)
            raise
        return self.read

    def _is_begun(self, partial: Path, options: Mapping[str, Any]) -> bool:
        """Whether an earlier run for the same model and form left it."""
        try:
            return _is_of(read_manifest(partial).spec, self.model, options)
        except MemoryFileError:
            return False

    def _require_room(self, partial: Path, options: Mapping[str, Any]) -> None:
        config = self.model.config
        assert config.head_dim is not None
        per_token = 4 + bytes_per_token(
            options["key_values"],
            options["landmarks"],
            chunk_size=config.chunk_size,
            num_memory_heads=config.num_memory_heads,
            head_dim=config.head_dim,
            num_retrieval_heads=config.num_retrieval_heads,
            retrieval_dim=config.retrieval_dim,
        )
        there = sum(file.stat().st_size for file in partial.rglob("*")) if partial.is_dir() else 0
        place = next(folder for folder in partial.parents if folder.exists())
        needed, free = per_token * self.source.num_tokens - there, shutil.disk_usage(place).free
        if needed > free:
            raise ValueError(
                f"rebuilding {self.source.path} needs {needed:,.0f} bytes in {place}, which has {free:,} free; "
                "the old memory stays until the new one is whole: free some space, or write to another disk (-o)"
            )

    def _take(self, library: Library, number: int, document: MemoryDocument, report: Progress) -> None:
        """Read a document unless an earlier run did."""
        tokens = self.source.document_tokens(document.id)
        if self.retokenize is not None:
            tokens = as_tokens(self.retokenize(tokens, document.label))
        before = self._kept(library, number, document, tokens)
        if before < len(tokens) or before == 0:
            start = self.done

            def advance(done: int, _: int | None) -> None:
                report(start + min(done, document.num_tokens), None)

            library.add(
                tokens,
                name=document.name,
                metadata=document.metadata,
                close=not document.is_open,
                commit=document.is_open,
                piece_tokens=self.piece_tokens,
                progress=advance,
            )
            self.read += len(tokens) - before
            self.uncommitted += len(tokens) - before
            if self.uncommitted >= _COMMIT_TOKENS:
                library.commit()
                self.uncommitted = 0
        self.done += document.num_tokens
        report(self.done, None)

    def _kept(self, library: Library, number: int, document: MemoryDocument, tokens: torch.Tensor) -> int:
        """How many tokens of a document an earlier run has read; what does not fit the old memory any more goes."""
        if number >= len(self.kept):
            return 0
        found = self.kept[number]
        same = (found.name, found.metadata) == (document.name, document.metadata)
        is_whole = found.is_open == document.is_open and found.num_tokens == len(tokens)
        is_begun = found.is_open and found.num_tokens < len(tokens)
        if same and (is_whole or is_begun) and torch.equal(library.tokens(found.id), tokens[: found.num_tokens]):
            return found.num_tokens
        # the last first: models that depend on the order of chunks allow no other
        for later in reversed(self.kept[number:]):
            library.delete(later.id)
        self.kept = self.kept[:number]
        return 0
