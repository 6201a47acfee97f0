"""Numbers of the command line: bounded before any work, and named when they are too large for the machine."""

import inspect
import json
import typing

import pytest
import typer
from typer.testing import CliRunner

from hsa_ultralong.cli.main import app, describe, is_user_error
from hsa_ultralong.cli.numbers import MAX_TOKENS, parse_counts, parse_size, parse_sizes


def hsa(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def commands(group=app, path=()):
    for one in group.registered_commands:
        yield (*path, one.name or one.callback.__name__), one.callback
    for one in group.registered_groups:
        yield from commands(one.typer_instance, (*path, one.name))


def number_options():
    for path, function in commands():
        hints = typing.get_type_hints(function, include_extras=True)
        for name in inspect.signature(function).parameters:
            kind, *info = typing.get_args(hints[name]) if typing.get_origin(hints[name]) is typing.Annotated else [None]
            if kind is not bool and {int, float} & {kind, *typing.get_args(kind)}:
                yield path, name, kind, info[0]


def test_every_number_option_has_bounds_and_refuses_what_is_none():
    found = list(number_options())
    assert len(found) > 25
    for path, name, kind, info in found:
        where = f"hsa {' '.join(path)} {name}"
        assert info.min is not None and info.max is not None, f"{where}: give min and max"
        if float in (kind, *typing.get_args(kind)):
            assert info.callback is not None, f"{where}: give callback=finite"


@pytest.mark.parametrize("value", ["1e30", "1" + "0" * 5000, "-1", "nan", ""])
def test_no_number_option_takes_what_no_machine_holds(value):
    for path, name, _, info in number_options():
        option = next((one for one in info.param_decls or () if one.startswith("--")), "--" + name.replace("_", "-"))
        callback = dict(commands())[path]
        required = [
            "x"
            for parameter in inspect.signature(callback).parameters.values()
            if parameter.default is inspect.Parameter.empty and parameter.name != "output"
        ]
        result = hsa(*path, *required, option, value)
        assert result.exit_code == 2 and "Traceback" not in result.output, (path, option, result.output)


@pytest.mark.parametrize(
    "text",
    ["9" * 400, "1" + "0" * 5000, "0", "0K", f"{MAX_TOKENS + 1}", "1000000000G", "1e30", "nan", "٣", "1.5", "." * 50],
)
def test_sizes_out_of_bounds_are_refused_by_the_option(text):
    for parse in (parse_size, parse_sizes):
        with pytest.raises(ValueError, match="--lengths: ") as error:
            parse(text, "--lengths")
        assert len(str(error.value)) < 200
    assert_one_line(hsa("plan", "nano", "--context", text), "--context")
    assert_one_line(hsa("quickstart", "--lengths", text), "--lengths")


def assert_one_line(result, *words):
    lines = result.stderr.strip().splitlines()
    assert result.exit_code == 2 and len(lines) == 1 and lines[0].startswith("error: "), result.output
    assert all(word in lines[0] for word in words), lines[0]


def test_lists_of_counts_are_checked():
    assert parse_counts("16, 32", "--topk") == [16, 32]
    for text in ("0", "1e20", "1" + "0" * 30, "-1", "", "1,,2", "16,x"):
        with pytest.raises(ValueError, match="--topk must be whole numbers from 1 to"):
            parse_counts(text, "--topk")


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_lower_layers", "chunk_topk", "sliding_window"])
@pytest.mark.parametrize("value", [10**30, 10**400, -(10**30)])
def test_configuration_values_that_no_machine_holds_are_named(key, value):
    assert_one_line(hsa("plan", "nano", "--set", f"{key}={value}"), key)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e400", "1e30"])
def test_configuration_values_that_are_no_numbers_are_named(value):
    assert_one_line(hsa("plan", "nano", "--set", f"rope_theta={value}"), "rope_theta")


def test_the_largest_plans_can_be_printed():
    for extra in ([], ["--json"]):
        result = hsa("plan", "nano", "--context", str(MAX_TOKENS), *extra)
        assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["context"] == MAX_TOKENS


def test_a_number_too_large_for_the_machine_is_named_in_one_line(checkpoint, tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("It was a bright cold day in April. " * 20)
    # 10^9 tokens of buffers, more than any test machine has
    result = hsa("ask", "-t", book, "--model", checkpoint, "--device", "cpu", "--max-new-tokens", 2**31 - 1, "What?")
    assert_one_line(result, "too large for this machine", "--max-new-tokens 2147483647")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("Storage size calculation overflowed with sizes=[1, 2]"),
        RuntimeError("numel: integer multiplication overflow"),
        RuntimeError("Overflow when unpacking long long"),
        OverflowError("int too large to convert to float"),
        MemoryError(),
        type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried to allocate 8 GiB"),
    ],
)
def test_every_error_of_allocation_is_a_users_error_with_their_numbers(error):
    line = describe(error, ["eval", "needles", "--lengths", "64K,1G", "--text", "a.txt", "--set", "x=1e9", "--seed=3"])
    assert is_user_error(error) and "\n" not in line and line.startswith("too large for this machine: ")
    assert "smaller --seed 3, --lengths 64K,1G, --set x=1e9 may fit" in line
    assert "a smaller input or model may fit" in describe(error)


def test_other_runtime_errors_are_bugs_and_deep_nesting_is_not():
    assert not is_user_error(RuntimeError("shapes do not match"))
    assert not is_user_error(KeyError("x"))
    assert is_user_error(RecursionError("maximum recursion depth exceeded"))
    assert isinstance(app, typer.Typer)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("generate", "x", "--max-new-tokens", "-1"), "--max-new-tokens"),
        (("generate", "x", "--max-new-tokens", "many"), "--max-new-tokens"),
        (("ask", "x", "y", "--topk", "0"), "No such option: --topk"),
        (("eval", "needles", "--needles", "0", "-o", "y"), "--needles"),
        (("remember",), "No such command 'remember'"),
        (("memory", "append"), "Missing argument"),
        (("ask", "--text", "\x1b[31m", "--nope"), "--nope"),
    ],
)
def test_a_wrong_command_line_is_refused_in_one_line_that_names_the_help(arguments, words):
    result = hsa(*arguments)
    assert result.exit_code == 2
    (line,) = result.output.strip().split("\n")
    assert line.startswith("error: ")
    assert words in line
    assert "\x1b" not in line


@pytest.mark.parametrize(
    ("command", "old"),
    [("eval needles", "--segment"), ("bench memory", "--segment"), ("bench training", "--segment-tokens")],
)
def test_flags_of_earlier_versions_keep_working(command, old):
    found = typer.main.get_command(app)
    for name in command.split():
        found = found.commands[name]
    assert [part.name for part in found.params if old in part.opts] in (["piece"], ["piece_tokens"])
