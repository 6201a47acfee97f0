"""Tables: JSON in all its forms, CSV and TSV, with damage named by its place."""

import json

import pytest

from hsa_ultralong.data import iter_texts
from hsa_ultralong.data import tables as module
from hsa_ultralong.data.sources import BadRecords


def read(tmp_path, name, content, **options):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(iter_texts([path], **options))


def test_json_lines_are_split_at_line_feeds_only(tmp_path):
    texts = ["one\u2028two", "three\x85four", "five\u2029six\x0bseven\x0c", "eight\x1cnine"]
    rows = "\r\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    for name in ("a.jsonl", "a.NDJSON"):
        assert read(tmp_path, name, rows) == texts


def test_a_json_array_or_object_gives_its_records(tmp_path):
    rows = [{"text": "one, [two] ]"}, {"text": "three", "n": [1, {"a": "}"}]}]
    for indent in (None, 1):
        assert read(tmp_path, "a.json", json.dumps(rows, indent=indent)) == ["one, [two] ]", "three"]
        assert read(tmp_path, "a.json", json.dumps(rows[1], indent=indent)) == ["three"]
    assert read(tmp_path, "a.json", "\ufeff\n" + json.dumps(rows) + " \n") == ["one, [two] ]", "three"]
    # what many programs call .json
    assert read(tmp_path, "a.json", "\n".join(map(json.dumps, rows))) == ["one, [two] ]", "three"]


@pytest.mark.parametrize("first_read", [1, 2, 7, 64])
def test_json_is_read_alike_in_pieces_of_any_size(tmp_path, monkeypatch, first_read):
    monkeypatch.setattr(module, "_FIRST_READ", first_read)
    rows = [{"text": f"é{i} \U0001f600 " * i, "n": -1.5e300, "t": True} for i in range(1, 30)]
    expected = [row["text"] for row in rows]
    assert read(tmp_path, "a.json", json.dumps(rows)) == expected
    assert read(tmp_path, "a.json", json.dumps(rows, ensure_ascii=False, indent=2)) == expected


def test_a_long_array_is_not_held_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_FIRST_READ", 1000)
    held = []
    read_more = module._Values._read

    def watched(self):
        held.append(len(self._text))
        return read_more(self)

    monkeypatch.setattr(module._Values, "_read", watched)
    assert len(read(tmp_path, "a.json", json.dumps([{"text": "word " * 20}] * 5000))) == 5000
    assert max(held) < 3000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"}, {"text": "b"', "is no whole JSON"),
        ('[{"text": "a"}, {"text": "b"}', "the array is cut off"),
        ('[{"text": "a"} {"text": "b"}]', "a comma is missing"),
        ('[{"text": "a"},]', "a value is missing"),
        ('[{"text": "a"}] more', "something follows"),
        ('[{"text": "a"}, nonsense' + " " * 100_000 + "]", "is no whole JSON"),
        ('[{"text": "a"}, ' + "[" * 100_000, "is no whole JSON"),
        ('[{"text": "a"}, ' + "9" * 5000 + "]", "is no whole JSON"),
        (b'[{"text": "a"}, {"text": "caf\xe9"}]', "not UTF-8"),
    ],
)
def test_a_damaged_array_gives_what_came_before_and_one_line(tmp_path, content, message):
    seen = BadRecords(5)
    assert read(tmp_path, "a.json", content, on_bad=seen) in (["a"], ["a", "b"], [])
    assert seen.count == 1 and message in seen.messages[0] and "a.json" in seen.messages[0]
    with pytest.raises(ValueError, match=message):
        read(tmp_path, "a.json", content)


def test_rows_of_csv_and_tsv_are_read_by_the_header(tmp_path):
    text = 'one, "two"\nthree'
    quoted = '"' + text.replace('"', '""') + '"'
    assert read(tmp_path, "a.csv", f"id,text\r\n1,{quoted}\r\n\r\n2,four\r\n") == [text, "four"]
    assert read(tmp_path, "a.CSV", f"\ufeffid;text\n1;{quoted}\n2;four\n") == [text, "four"]
    assert read(tmp_path, "a.tsv", f"id\ttext\n1\t{quoted}\n2\tfour, five\n") == [text, "four, five"]
    assert read(tmp_path, "a.csv", "body\nx\n", text_field="body") == ["x"]
    long = "word " * 200_000
    assert read(tmp_path, "a.csv", f"text\n{long}\n") == [long]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "one,two\n",
            r"a\.csv has no column 'text' in its first line, but one, two; give --text-field, or add a header",
        ),
        ("Just a line of prose.\n", "has no column 'text'"),
        ("text,text\na,b\n", "two columns"),
        ('text\n"open\nmore\n', r"line 2: no CSV"),
        ("id,text\n1\n", "line 2: the row has 1 fields, the header 2"),
        ("id,text\n1,a,b\n", "the row has 3 fields"),
        (b"text\ncaf\xe9\n", "is not UTF-8 text: byte 0xe9 at offset 8, line 2"),
        ("text\n", "is empty"),
    ],
)
def test_damaged_csv_is_named_by_its_line(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, "a.csv", content)


def test_bad_rows_of_csv_are_passed_over(tmp_path):
    seen = BadRecords(3)
    content = 'id,text\n1,a\n2\n3,"b"c\n4,d\n5, \n'
    assert read(tmp_path, "a.csv", content, on_bad=seen) == ["a", "d"]
    assert [message.split(":")[0].split("/")[-1] for message in seen.messages] == [
        f"a.csv, line {n}" for n in (3, 4, 6)
    ]


def test_a_null_text_is_named_as_such(tmp_path):
    with pytest.raises(ValueError, match=r"line 1: required an object with a text in 'text', got null in it"):
        read(tmp_path, "a.jsonl", '{"text": null}')
