"""Every script of examples/ runs, with small settings, and shows what it says."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import typer

from hsa_ultralong.cli.main import app

ROOT = Path(__file__).resolve().parents[1]


def example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_book_answers_from_a_note_its_correction_and_the_file():
    before, after, from_file = example("ask_a_book").main(["--tokens", "8192"])
    assert "7301954" in before
    assert "2046813" in after and after == from_file


def test_the_operator_alone_equals_dense_attention_under_full_coverage():
    assert example("operator_alone").main(length=320) < 1e-4


def test_the_last_token_of_a_question_reads_the_chunk_of_the_fact():
    hidden, read = example("watch_retrieval").main(tokens=4096)
    assert read in (hidden, hidden + 1)


def test_a_text_becomes_a_model_that_memorises(tmp_path, capsys):
    pages = [page.read_text(encoding="utf-8") for page in sorted(ROOT.glob("docs/*.md"))]
    (tmp_path / "corpus.txt").write_text("\n\x1e\n".join(pages), encoding="utf-8")
    sizes = ["--preset", "debug", "--tokens", "1024", "--seq-len", "256", "--batch-tokens", "512", "--device", "cpu"]
    folder = example("train_nano").main([str(tmp_path / "corpus.txt"), "-o", str(tmp_path / "run"), *sizes])
    assert (folder / "model.safetensors").is_file()
    assert "the new model memorised" in capsys.readouterr().out


def test_a_converted_transformer_computes_what_its_source_does(tmp_path):
    assert example("convert_transformer").main(["-o", str(tmp_path / "converted")]) < 1e-4
    assert (tmp_path / "converted" / "config.json").is_file()


def test_a_model_of_ones_own_gets_a_memory_and_comes_back_from_a_small_file(tmp_path):
    # enough text for the word bank of facts
    names = "architecture", "data", "convert", "evaluate", "training"
    pages = [(ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in names]
    (tmp_path / "corpus.txt").write_text("\n\x1e\n".join(pages), encoding="utf-8")
    curves = example("own_memory").main([str(tmp_path / "corpus.txt"), "-o", str(tmp_path / "own"), "--steps", "1"])
    assert len(curves["divergence"]) == 1
    assert (tmp_path / "own" / "model" / "model.safetensors").is_file()
    assert (tmp_path / "own" / "learnt.safetensors").stat().st_size < 300_000


@pytest.mark.slow
def test_the_converted_model_of_the_long_example_learns(tmp_path, monkeypatch):
    import sys

    steps = ["--steps", "2", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["convert_and_distill.py", *steps])
    example("convert_and_distill").main()
    assert (tmp_path / "report.json").is_file()


def test_the_container_and_the_unit_start_a_server_with_options_that_exist():
    container, unit = ((ROOT / "examples" / "serving" / name).read_text() for name in ("Dockerfile", "hsa.service"))
    started = json.loads(re.search(r"^CMD (.*)$", container, re.M)[1])
    assert "--keys" in started  # it listens on all addresses
    for words in (started, re.search(r"^ExecStart=\S*/(hsa .*)$", unit, re.M)[1].split()):
        typer.main.get_command(app).commands[words[1]].make_context("hsa", words[2:])
    # the same torch as the library, or pip would fetch another, with gigabytes of what a CPU does not need
    wanted = re.search(r'"(torch>=[^"]+)"', (ROOT / "pyproject.toml").read_text())[1]
    assert f"'{wanted}'" in container


def test_every_example_is_listed_and_tested():
    page = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    scripts = {path.stem for path in ROOT.glob("examples/*.py")}
    assert scripts == set(re.findall(r"\]\((\w+)\.py\)", page))
    tests = (Path(__file__), ROOT / "tests" / "serve" / "test_retrievers.py")
    assert scripts == {
        name for test in tests for name in re.findall(r'example\("(\w+)"\)', test.read_text(encoding="utf-8"))
    }
