"""hsa memorize, hsa memory and hsa ask -m on a tiny random model: what they keep, say and refuse."""

import json
import shutil

import pytest
import torch
from typer.testing import CliRunner

from hsa_ultralong.cli.main import app
from hsa_ultralong.cli.memorize import Bar, open_or_create
from hsa_ultralong.cli.updating import memorize_files
from hsa_ultralong.memory import MemoryFile, MemoryWriter

SENTENCE = "It was a bright cold day in April, and the clocks were striking. "


def hsa(*arguments, stdin=None):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def run(*arguments, stdin=None):
    result = hsa(*arguments, stdin=stdin)
    assert result.exit_code == 0, result.output + result.stderr
    return result.stdout


def assert_one_clear_line(result, *words):
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    for word in words:
        assert word in lines[0]


def contents(path):
    """Names, tokens and all columns of a memory."""
    with MemoryFile.open(path) as file:
        names = [(document.name, document.num_tokens) for document in file.documents]
        tokens = [file.document_tokens(document.id) for document in file.documents]
        columns = {name: file.read(name, 0, file.num_chunks) for name in file.spec.columns}
    return names, tokens, columns


def assert_same(left, right):
    (names, tokens, columns), (other_names, other_tokens, other_columns) = contents(left), contents(right)
    assert names == other_names
    assert all(torch.equal(a, b) for a, b in zip(tokens, other_tokens, strict=True))
    used = torch.arange(columns["tokens"].shape[1]) < columns["lengths"][:, None]
    for name, column in columns.items():
        a, b = column.float(), other_columns[name].float()
        if name == "keys_values":
            a, b = (x.movedim(1, 2)[used] for x in (a, b))
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, name in enumerate(("a.txt", "b.md", "c.txt")):
        (folder / name).write_text(f"Document {number}. " + SENTENCE * (10 + 7 * number), encoding="utf-8")
    return folder


@pytest.fixture
def library(texts, checkpoint, tmp_path):
    path = tmp_path / "lib.hsa"
    run("memorize", texts, "-o", path, "--model", checkpoint, "--dtype", "fp32")
    return path


def test_memorize_says_what_it_did_and_passes_over_what_is_known(library, texts, checkpoint):
    again = json.loads(run("memorize", texts, "-o", library, "--model", checkpoint, "--dtype", "fp32", "--json"))
    assert (again["added"], again["changed"], again["unchanged"], again["tokens_read"]) == (0, 0, 3, 0)
    (texts / "b.md").write_text("Document 1. " + SENTENCE * 16 + "The end.", encoding="utf-8")
    (texts / "d.txt").write_text(SENTENCE, encoding="utf-8")
    again = json.loads(run("memorize", texts, "-o", library, "--model", checkpoint, "--dtype", "fp32", "--json"))
    assert (again["added"], again["changed"], again["unchanged"]) == (1, 1, 2)
    fresh = library.with_name("fresh.hsa")
    run("memorize", texts, "-o", fresh, "--model", checkpoint, "--dtype", "fp32")
    assert_same(library, fresh)


def test_an_interrupted_memorize_goes_on_and_ends_with_the_same_memory(library, texts, checkpoint, monkeypatch):
    from hsa_ultralong.cli import updating
    from hsa_ultralong.cli.common import load_model
    from hsa_ultralong.data import Spool, source_files
    from hsa_ultralong.inference.file_reader import FileReader

    monkeypatch.setattr(updating, "_COMMIT_TOKENS", 1)
    read_on, path, files = FileReader.read_on, library.with_name("cut.hsa"), source_files([texts], spool=Spool())
    network, tokenizer = load_model(checkpoint, "cpu", "fp32")
    for cut in (1, 2, 3):
        calls = []

        def stop(self, id, tokens, done, state, *, report, cut=cut, calls=calls, **_):
            calls.append(id)

            def limited(stop, total):
                if len(calls) == cut and stop >= 128:
                    raise KeyboardInterrupt
                report(stop, total)

            read_on(self, id, tokens, done, state, piece_tokens=64, commit_tokens=64, report=limited)

        shutil.rmtree(path, ignore_errors=True)
        monkeypatch.setattr(FileReader, "read_on", stop)
        with pytest.raises(KeyboardInterrupt), open_or_create(network, tokenizer, path, "bf16", "bf16") as opened:
            memorize_files(opened, tokenizer, files, Bar(files, is_quiet=True))
        monkeypatch.setattr(FileReader, "read_on", read_on)
        with open_or_create(network, tokenizer, path, "bf16", "bf16") as opened:
            assert len(opened.documents) in (cut - 1, cut)
            memorize_files(opened, tokenizer, files, Bar(files, is_quiet=True))
        assert_same(path, library)


def test_info_lists_documents_and_bytes(library, texts):
    shown = json.loads(run("memory", "info", library, "--json"))
    assert [document["name"] for document in shown["documents"]] == [
        str(texts / name) for name in ("a.txt", "b.md", "c.txt")
    ]
    assert shown["tokens"] == sum(document["tokens"] for document in shown["documents"])
    assert shown["dead_bytes"] == 0 and shown["formats"] == {"key_values": "bf16", "landmarks": "bf16"}
    assert "deleted: hsa memory compact" in run("memory", "info", library)


def test_edit_states_its_cost_and_equals_memorising_the_changed_text(library, texts, checkpoint):
    name = str(texts / "c.txt")
    before = contents(library)
    dry = run(
        "memory", "edit", library, name, "--find", "Document 2.", "--replace", "Chapter 2.", "--dry-run",
        "--model", checkpoint,
    )  # fmt: skip
    assert "chunks are read again" in dry and "nothing was changed" in dry
    assert all(torch.equal(a, b) for a, b in zip(before[1], contents(library)[1], strict=True))
    change = ("--find", "Document 2.", "--replace", "Chapter 2.", "--model", checkpoint, "--dtype", "fp32")
    run("memory", "edit", library, name, *change)
    file = texts / "c.txt"
    file.write_text(file.read_text(encoding="utf-8").replace("Document 2.", "Chapter 2."), encoding="utf-8")
    fresh = library.with_name("fresh.hsa")
    run("memorize", texts, "-o", fresh, "--model", checkpoint, "--dtype", "fp32")
    assert_same(library, fresh)
    again = json.loads(run("memorize", texts, "-o", library, "--model", checkpoint, "--dtype", "fp32", "--json"))
    assert again["unchanged"] == 3


def test_delete_compact_export_and_merge_keep_the_rest(library, texts, checkpoint):
    run("memory", "export", library, texts / "b.md", "-o", library.with_name("b.hsa"))
    run("memory", "edit", library, texts / "b.md", "--delete", "--model", checkpoint)
    assert json.loads(run("memory", "info", library, "--json"))["dead_bytes"] > 0
    assert json.loads(run("memory", "compact", library, "--json"))["freed"] > 0
    run("memory", "merge", library, library.with_name("b.hsa"))
    shown = json.loads(run("memory", "info", library, "--json"))
    assert [document["name"][-5:] for document in shown["documents"]] == ["a.txt", "c.txt", "/b.md"]
    assert shown["dead_bytes"] == 0 and "all checksums are right" in run("memory", "verify", library)


def test_append_to_the_last_document_equals_one_longer_document(library, texts, checkpoint, tmp_path):
    run("memory", "append", library, "--to-last", "-", "--model", checkpoint, stdin=" And then it rained.")
    with MemoryFile.open(library) as file:
        tokens = file.document_tokens(file.documents[-1].id)
    from hsa_ultralong.data import load_tokenizer

    decoded = load_tokenizer(checkpoint).decode(tokens.tolist(), skip_special_tokens=True)
    assert decoded == (texts / "c.txt").read_text(encoding="utf-8") + " And then it rained."
    extra = tmp_path / "more.txt"
    extra.write_text(SENTENCE, encoding="utf-8")
    shown = json.loads(run("memory", "append", library, extra, "--model", checkpoint, "--json"))
    assert shown["added"] == 1 and shown["documents"] == 4


@pytest.mark.parametrize("store", ["file", "host", "device"])
def test_ask_reads_a_memory_from_any_store_and_names_its_passages(library, texts, checkpoint, store):
    question = ("ask", "-m", library, "--model", checkpoint, "--store", store, "--show-sources", 2, "What is it?")
    answer = json.loads(run(*question, "--json"))
    now = ("ask", *(part for name in ("a.txt", "b.md", "c.txt") for part in ("--text", texts / name)))
    direct = json.loads(run(*now, "--model", checkpoint, "--sources", 2, "What is it?", "--json"))
    assert answer["memorised_tokens"] == direct["memorised_tokens"] and len(answer["sources"]) == 2
    assert answer["weight"] == pytest.approx(direct["weight"], abs=0.02)
    shown = run(*question)
    # streamed or not, the answer is the same
    assert shown.splitlines()[0].strip() in (answer["answer"], "(no answer)")
    assert answer["sources"][0]["name"] in shown


def test_a_damaged_memory_stops_ask_with_one_line_and_verify_names_the_documents(library, texts, checkpoint):
    shard = next((library / "shards").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert_one_clear_line(hsa("ask", "-m", library, "--model", checkpoint, "What is it?"), shard.name, "c.txt")
    result = hsa("memory", "verify", library)
    assert result.exit_code == 1 and "a.txt" in result.stdout and "1 damaged place" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("ask", "What?"), ("--memory", "--text")),
        (("ask", "-m", "LIB", "--hide", "x", "What?"), ("--hide needs --text",)),
        (("ask", "-m", "no.hsa", "What?"), ("no.hsa",)),
        (("ask", "-m", "LIB", "--store", "tape", "What?"), ("store must be one of",)),
        (("ask", "-m", "LIB", "--depth", "0.3", "What?"), ("give --hide SENTENCE too",)),
        (("ask", "-t", "a.txt", "--lookup", "sketch", "What?"), ("--store and --lookup go with --memory",)),
        (("memory", "info", "no.hsa"), ("no.hsa",)),
        (("memory", "edit", "LIB", "nobody", "--delete"), ("'nobody'", "does not exist")),
        (("memory", "edit", "LIB", "0"), ("--find with --replace",)),
        (("memory", "edit", "LIB", "0", "--find", "zebra", "--replace", ""), ("occurs 0 times",)),
        (("memory", "export", "LIB", "nobody", "-o", "OUT"), ("'nobody'",)),
        (("memorize", "no.txt", "-o", "OUT"), ("no.txt", "does not exist")),
        (("memorize", "TEXTS", "-o", "OUT", "--key-values", "fp4"), ("--key-values", "fp4")),
        (("memorize", "TEXTS", "-o", "LIB", "--key-values", "int8"), ("another form",)),
    ],
)
def test_bad_input_ends_in_one_line_and_changes_nothing(arguments, words, library, texts, checkpoint, tmp_path):
    places = {"LIB": library, "OUT": tmp_path / "out.hsa", "TEXTS": texts}
    command = [places.get(part, part) for part in arguments]
    if command[0] != "memory" or command[1] == "edit":
        command += ["--model", checkpoint]
    before = {file: file.read_bytes() for file in library.rglob("*") if file.is_file()}
    assert_one_clear_line(hsa(*command), *words)
    assert before == {file: file.read_bytes() for file in library.rglob("*") if file.is_file()}
    assert not (tmp_path / "out.hsa").exists()


def test_a_second_writer_and_a_full_disk_are_refused(library, texts, checkpoint, monkeypatch):
    with MemoryWriter.open(library):
        assert_one_clear_line(hsa("memorize", texts, "-o", library, "--model", checkpoint), "writ")
    usage = shutil.disk_usage(library)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert_one_clear_line(
        hsa("memorize", texts, "-o", library.with_name("new.hsa"), "--model", checkpoint), "tokens at", "free"
    )


def test_a_memory_of_another_model_is_refused(library, checkpoint, tmp_path):
    from hsa_ultralong.data import load_tokenizer
    from hsa_ultralong.models import HSAForCausalLM
    from hsa_ultralong.train.export import export_model

    other = HSAForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        other.model.embed_tokens.weight[5] += 1
    export_model(other, load_tokenizer(checkpoint), tmp_path / "other", topk=4)
    assert_one_clear_line(hsa("ask", "-m", library, "--model", tmp_path / "other", "What?"), "another model")


def test_a_bad_record_ends_the_reading_and_keeps_what_came_before_or_is_passed_over(checkpoint, tmp_path):
    table, library = tmp_path / "table.jsonl", tmp_path / "lib.hsa"
    rows = [json.dumps({"text": SENTENCE}), "no json", json.dumps({"text": 2 * SENTENCE}), json.dumps({"body": "x"})]
    table.write_text("\n".join(rows) + "\n")
    refused = hsa("memorize", table, "-o", library, "--model", checkpoint)
    assert refused.exit_code == 2 and "table.jsonl, line 2: no JSON" in refused.stderr.splitlines()[-1]
    assert [name for name, _ in contents(library)[0]] == [f"{table}:1"]
    assert "not committed" not in refused.stderr
    result = hsa("memorize", table, "-o", library, "--model", checkpoint, "--max-bad", 2)
    assert result.exit_code == 0 and "passed over 2 bad records" in result.stderr
    assert [name for name, _ in contents(library)[0]] == [f"{table}:1", f"{table}:3"]
    again = json.loads(run("memorize", table, "-o", library, "--model", checkpoint, "--max-bad", 2, "--json"))
    assert again["unchanged"] == 2 and again["bad"] == 2
    few = hsa("memorize", table, "-o", library, "--model", checkpoint, "--max-bad", 1)
    assert few.exit_code == 2 and "more than 1 bad records" in few.stderr.splitlines()[-1]
