"""trl's trainers take a model folder, with and without adapters, run, and save what the Auto classes load."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hsa_ultralong.inference import memory_fingerprint
from hsa_ultralong.models import HSAForCausalLM
from hsa_ultralong.models.adapters import UPPER_LORA_TARGETS
from hsa_ultralong.testing.factories import tiny_model

trl, peft = pytest.importorskip("trl"), pytest.importorskip("peft")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]

PREFERENCE = {"prompt": "The cat", "chosen": " sat on the mat", "rejected": " ate"}
GENERATING = {"num_generations": 4, "max_completion_length": 6, "per_device_train_batch_size": 4}
# the rows of a data set, and what a configuration needs beside the common part
TASKS = {
    "SFT": ({"text": "The cat sat on the mat. " * 3}, {}),
    "DPO": (PREFERENCE, {}),
    "KTO": ({"prompt": "The cat", "completion": " sat", "label": True}, {}),
    "GRPO": ({"prompt": "The cat"}, {**GENERATING, "beta": 0.1}),
    "RLOO": ({"prompt": "The cat"}, {**GENERATING, "beta": 0.1}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained("checkpoints/nano")
    tiny_model(dtype=torch.float32, vocab_size=len(tokenizer), std=0.05).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_a_trainer_takes_a_folder_and_saves_one(task, adapted, folder, tmp_path):
    from datasets import Dataset

    row, options = TASKS[task]
    rows = [{**row, "label": bool(number % 2)} if "label" in row else row for number in range(8)]
    settings = getattr(trl, f"{task}Config")(
        **{
            "output_dir": str(tmp_path / "run"), "max_steps": 2, "per_device_train_batch_size": 2, "report_to": [],
            "use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True, **options,
        }
    )  # fmt: skip
    extra = {"reward_funcs": lambda completions, **_: [float(len(c)) for c in completions]} if "beta" in options else {}
    if adapted:
        extra["peft_config"] = peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=UPPER_LORA_TARGETS)
    trainer = getattr(trl, f"{task}Trainer")(
        str(folder), args=settings, train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder), **extra,
    )  # fmt: skip
    trained = trainer.train()
    assert trained.global_step == 2 and torch.isfinite(torch.tensor(trained.training_loss))
    trainer.save_model(str(tmp_path / "saved"))
    kind = peft.AutoPeftModelForCausalLM if adapted else AutoModelForCausalLM
    loaded = kind.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    tokens = torch.arange(9)[None]
    torch.testing.assert_close(loaded(tokens).logits, trainer.model.eval()(tokens).logits, rtol=1e-4, atol=1e-4)
    same = memory_fingerprint(loaded) == memory_fingerprint(HSAForCausalLM.from_pretrained(folder))
    assert same == adapted


def test_packing_without_documents_is_refused_with_the_collator_that_packs(folder, tmp_path):
    from datasets import Dataset

    settings = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=1, packing=True, max_length=64, use_cpu=True, bf16=False, report_to=[]
    )
    trainer = trl.SFTTrainer(
        str(folder), args=settings, train_dataset=Dataset.from_list([{"text": "The cat sat on the mat. " * 5}] * 8),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )  # fmt: skip
    with pytest.raises(ValueError, match="PackingCollator"):
        trainer.train()
