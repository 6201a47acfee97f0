"""A model folder that is damaged, foreign or hostile is one line, before memory is taken, whatever loads it."""

import json
import os
import resource
import shutil
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from typer.testing import CliRunner

from hsa_ultralong.cli.common import load_checkpoint, load_model
from hsa_ultralong.cli.main import app
from hsa_ultralong.data import load_tokenizer, train_tokenizer
from hsa_ultralong.files.checksum import file_digest
from hsa_ultralong.models import HSAConfig, HSAForCausalLM, HSAModel
from hsa_ultralong.models.presets import preset
from hsa_ultralong.train.export import export_model


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["some words that are here to be read " * 20], 300)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = HSAForCausalLM(preset("debug", vocab_size=len(tokenizer), **ids))
    folder = tmp_path_factory.mktemp("models") / "small"
    export_model(model, tokenizer, folder, topk=model.config.chunk_topk)
    return folder


@pytest.fixture
def folder(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "model")


def set_config(folder, file="config.json", **changes):
    """Other values with the right checksum."""
    content = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
    (folder / file).write_text(json.dumps({**content, **changes}))
    reseal(folder)


def reseal(folder):
    table = {
        file.name: file_digest(file) for file in folder.iterdir() if file.name != "checksums.json" and file.is_file()
    }
    (folder / "checksums.json").write_text(json.dumps(table))


def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    reseal(folder)


@contextmanager
def little_memory():
    """What is allocated beyond 2 GiB fails."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as stream:
        now = int(stream.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 2**31, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def library(folder):
    return HSAForCausalLM.from_pretrained(folder, dtype=torch.float32)


# what commands do, and what people write
LOADERS = {
    "command": lambda folder: load_model(folder, "cpu", "fp32"),
    "class": library,
    "auto": lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
    "base": lambda folder: HSAModel.from_pretrained(folder),
}


# a folder that transformers cannot tell to be ours it refuses by itself, in words of its own
OURS = ("command", "class", "base")


def refused(folder, words, loaders=tuple(LOADERS)):
    for loader in loaders:
        with pytest.raises(ValueError, match=words) as caught, little_memory():
            LOADERS[loader](folder)
        said = str(caught.value)
        assert "\n" not in said and len(said) < 600, (loader, said)
    return said


def test_a_whole_folder_loads_with_and_without_checksums(folder):
    for _ in range(2):
        model, tokenizer = load_model(folder, "cpu", "fp32")
        assert model.config.vocab_size == len(tokenizer) and not model.training
        (folder / "checksums.json").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 10**25}, "vocab_size.* is beyond any model"),
        ({"vocab_size": 1e25}, "vocab_size"),
        ({"vocab_size": 2**30}, "more than .* bytes can hold|asks for"),
        ({"hidden_size": 2**40}, "beyond any model"),
        ({"hidden_size": 2**30}, "config.json"),
        ({"hidden_size": "x"}, "hidden_size"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": [1]}, "hidden_size"),
        ({"hidden_size": 48}, "shape|config.json"),
        ({"num_lower_layers": 2**30}, "layers, but there are"),
        ({"num_upper_groups": 2**20, "num_layers_per_group": 2**20}, "layers, but there are"),
        ({"num_lower_layers": 5}, "lacks weights"),
        ({"num_lower_layers": 1}, "no place for|lacks weights"),
        ({"num_experts": 2**28, "moe_intermediate_size": 2**28}, "config.json"),
        ({"rms_norm_eps": float("nan")}, "NaN is no JSON|beyond any model"),
        ({"eos_token_id": 10**6}, "eos_token_id must be below vocab_size"),
        ({"eos_token_id": [1, -1]}, "eos_token_id must be below vocab_size"),
        ({"fusion": "prayer"}, "fusion"),
        ({"model_type": "llama"}, "another kind of model"),
        ({"model_type": ["x"]}, "another kind of model"),
        ({"chunk_sise": 3}, "chunk_sise"),
        ({"rope_scaling": [[[3]]]}, "rope_scaling"),
        ({"rope_scaling": {"factor": json.loads("[" * 500 + "]" * 500)}}, "nested too deeply"),
    ],
)
def test_configurations_that_do_not_fit_are_refused_before_memory_is_taken(folder, changes, words):
    set_config(folder, **changes)
    refused(folder, words, OURS if {"model_type", "rope_scaling"} & changes.keys() else LOADERS)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000, '{"a":' * 100_000, "\x00", '"x"'])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "checksums.json"])
def test_json_of_the_wrong_type_is_refused(folder, name, text):
    (folder / name).write_text(text)
    if name != "checksums.json":
        reseal(folder)
    refused(folder, name, OURS if name == "config.json" else LOADERS)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"temperature": "hot"}, "temperature must be a number"),
        ({"max_new_tokens": 1e30}, "max_new_tokens must be a whole number"),
        ({"top_k": -4}, "top_k must be a whole number"),
        ({"do_sample": "yes"}, "do_sample must be true or false"),
        ({"eos_token_id": 10**6}, "eos_token_id must be below"),
        ({"eos_token_id": "a"}, "eos_token_id must be below"),
        ({"more": json.loads("[" * 500 + "]" * 500)}, "nested too deeply"),
    ],
)
def test_generation_settings_of_the_wrong_kind_are_refused(folder, changes, words):
    set_config(folder, "generation_config.json", **changes)
    refused(folder, words)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"../secret": "0" * 64}, "must be a file of the folder"),
        ({"config.json": 3}, "must be a file of the folder"),
        ({}, "says nothing about model.safetensors"),
        ({"gone.json": "0" * 64}, "is incomplete: gone.json is missing"),
        ({"config.json": "0" * 64, "model.safetensors": "0" * 64}, "is corrupt"),
    ],
)
def test_checksums_that_make_no_sense_are_refused(folder, table, words):
    (folder / "checksums.json").write_text(json.dumps(table))
    refused(folder, words)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(folder, value):
    def change(tensors):
        tensors["model.norm.weight"][7] = value

    change_weights(folder, change)
    refused(folder, r"not finite \((model\.)?norm.weight")


def test_large_finite_weights_are_no_damage(folder):
    def change(tensors):
        tensors["model.embed_tokens.weight"].fill_(3e38)

    change_weights(folder, change)
    model, _ = load_model(folder, "cpu", "fp32")
    assert (model.get_input_embeddings().weight > 2.9e38).all()


@pytest.mark.parametrize("damage", ["missing", "extra", "shape", "kind", "cut", "header", "empty"])
def test_weights_that_do_not_fit_the_configuration_are_refused(folder, damage):
    name, file = "model.norm.weight", folder / "model.safetensors"

    def change(tensors):
        if damage == "missing":
            del tensors[name]
        elif damage == "extra":
            tensors["model.\x1b[2J"] = tensors[name].clone()
        elif damage == "shape":
            tensors[name] = tensors[name][:-1].clone()
        else:
            tensors[name] = tensors[name].to(torch.int8)

    if damage in ("cut", "header", "empty"):
        data = file.read_bytes()
        file.write_bytes({"cut": data[:-1], "header": b"\xff" * 8 + data[8:], "empty": b""}[damage])
        reseal(folder)
    else:
        change_weights(folder, change)
    words = {"missing": "lacks weights", "extra": "no place for", "shape": "has the shape", "kind": "of the kind I8"}
    assert "\x1b" not in refused(folder, words.get(damage, "model.safetensors is damaged"))


def test_a_pickle_is_never_opened(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    (folder / "checksums.json").unlink()
    refused(folder, r"pytorch_model.bin only, a pickle, .* save_pretrained")
    (folder / "pytorch_model.bin").unlink()
    refused(folder, "has no model.safetensors")


@pytest.mark.parametrize("has_model", [True, False])
def test_an_adapter_is_refused_with_what_to_do(folder, has_model):
    (folder / "adapter_config.json").write_text("{}")
    if not has_model:
        (folder / "config.json").unlink()
    refused(folder, "holds an adapter .* merge it into its model", ["command"])


def shard(folder):
    HSAForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="100KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    reseal(folder)
    return folder / "model.safetensors.index.json"


def test_weights_in_several_files_load_and_must_lie_in_the_folder(folder, tmp_path):
    index = shard(folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    load_model(folder, "cpu", "fp32")
    table = json.loads(index.read_text())
    name, file = next(iter(table["weight_map"].items()))
    shutil.copy(folder / file, tmp_path / "other.safetensors")
    for place in ("../other.safetensors", str(tmp_path / "other.safetensors"), "x\n", "pytorch_model.bin"):
        index.write_text(json.dumps({**table, "weight_map": {**table["weight_map"], name: place}}))
        reseal(folder)
        refused(folder, "which is no safetensors file of the folder")
    for content in ([], {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": 1}}):
        index.write_text(json.dumps(content))
        refused(folder, "index.json")
    index.write_text(json.dumps(table))
    (folder / file).unlink()
    reseal(folder)
    refused(folder, f"is incomplete: {file} is missing")


def test_links_of_a_hub_cache_are_followed(folder, tmp_path):
    expected = load_model(folder, "cpu", "fp32")[0].state_dict()
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.move(file, tmp_path / "blobs" / str(number))
        (tmp_path / "snapshot" / file.name).symlink_to(f"../blobs/{number}")
    found = load_model(tmp_path / "snapshot", "cpu", "fp32")[0].state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_no_regular_file_is_refused_and_never_opened(folder, name, kind):
    (folder / name).unlink()
    (folder / "checksums.json").unlink()
    if kind == "pipe":
        os.mkfifo(folder / name)
    elif kind == "folder":
        (folder / name).mkdir()
    else:
        (folder / name).symlink_to("/dev/zero")
    loaders = {"config.json": OURS, "tokenizer.json": ["command"]}.get(name, LOADERS)
    refused(folder, "no regular file|is no model folder|holds no tokenizer", loaders)


def test_a_tokenizer_of_another_size_is_refused(folder, tmp_path):
    text = " ".join(f"{a}{b}{c}" for a in "bcdfg" for b in "aeiou" for c in "lmnrst")
    train_tokenizer([text * 9], 400).save_pretrained(folder)
    reseal(folder)
    refused(folder, "they do not belong together")


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"model": 3}', "\x00" * 99, "[" * 100_000])
def test_a_tokenizer_that_cannot_be_read_is_refused(folder, content):
    (folder / "tokenizer.json").write_text(content)
    reseal(folder)
    refused(folder, "tokenizer.json", ["command"])
    # a model needs none
    library(folder)


def test_all_commands_refuse_the_same_folder_with_the_same_line(folder, tmp_path):
    set_config(folder, hidden_size=2**30)
    text = tmp_path / "a.txt"
    text.write_text("some words")
    commands = (
        ["ask", "x", "--text", text, "--model", folder],
        ["generate", "x", "--model", folder],
        ["quickstart", "--model", folder],
        ["memorize", text, "-o", tmp_path / "m.hsa", "--model", folder],
        ["average", folder, folder, "-o", tmp_path / "mean"],
        ["eval", "needles", "-o", tmp_path / "study", "--model", folder],
        ["bench", "memory", "--model", folder, "-o", tmp_path / "bench"],
        ["train", "debug", "--data", tmp_path, "--init-from", folder, "-o", tmp_path / "run"],
    )
    for command in commands:
        result = CliRunner().invoke(app, [str(one) for one in command])
        assert result.exit_code == 2, (command, result.output)
        assert "asks for" in result.stderr, (command, result.stderr)
        assert len(result.stderr.splitlines()) == 1, result.stderr


def test_the_check_reads_no_weights(folder):
    config = HSAForCausalLM.check_folder(folder)
    assert config.vocab_size == load_checkpoint(folder, "auto").config.vocab_size


NESTED = ["[" * 100_000, '{"head_dim": ' + '{"a":' * 500 + "1" + "}" * 501, '{"more": ' + "[" * 500 + "]" * 500 + "}"]


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "\x00", '"x"', '{"hidden_size": 1e999}', *NESTED])
def test_a_configuration_alone_is_refused_as_with_its_model(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config.json") as caught:
        HSAConfig.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_a_configuration_from_the_auto_class_takes_no_huge_numbers(folder):
    set_config(folder, vocab_size=2**40)
    with pytest.raises(ValueError, match="'vocab_size' is 1099511627776, which is beyond any model"):
        AutoConfig.from_pretrained(folder)


def test_what_transformers_offers_beside_a_folder_still_works(folder, tmp_path):
    model = library(folder)
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    found = HSAForCausalLM.from_pretrained(None, config=model.config, state_dict=state)
    assert torch.equal(found.model.norm.weight, state["model.norm.weight"])
    # a configuration of one's own is one's own business, of other sizes too
    assert HSAForCausalLM.from_pretrained(folder, chunk_topk=3).config.chunk_topk == 3
    wider = AutoConfig.from_pretrained(folder, vocab_size=model.config.vocab_size + 8)
    found, info = HSAForCausalLM.from_pretrained(
        folder, config=wider, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert len(found.get_input_embeddings().weight) == wider.vocab_size and info["mismatched_keys"]
    assert AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).config.chunk_topk == 4
    shutil.copytree(folder, tmp_path / "all" / "part")
    assert torch.equal(
        HSAForCausalLM.from_pretrained(tmp_path / "all", subfolder="part").lm_head.weight, model.lm_head.weight
    )
    (folder / "config.json").unlink()
    (folder / "checksums.json").unlink()
    assert HSAForCausalLM.from_pretrained(folder, config=model.config).config.vocab_size == model.config.vocab_size


def test_variants_and_pickles_that_are_asked_for_are_loaded(folder, tmp_path):
    model = library(folder)
    model.save_pretrained(tmp_path / "variant", variant="half")
    assert torch.equal(
        HSAForCausalLM.from_pretrained(tmp_path / "variant", variant="half").model.norm.weight, model.model.norm.weight
    )
    with pytest.raises(ValueError, match=r"has no model.safetensors"):
        library(tmp_path / "variant")
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    (folder / "checksums.json").unlink()
    with pytest.raises(ValueError, match="use_safetensors=False"):
        library(folder)
    found = HSAForCausalLM.from_pretrained(folder, use_safetensors=False)
    assert torch.equal(found.model.norm.weight, model.model.norm.weight)


@pytest.mark.parametrize("save", ["model", "config"])
def test_a_folder_that_is_saved_over_loads_again(folder, save):
    model = library(folder)
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    model.config.chunk_topk = 5
    (model if save == "model" else model.config).save_pretrained(folder)
    again, _ = load_model(folder, "cpu", "fp32")
    assert again.config.chunk_topk == 5
    assert torch.equal(again.model.norm.weight, model.model.norm.weight) == (save == "model")


class Classifier(HSAForCausalLM):
    """A class of a user's, with a part that no folder of ours has."""

    def __init__(self, config):
        super().__init__(config)
        self.score = torch.nn.Linear(config.hidden_size, 2)
        self.post_init()


def test_classes_derived_from_ours_may_have_parts_of_their_own(folder, tmp_path):
    Classifier.from_pretrained(folder).save_pretrained(tmp_path / "mine")
    Classifier.from_pretrained(tmp_path / "mine")
    with pytest.raises(ValueError, match=r"no place for, e.g. 'score"):
        library(tmp_path / "mine")
    with pytest.raises(ValueError, match=r"lacks weights, e.g. model.norm.weight"):
        change_weights(tmp_path / "mine", lambda tensors: tensors.pop("model.norm.weight"))
        Classifier.from_pretrained(tmp_path / "mine")


def test_missing_and_unexpected_weights_are_reported_to_those_who_ask_for_their_names(folder):
    expected = HSAForCausalLM.from_pretrained(folder)
    change_weights(folder, lambda tensors: tensors.update(other=tensors.pop("model.norm.weight")))
    with pytest.raises(ValueError, match="lacks weights"):
        HSAForCausalLM.from_pretrained(folder)
    model, info = HSAForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert set(info["missing_keys"]) == {"model.norm.weight"} and set(info["unexpected_keys"]) == {"other"}
    assert torch.equal(model.model.embed_tokens.weight, expected.model.embed_tokens.weight)


def test_a_base_model_and_its_causal_model_load_from_each_other(folder, tmp_path):
    model = library(folder)
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "base")
    if model.config.tie_word_embeddings:
        assert torch.equal(library(tmp_path / "base").lm_head.weight, model.lm_head.weight)
    untied = HSAForCausalLM(preset("debug", vocab_size=300, tie_word_embeddings=False))
    untied.model.save_pretrained(tmp_path / "headless")
    HSAModel.from_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match=r"lacks weights, e.g. lm_head.weight"):
        library(tmp_path / "headless")


def test_a_tokenizer_beyond_the_vocabulary_is_refused_by_whoever_loads_it(folder):
    set_config(folder, vocab_size=100)
    with pytest.raises(ValueError, match="they do not belong together"):
        load_tokenizer(folder)
