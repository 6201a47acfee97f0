"""The card of the model with a memory says what its settings say."""

import hashlib
import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("smol_card", ROOT / "scripts" / "smol_card.py")
smol_card = importlib.util.module_from_spec(spec)
spec.loader.exec_module(smol_card)


def test_the_committed_card_is_what_the_committed_run_and_scores_give(tmp_path):
    smol_card.main(["-o", str(tmp_path / "README.md")])
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == smol_card.CARD.read_text(encoding="utf-8")


def test_the_card_of_a_run_has_its_shares_and_the_licences_of_its_files(tmp_path):
    stage = {"name": "sft", "tokens": 8_000_000, "batch_tokens": 1000, "seq_len": 4096, "mixture": {}}
    stage["mixture"] = {"text": 1.0, "chat": 2.0, "facts": 1.0}
    settings = {"stages": [stage], "lora_rank": 8, "seed": 3, "questions": ["a/new_wiki_v1.0.json"], "chats": ["b.csv"]}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(SystemExit, match=r"it has no summary.json"):
        smol_card.main(["--run", str(tmp_path)])
    steps = [{"metric": "loss", "stage": "sft", "step": 7500, "value": 1.0}]
    (tmp_path / "summary.json").write_text(json.dumps({"records": steps}))
    smol_card.main(["--run", str(tmp_path), "-o", str(tmp_path / "card.md")])
    text = (tmp_path / "card.md").read_text(encoding="utf-8")
    assert "7.5M tokens of 8M planned" in text and "| sft | 8M | 4,096 | 25% | 50% | 25% |" in text
    assert "| new_wiki_v1.0.json | SQuADShifts, new Wikipedia | CC BY 4.0, text of Wikipedia CC BY-SA |" in text
    assert "| b.csv | not described here | state it before this is shared |" in text
    with pytest.raises(SystemExit, match="is no folder of a run"):
        smol_card.main(["--run", str(tmp_path / "none")])


def test_a_score_that_is_missing_stops_the_card(tmp_path):
    for score in smol_card.SCORES:
        for folder in score.folders.values():
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / "summary.json").write_text('{"records": []}')
    with pytest.raises(SystemExit, match=r"smol-recall-64k has 0 of 12 scores \(mentions, 64K\)"):
        smol_card.main(["--results", str(tmp_path), "-o", str(tmp_path / "card.md")])


def test_the_committed_difference_is_below_13_mib_and_has_the_sum_that_make_smol_checks():
    difference = smol_card.CARD.parent / "difference.safetensors"
    digest = hashlib.sha256(difference.read_bytes()).hexdigest()
    assert difference.stat().st_size < 13 * 2**20
    assert difference.with_suffix(".sha256").read_text(encoding="utf-8").split() == [digest, difference.name]
