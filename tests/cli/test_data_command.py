"""`hsa data`: tables with bad records, conversations, an interrupted build, and errors of one line."""

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from hsa_ultralong.cli.main import app
from hsa_ultralong.data import TokenShards, build_shards, load_tokenizer

TOKENIZER = ("--tokenizer", "checkpoints/nano")


@pytest.fixture
def hsa(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    return lambda *arguments: CliRunner().invoke(app, ["data", *map(str, arguments)])


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "table.jsonl"
    rows = [json.dumps({"body": f"Article {i} says little. " * 9}) for i in range(6)]
    path.write_text("\n".join([*rows[:3], "{broken", *rows[3:]]))
    return path


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "chats.jsonl"
    rows = [
        {"talk": [{"role": "user", "content": f"Count to {i}."}, {"role": "assistant", "content": f"1 to {i}."}]}
        for i in range(4)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_bad_records_are_passed_over_with_a_report(hsa, table, tmp_path):
    result = hsa(table, "--field", "body", "-o", tmp_path / "out", *TOKENIZER)
    assert result.exit_code == 0, result.output
    assert "passed over 1 bad records, the first:" in result.stderr and "table.jsonl, line 4: no JSON" in result.stderr
    assert "6 documents" in result.stdout
    refused = hsa(table, "--text-field", "body", "-o", tmp_path / "other", "--max-bad", 0, *TOKENIZER)
    assert refused.exit_code == 2 and "table.jsonl, line 4: no JSON" in refused.stderr.splitlines()[-1]


def test_conversations_stand_alone_or_beside_text(hsa, table, chats, tmp_path):
    options = ("--chat-field", "talk", *TOKENIZER)
    alone = hsa(chats, "--format", "chat", "-o", tmp_path / "alone", *options)
    assert alone.exit_code == 0 and "4 documents, 4 of them conversations" in alone.stdout, alone.output
    both = hsa(table, "--chat", chats, "--field", "body", "-o", tmp_path / "both", *options)
    assert both.exit_code == 0 and "10 documents, 4 of them conversations" in both.stdout, both.output
    wrong = hsa(chats, "--format", "chat", "-o", tmp_path / "wrong", *TOKENIZER)
    assert wrong.exit_code == 2 and "messages" in wrong.stderr.splitlines()[-1]


def test_an_interrupted_build_goes_on_with_the_tokenizer_it_began_with(hsa, table, chats, tmp_path):
    arguments = (table, "--chat", chats, "--field", "body", "--chat-field", "talk", "--vocab-size", 300)
    assert hsa(*arguments, "-o", tmp_path / "whole").exit_code == 0
    whole = TokenShards.open(tmp_path / "whole")

    def interrupt(num_bytes, num_tokens):
        raise KeyboardInterrupt

    options = {"text_field": "body", "chat_field": "talk", "chats": [chats], "max_bad": 100}
    with pytest.raises(KeyboardInterrupt):
        build_shards([table], load_tokenizer(whole.path / "tokenizer"), tmp_path / "cut", progress=interrupt, **options)
    # a tokenizer of another size would be trained now, if the build did not bring its own
    result = hsa(*arguments[:-1], 400, "-o", tmp_path / "cut")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "cut" / "tokens.bin").read_bytes() == (whole.path / "tokens.bin").read_bytes()


def test_a_corpus_through_a_pipe_gives_the_shards_of_its_file(request, tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n\x1e\n".join(f"Article {i} says little. " * 9 for i in range(6)))
    # both kinds of pipe in one process: Python takes seconds to start
    code = (
        "import sys; from hsa_ultralong.cli.main import app\n"
        "for given, out in (('-', 'piped'), (sys.argv[1], 'substituted'), (sys.argv[2], 'file')):\n"
        "    app(['data', given, '-o', out, '--vocab-size', '300'], standalone_mode=False)"
    )
    line = f'{sys.executable} -c "$0" <(cat {corpus}) {corpus} < {corpus}'
    environment = {**os.environ, "PYTHONPATH": str(request.config.rootpath)}
    result = subprocess.run(["bash", "-c", line, code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("6 documents") == 3
    tokens = {(tmp_path / out / "tokens.bin").read_bytes() for out in ("piped", "substituted", "file")}
    assert len(tokens) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.txt", "file", "piped", "substituted"]


def test_what_a_folder_holds_besides_is_said_and_listed(hsa, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("One text. " * 30)
    (folder / "b.png").write_bytes(b"x")
    result = hsa(folder, "-o", tmp_path / "out", *TOKENIZER)
    assert result.exit_code == 0 and "1 images (b.png)" in result.stderr, result.output
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["passed_over"] == {"count": 1, "files": [[str(folder / "b.png"), "images"]]}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["latin.txt", "--max-bad", 0, "-o", "x", *TOKENIZER], ["offset 3", "--encoding cp1252"]),
        (["-", "-o", "x", *TOKENIZER], ["standard input is empty"]),
        (["a.txt", "--encoding", "klingon", "-o", "x", *TOKENIZER], ["klingon", "cp1252"]),
        (["nowhere.txt", "-o", "x"], ["nowhere.txt", "does not exist"]),
        (["a.txt", "--format", "chat", "-o", "x", *TOKENIZER], ["conversations are read from", ".jsonl"]),
        (["-", "--format", "chat", "-o", "x", *TOKENIZER], ["standard input"]),
    ],
)
def test_bad_arguments_end_in_one_line(hsa, arguments, words, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    files = ("x", "a.txt", "latin.txt")
    result = hsa(*(str(tmp_path / word) if word in files else word for word in arguments))
    last = result.stderr.strip().splitlines()[-1]
    assert result.exit_code == 2 and last.startswith("error: ") and all(word in last for word in words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "latin.txt"]
