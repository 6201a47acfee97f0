"""Kinds of files: told by content and name; binary ones refused by what they are."""

import io
import json
import zipfile

import pytest

from hsa_ultralong.data import iter_texts


def zipped(**members):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in members.items():
            archive.writestr(name.replace("__", "/").replace("_dot_", "."), data)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "an image"),
        (b"\xff\xd8\xff\xe0" + bytes(50), "an image"),
        (b"GIF89a" + bytes(50), "an image"),
        (b"RIFF\0\0\0\0WEBPVP8 " + bytes(50), "an image"),
        (b"ID3\x04" + bytes(50), "audio"),
        (b"\0\0\0\x18ftypmp42" + bytes(50), "video"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(50), "an old office program: save it as .docx"),
        (b"{\\rtf1 hello}", "rich text"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(50), "a 7z archive"),
        (b"\x7fELF" + bytes(50), "a program"),
        (b"SQLite format 3\0" + bytes(50), "a database"),
        (zipped(a_dot_txt="x"), "a zip archive: unpack it"),
        (zipped(xl__workbook_dot_xml="x"), "an Excel workbook: save it as .csv"),
        (zipped(mimetype="application/vnd.oasis.opendocument.text"), "office program"),
        (b"PK\x03\x04" + b"broken" * 9, "damaged or unusual zip"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.bin", "a"])
def test_binary_files_are_refused_by_what_they_are(tmp_path, data, what, name):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=rf"{name} is .*{what}"):
        list(iter_texts([tmp_path / name]))


def test_text_that_begins_like_a_binary_file_is_text(tmp_path):
    for text in ("ID3 is an algorithm.", "GIF87 or GIF89?", "OggS", "GGUF files hold weights", "abcdftypx", "BZh1"):
        (tmp_path / "a.txt").write_text(text)
        assert list(iter_texts([tmp_path / "a.txt"])) == [text]


@pytest.mark.parametrize("name", ["a.pdf", "a.docx", "a.epub", "a.parquet"])
def test_a_file_that_is_not_what_its_name_says_is_refused(tmp_path, name):
    (tmp_path / name).write_text("just text")
    with pytest.raises(ValueError, match=rf"{name} is no .* file"):
        list(iter_texts([tmp_path / name]))


def test_files_of_other_names_are_text_and_nameless_tables_show_themselves(tmp_path):
    rows = '{"text": "one"}\n{"text": "two"}\n'
    for name, content, expected in (
        ("a.py", "import this\n", ["import this\n"]),
        ("LICENSE", "You may.\n", ["You may.\n"]),
        ("rows", rows, ["one", "two"]),
        ("array", '[\n {"text": "one"}, {"text": "two"}]', ["one", "two"]),
        ("long", json.dumps({"text": "word " * 30_000}), ["word " * 30_000]),
        ("list", "[1] A footnote.\n", ["[1] A footnote.\n"]),
        ("log.log", rows, [rows]),
        ("braces", "{not json}\n", ["{not json}\n"]),
    ):
        (tmp_path / name).write_text(content)
        assert list(iter_texts([tmp_path / name])) == expected
