"""`hsa train --init-from FOLDER`: any recipe goes on with the folder's model, whatever its shape."""

import json

import pytest
import torch
from typer.testing import CliRunner

from hsa_ultralong.cli.main import app
from hsa_ultralong.models import HSAForCausalLM
from hsa_ultralong.models.presets import preset
from hsa_ultralong.train.export import export_model

SHORT = ["--device", "cpu", "--set", "warmup.mixture={'text': 1.0}", "--set", "probe_every=100000", "--set",
         "warmup.tokens=4096", "--set", "tensorboard=false", "--until", "warmup"]  # fmt: skip
OTHER = {"hidden_size": 48, "num_upper_groups": 3, "num_layers_per_group": [1, 2, 1], "num_attention_heads": 2,
         "head_dim": 24, "num_key_value_heads": 1, "chunk_topk": 5, "use_qk_norm": False}  # fmt: skip


# figures are painted in test_command.py
pytestmark = pytest.mark.usefixtures("undrawn")


def hsa(*arguments):
    return CliRunner().invoke(app, [str(one) for one in arguments])


@pytest.fixture
def folder(tmp_path, shards_folder):
    tokenizer = shards_folder[1]
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    # more rows than the tokenizer has tokens, as real models have
    config = preset("debug", vocab_size=len(tokenizer) + 7, **ids, **OTHER)
    config.unsure_below = [[4, 0.5]]
    model = HSAForCausalLM(config)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 5]
    export_model(model, tokenizer, tmp_path / "model", topk=5)
    return tmp_path / "model"


def test_a_recipe_takes_the_shape_of_the_folder(tmp_path, folder, shards_folder):
    arguments = ["train", "debug", "--data", shards_folder[0], "-o", tmp_path / "run", "--init-from", folder, *SHORT]
    plan = json.loads(hsa(*arguments, "--dry-run", "--json").stdout)
    assert plan["base"]["hidden_size"] == 48 and plan["plan"]["stages"][0]["weights"] > 0
    stopped = hsa(*arguments, "--max-minutes", 0)
    assert stopped.exit_code == 0, stopped.output
    # once the run has a checkpoint the folder is not needed
    folder.rename(tmp_path / "moved")
    finished = hsa(*arguments, "--export", tmp_path / "new")
    assert finished.exit_code == 0, finished.output
    before, after = (HSAForCausalLM.from_pretrained(path) for path in (tmp_path / "moved", tmp_path / "new"))
    left_out = ("unsure_below", "_name_or_path")
    kept = {name: value for name, value in before.config.to_dict().items() if name not in left_out}
    assert {name: after.config.to_dict()[name] for name in kept} == kept
    # what was measured of the old weights is not said of the new ones
    assert after.config.unsure_below is None
    assert not torch.equal(after.model.embed_tokens.weight, before.model.embed_tokens.weight)
    close = (after.model.embed_tokens.weight - before.model.embed_tokens.weight).abs().mean()
    assert close < before.model.embed_tokens.weight.std() / 2


def test_tokens_that_end_an_answer_stay_those_of_the_folder(tmp_path, folder, shards_folder):
    arguments = ["train", "debug", "--data", shards_folder[0], "-o", tmp_path / "run", "--init-from", folder, *SHORT]
    assert hsa(*arguments, "--set", "warmup.tokens=2048", "--export", tmp_path / "new").exit_code == 0
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert json.loads((tmp_path / "new" / "generation_config.json").read_text())["eos_token_id"] == ends
    assert len(ends) == 2
