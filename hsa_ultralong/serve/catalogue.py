"""The memory files of a server as they lie on disk: where they are, what they hold, whose they are.

Called by memories.py, which changes and opens them; tests/serve/test_app.py, test_memories.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hsa_ultralong.data import tokenizer_fingerprint
from hsa_ultralong.inference import memory_fingerprint
from hsa_ultralong.memory import MemoryFile, MemorySpec
from hsa_ultralong.memory.files import MemoryFileError
from hsa_ultralong.memory.half_read import half_read
from hsa_ultralong.models.form import model_spec
from hsa_ultralong.serve.limits import ServeError, require_id
from hsa_ultralong.serve.memory_folders import SUFFIX, refusal


class Catalogue:
    """All memories below a folder, one folder for every namespace."""

    def __init__(self, folder: Path, model: Any, tokenizer: Any, *, key_values: str, landmarks: str) -> None:
        """key_values, landmarks: forms of new files."""
        self.folder, self.model, self.tokenizer = folder, model, tokenizer
        self.spec = model_spec(
            model.config, key_values, landmarks,
            fingerprint=memory_fingerprint(model), tokenizer=tokenizer_fingerprint(tokenizer),
        )  # fmt: skip

    def _place(self, namespace: str, id: str) -> Path:
        require_id(id)
        return self.folder / namespace / (id + SUFFIX)

    def _existing(self, namespace: str, id: str) -> Path:
        place = self._place(namespace, id)
        if not (place / "manifest.json").is_file() or place.is_symlink() or place.parent.is_symlink():
            raise ServeError(404, f"there is no memory {id!r}", "memory_not_found")
        return place

    def ids(self, namespace: str) -> list[str]:
        """Names of a namespace's memories, sorted."""
        place = self.folder / namespace
        if not place.is_dir() or place.is_symlink():
            return []
        found = (one.name for one in place.iterdir() if one.name.endswith(SUFFIX) and not one.name.startswith("."))
        return sorted(name.removesuffix(SUFFIX) for name in found if (place / name / "manifest.json").is_file())

    @contextmanager
    def _file(self, namespace: str, id: str) -> Iterator[MemoryFile]:
        place = self._existing(namespace, id)
        try:
            with MemoryFile.open_unverified(place) as file:
                yield file
        except MemoryFileError as error:
            raise refusal(error, self.folder) from error

    def info(self, namespace: str, id: str) -> dict[str, Any]:
        """What a memory holds.

        Raises:
            ServeError: there is none.
        """
        with self._file(namespace, id) as file:
            return self._info(id, file)

    def _info(self, id: str, file: MemoryFile) -> dict[str, Any]:
        half = half_read(file.manifest.open_document, file.build_state)
        state = "reading" if half is not None else "ready" if self._is_ours(file.spec) else "foreign"
        return {
            "id": id, "object": "memory", "status": state, "tokens": file.num_tokens, "chunks": file.num_chunks,
            "documents": len(file.documents), "bytes": file.num_bytes, "generation": file.generation,
            "formats": file.spec.metadata.get("formats"),
        }  # fmt: skip

    def infos(self, namespace: str) -> list[dict[str, Any]]:
        """`info` of all memories: one that goes meanwhile is left out, one that cannot be read says so."""
        found = []
        for id in self.ids(namespace):
            try:
                found.append(self.info(namespace, id))
            except ServeError as error:
                if error.status != 404:
                    found.append({"id": id, "object": "memory", "status": "damaged", "error": error.message})
        return found

    def _is_ours(self, spec: MemorySpec) -> bool:
        return (spec.fingerprint, spec.tokenizer) == (self.spec.fingerprint, self.spec.tokenizer)

    def _require_ours(self, id: str, spec: MemorySpec) -> None:
        """Refuse a memory of another model or tokenizer, or one that does not say which tokenizer it is of."""
        if self._is_ours(spec):
            return
        is_known = spec.tokenizer != "" or spec.fingerprint != self.spec.fingerprint
        why = "was made by another model or tokenizer" if is_known else "does not say which tokenizer made it"
        way = "makes it again" if is_known else "takes it over"
        raise ServeError(
            409, f"memory {id!r} {why}; on the server, hsa memory rebuild MEMORY --model MODEL {way}", "foreign_memory"
        )

    def documents(self, namespace: str, id: str) -> list[dict[str, Any]]:
        """Numbers, names and sizes of a memory's documents."""
        with self._file(namespace, id) as file:
            return [
                {"number": number, "id": one.id, "name": one.name, "tokens": one.num_tokens, "open": one.is_open}
                for number, one in enumerate(file.documents)
            ]

    def passage(self, namespace: str, id: str, document: int, start: int, stop: int) -> dict[str, Any]:
        """Text of tokens start..stop of a document (by id)."""
        with self._file(namespace, id) as file:
            # ids of another tokenizer would be another text
            self._require_ours(id, file.spec)
            try:
                record = file.document(document)
            except ValueError as error:
                raise ServeError(404, f"{id} holds no document {document}", "document_not_found") from error
            stop = min(stop, record.num_tokens)
            if not 0 <= start <= stop:
                raise ServeError(400, f"tokens {start}..{stop} are no range of {record.num_tokens}", "invalid_range")
            text = self.tokenizer.decode(file.document_tokens(document)[start:stop].tolist(), skip_special_tokens=True)
            return {"document": document, "name": record.name, "start": start, "stop": stop, "text": text}
