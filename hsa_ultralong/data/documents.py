"""The text of HTML pages, EPUB books, PDF and DOCX files, by libraries of the extra `documents`.

Called by ``sources.py``; tested in ``tests/data/test_documents.py``.
"""

from __future__ import annotations

import logging
import posixpath
import re
import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO
from urllib.parse import unquote
from xml.etree import ElementTree

from hsa_ultralong.data.encodings import AUTO, HEAD_BYTES, choose_encoding, marked_encoding
from hsa_ultralong.data.input_file import InputFile
from hsa_ultralong.data.kinds import DOCX, EPUB, HTML, PDF, as_seekable, needs
from hsa_ultralong.data.text import cannot_be_read

logger = logging.getLogger(__name__)

# elements that stand on lines of their own; of others the text runs on
_BLOCKS = re.compile(
    "^(address|article|aside|blockquote|body|br|caption|center|dd|details|dialog|div|dl|dt|fieldset|figcaption|figure|"
    "footer|form|h[1-6]|header|hr|li|main|nav|ol|option|p|pre|section|summary|table|title|tr|ul)$"
)
# stand for line breaks, blanks that stay and tabs until the other white space is gone
_LINE, _BLANK, _TAB = "\0", "\x01", "\x02"
_SIGNS = re.compile("[\0-\x02]")
_UNSEEN = ("script", "style", "template", "noscript")
_MAX_PAGE_BYTES = 1 << 28


def document_text(file: InputFile, kind: str) -> str:
    """The whole text of a document; of pages and cells in reading order, blocks on lines of their own.

    Raises:
        ValueError: damaged, encrypted, or without text (a scan). ImportError: a library is missing.
    """
    try:
        with file.open() as stream:
            return _READERS[kind](file, as_seekable(stream))
    except ImportError as error:
        raise ImportError(f"{file.name}: {needs(kind)}") from error
    except ValueError:
        raise
    except OSError as error:
        raise cannot_be_read(file, error) from error
    except RecursionError as error:
        raise ValueError(f"{file.name} is nested too deeply to be read") from error
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:
        # these libraries raise errors of all kinds on damaged files
        raise ValueError(f"{file.name} is no readable {kind} file: {type(error).__name__}: {error}") from error


def _html(file: InputFile, stream: BinaryIO) -> str:
    data = stream.read()
    if file.encoding == AUTO:
        return _page_text(data, marked_encoding(data), file.name)
    return _page_text(data, choose_encoding(data[:HEAD_BYTES], file.encoding, file.name), file.name)


def _page_text(data: bytes, encoding: str, name: str) -> str:
    """The text of a page in the encoding given, else that which it states, else UTF-8."""
    from bs4 import BeautifulSoup, CData, NavigableString, Tag
    from bs4.dammit import EncodingDetector

    stated = encoding or EncodingDetector.find_declared_encoding(data, is_html=True) or "utf-8"
    try:
        text = data.decode(stated).removeprefix("\ufeff")
    except (LookupError, UnicodeError) as error:
        raise ValueError(
            f"{name} is not {stated} text, as it states or by default ({error}); give --encoding"
        ) from error
    page = BeautifulSoup(_SIGNS.sub("", text), "html.parser")
    words: list[str] = []
    # what is still to be read, the next last; no recursion, as pages may be nested without end
    left: list[tuple[Any, bool]] = [(page, False)]
    while left:
        node, is_kept = left.pop()
        if isinstance(node, Tag):
            if node.name in _UNSEEN:
                continue
            around = _LINE if _BLOCKS.match(node.name) else ""
            words.append(around)
            left.append((NavigableString(_TAB if node.name in ("td", "th") else around), False))
            left += [(child, is_kept or node.name == "pre") for child in reversed(node.contents)]
        elif type(node) in (NavigableString, CData):
            words.append(str(node).replace("\n", _LINE).replace(" ", _BLANK) if is_kept else str(node))
    # line breaks of the source are blanks
    lines = re.sub(r"[ \t\r\n\f]+", " ", "".join(words)).split(_LINE)
    kept = (line.strip(f" {_TAB}").replace(_BLANK, " ").replace(_TAB, "\t") for line in lines)
    return "".join(f"{line}\n" for line in kept if line.strip())


def _epub(file: InputFile, stream: BinaryIO) -> str:
    with zipfile.ZipFile(stream) as archive:
        names = set(archive.namelist())
        container = _xml(archive, "META-INF/container.xml")
        root = next((e.get("full-path") for e in container.iter() if _tag(e) == "rootfile"), None)
        if root is None or root not in names:
            raise ValueError(f"{file.name} is no readable EPUB file: its container names no content")
        package = _xml(archive, root)
        items = {e.get("id"): e for e in package.iter() if _tag(e) == "item"}
        spine = [items.get(e.get("idref")) for e in package.iter() if _tag(e) == "itemref"]
        pages = [item for item in spine if item is not None and "html" in (item.get("media-type") or "")]
        folder = posixpath.dirname(root)
        paths = [posixpath.normpath(posixpath.join(folder, unquote(page.get("href") or ""))) for page in pages]
        if "META-INF/encryption.xml" in names and _encrypted(archive) & set(paths):
            raise ValueError(f"{file.name} is encrypted (copy protection); pass a copy without it")
        texts = [_page_text(_member(archive, path), "", f"{file.name}, {path}") for path in paths]
    return _require_text(file, "\n".join(text for text in texts if text), "its pages are pictures or empty")


def _encrypted(archive: zipfile.ZipFile) -> set[str]:
    references = (e for e in _xml(archive, "META-INF/encryption.xml").iter() if _tag(e) == "CipherReference")
    return {unquote(e.get("URI") or "") for e in references}


def _xml(archive: zipfile.ZipFile, name: str) -> Any:
    return ElementTree.fromstring(_member(archive, name))


def _tag(element: Any) -> str:
    return str(element.tag).rsplit("}", 1)[-1]


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    """A file of an archive; its stated size bounds what unpacking it takes."""
    size = archive.getinfo(name).file_size
    if size > _MAX_PAGE_BYTES:
        raise ValueError(f"{name} in {archive.filename} unpacks to {size:,} bytes, more than a book has")
    return archive.read(name)


def _pdf(file: InputFile, stream: BinaryIO) -> str:
    import pypdf

    # it tells of every oddity that it passes over; what cannot be read is an error here
    logging.getLogger("pypdf").setLevel(logging.ERROR)
    reader = pypdf.PdfReader(stream)
    if reader.is_encrypted:
        try:
            is_open = bool(reader.decrypt(""))
        except Exception as error:
            raise ValueError(f"{file.name} is encrypted ({error}); remove the protection: qpdf --decrypt") from error
        if not is_open:
            raise ValueError(f"{file.name} is encrypted; remove the password: qpdf --decrypt --password=...")
    pages = [page.extract_text() for page in reader.pages]
    num_bare = sum(not page.strip() for page in pages)
    text = _require_text(file, "\n".join(pages), "a scan; recognise its text first, as ocrmypdf does")
    if num_bare:
        logger.warning("%s: %d of %d pages hold no text (scans?)", file.name, num_bare, len(pages))
    # letters that a font does not name
    return text.encode("utf-8", "replace").decode("utf-8")


def _docx(file: InputFile, stream: BinaryIO) -> str:
    import docx
    from docx.table import Table

    with zipfile.ZipFile(stream) as archive:
        for member in archive.infolist():
            if member.filename.endswith((".xml", ".rels")):
                _member(archive, member.filename)
    stream.seek(0)

    def blocks(container: Any) -> list[str]:
        lines = []
        for block in container.iter_inner_content():
            if isinstance(block, Table):
                for row in block.rows:
                    lines.append("\t".join(" ".join(blocks(cell)) for cell in row.cells))
            else:
                lines.append(block.text)
        return lines

    return _require_text(file, "".join(f"{line}\n" for line in blocks(docx.Document(stream))), "nothing but pictures?")


def _require_text(file: InputFile, text: str, guess: str) -> str:
    if not text.strip():
        raise ValueError(f"{file.name} holds no text ({guess})")
    return text


_READERS: dict[str, Callable[[InputFile, BinaryIO], str]] = {HTML: _html, EPUB: _epub, PDF: _pdf, DOCX: _docx}
