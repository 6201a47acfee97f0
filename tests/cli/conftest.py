"""A tiny random checkpoint with the shipped tokenizer, made once."""

from pathlib import Path

import pytest
import torch

from hsa_ultralong.data import load_tokenizer
from hsa_ultralong.models import HSAForCausalLM
from hsa_ultralong.models.presets import preset
from hsa_ultralong.train.export import export_model

TOKENIZER = Path(__file__).resolve().parents[2] / "checkpoints" / "nano"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    tokenizer = load_tokenizer(TOKENIZER)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = HSAForCausalLM(preset("debug", vocab_size=len(tokenizer), **ids))
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    export_model(model, tokenizer, folder, topk=4)
    return folder
