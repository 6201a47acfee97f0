"""Names, texts, answers and errors are shown and never act on the terminal."""

import ast
import io
import json
import logging
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hsa_ultralong.cli import terminal
from hsa_ultralong.cli.ask import Writer
from hsa_ultralong.cli.main import app
from hsa_ultralong.cli.terminal import LogFormatter, console, echo_json, one_line, progress, shown

CLI = Path(terminal.__file__).parent
HOSTILE = (
    "[red]n[/red] [link=file:///etc]x[/link] [/] :skull: "
    "\x1b[31mred \x1b]0;title\x07 \x1b]8;;http://x\x1b\\link \x9b2J \x08\x7f \u202egnp.exe \u2066x\u2069 \u2028end"
)
# a name of a file: no slash
NAME = HOSTILE.replace("/", "|")


def assert_harmless(text):
    assert shown(text) == text, f"acts on a terminal: {text!r}"


def hsa(*arguments, stdin=None):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin, env={"COLUMNS": "400"})
    # piped or not, both streams
    assert_harmless(result.stdout.replace("\r", ""))
    assert_harmless(result.stderr.replace("\r", ""))
    return result


def test_what_acts_on_a_terminal_is_written_as_escapes_and_the_rest_stays():
    assert shown("a\x1b[31m\x07\x9b\u202e\ud800\x7f\r") == r"a\x1b[31m\x07\x9b\u202e\ud800\x7f\x0d"
    plain = "[red] tabs\tand\nlines, déjà vu, 日本語, שלום, \U0001f600"
    assert shown(plain) == plain and shown("a\r\nb") == "a\nb"
    assert one_line("a\nb\tc\x1b") == r"a\nb\tc\x1b"
    for code in [*range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]:
        assert chr(code) not in shown(chr(code))


def test_tables_bars_and_log_lines_take_strings_for_what_they_are():
    from rich.table import Table

    screen = console()
    screen.file = io.StringIO()
    screen.width = 400
    table = Table(title=HOSTILE)
    table.add_column(HOSTILE)
    table.add_row(HOSTILE)
    screen.print(table)
    screen.print(HOSTILE)
    written = screen.file.getvalue()
    assert_harmless(written)
    assert written.count("[red]n[/red] [link=file:///etc]x[/link] [/] :skull: \\x1b[31mred") == 4
    bar = progress("{task.description} {task.fields[name]}")
    bar.add_task(HOSTILE, name=HOSTILE, total=None)
    column = bar.columns[0]
    cell = column.render(bar.tasks[0]).plain
    assert_harmless(cell)
    assert cell.count("[red]n[/red]") == 2 and "\n" not in cell
    record = logging.LogRecord("a", logging.WARNING, "", 0, "read %s", ("x\nERROR faked\x1b[2J",), None)
    assert LogFormatter("%(levelname)s %(message)s").format(record) == r"WARNING read x\nERROR faked\x1b[2J"


def test_json_is_exact_and_harmless(capsys):
    echo_json({HOSTILE: HOSTILE})
    written = capsys.readouterr().out
    assert_harmless(written)
    assert json.loads(written) == {HOSTILE: HOSTILE}


def test_a_sequence_split_over_pieces_of_an_answer_is_not_run(capsys):
    writer = Writer()
    for piece in HOSTILE:
        writer(piece)
    written = capsys.readouterr().out
    assert_harmless(written)
    assert "\\x1b]0;title\\x07" in written


def test_a_terminal_of_few_letters_gets_escapes(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii"))
    terminal.echo("déjà \x1b")
    assert raw.getvalue() == b"d\\xe9j\\xe0 \\x1b\n"


def test_all_output_of_the_commands_goes_through_one_module():
    for path in CLI.glob("*.py"):
        if path.name == "terminal.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            used = {"typer.echo", "typer.secho", "print", "Console", "Progress", "TextColumn"} & {name}
            assert not used, f"{path.name}:{getattr(node, 'lineno', 0)} uses {used}; use hsa_ultralong.cli.terminal"


@pytest.fixture
def hostile(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    text = f"It was a bright cold day in April. {HOSTILE} " * 9
    (folder / f"{NAME}.txt").write_text(text, encoding="utf-8")
    (folder / f"{NAME}.png").write_bytes(b"x")
    (folder / f"{NAME}.jsonl").write_text(json.dumps({"text": text, NAME: 1}) + "\n{broken" + NAME + "\n")
    return folder


def test_no_command_lets_names_and_texts_act_on_the_terminal(hostile, checkpoint, tmp_path):
    text, table, library = hostile / f"{NAME}.txt", hostile / f"{NAME}.jsonl", tmp_path / f"lib{NAME}.hsa"
    model = ("--model", checkpoint)
    done = [
        hsa("memorize", hostile, "-o", library, *model, "--max-bad", 3),
        hsa("memorize", text, "-o", library, *model),
        hsa("memory", "info", library),
        hsa("memory", "info", library, "--json"),
        hsa("memory", "append", library, "-", *model, stdin=HOSTILE),
        hsa("memory", "edit", library, text, "--text", text, "--dry-run", *model),
        hsa("memory", "export", library, text, "-o", tmp_path / f"out{NAME}.hsa"),
        hsa("memory", "verify", library),
        hsa("memory", "compact", library),
        hsa("ask", "-m", library, "--show-sources", 9, *model, HOSTILE),
        hsa("ask", "-t", text, *model, f"{HOSTILE}?"),
        hsa("ask", "-t", text, *model, "--json", HOSTILE),
        hsa("generate", "-t", text, "--continue", HOSTILE, *model, "--max-new-tokens", 20),
        hsa("generate", HOSTILE, *model, "--max-new-tokens", 20, "--json"),
        hsa("data", hostile, "-o", tmp_path / f"shards{NAME}", "--tokenizer", checkpoint),
    ]
    for result in done:
        assert result.exit_code == 0, result.output + result.stderr
    assert "[red]n[|red]" in done[2].stdout
    assert "\\x" in done[9].stdout and "\\x" in done[10].stdout
    assert json.loads(done[13].stdout)["text"].startswith(HOSTILE[:10])
    for refused in (
        hsa("ask", "-m", tmp_path / NAME, *model, "x"),
        hsa("ask", "-t", tmp_path / NAME, *model, "x"),
        hsa("ask", "-t", text, "--model", tmp_path / NAME, "x"),
        hsa("memorize", table, "-o", library, *model),
        hsa("memorize", table, "-o", library, *model, "--text-field", NAME),
        hsa("memorize", tmp_path / NAME, "-o", library, *model),
        hsa("memorize", hostile / f"{NAME}.png", "-o", library, *model, "--encoding", NAME),
        hsa("memory", "edit", library, NAME, "--delete", *model),
        hsa("memory", "export", library, NAME, "-o", tmp_path / "x.hsa"),
        hsa("data", tmp_path / NAME, "-o", tmp_path / "x"),
        hsa("plan", NAME),
        hsa("plan", "nano", "--set", f"{NAME}={NAME}"),
        hsa("plan", "nano", "--context", NAME),
        hsa("plot", tmp_path / NAME),
        hsa("train", NAME, "--dry-run"),
        hsa("train", "nano", "--set", f"{NAME}=1", "--dry-run"),
        hsa("average", tmp_path / NAME, tmp_path / NAME, "-o", tmp_path / "x"),
        hsa("convert", tmp_path / NAME, "-o", tmp_path / "x"),
        hsa("eval", "needles", "--forms", NAME, *model, "-o", tmp_path / "x"),
        hsa("bench", "ops", "--text", tmp_path / NAME, "--device", "cpu"),
        hsa("bench", "memory", "--preset", NAME, "--device", "cpu"),
        hsa("quickstart", "--needles", NAME),
        hsa("quickstart", f"--{NAME}"),
        hsa(NAME),
        hsa(f"--{NAME}"),
        hsa("generate", "x", "--device", NAME),
    ):
        assert refused.exit_code == 2, refused.output + refused.stderr
