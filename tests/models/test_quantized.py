"""Models in 8 bits, by the packages that people use for it: they save, load, answer and stay close."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TorchAoConfig

from hsa_ultralong import default_checkpoint
from hsa_ultralong.cli.common import load_model
from hsa_ultralong.inference import ask, memorize

FACT = "The secret code of the silver lantern is 4821937."
QUESTION = "Question: What is the secret code of the silver lantern?\nAnswer:"


def bitsandbytes():
    pytest.importorskip("accelerate")
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True)


def torchao():
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


@pytest.fixture(scope="module", params=[bitsandbytes, torchao], ids=lambda make: make.__name__)
def case(request):
    """Quantised model, the model itself, tokenizer, token ids (1, T)."""
    folder, wanted = default_checkpoint(), request.param()
    plain, tokenizer = load_model(folder, "cpu", "fp32")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=wanted, dtype=torch.float32)
    text = "The sea is wide. " * 30 + FACT + " The road is long." * 20
    return model, plain, tokenizer, torch.tensor([tokenizer(text)["input_ids"]])


@torch.no_grad()
def test_logits_stay_close_to_those_of_the_full_weights(case):
    model, plain, _, tokens = case
    expected, found = plain(tokens).logits, model(tokens).logits.float()
    assert float((found - expected).square().mean().sqrt()) < 0.05 * float(expected.std())
    assert float((found.argmax(-1) == expected.argmax(-1)).float().mean()) > 0.95


def test_a_quantised_model_saves_loads_and_generates_the_same(case, tmp_path):
    model, _, tokenizer, tokens = case
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    # the embedding stays as it is, here in fp32; the shipped file is in bf16
    assert (tmp_path / "model.safetensors").stat().st_size < (default_checkpoint() / "model.safetensors").stat().st_size
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(tokens[:, :50], **options)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert torch.equal(loaded.generate(tokens[:, :50], **options), expected)
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is type(AutoTokenizer.from_pretrained(default_checkpoint()))
    by_command, _ = load_model(tmp_path, "cpu", "fp32")
    assert torch.equal(by_command.generate(tokens[:, :50], **options), expected)


def test_a_quantised_model_memorises_and_answers_and_refuses_memories_of_the_full_weights(case):
    model, plain, tokenizer, tokens = case
    memory = memorize(model, tokens[0])
    assert "4821937" in ask(model, tokenizer, memory, QUESTION).text
    with pytest.raises(ValueError, match="another model"):
        ask(model, tokenizer, memorize(plain, tokens[0]), QUESTION)
