"""The card of the model with a memory says what its settings say."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("smol_card", ROOT / "scripts" / "smol_card.py")
smol_card = importlib.util.module_from_spec(spec)
spec.loader.exec_module(smol_card)


def test_the_committed_card_is_what_the_recipe_gives_until_there_is_a_difference(tmp_path):
    if (smol_card.CARD.parent / "difference.safetensors").is_file():
        pytest.skip("the card is that of a run")
    smol_card.main(["-o", str(tmp_path / "README.md")])
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == smol_card.CARD.read_text(encoding="utf-8")


def test_the_card_of_a_run_has_its_shares_and_the_licences_of_its_files(tmp_path):
    stage = {"name": "sft", "tokens": 8_000_000, "seq_len": 4096, "mixture": {"text": 1.0, "chat": 2.0, "facts": 1.0}}
    settings = {"stages": [stage], "lora_rank": 8, "seed": 3, "questions": ["a/new_wiki_v1.0.json"], "chats": ["b.csv"]}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    smol_card.main(["--run", str(tmp_path), "-o", str(tmp_path / "card.md")])
    text = (tmp_path / "card.md").read_text(encoding="utf-8")
    assert "draft" not in text and "| sft | 8M | 4,096 | 25% | 50% | 25% |" in text
    assert "| new_wiki_v1.0.json | SQuADShifts, new Wikipedia | CC BY 4.0, text of Wikipedia CC BY-SA |" in text
    assert "| b.csv | not described here | state it before this is shared |" in text
    with pytest.raises(SystemExit, match="is no folder of a run"):
        smol_card.main(["--run", str(tmp_path / "none")])
