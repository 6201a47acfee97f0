"""Encodings: read where they are certain or stated, refused with the option that reads them otherwise."""

import pytest

from hsa_ultralong.data import iter_texts
from hsa_ultralong.data.encodings import HEAD_BYTES

TEXTS = {
    "english": "It was a bright cold day.\nThe clocks were striking.\n",
    "russian": "Мама мыла раму.\nРама была чистой.\n",
    "chinese": "一切都很好。\n我们在这里 2024。\n",
    "greek": "Ἐν ἀρχῇ ἦν ὁ λόγος\n",
    "short": "hi",
}
BOMS = {"utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff", "utf-32-le": b"\xff\xfe\0\0", "utf-32-be": b"\0\0\xfe\xff"}


def read(tmp_path, data, name="a.txt", **options):
    path = tmp_path / name
    path.write_bytes(data)
    return list(iter_texts([path], **options))


@pytest.mark.parametrize("language", TEXTS)
@pytest.mark.parametrize("encoding", BOMS)
def test_wide_encodings_are_read_with_and_without_a_mark(tmp_path, language, encoding):
    text = TEXTS[language]
    marked = BOMS[encoding] + text.encode(encoding)
    assert read(tmp_path, marked) == read(tmp_path, marked, encoding=encoding) == [text]
    assert read(tmp_path, text.encode(encoding), encoding=encoding) == [text]
    assert read(tmp_path, text.encode(encoding)) == [text]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("text", ["Привет", "你好世界", "שלום", "日本語のテキスト。" * 300, "一" * 9, "一二一"])
def test_what_does_not_show_its_encoding_is_refused_and_never_read_as_another(tmp_path, encoding, text):
    with pytest.raises(ValueError, match=r"a\.txt .*--encoding"):
        read(tmp_path, text.encode(encoding))
    assert read(tmp_path, text.encode(encoding), encoding=encoding) == [text]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("language", TEXTS)
def test_utf8_is_read_as_it_is(tmp_path, encoding, language):
    assert read(tmp_path, TEXTS[language].encode(encoding)) == [TEXTS[language]]


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("latin-1", "Les élèves ont déjà mangé à Noël."),
        ("cp1252", "“Smart” quotes – and dashes…"),
        ("cp1251", "Мама мыла раму."),
        ("shift_jis", "日本語のテキスト"),
        ("gb18030", "一切都很好"),
        ("iso2022_jp", "日本語のテキスト"),
    ],
)
def test_other_encodings_are_refused_with_the_option_that_reads_them(tmp_path, encoding, text):
    with pytest.raises(ValueError, match=r"a\.txt (is not UTF-8 text: byte 0x|holds the escapes).*--encoding"):
        read(tmp_path, text.encode(encoding))
    assert read(tmp_path, text.encode(encoding), encoding=encoding) == [text]


def test_the_advice_for_western_text_works(tmp_path):
    for text, name in (("caf\xe9 \x81", "latin-1"), ("caf\xe9 “", "cp1252")):
        with pytest.raises(ValueError, match=f"--encoding {name} for Western European text"):
            read(tmp_path, text.encode(name))
        assert read(tmp_path, text.encode(name), encoding=name) == [text]


def test_a_contradicting_mark_is_refused_and_utf8_read_as_another_encoding_is_named(tmp_path, caplog):
    with pytest.raises(ValueError, match="begins with the byte order mark of utf-16, so it is not cp1252"):
        read(tmp_path, "a\n".encode("utf-16"), encoding="cp1252")
    assert read(tmp_path, "é".encode(), encoding="cp1252") == ["Ã©"]
    assert "looks like UTF-8, but is read as cp1252" in caplog.text
    for unknown in ("klingon", "base64", "hex"):
        with pytest.raises(ValueError, match=f"--encoding '{unknown}' is unknown"):
            read(tmp_path, b"a", encoding=unknown)


def test_a_byte_that_the_stated_encoding_lacks_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"a\.txt is not cp1252 text near byte 7"):
        read(tmp_path, b"fine \n \x81", encoding="cp1252")
    odd = "long enough to be certain".encode("utf-16-le")[:-1]
    with pytest.raises(ValueError, match=r"a\.txt .*utf-16"):
        read(tmp_path, odd)


def test_documents_and_tables_are_split_in_any_encoding(tmp_path):
    text = "one\n\x1e\ntwo über\n"
    for encoding in ("utf-16", "utf-32", "cp1252", "latin-1"):
        assert read(tmp_path, text.encode(encoding), encoding=encoding) == ["one\n", "two über\n"]
    rows = '{"text": "über"}\n{"text": "drei"}\n'
    assert read(tmp_path, rows.encode("utf-16"), "a.jsonl") == ["über", "drei"]
    assert read(tmp_path, "id,text\n1,über\n".encode("cp1252"), "a.csv", encoding="cp1252") == ["über"]
    assert read(tmp_path, '[{"text": "über"}]'.encode("utf-16"), "a.json") == ["über"]


def test_long_files_are_transcoded_in_pieces(tmp_path):
    text = "".join(f"Zeile {i}: größer\n" for i in range(HEAD_BYTES // 8))
    for encoding in ("utf-16", "utf-16-be", "utf-32-le", "cp1252"):
        assert read(tmp_path, text.encode(encoding), encoding=encoding) == [text]


@pytest.mark.parametrize("data", [b"\0" * 100, bytes(range(32)) * 10, b"\x01\x02text" * 40])
def test_binary_content_is_no_text(tmp_path, data):
    with pytest.raises(ValueError, match="binary"):
        read(tmp_path, data)


def test_a_single_stray_nul_does_not_make_text_binary(tmp_path):
    text = "a line of a log\n" * 20 + "\0" + "and on\n" * 20
    assert read(tmp_path, text.encode()) == [text]
