"""`hsa plan`, and what every command shares: exit codes, one-line errors, logging, a fast start."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from hsa_ultralong.cli import main as cli
from hsa_ultralong.cli.numbers import parse_size
from hsa_ultralong.cli.plan import format_bytes, format_count
from hsa_ultralong.models.accounting import count_parameters, flops_per_token, memory_bytes
from hsa_ultralong.models.presets import PRESETS, preset

ROOT = Path(__file__).resolve().parents[2]


def hsa(*arguments: str, **options):
    return CliRunner().invoke(cli.app, list(arguments), prog_name="hsa", env={"COLUMNS": "140"}, **options)


@pytest.mark.parametrize("name", PRESETS)
def test_the_table_shows_every_preset(name):
    result = hsa("plan", name)
    assert result.exit_code == 0, result.output
    assert "16,777,216 tokens, bf16" in result.stdout
    for row in (
        "active parameters",
        "FLOP per token, training",
        "memory per token",
        "landmark share",
        "full attention",
    ):
        assert row in result.stdout


def test_json_holds_the_numbers_of_accounting():
    result = hsa("plan", "nano", "--context", "1M", "--dtype", "fp32", "--set", "chunk_topk=64", "--json")
    costs = json.loads(result.stdout)
    config = preset("nano", chunk_topk=64)
    assert costs["context"] == 2**20
    assert costs["parameters"]["total"] == count_parameters(config).total
    assert costs["flops_per_token"]["forward"] == flops_per_token(config, 2**20)
    assert costs["flops_per_token"]["training"] == flops_per_token(config, 2**20, training=True)
    assert costs["memory"]["bytes_per_token"] == 528
    assert costs["memory"]["total"] == memory_bytes(config, 2**20, 4).total
    assert costs["full_attention_cache_bytes"] == 8 * 2 * 2 * 64 * 4 * 2**20


def test_stores_say_what_lies_on_which_tier():
    result = hsa("plan", "nano", "--context", "1B", "--key-values", "int8", "--landmarks", "int8", "--json")
    costs = json.loads(result.stdout)
    chunks = 2**24
    assert costs["stores"]["file"]["device"] == chunks * 256 * 2
    assert costs["stores"]["host"]["device"] == chunks * 258
    tiers = costs["stores"]["tiered"]
    assert tiers["device"] + tiers["host"] == chunks * (258 + 64 * 2 * 66)
    assert 128 * 2**30 - 64 * 2 * 66 < tiers["device"] <= 128 * 2**30
    assert costs["stores"]["host"]["host"] == chunks * 64 * 2 * 66
    assert costs["stores"]["file"] == {"device": chunks * 512, "host": 0, "file": chunks * (64 * 132 + 258 + 260)}
    assert costs["stores"]["device"]["device"] == memory_bytes(preset("nano"), 2**30).keys_values + chunks * 512
    assert 0 < costs["least_seconds"]["scan_per_retrieval_layer"] < 0.01 < costs["least_seconds"]["memorising"]
    shown = hsa("plan", "nano").stdout
    assert "store 'host'" in shown and "floors of one H200" in shown


def test_the_plan_of_a_file_is_what_a_file_takes(tmp_path):
    import torch

    from hsa_ultralong.memory import MemoryFile
    from hsa_ultralong.models import HSAForCausalLM

    model = HSAForCausalLM(preset("debug")).eval()
    memory = model.memorize(torch.randint(512, (6400,)))
    for form in ("bf16", "int8"):
        memory.save(tmp_path / f"{form}.hsa", key_values=form, landmarks=form)
        planned = hsa("plan", "debug", "--context", "6400", "--key-values", form, "--landmarks", form, "--json")
        expected = json.loads(planned.stdout)["stores"]["file"]["file"]
        with MemoryFile.open(tmp_path / f"{form}.hsa") as file:
            assert expected <= file.num_bytes <= expected + 2000


def test_help_has_examples_that_run_and_names_every_preset():
    text = hsa("plan", "--help").stdout
    assert "16,777,216" in text and all(name in text for name in PRESETS)
    examples = [line.split()[1:] for line in text.splitlines() if line.strip().startswith("hsa plan")]
    assert len(examples) == 3
    for example in examples:
        assert hsa(*example).exit_code == 0


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("4096", 4096),
        ("32K", 32768),
        ("16M", 16_777_216),
        ("1B", 2**30),
        ("1g", 2**30),
        ("1.5k", 1536),
        ("16,384", 2**14),
    ],
)
def test_sizes_are_binary_multiples(text, tokens):
    assert parse_size(text) == tokens


@pytest.mark.parametrize("text", ["", "K", "-1", "4 096", "1KB", "1e6", "1.0001K", "12,34"])
def test_other_sizes_are_refused(text):
    with pytest.raises(ValueError):
        parse_size(text)


def test_numbers_read_well():
    assert [format_bytes(n) for n in (0, 264, 1536, 2**20 - 1, 4.5 * 2**30)] == [
        "0 B",
        "264 B",
        "1.5 KiB",
        "1024 KiB",
        "4.5 GiB",
    ]
    assert [format_count(n) for n in (7, 1536, 999_600, 9_231_938)] == ["7", "1.54K", "1M", "9.23M"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["nanoo"],
        ["nano", "--set", "chunk_top=1"],
        ["nano", "--set", "chunk_topk"],
        ["nano", "--set", "num_memory_heads=3"],
        ["nano", "--context", "many"],
        ["nano", "--context", "0"],
        ["nano", "--dtype", "int3"],
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments):
    result = hsa("plan", *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [["plan", "nano", "--bad"], ["plan"], ["no-such-command"]])
def test_wrong_usage_is_exit_code_2(arguments):
    assert hsa(*arguments).exit_code == 2


@pytest.mark.parametrize(
    ("debug", "has_traceback"), [({}, False), ({"HSA_DEBUG": "1"}, True)], ids=["plain", "HSA_DEBUG=1"]
)
def test_a_process_shows_a_traceback_only_when_asked(debug, has_traceback, monkeypatch):
    monkeypatch.delenv("HSA_DEBUG", raising=False)
    for name, value in debug.items():
        monkeypatch.setenv(name, value)
    # a command that fails before it needs torch
    command = [sys.executable, "-m", "hsa_ultralong.cli.main", "plot", "nowhere"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "nowhere holds neither log.jsonl" in done.stderr
    assert ("Traceback" in done.stderr) == has_traceback
    if not has_traceback:
        assert done.returncode == 2 and done.stderr.count("\n") == 1


def raising(error: BaseException):
    """An application like `hsa` with one command that fails."""
    app = typer.Typer(cls=cli.CommandGroup, pretty_exceptions_enable=False)
    app.callback()(lambda: None)

    def fail() -> None:
        raise error

    app.command("fail")(fail)
    return CliRunner().invoke(app, ["fail"])


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (FileNotFoundError(2, "No such file or directory", "a.txt"), "error: No such file or directory: a.txt"),
        (ValueError("two\n  lines"), "error: two lines"),
        (ImportError("install lm_eval"), "error: install lm_eval"),
        (MemoryError(), "error: too large for this machine: MemoryError; a smaller input or model may fit"),
    ],
)
def test_errors_of_the_user_become_one_line(error, line):
    result = raising(error)
    assert (result.exit_code, result.stderr.strip()) == (2, line)


def test_bugs_keep_their_traceback():
    result = raising(KeyError("x"))
    assert result.exit_code == 1 and isinstance(result.exception, KeyError)


def test_interrupt_is_exit_code_130():
    assert raising(KeyboardInterrupt()).exit_code == 130


def test_verbose_shows_information_on_standard_error(capsys):
    logger = logging.getLogger("hsa_ultralong.some.module")
    for flags in (["-v"], []):
        assert hsa(*flags, "plan", "nano").exit_code == 0
        logger.info("in detail")
        logger.warning("take care")
        shown = capsys.readouterr().err
        assert "WARNING hsa_ultralong.some.module: take care" in shown
        assert ("in detail" in shown) == bool(flags)


def test_version_and_help_load_nothing_heavy():
    assert hsa("--version").stdout.startswith("hsa-ultralong")
    code = (
        "import sys; from hsa_ultralong.cli.main import app; from typer.testing import CliRunner; "
        "assert 'plan' in CliRunner().invoke(app, ['--help']).stdout; "
        "print(sorted({'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_figures_are_drawn_without_torch():
    code = "import sys, hsa_ultralong.cli.figures; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
