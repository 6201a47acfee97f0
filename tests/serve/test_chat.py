"""hsa chat against a running server: answers of ask, passages, what is remembered there, refusals in one line."""

import hashlib
import json
import time

import pytest
import torch

from hsa_ultralong.cli import chat_partners
from hsa_ultralong.cli.chat_partners import There
from hsa_ultralong.inference import as_question, ask, memorize
from hsa_ultralong.testing.processes import HANG_SECONDS
from tests.cli.test_memory_commands import assert_one_clear_line, hsa, run
from tests.serve.conftest import FERRY, FILLER, LANTERN, serving

QUESTION = "What is the secret code of the silver lantern?"


@pytest.fixture(scope="module")
def address(server):
    answers = server[1]
    answers.memories.create("default", "talked", [("a", f"{LANTERN} {FILLER}")])
    answers.memories.create("default", "ferry", [("c", FERRY)])
    return server[0]


@pytest.mark.parametrize("reread", [None, 2])
def test_a_line_is_answered_as_ask_answers_it(address, server, reread):
    answers = server[1]
    options = ("--reread", reread) if reread else ()
    shown = run("chat", "--server", address + "/v1", "-m", "talked", *options, "--json", stdin=QUESTION)
    found = json.loads(shown)
    memory = answers.memories.open("default", ["talked"]).memory
    expected = ask(answers.model, answers.tokenizer, memory, as_question(QUESTION), reread=reread or 0)
    assert found["answer"] == expected.text.strip()
    assert found["weight"] == pytest.approx(expected.weight, abs=1e-5)
    assert [one["start"] for one in found["reread"]] == [one.start for one in expected.reread]
    assert "lantern" in found["sources"][0]["passage"] and found["is_uncertain"] == expected.is_uncertain


def test_what_is_said_is_remembered_on_the_server(address):
    talk = ("chat", "--server", address, "-m", "ferry", "--remember", "said", "--json")
    run(*talk, stdin=f"{LANTERN}\nAnd then it rained.\n")
    found = [json.loads(line) for line in run(*talk, stdin=QUESTION).splitlines()]
    assert "4821937" in found[0]["answer"] and found[0]["remembered"] == "turn 3"
    assert "turn 1" in [source["name"] for source in found[0]["sources"]]


def test_an_answer_that_is_stopped_gives_its_row_back(address, server):
    partner = There(address, None, ["talked"], max_tokens=400)
    pieces = partner.pieces("The old road")
    assert next(pieces)
    pieces.close()
    end = time.monotonic() + HANG_SECONDS
    while server[1].worker.num_running and time.monotonic() < end:
        time.sleep(0.05)
    assert server[1].worker.num_running == 0 and partner.found()["answer"]


def test_what_the_server_refuses_is_one_line(address, nano, tmp_path):
    wrong = {
        ("-m", "none"): "no memory 'none'",
        ("--system", "Be."): "a chat template",
        ("--remember", "../x"): "refused",
    }
    for words, message in wrong.items():
        assert_one_clear_line(hsa("chat", "--server", address, *words, stdin="a\n"), message)
    long = hsa("chat", "--server", address, "--json", stdin="word " * 2000)
    assert long.exit_code == 2 and "put long text into a memory" in json.loads(long.stdout)["error"]
    keys = {hashlib.sha256(b"secret").hexdigest(): "one"}
    with serving(nano, tmp_path / "memories", keys=keys) as (guarded, _):
        assert_one_clear_line(hsa("chat", "--server", guarded, stdin="a\n"), "a valid API key is needed")
        assert hsa("chat", "--server", guarded, "--key", "secret", stdin="a\n").exit_code == 0


def test_the_oldest_turns_are_left_out_where_a_row_has_no_room(address, monkeypatch):
    partner = There(address, None, [])
    partner.is_chat = True
    partner.messages = [{"role": role, "content": str(number)} for number in range(2) for role in ("user", "assistant")]
    asked = []

    def refuse(path, body):
        asked.append([one["content"] for one in body["messages"]])
        raise chat_partners._Refused("too long", "context_length_exceeded")

    monkeypatch.setattr(partner, "_open", refuse)
    with pytest.raises(ValueError, match="too long"):
        next(partner.pieces("now"))
    assert asked == [["0", "0", "1", "1", "now"], ["1", "1", "now"], ["now"]]


def test_several_memories_are_one_for_the_question(address, server, nano):
    model, tokenizer = nano
    (found,) = [json.loads(run("chat", "--server", address, "-m", "talked", "-m", "ferry", "--json", stdin=QUESTION))]
    texts = [f"{LANTERN} {FILLER}", FERRY]
    memory = memorize(model, [torch.tensor(tokenizer(text)["input_ids"]) for text in texts])
    assert found["answer"] == ask(model, tokenizer, memory, as_question(QUESTION)).text.strip()
