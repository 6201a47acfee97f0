"""`hsa eval` measures a rival's folder by plain prompts."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from hsa_ultralong.baselines import RivalConfig, RivalForCausalLM
from hsa_ultralong.cli.evaluate_suite import load_any
from hsa_ultralong.cli.main import app
from hsa_ultralong.data import load_tokenizer

NANO = Path(__file__).resolve().parents[2] / "checkpoints" / "nano"


@pytest.fixture
def folder(tmp_path):
    tokenizer = load_tokenizer(NANO)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "head_dim": 8}
    config = RivalConfig(layers=["window_sinks", "full_rope"], vocab_size=len(tokenizer), **sizes)
    RivalForCausalLM(config).save_pretrained(tmp_path / "rival")
    tokenizer.save_pretrained(tmp_path / "rival")
    return tmp_path / "rival"


def hsa(*arguments):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def test_a_rival_answers_tasks_by_its_cache(folder, tmp_path):
    text = NANO.parents[1] / "docs" / "paper_facts.md"
    common = (
        folder,
        "--text",
        text,
        "--tasks",
        "passkey",
        "--lengths",
        "1K",
        "--samples",
        1,
        "--device",
        "cpu",
        "--dtype",
        "fp32",
    )
    result = hsa(*common, "-o", tmp_path / "run")
    assert result.exit_code == 0, result.output
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert settings["setting"] == "prompt"
    changed = hsa(*common, "--set", "decoding=pages", "--set", "decoding_tokens=64", "-o", tmp_path / "pages")
    assert changed.exit_code == 0, changed.output
    settings = json.loads((tmp_path / "pages" / "run.json").read_text())["settings"]
    assert settings["set"] == ["decoding=pages", "decoding_tokens=64"]
    for wrong, message in (
        ("layers=[]", "--set must be KEY=VALUE with one of rope_scaling"),
        ("decoding", "--set must be KEY=VALUE"),
        ("decoding=quest", "decoding must be one of full"),
        ("decoding_tokens=many", "decoding_tokens must be of type int"),
        ("rope_scaling=8", "rope_scaling must be of type dict"),
    ):
        said = hsa(*common, "--set", wrong, "-o", tmp_path / "other")
        assert message in said.output + str(said.exception) and not (tmp_path / "other").exists()
    refused = hsa(*common, "--setting", "memory", "-o", tmp_path / "other")
    assert "needs a model with a memory" in refused.output + str(refused.exception)
    ours = hsa(NANO, *common[1:], "--set", "decoding=pages", "-o", tmp_path / "other")
    assert "--set is of rivals" in ours.output + str(ours.exception)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "ntk", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ],
    ids=["pi", "ntk", "yarn"],
)
def test_full_attention_is_extended_at_test_time_by_an_option_of_the_evaluation(folder, scaling):
    plain, *_ = load_any(folder, "cpu", "fp32", [])
    model, *_ = load_any(folder, "cpu", "fp32", [f"rope_scaling={scaling}"])
    trained = RivalForCausalLM(RivalConfig.from_dict({**plain.config.to_dict(), "rope_scaling": scaling})).eval()
    trained.load_state_dict(plain.state_dict())
    ids = torch.arange(100)[None]
    torch.testing.assert_close(model(ids).logits, trained(ids).logits)
    assert not torch.equal(model(ids).logits, plain(ids).logits)
