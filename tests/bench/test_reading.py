"""hsa bench reading: folders of ours and of others side by side."""

import json

import pytest
from typer.testing import CliRunner

from hsa_ultralong.baselines import RivalConfig, RivalForCausalLM
from hsa_ultralong.cli.main import app
from hsa_ultralong.data import load_tokenizer
from hsa_ultralong.data.tokenizer import special_token_ids
from hsa_ultralong.models import HSAForCausalLM
from hsa_ultralong.models.presets import preset


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    from tests.baselines.test_evaluation import NANO

    place, tokenizer = tmp_path_factory.mktemp("models"), load_tokenizer(NANO)
    assert special_token_ids(tokenizer)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "head_dim": 8}
    for name in ("full_rope", "window"):
        RivalForCausalLM(RivalConfig(layers=[name], vocab_size=len(tokenizer), **sizes)).save_pretrained(place / name)
    HSAForCausalLM(preset("debug", vocab_size=len(tokenizer))).save_pretrained(place / "hsa")
    for folder in place.iterdir():
        tokenizer.save_pretrained(folder)
    return place


def test_what_is_read_and_kept_is_measured_for_ours_and_for_rivals(folders, tmp_path):
    names = ("hsa", "full_rope", "window")
    common = ["bench", "reading", *(str(folders / name) for name in names), "--lengths", "256,512", "--device", "cpu"]
    made = CliRunner().invoke(app, [*common, "--dtype", "fp32", "-o", str(tmp_path)])
    assert made.exit_code == 0, made.output
    found = json.loads((tmp_path / "reading.json").read_text())
    kept = {r["preset"]: r["value"] for r in found["records"] if r["metric"] == "bytes_per_token"}
    # keys and values of two heads of 8 in fp32; a window keeps nothing more
    assert kept["full_rope"] == 2 * 2 * 8 * 4 and kept["window"] == 0 and kept["hsa"] > 0
    assert sum(r["metric"] == "read_tokens_per_s" for r in found["records"]) == 6


def test_models_of_one_name_are_refused_before_any_is_read(tmp_path):
    common = ["bench", "reading", "a/same", "b/same", "--device", "cpu", "-o", str(tmp_path / "new")]
    made = CliRunner().invoke(app, common)
    assert made.exit_code == 2 or isinstance(made.exception, ValueError)
    assert "two models are called 'same'" in made.output + str(made.exception)
    assert not (tmp_path / "new").exists()
