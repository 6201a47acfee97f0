"""What paths stand for: folders with everything that is passed over, pipes, standard input."""

import io
import os
import sys
import threading

import pytest

from hsa_ultralong.data import Spool, build_shards, inputs_of, iter_texts, read_sources, source_files, spool_of
from hsa_ultralong.data.sources import BadRecords


def test_every_file_of_a_folder_is_read_or_counted_and_named(tmp_path, caplog):
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / ".git" / "a.txt").write_text("no")
    for number in range(5):
        (folder / f"p{number}.PNG").write_bytes(b"\x89PNG")
    for name, content in {
        "a.TXT": "one", "sub/b.Md": "two", "c.csv": "text\nthree\n", "d.csv": "body\nx\n",
        "package.json": '{"name": 1}', "e.txt": "", "f.xyz": "x", "LICENSE": "x", ".hidden.txt": "x", "g.zip": "x",
        "h.docm": "x", "i.xls": "x",
        "z.json": '[{"text": "four"}]',
    }.items():  # fmt: skip
        (folder / name).write_text(content)
    (folder / "broken.txt").symlink_to(folder / "nowhere")
    (folder / "linked").symlink_to(folder / "sub")
    os.mkfifo(folder / "pipe.txt")
    passed_over = []
    with Spool() as spool:
        files = source_files([folder], spool=spool, passed_over=passed_over)
        assert [source.text for file in files for source in read_sources(file)] == ["one", "three", "two", "four"]
    assert len(files) + len(passed_over) == len([*folder.rglob("*")]) - 2
    reasons = {os.path.relpath(path, folder): reason for path, reason in passed_over}
    for name, reason in {
        "p3.PNG": "images", "d.csv": "tables without a field 'text'", "package.json": "tables without a field",
        "e.txt": "empty", "f.xyz": "of unknown kind .xyz", "LICENSE": "without a suffix", ".hidden.txt": "hidden",
        ".git": "hidden", "g.zip": "archives", "i.xls": "office", "broken.txt": "links to nothing",
        "linked": "links to folders", "pipe.txt": "pipes",
    }.items():  # fmt: skip
        assert reason in reasons[name], name
    (record,) = caplog.records
    assert "passed over 18 in folder" in record.message
    assert "5 images (p0.PNG, p1.PNG, p2.PNG and 2 more)" in record.message


def test_a_folder_with_nothing_to_read_says_what_it_holds(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(
        ValueError, match=r"holds nothing to read \(1 images \(a\.png\)\); what can be read: text \(\.txt"
    ):
        inputs_of([tmp_path], spool=Spool())


def test_a_file_of_white_space_in_a_folder_is_passed_over_with_a_word(tmp_path, caplog):
    (tmp_path / "a.txt").write_text(" \n")
    (tmp_path / "b.txt").write_text("read")
    assert list(iter_texts([tmp_path])) == ["read"] and "a.txt is empty" in caplog.text
    with pytest.raises(ValueError, match=r"a\.txt is empty"):
        list(iter_texts([tmp_path / "a.txt"]))


def test_pipes_and_standard_input_are_read_once_and_leave_nothing(tmp_path, monkeypatch, tokenizer):
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    texts = [f"A line of text, number {i}.\n" for i in range(4)]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\x1e\n".join(texts[:2]).encode())))
    rows = "".join(f'{{"text": "{text.strip()}"}}\n' for text in texts[2:])
    writer = threading.Thread(target=lambda: pipe.write_text(rows))
    writer.start()
    shards = build_shards(["-", pipe], tokenizer, tmp_path / "out", checkpoint_seconds=0)
    writer.join()
    assert shards.num_documents == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pipe.jsonl"]


def test_a_build_from_standard_input_goes_on_when_it_is_given_the_same_again(tmp_path, monkeypatch, tokenizer):
    from hsa_ultralong.data import build as build_module

    monkeypatch.setattr(build_module, "_BATCH_CHARACTERS", 100)
    text = "\x1e\n".join(f"A line of text, number {i}. " * 9 + "\n" for i in range(9))

    def build(name, content=text, **options):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
        return build_shards("-", tokenizer, tmp_path / name, checkpoint_seconds=0, **options)

    whole = build("whole").path
    steps = []

    def stop(num_bytes, num_tokens):
        steps.append(num_tokens)
        if len(steps) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build("cut", progress=stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".cut.partial", "whole"]
    with pytest.raises(ValueError, match="had other inputs"):
        build("cut", text + "more\n")
    again = []
    cut = build("cut", progress=lambda num_bytes, num_tokens: again.append(num_tokens)).path
    assert again[0] > steps[2] and (cut / "tokens.bin").read_bytes() == (whole / "tokens.bin").read_bytes()


def test_standard_input_twice_closed_or_in_use_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"text")))
    with Spool() as spool, pytest.raises(ValueError, match="given twice"):
        inputs_of(["-", "-"], spool=spool)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"text")))
    with spool_of(tmp_path / "out") as first, spool_of(tmp_path / "out") as second:
        inputs_of(["-"], spool=first)
        with pytest.raises(ValueError, match="in use by process"):
            inputs_of(["-"], spool=second)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(sys, "stdin", None)
    with Spool() as spool, pytest.raises(ValueError, match="standard input is closed"):
        inputs_of(["-"], spool=spool)


def test_a_spool_follows_no_link(tmp_path, monkeypatch):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_text("mine")
    place = spool_of(tmp_path / "out")._place
    for name in ("lock", "0"):
        place.mkdir()
        (place / name).symlink_to(outside / "mine")
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"text")))
        if name == "lock":
            with Spool(place) as spool, pytest.raises(ValueError, match="symbolic link"):
                inputs_of(["-"], spool=spool)
            (place / name).unlink()
            place.rmdir()
        else:
            with Spool(place) as spool:
                inputs_of(["-"], spool=spool)
    place.symlink_to(outside)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"text")))
    with Spool(place) as spool, pytest.raises(ValueError, match="symbolic link"):
        inputs_of(["-"], spool=spool)
    assert [file.name for file in outside.iterdir()] == ["mine"] and (outside / "mine").read_text() == "mine"


def test_devices_are_refused(tmp_path):
    for path in ("/dev/zero", "/dev/null"):
        with pytest.raises(ValueError, match="is a device"):
            list(iter_texts([path]))


def test_bytes_on_standard_input_that_are_no_utf8_get_the_message_of_files(tmp_path, monkeypatch):
    data = b"fine\ncaf\xe9\n"
    (tmp_path / "a.txt").write_bytes(data)
    messages = []
    for path in ("-", tmp_path / "a.txt"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        with pytest.raises(
            ValueError, match="is not UTF-8 text: byte 0xe9 at offset 8, line 2; give its encoding"
        ) as error:
            list(iter_texts([path]))
        messages.append(str(error.value))
    assert messages[0] == messages[1].replace(str(tmp_path / "a.txt"), "standard input")


def test_names_that_are_no_utf8_are_written_as_escapes(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.txt")
    path.write_text("one")
    seen = BadRecords(0)
    with Spool() as spool:
        (file,) = source_files([path], spool=spool)
        (source,) = read_sources(file, on_bad=seen)
    assert source.name == f"{tmp_path}/caf\\xe9.txt"
