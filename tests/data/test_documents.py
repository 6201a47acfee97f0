"""HTML, EPUB, PDF and DOCX: the text as it is read, and one line about what cannot be."""

import io
import zipfile

import pytest

from hsa_ultralong.data import Spool, iter_texts, source_files
from hsa_ultralong.data.input_file import InputFile

PAGE = """<!DOCTYPE html><html><head><meta charset="{encoding}"><title>The title</title><style>p {{}}</style></head>
<body><h1>Head</h1><p>First line,
second <b>bo</b>ld &amp; caf\xe9.</p><script>alert("no")</script><p hidden>Next<br>line</p>
<table><tr><td>a</td><td>b</td></tr><tr><td>c</td><td>d</td></tr></table><pre>  kept
    as it is</pre></body></html>"""
PAGE_TEXT = "The title\nHead\nFirst line, second bold & caf\xe9.\nNext\nline\na\tb\nc\td\n  kept\n    as it is\n"


def read(tmp_path, name, data, **options):
    (tmp_path / name).write_bytes(data)
    return list(iter_texts([tmp_path / name], **options))


def make_pdf(*pages, trailer=b""):
    """A PDF written by hand; a page of None has no text."""
    kids = b" ".join(b"%d 0 R" % (4 + 2 * i) for i in range(len(pages)))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [%b] /Count %d >>" % (kids, len(pages)),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for number, text in enumerate(pages):
        font = b"/Resources << /Font << /F1 3 0 R >> >>"
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] %b /Contents %d 0 R >>" % (font, 5 + 2 * number)
        )
        drawn = b"" if text is None else b"BT /F1 12 Tf 72 720 Td (%b) Tj ET" % text.encode()
        objects.append(b"<< /Length %d >>\nstream\n%b\nendstream" % (len(drawn), drawn))
    out, offsets = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, start=1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%b\nendobj\n" % (number, content)
    table = b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    table += b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    end = b"trailer\n<< /Size %d /Root 1 0 R %b >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, trailer, len(out))
    return out + table + end


def make_epub(pages, encryption=None, container=True):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as book:
        book.writestr("mimetype", "application/epub+zip")
        name = "urn:oasis:names:tc:opendocument:xmlns:container"
        rootfile = '<rootfile full-path="OEBPS/c.opf"/>' if container else ""
        book.writestr(
            "META-INF/container.xml", f'<container xmlns="{name}"><rootfiles>{rootfile}</rootfiles></container>'
        )
        items = "".join(
            f'<item id="i{i}" href="p%20{i}.xhtml" media-type="application/xhtml+xml"/>' for i in range(len(pages))
        )
        order = "".join(f'<itemref idref="i{i}"/>' for i in reversed(range(len(pages))))
        opf = f'<package xmlns="http://www.idpf.org/2007/opf"><manifest>{items}</manifest><spine>{order}</spine></package>'
        book.writestr("OEBPS/c.opf", opf)
        for number, page in enumerate(pages):
            book.writestr(f"OEBPS/p {number}.xhtml", f"<html><body><p>{page}</p></body></html>")
        if encryption:
            reference = f'<e><CipherReference URI="{encryption}"/></e>'
            book.writestr("META-INF/encryption.xml", reference)
    return stream.getvalue()


def test_a_page_is_read_block_by_block_without_what_is_not_shown(tmp_path):
    pytest.importorskip("bs4")
    assert read(tmp_path, "a.HTML", PAGE.format(encoding="utf-8").encode()) == [PAGE_TEXT]
    assert read(tmp_path, "a.htm", PAGE.format(encoding="latin-1").encode("latin-1")) == [PAGE_TEXT]
    assert read(tmp_path, "a.html", PAGE.format(encoding="x").encode("utf-16")) == [PAGE_TEXT]
    bare = b"<p>caf\xe9</p>"
    with pytest.raises(ValueError, match=r"a\.html is not utf-8 text, as it states or by default .*--encoding"):
        read(tmp_path, "a.html", bare)
    assert read(tmp_path, "a.html", bare, encoding="latin-1") == ["café\n"]
    assert read(tmp_path, "page", b"<!doctype html><p>One<p>Two") == ["One\nTwo\n"]
    with pytest.raises(ValueError, match=r"a\.html is empty"):
        read(tmp_path, "a.html", b"<html><script>1</script></html>")
    assert read(tmp_path, "deep.html", b"<div>" * 20_000 + b"text") == ["text\n"]


def test_a_book_is_read_in_the_order_of_its_spine(tmp_path):
    pytest.importorskip("bs4")
    assert read(tmp_path, "a.epub", make_epub(["second", "first"])) == ["first\n\nsecond\n"]
    with pytest.raises(ValueError, match=r"a\.epub is encrypted \(copy protection\)"):
        read(tmp_path, "a.epub", make_epub(["x"], encryption="OEBPS/p%200.xhtml"))
    # fonts may be
    assert read(tmp_path, "a.epub", make_epub(["x"], encryption="OEBPS/font.otf")) == ["x\n"]
    for book, message in (
        (make_epub(["x"], container=False), "names no content"),
        (make_epub([""]), "holds no text"),
        (make_epub(["x"])[:-30], "damaged or unusual zip"),
    ):
        with pytest.raises(ValueError, match=rf"a\.epub .*{message}"):
            read(tmp_path, "a.epub", book)


def test_pages_of_a_pdf_are_read_and_scans_are_named(tmp_path, caplog):
    pytest.importorskip("pypdf")
    assert read(tmp_path, "a.pdf", make_pdf("Hello there.", "Second page.")) == ["Hello there.\nSecond page."]
    assert read(tmp_path, "named-otherwise.txt", make_pdf("Hello there.")) == ["Hello there."]
    with pytest.raises(ValueError, match=r"scan\.pdf holds no text \(a scan; recognise its text first, as ocrmypdf"):
        read(tmp_path, "scan.pdf", make_pdf(None, None))
    assert read(tmp_path, "b.pdf", make_pdf("One.", None))[0].strip() == "One."
    assert "b.pdf: 1 of 2 pages hold no text" in caplog.text
    for damaged in (b"%PDF-1.4\n", make_pdf("x")[:150], b"%PDF-1.4\n" + bytes(range(256)) * 9):
        with pytest.raises(ValueError, match=r"c\.pdf"):
            read(tmp_path, "c.pdf", damaged)


def test_an_encrypted_pdf_is_refused_with_what_opens_it(tmp_path):
    pypdf = pytest.importorskip("pypdf")
    writer = pypdf.PdfWriter(io.BytesIO(make_pdf("Hello there.")))
    writer.encrypt("secret", algorithm="RC4-128")
    stream = io.BytesIO()
    writer.write(stream)
    with pytest.raises(ValueError, match=r"a\.pdf is encrypted; remove the password: qpdf --decrypt"):
        read(tmp_path, "a.pdf", stream.getvalue())


def test_paragraphs_and_tables_of_a_docx_are_read_in_order(tmp_path):
    docx = pytest.importorskip("docx")
    document = docx.Document()
    document.add_heading("Head", 1)
    document.add_paragraph("One café.")
    table = document.add_table(rows=1, cols=2)
    table.cell(0, 0).text, table.cell(0, 1).text = "a", "b"
    document.add_paragraph("Two.")
    stream = io.BytesIO()
    document.save(stream)
    assert read(tmp_path, "a.DOCX", stream.getvalue()) == ["Head\nOne café.\na\tb\nTwo.\n"]
    damaged = bytearray(stream.getvalue())
    damaged[len(damaged) // 3 : len(damaged) // 3 + 300] = bytes(300)
    with pytest.raises(ValueError, match=r"b\.docx"):
        read(tmp_path, "b.docx", bytes(damaged))


def test_documents_are_named_by_their_file_and_read_packed(tmp_path):
    pytest.importorskip("bs4")
    import gzip

    from hsa_ultralong.data import read_sources, read_text

    path = tmp_path / "a.html.gz"
    path.write_bytes(gzip.compress(b"<p>One</p>"))
    (source,) = read_sources(InputFile(path, "a.html.gz"))
    assert source == ("a.html.gz", "One\n") and read_text(path) == "One\n"


@pytest.mark.parametrize(
    ("name", "data", "library"),
    [
        ("a.html", b"<p>x</p>", "bs4"),
        ("a.epub", make_epub(["x"]), "bs4"),
        ("a.pdf", make_pdf("x"), "pypdf"),
        ("a.docx", b"", "docx"),
    ],
)
def test_without_its_library_a_document_is_refused_with_the_line_that_installs_it(
    tmp_path, monkeypatch, caplog, name, data, library
):
    import sys

    from hsa_ultralong.data import kinds

    if name == "a.docx":
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("word/document.xml", "x")
        data = stream.getvalue()
    for module in [one for one in sys.modules if one.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf'{name}: reading \w+ needs more: pip install "hsa-ultralong\[documents\]"'):
        read(tmp_path, name, data)
    monkeypatch.setattr(kinds.importlib.util, "find_spec", lambda module: None)
    (tmp_path / "b.txt").write_text("read")
    passed_over = []
    with Spool() as spool:
        files = source_files([tmp_path], spool=spool, passed_over=passed_over)
    assert [file.path.name for file in files] == ["b.txt"]
    assert 'pip install "hsa-ultralong[documents]"' in passed_over[0].reason
