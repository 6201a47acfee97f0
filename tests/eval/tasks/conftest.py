"""A small text and files of questions, made here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from hsa_ultralong.eval.tasks import Material
from hsa_ultralong.testing.tokenizers import byte_level, sentence_piece

_MAKES = {"byte_level": byte_level, "sentence_piece": sentence_piece}


@pytest.fixture(params=sorted(_MAKES))
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return _MAKES[request.param]()


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
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
    return {"squad": tmp_path / "squad.json", "hotpot": tmp_path / "hotpot.jsonl"}


@pytest.fixture
def material(tokenizer: PreTrainedTokenizerFast, files: dict[str, Path]) -> Material:
    sentences = [f"Line {i} says that sheep number {i * 7919 % 997} sleeps. It snores." for i in range(400)]
    text = torch.tensor(tokenizer("\n".join(sentences))["input_ids"], dtype=torch.int32)
    return Material(tokenizer, text, files=files)
