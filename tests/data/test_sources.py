"""Named documents from files, folders, tables and standard input."""

import io
import json
import lzma
import sys
import types

import pytest

from hsa_ultralong.data import InputFile, Spool, build_shards, read_sources, source_files
from hsa_ultralong.data.sources import BadRecords, iter_texts, parse_text, read_parsed


def names_and_texts(path, **options):
    with Spool() as spool:
        files = source_files([path], spool=spool)
        return [(source.name, source.text) for file in files for source in read_sources(file, **options)]


def test_documents_of_one_text_file_are_numbered(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one\n\x1e\n  \n\x1e\ntwo\n")
    assert names_and_texts(file) == [(str(file), "one\n"), (f"{file}#2", "two\n")]


def test_a_folder_stands_for_all_readable_files_below_it(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "z.md").write_text("z")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "x.txt.xz").write_bytes(lzma.compress(b"x"))
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "picture.png").write_bytes(b"no")
    assert [text for _, text in names_and_texts(tmp_path)] == ["a", "z", "x"]


def test_rows_of_tables_are_named_by_their_line(tmp_path):
    file = tmp_path / "t.jsonl"
    file.write_text('{"body": "a", "id": 3}\n\n{"body": " "}\n{"body": "b"}\n')
    assert names_and_texts(file, text_field="body") == [(f"{file}:1", "a"), (f"{file}:4", "b")]


def test_parquet_rows_are_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = tmp_path / "t.parquet"
    parquet.write_table(pyarrow.table({"text": ["a", "b"], "n": [1, 2]}), file)
    assert names_and_texts(file) == [(f"{file}:1", "a"), (f"{file}:2", "b")]
    with pytest.raises(ValueError, match=r"no column 'body', but text, n; give --text-field"):
        names_and_texts(file, text_field="body")


def test_standard_input_is_one_document(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello")))
    assert names_and_texts("-") == [("standard input", "hello")]
    with pytest.raises(ValueError, match="standard input is empty"):
        names_and_texts("-")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"t\.jsonl, line 2: no JSON"),
        ("[1]", "line 2: required an object with a text in 'text', got list"),
        ('{"body": "x"}', "got fields body; give --text-field"),
        ('{"text": 3}', "required an object with a text"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, line, message):
    file = tmp_path / "t.jsonl"
    file.write_text(json.dumps({"text": "good"}) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=message):
        names_and_texts(file)


def test_missing_paths_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        source_files([tmp_path / "no"], spool=Spool())
    with pytest.raises(ValueError, match="holds nothing to read"):
        source_files([tmp_path], spool=Spool())
    with pytest.raises(ValueError, match="no paths given"):
        source_files([], spool=Spool())


def test_the_digest_is_that_of_the_text(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one")
    source = InputFile(file, "a.txt")
    first = next(read_sources(source)).digest
    file.write_text("two")
    assert next(read_sources(source)).digest != first and len(first) == 64


def test_bad_records_are_named_counted_and_limited(tmp_path, tokenizer):
    good = [json.dumps({"text": f"A line of text, number {i}."}) for i in range(5)]
    bad = ["{broken", json.dumps({"body": "x"}), json.dumps({"text": 3})]
    table = tmp_path / "a.jsonl"
    table.write_text("\n".join([good[0], bad[0], good[1], bad[1], bad[2], *good[2:]]) + "\n")
    (tmp_path / "b.txt").write_bytes(b"not \xff UTF-8")
    seen = BadRecords(10)
    assert len(list(iter_texts([table, tmp_path / "b.txt"], on_bad=seen))) == 5
    assert seen.count == 4
    for message, where in zip(seen.messages, ("line 2", "line 4", "line 5", "b.txt"), strict=True):
        assert where in message
    shards = build_shards([table], tokenizer, tmp_path / "shards", max_bad=3)
    assert shards.num_documents == 5 and shards.manifest["bad_records"]["count"] == 3
    with pytest.raises(ValueError, match=r"more than 2 bad records.*line 5"):
        build_shards([table], tokenizer, tmp_path / "other", max_bad=2)
    assert not (tmp_path / "other").exists() and not list(tmp_path.glob(".other*"))
    with pytest.raises(ValueError, match="line 2"):
        build_shards([table], tokenizer, tmp_path / "other")


def test_a_bad_document_of_a_text_file_is_named_by_line_and_the_others_are_read(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"one\n\x1e\nfine\ncaf\xe9\n\x1e\nthree\n")
    seen = BadRecords(10)
    sources = list(read_sources(InputFile(file, str(file)), on_bad=seen))
    assert [(source.name, source.text) for source in sources] == [(str(file), "one\n"), (f"{file}#3", "three\n")]
    assert seen.count == 1 and "byte 0xe9 at offset 14, line 4" in seen.messages[0]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": " \\n"}', "line 2: the text is empty"),
        (b'{"text": "\\ud83d"}', "line 2: the text holds half of a character pair at 0"),
        (b'{"text": "caf\xe9"}', "line 2: no JSON"),
        (b"[" * 100_000, "line 2: no JSON"),
        (b'{"text": ' + b"9" * 5000 + b"}", "line 2: no JSON"),
        (b'{"text": ["a"]}', "got list in it"),
        (b'{"text": null, "body": "x"}', "got null in it"),
    ],
)
def test_every_kind_of_bad_row_is_passed_over(tmp_path, line, reason):
    file = tmp_path / "t.jsonl"
    file.write_bytes(b'{"text": "a"}\n' + line + b'\n{"text": "b"}\n')
    seen = BadRecords(1)
    assert list(iter_texts([file], on_bad=seen)) == ["a", "b"]
    assert reason in seen.messages[0]


def test_damaged_and_empty_files_are_bad_records_too(tmp_path):
    (tmp_path / "a.txt").write_text(" \n")
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress(b"hello " * 1000)[:-20])
    (tmp_path / "c.txt").write_text("read")
    seen = BadRecords(2)
    assert list(iter_texts([tmp_path], on_bad=seen)) == ["read"]
    assert "a.txt is empty" in seen.messages[0] and "not a whole .xz file" in seen.messages[1]


def test_reading_can_begin_at_any_record(tmp_path):
    rows = [json.dumps({"text": f"text {i}"}) for i in range(1, 8)]
    rows[2] = "{"
    (tmp_path / "t.jsonl").write_text("\n".join(rows))
    (tmp_path / "t.txt").write_text("\x1e\n".join(f"text {i}\n" for i in range(1, 8)))
    files = [tmp_path / "t.jsonl", tmp_path / "t.txt"]
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        pass
    else:
        files.append(tmp_path / "t.parquet")
        parquet.write_table(pyarrow.table({"text": [f"text {i}" for i in range(1, 200)]}), files[-1])
    for file in (InputFile(path, path.name) for path in files):
        seen = BadRecords(1)
        whole = [record.number for record, _ in read_parsed(file, parse_text, field="text", on_bad=seen)]
        for first in (1, 3, 4, 7, 70):
            part = read_parsed(file, parse_text, field="text", on_bad=BadRecords(1), first=first)
            read = [(record.number, text.strip()) for record, text in part]
            assert read == [(number, f"text {number}") for number in whole if number >= first]


def test_local_and_saved_datasets_are_read_with_the_real_library(tmp_path):
    pytest.importorskip("datasets")
    import pyarrow

    rows = [{"text": f"text {i}"} for i in range(1, 6)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    # as save_to_disk writes it
    saved = tmp_path / "dict" / "test"
    saved.mkdir(parents=True)
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.OSFile(str(saved / "rows.arrow"), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    fields = ("_format_columns", "_format_type", "_output_all_columns", "_split")
    state = {"_data_files": [{"filename": "rows.arrow"}], "_fingerprint": "0" * 16, "_format_kwargs": {}}
    (saved / "state.json").write_text(json.dumps({**dict.fromkeys(fields), **state, "_output_all_columns": False}))
    (saved / "dataset_info.json").write_text("{}")
    (saved.parent / "dataset_dict.json").write_text('{"splits": ["test"]}')
    for name in ("data", "dict/test", "dict::test"):
        found = list(read_parsed(f"hf:{tmp_path / name}", parse_text, field="text", first=3))
        assert [(record.number, text) for record, text in found] == [(i, f"text {i}") for i in (3, 4, 5)]


def test_hub_datasets_are_streamed(monkeypatch):
    calls = []

    def load_dataset(*args, **options):
        calls.append((args, options))
        return iter([{"text": "one"}, {"text": None}, {"text": "two"}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    seen = BadRecords(1)
    assert list(iter_texts(["hf:books:plain:test"], on_bad=seen)) == ["one", "two"]
    assert calls == [(("books", "plain"), {"split": "test", "streaming": True})]
    assert "hf:books:plain:test, row 2" in seen.messages[0]
    assert next(iter_texts(["hf:books"], on_bad=BadRecords(9))) == "one" and calls[1][0] == ("books", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="needs the datasets library"):
        list(iter_texts(["hf:books"]))
