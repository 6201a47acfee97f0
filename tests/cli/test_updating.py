"""`hsa memorize` on a library that knows some of the texts: spellings, half-read documents, standard input."""

import json
import os
import sys

import pytest

from hsa_ultralong.cli import updating
from hsa_ultralong.cli.common import load_model
from hsa_ultralong.cli.memorize import Bar, open_or_create
from hsa_ultralong.data import Spool, load_tokenizer, source_files
from hsa_ultralong.inference.file_reader import FileReader
from hsa_ultralong.memory import MemoryFile, MemoryWriter
from hsa_ultralong.memory.files import manifest
from tests.cli.test_memory_commands import SENTENCE, assert_one_clear_line, assert_same, contents, hsa, run

READ_ON = FileReader.read_on


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """Three files in the current folder."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate("abc"):
        (tmp_path / f"{name}.txt").write_text(f"Document {number}. " + SENTENCE * (10 + 7 * number), encoding="utf-8")
    return tmp_path


@pytest.fixture
def options(checkpoint):
    return ("--model", checkpoint, "--dtype", "fp32")


def memorize(*sources, options, output="lib.hsa", stdin=None, **more):
    return json.loads(run("memorize", *sources, "-o", output, *options, "--json", stdin=stdin, **more))


def counts(summary):
    return tuple(summary[name] for name in ("added", "changed", "unchanged"))


def names(path="lib.hsa"):
    with MemoryFile.open(path) as file:
        return [document.name for document in file.documents]


def told(checkpoint, path="lib.hsa"):
    """The texts of a memory."""
    tokenizer = load_tokenizer(checkpoint)
    return [tokenizer.decode(tokens.tolist(), skip_special_tokens=True) for tokens in contents(path)[1]]


@pytest.fixture
def half(texts, options, monkeypatch):
    """a.txt and the first 128 tokens of b.txt."""

    def kill(self, id, tokens, done, state, *, report, **_):
        def dying(stop, total):
            report(stop, total)
            if id == 1 and stop == 128:
                raise KeyboardInterrupt

        READ_ON(self, id, tokens, done, state, piece_tokens=64, commit_tokens=64, report=dying)

    monkeypatch.setattr(updating, "_COMMIT_TOKENS", 1)
    with monkeypatch.context() as patch:
        patch.setattr(FileReader, "read_on", kill)
        assert hsa("memorize", "a.txt", "b.txt", "-o", "lib.hsa", *options).exit_code == 130
    shown = json.loads(run("memory", "info", "lib.hsa", "--json"))
    assert [document["tokens"] for document in shown["documents"]][1] == 128
    assert shown["documents"][1]["half_read_of"] > 300
    return "lib.hsa"


@pytest.mark.parametrize("given", [("a.txt", "b.txt", "c.txt"), ("c.txt", "./b.txt"), (".",)])
def test_a_half_read_document_is_finished_before_others_are_added(half, texts, options, given):
    memorize(*given, options=options)
    memorize("a.txt", "b.txt", "c.txt", output="whole.hsa", options=options)
    assert names() == ["a.txt", "b.txt", "c.txt"]
    assert_same("lib.hsa", "whole.hsa")


@pytest.mark.parametrize(
    "command",
    [
        ("memorize", "c.txt", "-o", "lib.hsa"),
        ("memorize", "a.txt", "-o", "lib.hsa"),
        ("memorize", "-", "-o", "lib.hsa"),
        ("memory", "append", "lib.hsa", "c.txt"),
        ("memory", "append", "lib.hsa", "-"),
        ("memory", "append", "lib.hsa", "--to-last", "c.txt"),
        ("memory", "edit", "lib.hsa", "b.txt", "--find", "Document 1.", "--replace", "x"),
        ("memory", "edit", "lib.hsa", "b.txt", "--text", "c.txt"),
    ],
)
def test_what_would_glue_drop_or_double_a_half_read_document_is_refused_with_the_ways_on(half, options, command):
    before = contents(half)
    result = hsa(*command, *options, stdin="Something else.")
    assert_one_clear_line(result, "'b.txt' is half-read (128 of", "hsa memory close lib.hsa", "--drop")
    assert contents(half)[0] == before[0]


def test_merging_into_or_out_of_a_half_read_memory_is_refused_with_the_way_on(half, texts, options):
    memorize("c.txt", output="c.hsa", options=options)
    for pair in (("lib.hsa", "c.hsa"), ("c.hsa", "lib.hsa")):
        assert_one_clear_line(hsa("memory", "merge", *pair), "open document 'b.txt'", "hsa memory close lib.hsa")


def test_info_and_ask_say_that_a_document_is_half_read_and_what_to_do(half, options):
    shown = run("memory", "info", half)
    assert "half-read" in shown and "hsa memory close lib.hsa --drop" in shown
    asked = hsa("ask", "-m", half, "What is it?", *options)
    assert asked.exit_code == 0 and "'b.txt' is half-read" in asked.stderr


def test_a_half_read_document_is_closed_or_dropped_and_read_to_its_end_when_given_again(
    half, texts, checkpoint, options
):
    run("memory", "export", half, "a.txt", "b.txt", "-o", "copy.hsa")
    closed = json.loads(run("memory", "close", half, *options, "--json"))
    assert (closed["document"], closed["tokens"], closed["is_dropped"]) == ("b.txt", 128, False)
    memorize("c.txt", options=options)
    assert names() == ["a.txt", "b.txt", "c.txt"] and len(contents(half)[1][1]) == 128
    assert counts(memorize("a.txt", "b.txt", options=options)) == (0, 1, 1)
    memorize("a.txt", "b.txt", "c.txt", output="whole.hsa", options=options)
    assert_same(half, "whole.hsa")
    assert_one_clear_line(hsa("memory", "close", half, *options), "no open document")
    # dropped, without a model
    assert json.loads(run("memory", "close", "copy.hsa", "--drop", "--json"))["is_dropped"]
    memorize("c.txt", output="copy.hsa", options=options)
    assert told(checkpoint, "copy.hsa") == [(texts / name).read_text() for name in ("a.txt", "c.txt")]


def test_a_half_read_document_whose_file_changed_is_read_anew(half, texts, checkpoint, options):
    (texts / "b.txt").write_text("Now it says this. " + SENTENCE)
    result = hsa("memorize", "b.txt", "c.txt", "-o", half, *options)
    assert result.exit_code == 0 and "its text is another now" in result.stderr
    assert told(checkpoint) == [(texts / name).read_text() for name in ("a.txt", "b.txt", "c.txt")]


def test_one_file_under_many_spellings_is_one_document_named_as_given_first(texts, options, monkeypatch):
    (texts / "link").symlink_to(texts)
    (texts / "sub").mkdir()
    spellings = ["./a.txt", "a.txt", texts / "a.txt", "link/a.txt", "sub/../a.txt"]
    assert counts(memorize(*spellings, options=options)) == (1, 0, 4)
    assert names() == ["a.txt"]
    for spelling in spellings:
        assert counts(memorize(spelling, options=options)) == (0, 0, 1)
    assert counts(memorize(".", options=options)) == (2, 0, 1)
    monkeypatch.chdir(texts / "sub")
    assert counts(memorize("../a.txt", output="../lib.hsa", options=options)) == (0, 0, 1)
    (texts / "a.txt").write_text("Other. " + SENTENCE)
    assert counts(memorize("../link/a.txt", output="../lib.hsa", options=options)) == (0, 1, 0)
    assert len(names("../lib.hsa")) == 3


def test_two_files_of_one_spelling_are_two_documents_but_a_moved_folder_is_the_same(texts, options, monkeypatch):
    (texts / "sub").mkdir()
    (texts / "sub" / "a.txt").write_text("Another file. " + SENTENCE)
    memorize("a.txt", options=options)
    monkeypatch.chdir(texts / "sub")
    assert counts(memorize("a.txt", output="../lib.hsa", options=options)) == (1, 0, 0)
    assert names("../lib.hsa") == ["a.txt", os.path.realpath("a.txt")]
    monkeypatch.chdir(texts)
    (texts / "moved").mkdir()
    (texts / "a.txt").rename("moved/a.txt")
    monkeypatch.chdir(texts / "moved")
    assert counts(memorize("a.txt", output="../lib.hsa", options=options)) == (0, 0, 1)


def test_every_text_of_standard_input_is_kept_once(texts, checkpoint, options):
    for text in ("One fact.", "Another fact.", "One fact."):
        run("memorize", "-", "-o", "lib.hsa", *options, stdin=text)
        run("memory", "append", "lib.hsa", "-", *options[:2], stdin=text)
    assert names() == ["standard input", "standard input#2"] and told(checkpoint) == ["One fact.", "Another fact."]


def test_changes_by_hand_stay_until_the_file_itself_changes(texts, checkpoint, options):
    memorize("a.txt", options=options)
    run("memory", "edit", "lib.hsa", "a.txt", "--find", "Document 0.", "--replace", "Mended.", *options)
    run("memory", "append", "lib.hsa", "--to-last", "-", *options, stdin="The end.")
    assert counts(memorize("a.txt", options=options)) == (0, 0, 1)
    assert told(checkpoint)[0].startswith("Mended.") and told(checkpoint)[0].endswith("The end.")
    (texts / "a.txt").write_text("New. " + SENTENCE)
    result = hsa("memorize", "a.txt", "-o", "lib.hsa", *options)
    assert result.exit_code == 0 and "changed in the memory gives way" in result.stderr
    assert told(checkpoint) == ["New. " + SENTENCE]


def test_a_null_text_is_named_as_such(texts, options):
    (texts / "t.jsonl").write_text('{"text": null}\n')
    assert_one_clear_line(hsa("memorize", "t.jsonl", "-o", "new.hsa", *options), "t.jsonl, line 1", "got null in it")
    assert not (texts / "new.hsa").exists()


def test_asking_an_empty_memory_says_that_it_is_empty_before_the_model_is_loaded(texts, options):
    memorize("a.txt", options=options)
    run("memory", "edit", "lib.hsa", "a.txt", "--delete", *options)
    asked = hsa("ask", "-m", "lib.hsa", "What is it?", "--model", "no-model")
    assert_one_clear_line(asked, "lib.hsa is empty: it holds no document", "hsa memorize FILES -o lib.hsa")


def test_the_work_for_a_document_does_not_grow_with_the_library(texts, options, monkeypatch):
    """Counted in lines of Python, and in entries of the document table that are gone through."""
    network, tokenizer = load_model(options[1], "cpu", "fp32")
    lines = entries = 0

    def count(*_):
        nonlocal lines
        lines += 1
        return count

    def documents(writer):
        nonlocal entries
        entries += len(writer._documents)
        return tuple(writer._documents.values())

    monkeypatch.setattr(MemoryWriter, "documents", property(documents))

    def work(path, rows):
        nonlocal lines, entries
        (texts / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
        with open_or_create(network, tokenizer, path, "bf16", "bf16") as library:
            lines = entries = 0
            sys.settrace(count)
            try:
                files = source_files([texts / "rows.jsonl"], spool=Spool())
                updating.memorize_files(library, tokenizer, files, Bar(files, is_quiet=True))
            finally:
                sys.settrace(None)
        return lines, entries

    def works(count):
        path, rows = texts / f"{count}.hsa", [f"Fact {number}." for number in range(count)]
        changed = [f"Changed {row}" if number % 4 == 0 else row for number, row in enumerate(rows)]
        return [*work(path, rows), *work(path, rows), *work(path, changed)]

    # four times the documents: anything quadratic would make it sixteen
    for few, many in zip(works(20), works(80), strict=True):
        assert many <= 5 * few + 80


def test_a_command_reads_the_table_of_documents_once(texts, options, monkeypatch):
    memorize("a.txt", options=options)
    decode, reads = manifest.decode, []
    monkeypatch.setattr(manifest, "decode", lambda *arguments: reads.append(1) or decode(*arguments))
    for command in (
        ("memorize", "a.txt", "-o", "lib.hsa", *options),
        ("ask", "-m", "lib.hsa", "What is it?", "--max-new-tokens", "1", *options),
        ("memory", "info", "lib.hsa"),
    ):
        reads.clear()
        assert hsa(*command).exit_code == 0 and len(reads) == 1, command
