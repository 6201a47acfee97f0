"""A model of another kind, to be converted or measured, is loaded whole: transformers would make up what is missing."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from hsa_ultralong.cli.main import app
from hsa_ultralong.models.folder import load_pretrained


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "llama"
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=9, tie_word_embeddings=True, **sizes)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("missing", "lacks weights, e.g. model.norm.weight"),
        ("shape", "other shapes than its config.json asks for"),
        ("nan", r"not finite \(model.norm.weight\)"),
        ("cut", "are damaged"),
        ("pickle", "pytorch_model.bin only"),
        ("layers", "lacks weights, e.g. model.layers.2"),
    ],
)
def test_no_weight_of_another_kind_of_model_is_made_up(llama, tmp_path, capfd, damage, words):
    folder, name = shutil.copytree(llama, tmp_path / "llama"), "model.norm.weight"
    load_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "pickle":
        file.rename(folder / "pytorch_model.bin")
    elif damage == "layers":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    else:
        norm = tensors.pop(name)
        damaged = {"missing": {}, "shape": {name: norm[:-1].clone()}, "nan": {name: norm / 0 * 0}}
        save_file({**tensors, **damaged[damage]}, file, {"format": "pt"})
    capfd.readouterr()
    with pytest.raises(ValueError, match=words) as caught:
        load_pretrained(folder)
    assert "\n" not in str(caught.value) and "MISSING" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ["convert", "--window", "8", "--groups", "1", "--lower-layers", "1", "--set", "retrieval_dim=16"],
        ["eval", "--suite", "recall", "--lengths", "256", "--samples", "1", "--device", "cpu"],
    ],
)
def test_commands_refuse_such_a_model(llama, tmp_path, command):
    folder = shutil.copytree(llama, tmp_path / "llama")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    result = CliRunner().invoke(app, [command[0], str(folder), *command[1:], "-o", str(tmp_path / "out")])
    assert result.exit_code == 2 and "lacks weights" in result.stderr.splitlines()[-1], result.output + result.stderr
    assert not (tmp_path / "out").exists()
