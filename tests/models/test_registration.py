"""transformers knows our model after `import hsa_ultralong`, or by what stands beside the weights."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hsa_ultralong.models import HSAConfig, HSAForCausalLM, HSAModel
from hsa_ultralong.models.auto_map import AUTO_MAP, REMOTE_MODULE
from hsa_ultralong.testing.factories import random_tokens, tiny_config, tiny_model

ROOT = Path(__file__).resolve().parents[2]
NAMES = "from transformers import AutoConfig, AutoModel, AutoModelForCausalLM\n"
LOAD = """
config = AutoConfig.from_pretrained(folder)
assert type(config).__name__ == "HSAConfig", type(config)
assert type(AutoModelForCausalLM.from_pretrained(folder)).__name__ == "HSAForCausalLM"
assert type(AutoModel.from_config(config)).__name__ == "HSAModel"
"""
UNPICKLE = """
import pickle
assert type(AutoModel.from_config(pickle.loads(pickled))).__name__ == "HSAModel"
"""
ORDERS = {
    "ours first, used in a thread meanwhile": (
        "import threading, hsa_ultralong\n"
        "thread = threading.Thread(target=lambda: hsa_ultralong.HSAForCausalLM)\n"
        "thread.start()\n" + NAMES + LOAD + "thread.join()"
    ),
    "transformers first": NAMES + "import hsa_ultralong\n" + LOAD,
    "from deep inside transformers": "import hsa_ultralong\nfrom transformers import PreTrainedModel\n" + NAMES + LOAD,
    "by a pickled configuration": NAMES + UNPICKLE,
}


def python(code, **environment):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


@pytest.fixture
def folder(tmp_path):
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    "order",
    [
        "transformers first",
        "by a pickled configuration",
        pytest.param("ours first, used in a thread meanwhile", marks=pytest.mark.slow),
        pytest.param("from deep inside transformers", marks=pytest.mark.slow),
    ],
)
def test_importing_the_library_registers_the_auto_classes(order, folder):
    result = python(f"folder, pickled = {str(folder)!r}, {pickle.dumps(tiny_config())!r}\n{ORDERS[order]}")
    assert result.returncode == 0, result.stderr


def test_importing_the_library_imports_neither_torch_nor_transformers():
    code = """
import sys
import hsa_ultralong, hsa_ultralong.cli.main
heavy = {"torch", "transformers", "numpy", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
import transformers
assert "torch" not in sys.modules
from transformers import AutoConfig
hooks = [finder for finder in sys.meta_path if type(finder).__module__.startswith("hsa_ultralong")]
assert not hooks, "the hook has done its work and is gone"
import inspect
assert "class AutoConfig" in inspect.getsource(sys.modules[AutoConfig.__module__])
assert "hsa_ultralong.models.modeling_hsa" not in sys.modules, "the models wait for a configuration"
"""
    result = python(code)
    assert result.returncode == 0, result.stderr


def test_a_folder_loads_with_trust_remote_code_alone_and_saves_whole_again(folder, tmp_path):
    code = f"""
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)
import hsa_ultralong
assert type(model) is hsa_ultralong.HSAForCausalLM
model.save_pretrained({str(tmp_path / "again")!r})
"""
    result = python(code, HF_MODULES_CACHE=str(tmp_path / "cache"))
    assert result.returncode == 0, result.stderr
    assert {file.name for file in (tmp_path / "again").iterdir()} == {file.name for file in folder.iterdir()}
    for name in (f"{REMOTE_MODULE}.py", "config.json"):
        assert (tmp_path / "again" / name).read_text() == (folder / name).read_text()


def test_without_the_library_a_folder_says_in_one_line_how_to_install_it(folder, tmp_path):
    code = f"""
import sys
sys.modules["hsa_ultralong"] = None
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)
"""
    last = python(code, HF_MODULES_CACHE=str(tmp_path / "cache")).stderr.splitlines()[-1]
    assert last == "ImportError: this model needs the library hsa_ultralong: pip install hsa-ultralong"


def saved_by_config(model, path):
    model.config.save_pretrained(path)


def saved_by_model(model, path):
    model.save_pretrained(path)


def saved_by_hand(model, path):
    # as some tools do, which write the weights themselves
    model.config.to_json_file(path / "config.json")
    model.config.to_json_file(path / "other.json")


def saved_after_registering(model, path):
    # what transformers does to classes of trust_remote_code
    HSAConfig.register_for_auto_class()
    HSAModel.register_for_auto_class(AutoModel)
    HSAForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    model.save_pretrained(path)


def saved_after_a_hub(model, path):
    model.config.auto_map = {name: f"owner/name--{value}" for name, value in AUTO_MAP.items()}
    model.config = HSAConfig.from_dict(model.config.to_dict())
    model.save_pretrained(path)


@pytest.mark.parametrize(
    "save",
    [saved_by_config, saved_by_model, saved_by_hand, saved_after_registering, saved_after_a_hub],
    ids=lambda way: way.__name__,
)
def test_every_way_of_saving_names_our_classes_and_writes_the_module(save, tmp_path):
    save(tiny_model(dtype=torch.float32), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert [file.name for file in tmp_path.glob("*.py")] == [f"{REMOTE_MODULE}.py"]
    assert set(AUTO_MAP.values()) == {f"{REMOTE_MODULE}.{c.__name__}" for c in (HSAConfig, HSAModel, HSAForCausalLM)}


def test_the_shipped_checkpoint_has_what_saving_writes(tmp_path):
    nano = ROOT / "checkpoints" / "nano"
    HSAConfig.from_pretrained(nano).save_pretrained(tmp_path)
    assert (tmp_path / f"{REMOTE_MODULE}.py").read_text() == (nano / f"{REMOTE_MODULE}.py").read_text()
    saved, shipped = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, nano))
    assert {**saved, "transformers_version": None} == {**shipped, "transformers_version": None}


def test_classes_derived_from_ours_register_as_usual(tmp_path):
    class Derived(HSAForCausalLM):
        pass

    Derived.register_for_auto_class("AutoModelForCausalLM")
    assert Derived._auto_class == "AutoModelForCausalLM" and HSAForCausalLM._auto_class is None
    config = tiny_config(auto_map={"AutoModelForCausalLM": "theirs.Derived"})
    assert config.auto_map == {**AUTO_MAP, "AutoModelForCausalLM": "theirs.Derived"}


def test_trust_remote_code_takes_the_installed_classes(folder):
    assert type(AutoConfig.from_pretrained(folder, trust_remote_code=True)) is HSAConfig
    assert type(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)) is HSAForCausalLM


def test_attention_of_another_kind_is_refused_when_loading(folder):
    for load in (HSAForCausalLM, AutoModelForCausalLM):
        with pytest.raises(ValueError, match="have their own kernels"):
            load.from_pretrained(folder, attn_implementation="flash_attention_2")


def test_smoothed_labels_are_shifted_as_for_other_causal_models(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model, tokens = tiny_model(dtype=torch.float32), random_tokens(2, 17)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], label_smoothing_factor=0.1)
    trainer = Trainer(model=model, args=arguments)
    with torch.no_grad():
        loss = trainer.compute_loss(model, {"input_ids": tokens, "labels": tokens.clone()})
        logits = model(tokens).logits[:, :-1].flatten(0, 1)
    # transformers smooths over all tokens: 0.9 of the label and 0.1 of the mean, torch's own form
    expected = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)
