"""`hsa memory rebuild`: the way on that every refusal of a foreign memory names."""

import json

import pytest
import torch

from hsa_ultralong.data import load_tokenizer, tokenizer_fingerprint, train_tokenizer
from hsa_ultralong.inference import rebuilding
from hsa_ultralong.inference.file_reader import FileReader
from hsa_ultralong.memory import MemoryFile
from hsa_ultralong.models import HSAForCausalLM
from hsa_ultralong.models.presets import preset
from hsa_ultralong.train.export import export_model
from tests.cli.test_memory_commands import SENTENCE, assert_one_clear_line, assert_same, contents, hsa, run

READ_ON = FileReader.read_on


def interrupted(*_, **__):
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def other(checkpoint, tmp_path_factory):
    """Another model with the same tokenizer."""
    folder = tmp_path_factory.mktemp("other") / "model"
    model = HSAForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(0.02 * torch.randn_like(model.model.embed_tokens.weight))
    export_model(model, load_tokenizer(checkpoint), folder, topk=4)
    return folder


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """Another model with another tokenizer."""
    folder = tmp_path_factory.mktemp("foreign") / "model"
    tokenizer = train_tokenizer([SENTENCE * 3], vocab_size=300)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    export_model(HSAForCausalLM(preset("debug", vocab_size=len(tokenizer), **ids)), tokenizer, folder, topk=4)
    return folder


@pytest.fixture
def library(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("a.txt", "b.txt")):
        (tmp_path / name).write_text(f"Document {number}. " + SENTENCE * (10 + 7 * number), encoding="utf-8")
    run("memorize", "a.txt", "b.txt", "-o", "lib.hsa", "--model", checkpoint, "--dtype", "fp32")
    return tmp_path / "lib.hsa"


@pytest.mark.parametrize(
    "command",
    [
        ("ask", "-m", "lib.hsa", "What?"),
        ("memorize", "a.txt", "-o", "lib.hsa"),
        ("memory", "append", "lib.hsa", "a.txt"),
    ],
)
def test_every_refusal_of_a_foreign_memory_names_the_command(library, other, command):
    refused = hsa(*command, "--model", other)
    assert_one_clear_line(refused, "another model", "hsa memory rebuild", "--model")


def test_a_rebuilt_memory_is_as_if_memorised_and_its_files_are_known(library, other, checkpoint):
    options = ("--model", other, "--dtype", "fp32")
    said = json.loads(run("memory", "rebuild", "lib.hsa", *options, "-o", "new.hsa", "--key-values", "int8", "--json"))
    assert said["path"].endswith("new.hsa") and said["num_tokens_read"] == said["num_tokens"]
    assert "read now" in run("memory", "rebuild", "lib.hsa", *options)
    for path, form in (("lib.hsa", "bf16"), ("new.hsa", "int8")):
        run("memorize", "a.txt", "b.txt", "-o", f"fresh-{path}", *options, "--key-values", form)
        assert_same(path, f"fresh-{path}")
        again = ("memorize", "a.txt", "b.txt", "-o", path, *options, "--key-values", form, "--json")
        assert json.loads(run(*again))["unchanged"] == 2
        with MemoryFile.open(path) as file:
            assert file.spec.metadata["model"] == str(other)
    assert json.loads(run("memory", "rebuild", "lib.hsa", *options, "--json"))["num_tokens_read"] == 0
    assert_one_clear_line(hsa("ask", "-m", "lib.hsa", "What?", "--model", checkpoint), "hsa memory rebuild lib.hsa")


def test_an_interrupted_rebuild_is_shown_by_info_and_leaves_no_folders_that_hold_nothing(library, other, monkeypatch):
    options = ("--model", other, "--dtype", "fp32")
    with monkeypatch.context() as patch:
        patch.setattr(FileReader, "read_on", interrupted)
        assert hsa("memory", "rebuild", "lib.hsa", *options, "-o", "deep/er/new.hsa").exit_code == 130
        assert not (library.parent / "deep").exists()
        patch.setattr(rebuilding, "take_over", interrupted)
        patch.setattr(FileReader, "read_on", READ_ON)
        assert hsa("memory", "rebuild", "lib.hsa", *options).exit_code == 130
    assert "a rebuild is unfinished in" in run("memory", "info", "lib.hsa")
    assert json.loads(run("memory", "rebuild", "lib.hsa", *options, "--json"))["num_tokens_read"] == 0
    assert "unfinished" not in run("memory", "info", "lib.hsa")


def test_another_tokenizer_is_named_and_with_the_old_one_the_text_is_read_anew(library, foreign, checkpoint, tmp_path):
    options = ("--model", foreign, "--dtype", "fp32")
    before = contents(library)[0]
    assert_one_clear_line(hsa("memory", "rebuild", "lib.hsa", *options), "another tokenizer", "--old-tokenizer")
    wrong = hsa("memory", "rebuild", "lib.hsa", *options, "--old-tokenizer", foreign)
    assert_one_clear_line(wrong, "another tokenizer")
    assert contents(library)[0] == before and not list(tmp_path.glob(".*"))
    run("memory", "rebuild", "lib.hsa", *options, "--old-tokenizer", checkpoint)
    run("memorize", "a.txt", "b.txt", "-o", "fresh.hsa", *options)
    assert_same("lib.hsa", "fresh.hsa")
    with MemoryFile.open("lib.hsa") as file:
        assert file.spec.tokenizer == tokenizer_fingerprint(load_tokenizer(foreign))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("no.hsa",), ("no.hsa", "does not exist")),
        (("lib.hsa", "-o", "a.txt"), ("a.txt is no folder",)),
        (("lib.hsa", "-o", "lib.hsa"), ("holds a memory already",)),
        (("lib.hsa", "-o", "a.txt/new.hsa"), ("is no folder",)),
        (("lib.hsa", "--landmarks", "fp4"), ("--landmarks", "fp4")),
    ],
)
def test_a_refused_rebuild_ends_in_one_line_and_leaves_nothing(library, other, tmp_path, arguments, words):
    there = sorted(tmp_path.rglob("*"))
    assert_one_clear_line(hsa("memory", "rebuild", *arguments, "--model", other), *words)
    assert sorted(tmp_path.rglob("*")) == there
