"""What a source writes is kept only if it passes: one sentence with an answer, an answer that the passage holds twice
asked, conversations within their bound."""

import json

import pytest

from hsa_ultralong.data.conversations import read_conversations
from hsa_ultralong.data.passages import evaluation_passages, passage_id, read_squad
from hsa_ultralong.data.questions import is_held_out, read_sentences
from hsa_ultralong.data.self_written import (
    AskedPassage,
    Bounds,
    Said,
    as_squad,
    is_sentence,
    write_conversations,
    write_questions,
    write_sentences,
)
from hsa_ultralong.data.written_items import cut, passages_of, questions_of
from tests.data.conftest import write_squad
from tests.data.test_many_questions import heat

PASSAGE = "The mill at Tavora was built in 1742 by Anna Melk. It ground barley for the whole valley until the flood."


class Fake:
    """Answers by a function of the round and the words of the last message; keeps what it was asked."""

    def __init__(self, answer):
        self.answer, self.asked = answer, {}

    def ask(self, name, prompts, max_new_tokens):
        self.asked[name] = list(prompts)
        return [one if isinstance(one, Said) else Said(one, True) for one in (self.answer(name, p) for p in prompts)]

    def size(self, prompt):
        return sum(len(message["content"].split()) for message in prompt.asked)


def talk(*words):
    return [{"role": ("user", "assistant")[i % 2], "content": word} for i, word in enumerate(words)]


def test_users_words_are_answered_in_turn_by_the_source_alone():
    scribe = Fake(lambda name, prompt: f"own to {prompt.asked[-1]['content']}")
    kept, dropped = write_conversations(scribe, [talk("a", "x", "b", "y", "c", "z")], Bounds(turns=2, answer=4))
    assert kept == [{"messages": talk("a", "own to a", "b", "own to b")}] and not dropped
    assert not any("x" in message["content"] for message in scribe.asked["turn 1"][0].asked)


def test_a_conversation_ends_before_what_is_too_long_cut_off_or_says_one_thing_over_and_over():
    said = {"long": Said("half an ans", False), "loop": Said("on and " * 40, True), "mute": Said(" ", True)}
    scribe = Fake(lambda name, prompt: said.get(prompt.asked[-1]["content"], "fine"))
    talks = [talk("hello", "x", "long", "y"), talk("loop", "x"), talk("mute", "x"), talk("w " * 30, "x")]
    kept, dropped = write_conversations(scribe, talks, Bounds(conversation=30, answer=8))
    assert kept == [{"messages": talk("hello", "fine")}]
    assert dropped == {"repeats": 1, "empty": 1, "longer than the bound": 1}


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("The mill was built by Dr. A. Melk of St. Louis in 1742.", True),
        ("The mill was built in 1742. It ground barley.", False),
        ("The mill was built in 1742", False),
        ("In 1742.", False),
        ("Sierra Nevada Brewing Company in Asheville, North Carolina, in January 2012.", False),
        ("Answer: the mill was built in 1742.", False),
        ("The mill was built\nin 1742.", False),
        (" ".join(["word"] * 50) + ".", False),
    ],
)
def test_what_one_sentence_is(text, is_one):
    assert is_sentence(text) is is_one


@pytest.mark.parametrize("rest", ["", " It ground barley", "\nIt ground", " Later 12. It"])
def test_of_several_sentences_the_first_counts(rest):
    told = [AskedPassage(PASSAGE, "", "Who built it?", ("Anna Melk",))]
    kept, _ = write_sentences(Fake(lambda name, prompt: Said(f"Anna Melk built the mill.{rest}", not rest)), told)
    assert [one["sentence"] for one in kept] == ["Anna Melk built the mill."]


def test_a_sentence_holds_an_answer_and_words_of_its_question_and_is_asked_for_twice():
    questions = [f"{who} built the mill?" for who in ("Who", "Which person", "What man", "Whose hand")]
    told = [AskedPassage(PASSAGE, "", question, ("Anna Melk",)) for question in questions]
    replies = {
        "told": {"Who": "The mill was built by Anna Melk.", "Which": "Somebody built the mill."},
        "sentence": {"Which": "It was Anna Melk who built it.", "What": "Anna Melk.", "Whose": "Anna Melk is old."},
    }

    def answer(name, prompt):
        last = prompt.asked if isinstance(prompt.asked, str) else prompt.asked[-1]["content"]
        words = last.split("\n\n")[-1].removeprefix("Question: ").split()
        return replies[name].get(words[0], "")

    kept, dropped = write_sentences(Fake(answer), told)
    assert [(one["question"], one["sentence"], one["with_answer"]) for one in kept] == [
        ("Who built the mill?", "The mill was built by Anna Melk.", True),
        ("Which person built the mill?", "It was Anna Melk who built it.", False),
    ]
    assert kept[0]["passage"] == passage_id(PASSAGE)
    assert dropped == {"no one sentence": 1, "little of the question in it": 1}


def test_a_question_is_kept_if_its_answer_stands_in_the_passage_and_is_given_again():
    asked = {
        "first": ("Who built the mill at Tavora?", "anna melk.", "Anna Melk"),
        "not there": ("What did the mill in Tavora grind?", "wheat", "wheat"),
        "another": ("When was the Tavora mill built?", "1742", "the flood"),
        "no number": ("When was the mill at Tavora built?", "Anna Melk", "Anna Melk"),
        "inside": ("Who is Anna Melk of Tavora?", "Anna Melk", "Anna Melk"),
        "text": ("Who built the mill in the text?", "Anna Melk", "Anna Melk"),
        "elsewhere": ("Who wrote seven blue novels?", "Anna Melk", "Anna Melk"),
        "long": ("What stands at Tavora valley?", PASSAGE, "x"),
    }
    for why, (question, answer, again) in asked.items():

        def say(name, prompt, question=question, answer=answer, again=again):
            return {"ask": f"{question} More.", "answer": answer, "again": again}[name]

        kept, dropped = write_questions(Fake(say), [AskedPassage(PASSAGE, "t")], Bounds(per_passage=1))
        assert len(kept) == (why == "first") and sum(dropped.values()) == (why != "first"), (why, dropped)
        if why == "first":
            assert kept == [{"title": "t", "context": PASSAGE, "question": question, "answer": "Anna Melk"}]


def test_beginnings_of_a_passage_differ_and_the_same_question_counts_once():
    scribe = Fake(lambda name, prompt: "Who built the mill at Tavora?" if name == "ask" else "Anna Melk")
    kept, dropped = write_questions(scribe, [AskedPassage(PASSAGE, "t")], Bounds(per_passage=4))
    assert len({prompt.begin for prompt in scribe.asked["ask"]}) == 4
    assert len(kept) == 1 and dropped == {"asked twice": 3}


def test_what_is_written_is_read_as_questions_sentences_and_conversations(tmp_path):
    kept = [
        {"title": "t", "context": PASSAGE, "question": "Who built it?", "answer": "Anna Melk"},
        {"title": "t", "context": PASSAGE, "question": "When was it built?", "answer": "1742"},
    ]
    squad = tmp_path / "own.json"
    squad.write_text(json.dumps(as_squad(kept, "1")), encoding="utf-8")
    read = read_squad(squad)
    assert read.texts == [PASSAGE] and [one.answers for one in read.questions] == [("Anna Melk",), ("1742",)]
    lines = tmp_path / "s.jsonl"
    lines.write_text(json.dumps({"passage": "ab", "question": "Who?", "sentence": "It was she."}) + "\n")
    assert read_sentences([str(lines)]) == {("ab", "Who?"): "It was she."}
    lines.write_text(json.dumps({"messages": talk("a", "b")}) + "\n")
    assert read_conversations(lines) == [talk("a", "b")]
    with pytest.raises(ValueError, match="no file of hsa write sentences"):
        read_sentences([str(lines)])


def test_only_passages_that_may_be_trained_on_are_asked_about(tmp_path, monkeypatch):
    file = write_squad(tmp_path / "squad.json", heat)
    texts = read_squad(file).texts
    free = [text for text in texts if not is_held_out(passage_id(text))]
    kept = evaluation_passages() | {passage_id(free[0])}
    monkeypatch.setattr("hsa_ultralong.data.written_items.evaluation_passages", lambda: kept)
    assert [one.text for one in passages_of([file])] == free[1:]
    assert {one.text for one in questions_of([file])} == set(free[1:])
    assert len(questions_of([file])) == 4 * len(free[1:]) and len({one.title for one in passages_of([file])}) <= 10


def test_texts_are_cut_at_the_ends_of_sentences(tmp_path):
    sentence = "The mill at Tavora ground barley for the whole valley. "
    (tmp_path / "text.txt").write_text(f"Short.\n\n{sentence * 40}", encoding="utf-8")
    passages = list(cut(sentence * 40))
    assert all(50 <= len(part.split()) <= 130 and part.endswith("valley.") for part in passages) and len(passages) == 3
    found = [one.text for one in passages_of([tmp_path / "text.txt"])]
    assert set(found) <= set(passages)
    with pytest.raises(ValueError, match="no passage is left"):
        (tmp_path / "text.txt").write_text("Short.", encoding="utf-8")
        passages_of([tmp_path / "text.txt"])
