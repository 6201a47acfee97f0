"""Means of models: exact, refused where there is none, written as a folder that loads."""

import json
import shutil

import pytest
import torch
from typer.testing import CliRunner

from hsa_ultralong.cli.common import load_model
from hsa_ultralong.cli.main import app
from hsa_ultralong.models.auto_map import AUTO_MAP, REMOTE_MODULE
from hsa_ultralong.testing.factories import MODEL_OPTIONS, tiny_model
from hsa_ultralong.train.averaging import average_models
from hsa_ultralong.train.export import export_model


def test_every_weight_and_statistic_is_the_mean():
    one, other = (tiny_model(seed=seed, **MODEL_OPTIONS["mixture_of_experts"]) for seed in (1, 2))
    other.model.chunk_encoder.landmark_center.normal_()
    tables = [{name: part.clone() for name, part in model.state_dict().items()} for model in (one, other)]
    one.config.unsure_below = [[64, 0.5]]
    mean = average_models([one, other], [0.25, 0.75]).state_dict()
    assert one.config.unsure_below is None, "it was measured for other weights"
    for name, part in mean.items():
        expected = 0.25 * tables[0][name].float() + 0.75 * tables[1][name].float()
        torch.testing.assert_close(part.float(), expected, rtol=1e-5, atol=1e-6, msg=name)
    assert not torch.equal(
        mean["model.chunk_encoder.landmark_center"], tables[1]["model.chunk_encoder.landmark_center"]
    )


@pytest.mark.parametrize(
    ("options", "weights", "message"),
    [
        ([{}], [1.0], "two models or more"),
        ([{}, {}], [1.0], "a weight for each"),
        ([{}, {}], [0.5, 0.6], r"0.5 \+ 0.6 = 1.1"),
        ([{}, {"hidden_size": 24}], [0.5, 0.5], "model 2 has other weights"),
    ],
)
def test_what_has_no_mean_is_refused(options, weights, message):
    with pytest.raises(ValueError, match=message):
        average_models([tiny_model(**one) for one in options], weights)


def test_the_command_writes_a_model_that_loads(tmp_path, shards_folder):
    tokenizer = shards_folder[1]
    models = [tiny_model(seed=seed, vocab_size=len(tokenizer)).float() for seed in (1, 2)]
    folders = [tmp_path / "a", tmp_path / "b"]
    for model, folder in zip(models, folders, strict=True):
        export_model(model, tokenizer, folder, topk=3)
    run = lambda *words: CliRunner().invoke(app, ["average", *map(str, words)])  # noqa: E731
    result = run(*folders, "--weights", "0.7,0.3", "-o", tmp_path / "mean")
    assert result.exit_code == 0 and "0.7 x" in result.output, result.output
    for folder in (folders[0], tmp_path / "mean"):
        assert f"{REMOTE_MODULE}.py" in json.loads((folder / "checksums.json").read_text())
        assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP
    mean = load_model(tmp_path / "mean", "cpu", "fp32")[0]
    assert mean.config.chunk_topk == 3
    name = "model.embed_tokens.weight"
    expected = sum(w * m.state_dict()[name].bfloat16().float() for w, m in zip((0.7, 0.3), models, strict=True))
    torch.testing.assert_close(mean.state_dict()[name], expected.bfloat16().float())
    assert "exists already" in run(*folders, "-o", tmp_path / "mean").output
    assert "must be numbers" in run(*folders, "--weights", "half", "-o", tmp_path / "x").output
    shutil.copytree(folders[1], tmp_path / "c")
    table = json.loads((tmp_path / "c" / "tokenizer.json").read_text())
    (tmp_path / "c" / "tokenizer.json").write_text(json.dumps({**table, "version": "1.1"}))
    assert run(folders[0], tmp_path / "c", "-o", tmp_path / "x").exit_code == 2
    assert not (tmp_path / "x").exists()
