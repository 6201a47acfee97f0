"""Uploaded files as documents, read as `hsa memorize` reads them. Called by app.py; tests/serve/test_app.py."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath

from fastapi import UploadFile
from fastapi.concurrency import run_in_threadpool

from hsa_ultralong.data import Spool, read_sources, source_files
from hsa_ultralong.serve.limits import ServeError
from hsa_ultralong.serve.memory_folders import held_upload


async def documents_of(files: list[UploadFile], folder: Path) -> list[tuple[str, str]]:
    """(name, text) of all documents of uploaded files; of a file's name only the last part is used.

    Args:
        folder: where they lie while they are read.

    Raises:
        ServeError: what cannot be read.
    """
    bodies = [(file.filename or "text.txt", await file.read()) for file in files]
    return await run_in_threadpool(_read, bodies, folder)


def _read(bodies: list[tuple[str, bytes]], parent: Path) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    with held_upload(parent) as folder, Spool() as spool:
        for number, (name, body) in enumerate(bodies):
            name = PurePosixPath(PureWindowsPath(name).name).name.replace("\0", "")[-200:] or "text.txt"
            if name in (".", ".."):
                name = "text.txt"
            place = folder / str(number)
            place.mkdir()
            (place / name).write_bytes(body)
            try:
                for file in source_files([place / name], spool=spool):
                    found += [(one.name.replace(f"{place}/", ""), one.text) for one in read_sources(file)]
            except (ValueError, OSError, ImportError) as error:
                message = str(error).replace(f"{place}/", "")
                # a package for this kind of file is not installed on the server
                status = 415 if isinstance(error, ImportError) else 400
                raise ServeError(status, message, "unreadable_file") from error
    if not found:
        raise ServeError(400, "no text in what was uploaded", "empty_document")
    return found
