"""hsa chat: lines in, answers out; commands; Ctrl-C; what is remembered survives the next start and kill -9."""

import io
import json
import os
import random
import signal
import tempfile
from pathlib import Path

import pytest

from hsa_ultralong.cli import chat
from hsa_ultralong.cli.ask import Writer
from hsa_ultralong.memory import ChunkMemory, verify_memory
from tests.cli.test_memory_commands import SENTENCE, assert_one_clear_line, hsa, run
from tests.cli.test_terminal import assert_harmless
from tests.memory.test_files_crash import die_at, in_child


@pytest.fixture(scope="module")
def libraries(checkpoint, tmp_path_factory):
    """Two memories of one document each."""
    folder = tmp_path_factory.mktemp("libraries")
    paths = []
    for number in range(2):
        text = folder / f"{number}.txt"
        text.write_text(f"Document {number}. " + SENTENCE * 9)
        paths.append(folder / f"{number}.hsa")
        run("memorize", text, "-o", paths[-1], "--model", checkpoint, "--dtype", "fp32")
    return paths


@pytest.fixture
def options(checkpoint):
    return "--model", checkpoint, "--dtype", "fp32", "--max-new-tokens", 5


def lines_of(*arguments, stdin):
    return [json.loads(line) for line in run("chat", *arguments, "--json", stdin=stdin).splitlines()]


def test_every_line_is_answered_as_ask_answers_it(libraries, options):
    found = lines_of("-m", libraries[0], "--reread", 2, *options, stdin="What is it?\n\nThe clocks\n/quit\n")
    assert [(one["turn"], one["message"]) for one in found] == [(1, "What is it?"), (2, "The clocks"), (3, "/quit")]
    asked = json.loads(run("ask", "-m", libraries[0], "--reread", 2, "--sources", 8, "--json", *options, "What is it?"))
    kept = ("answer", "weight", "is_uncertain", "sources", "reread")
    assert {name: found[0][name] for name in kept} == {name: asked[name] for name in kept}
    assert len(found[0]["reread"]) == 2 and found[0]["is_stopped"] is False and found[0]["remembered"] is None


def test_several_memories_are_read_together(libraries, options):
    (found,) = lines_of("-m", libraries[0], "-m", libraries[1], *options, stdin="Document\n")
    assert {source["document"] for source in found["sources"]} == {0, 1}


def test_commands_show_passages_and_history_and_the_end(libraries, options):
    stdin = "/sources\nDocument \x1b[31m 1\n/sources\n/history\n/nothing\n/new\n/history\n/help\n/quit\nnot asked\n"
    result = hsa("chat", "-m", libraries[0], *options, stdin=stdin)
    assert result.exit_code == 0
    assert_harmless(result.stdout)
    shown = result.stdout
    assert shown.startswith("(no passages)\n") and "0.txt, tokens" in shown and "not asked" not in shown
    assert shown.count("user: Document \\x1b[31m 1\nassistant: ") == 1 and "/quit      the end" in shown
    assert result.stderr == "error: no command /nothing; /help names them\n"


def test_a_message_that_cannot_be_asked_is_an_error_of_its_line_alone(libraries, options):
    long = "word " * 400
    result = hsa("chat", "-m", libraries[0], "--context", "256", *options, "--json", stdin=f"{long}\nThe clocks\n")
    first, second = (json.loads(line) for line in result.stdout.splitlines())
    assert result.exit_code == 2 and "put long text into a memory" in first["error"] and "answer" in second


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--reread", 2), "name one"),
        (("--reread-tokens", 9), "--reread-tokens goes with"),
        (("-m", "a", "-m", "a"), "named twice"),
        (("-m", "a", "--remember", "a"), "named twice"),
        (("--server", "http://x", "--model", "m"), "--model: a server has its own"),
        (("--server", "file:///etc/passwd"), "an address such as"),
        (("--server", "http://127.0.0.1:9"), "no server answers"),
        (("--key", "k"), "--key goes with"),
        (("-m", "a", "-m", "b", "--store", "host"), "leave out --store"),
        (("-m", "none-such.hsa"), "none-such.hsa"),
        (("--remember", __file__), "test_chat.py"),
    ],
)
def test_options_that_say_nothing_are_refused_before_a_model_is_loaded(arguments, message):
    assert_one_clear_line(hsa("chat", *arguments, stdin="Hello\n"), message)


class Slow:
    """A partner whose second answer is stopped by Ctrl-C."""

    num_left_out = 0

    def __init__(self):
        self.kept, self.messages = [], []

    def pieces(self, text):
        self.text = ""
        for piece in ("one", " \x1b]0;two\x07", " three"):
            if text == "stop" and "two" in self.text:
                raise KeyboardInterrupt
            self.text += piece
            yield piece

    def found(self):
        return {"answer": self.text, "weight": 0.1, "unsure_below": 0.3, "is_uncertain": True, "sources": []}

    def keep(self, text, answer):
        if text == "keep":
            # a second Ctrl-C, while the turn is written
            os.kill(os.getpid(), signal.SIGINT)
        self.kept.append((text, answer))


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_ctrl_c_stops_the_answer_and_not_the_program(monkeypatch, capsys):
    typed = iter(["go", KeyboardInterrupt, "stop", "/quit"])

    def next_line(_):
        line = next(typed)
        if line is KeyboardInterrupt:
            raise line
        return line

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", next_line)
    partner = Slow()
    chat._talk(partner, as_json=False)
    shown = capsys.readouterr().out
    assert_harmless(shown)
    assert partner.kept == [("go", "one \x1b]0;two\x07 three"), ("stop", "one \x1b]0;two\x07")]
    assert "two\\x07 three\n(unsure: no passage stood out, best weight 0.10 < 0.30)" in shown
    assert "(/quit ends)" in shown and "two\\x07 (stopped)" in shown


def test_ctrl_c_waits_until_a_turn_is_kept():
    partner, before = Slow(), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        chat._turn(partner, "keep", Writer(), True)
    assert [text for text, _ in partner.kept] == ["keep"] and signal.getsignal(signal.SIGINT) is before


def test_what_is_said_in_one_session_is_recalled_in_the_next(tmp_path):
    talk = ("--remember", tmp_path / "talk.hsa", "--device", "cpu", "--dtype", "fp32")
    said = "The secret code of the silver lantern is 4821937.\nThe locker number of the old library is 7301954.\n"
    first = lines_of(*talk, stdin=said)
    assert [one["remembered"] for one in first] == ["turn 1", "turn 2"]
    asked = "What is the secret code of the silver lantern?\nWhat is the locker number of the old library?\n"
    again = lines_of(*talk, stdin=asked)
    assert "4821937" in again[0]["answer"] and "7301954" in again[1]["answer"]
    assert again[0]["sources"][0]["name"] == "turn 1"


@pytest.fixture
def place(monkeypatch):
    """An empty folder, in RAM where there is one."""
    root = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    # transformers loads in threads, of which torch knows none in a forked process
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    with tempfile.TemporaryDirectory(dir=root) as name:
        yield Path(name)


@pytest.mark.parametrize("kills", [2, pytest.param(40, marks=pytest.mark.slow)])
def test_a_killed_conversation_keeps_every_turn_that_it_answered(place, options, kills, monkeypatch):
    answered, counted, path = place / "answered", place / "count", place / "talk.hsa"

    def note(value, indent=None):
        with answered.open("a") as file:
            file.write(f"{value['remembered']}\n")

    def talk(step):
        """How a session of three turns ended that died at the step-th change of the file system."""

        def child():
            calls = []
            die_at(step, calls)
            code = hsa("chat", "--remember", path, *options, "--json", stdin="One.\nTwo.\nThree.\n").exit_code
            counted.write_text(str(len(calls)))
            os._exit(code)

        return in_child(child)

    monkeypatch.setattr(chat, "echo_json", note)
    chance, shown = random.Random(0), []
    assert talk(-1) == 0
    steps = int(counted.read_text())
    for kill in range(kills):
        assert talk(chance.randrange(steps // 4, steps)) in (0, signal.SIGKILL)
        shown = answered.read_text().split("\n")[:-1]
        assert verify_memory(path) == []
        found = ChunkMemory.load(path)
        names = [one.name for one in found.documents]
        # what was shown is there; of each kill at most one turn more, whole
        assert set(shown) <= set(names) and len(names) <= len(shown) + kill + 1 and found.open_document is None
        assert names == [f"turn {1 + number}" for number in range(len(names))]
    assert talk(-1) == 0 and len(ChunkMemory.load(path).documents) == len(names) + 3
