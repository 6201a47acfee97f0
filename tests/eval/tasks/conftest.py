"""A small text and files of questions, made here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from hsa_ultralong.eval.tasks import Material, babilong, questions
from hsa_ultralong.testing.tokenizers import byte_level, sentence_piece

MAKES = {"byte_level": byte_level, "sentence_piece": sentence_piece}


@pytest.fixture(params=sorted(MAKES))
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return MAKES[request.param]()


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    return write_files(tmp_path)


def write_files(tmp_path: Path) -> dict[str, Path]:
    """The data of all tasks that read some, in a folder."""
    articles = [
        {
            "paragraphs": [
                {
                    "context": f"The river number {a}{p} flows past hill {p}.",
                    "qas": [{"id": f"{a}-{p}", "question": f"Where flows {a}{p}?", "answers": [{"text": f"hill {p}"}]}],
                }
                for p in range(4)
            ]
        }
        for a in range(5)
    ]
    (tmp_path / "squad.json").write_text(json.dumps({"data": articles}))
    rows = [
        {
            "_id": str(i),
            "question": f"Who owns boat {i}?",
            "answer": f"Owner {i}",
            "supporting_facts": [[f"Boat {i}", 0]],
            "context": [[f"Boat {i}", [f"Boat {i} is of Owner {i}."]], [f"Quay {i}", ["It is long.", " And grey."]]],
        }
        for i in range(6)
    ]
    (tmp_path / "hotpot.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "nq.jsonl").write_text("\n".join(
        json.dumps({"question": f"who won race {i}", "answers": [f"Runner {i}"],
                    "ctxs": [{"title": f"Race {i}", "text": f"Race {i} was won by Runner {i}."}]})
        for i in range(9)))  # fmt: skip
    (tmp_path / "wiki.json").write_text(json.dumps([{"title": f"Town {i}", "text": "A town."} for i in range(30)]))
    (tmp_path / "babi").mkdir()
    for kind, name in babilong.FILES.items():
        (tmp_path / "babi" / name).write_text(stories(kind))
    named = {
        "squad": "squad.json", "xquad": "squad.json", "squadshifts": "squad.json", "hotpot": "hotpot.jsonl",
        "2wiki": "hotpot.jsonl", "nq": "nq.jsonl", "wiki": "wiki.json", "babi": "babi",
    }  # fmt: skip
    return {name: tmp_path / file for name, file in named.items()}


def stories(kind: str) -> str:
    """Stories of three facts in bAbI's form, whose last fact holds the answer."""
    places = ("office", "kitchen", "garden", "hallway")
    lines = []
    for i in range(8):
        answer = ("Mary" if i % 2 else "Jeff") if kind == "qa5" else places[i % 4]
        last = f"{answer} gave the milk to Fred." if kind == "qa5" else f"John went to the {answer}."
        asked = "Who gave the milk to Fred?" if kind == "qa5" else "Where is John?"
        lines += [
            f"1 Bill took the apple {i}.",
            "2 Bill went to the bathroom.",
            f"3 {last}",
            f"4 {asked} \t{answer}\t3",
        ]
    return "\n".join(lines) + "\n"


@pytest.fixture(autouse=True)
def every_passage_may_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The passages made here are in no list of evaluation passages."""

    class All:
        def __contains__(self, passage: object) -> bool:
            return True

    monkeypatch.setattr(questions, "evaluation_passages", All)


@pytest.fixture
def material(tokenizer: PreTrainedTokenizerFast, files: dict[str, Path]) -> Material:
    return make_material(tokenizer, files)


def make_material(tokenizer: PreTrainedTokenizerFast, files: dict[str, Path]) -> Material:
    sentences = [f"Line {i} says that sheep number {i * 7919 % 997} sleeps. It snores." for i in range(400)]
    text = torch.tensor(tokenizer("\n".join(sentences))["input_ids"], dtype=torch.int32)
    return Material(tokenizer, text, files=files)
