"""lm-eval and other tools find a length that cuts nothing; transformers neither warns nor pads because of it."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from hsa_ultralong import default_checkpoint
from hsa_ultralong.models import HSAForCausalLM
from hsa_ultralong.testing.factories import random_tokens, tiny_model

LONGEST = 2**31 - 1
# more than the 2,048 tokens that lm-eval takes where a model states none
NUM_TOKENS = 2500


@pytest.fixture(scope="module")
def nano():
    folder = default_checkpoint()
    model = HSAForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def prompt(tokenizer):
    return tokenizer.decode(tokenizer("The sea is wide. " * NUM_TOKENS)["input_ids"][1:NUM_TOKENS])


def test_the_first_length_that_tools_look_for_is_one_that_cuts_nothing(nano):
    model, _ = nano
    # lm-eval 0.4.13: a nested text_config, these, the tokenizer's model_max_length
    assert not getattr(model.config, "text_config", None)
    stated = [getattr(model.config, name, None) for name in ("n_positions", "max_position_embeddings", "n_ctx")]
    assert [value for value in stated if value is not None] == [LONGEST]


def test_the_tokenizer_neither_cuts_nor_pads_to_a_length(nano):
    _, tokenizer = nano
    text = prompt(tokenizer)
    whole = tokenizer(text)["input_ids"]
    # a finite model_max_length would make the last of these a list of that length
    assert len(whole) > 2048
    assert tokenizer(text, truncation=True)["input_ids"] == whole
    assert tokenizer(text, padding="max_length")["input_ids"] == whole


def test_generate_neither_warns_nor_stops_because_of_the_stated_length(caplog):
    model, tokens = tiny_model(max_position_embeddings=8), random_tokens(1, 6)
    transformers_logging.enable_propagation()
    try:
        with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
            warnings.simplefilter("error")
            found = tiny_model().generate(tokens, max_new_tokens=20, do_sample=False, pad_token_id=0)
        assert not [record for record in caplog.records if "length" in record.getMessage()]
    finally:
        transformers_logging.disable_propagation()
    # a small statement changes nothing either
    assert torch.equal(model.generate(tokens, max_new_tokens=20, do_sample=False, pad_token_id=0), found)


@pytest.fixture(scope="module")
def harness(nano):
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    return huggingface.HFLM(pretrained=nano[0], tokenizer=nano[1], batch_size=1, device="cpu")


def request(kind, *arguments):
    from lm_eval.api.instance import Instance

    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_lm_eval_reads_prompts_whole(nano, harness):
    model, tokenizer = nano
    assert harness.max_length == LONGEST
    text, ending = prompt(tokenizer), " The road"
    context, continuation = harness._encode_pair(text, ending)
    assert len(context) > 2048
    ((found, _),) = harness.loglikelihood([request("loglikelihood", text, ending)], disable_tqdm=True)
    with torch.no_grad():
        tokens = torch.tensor([context + continuation])
        scores = model(tokens).logits[0, len(context) - 1 : -1].log_softmax(-1)
    expected = scores.gather(1, torch.tensor(continuation)[:, None]).sum()
    assert abs(found - float(expected)) < 1e-3


def test_lm_eval_generates_from_the_whole_prompt(nano, harness):
    model, tokenizer = nano
    text = prompt(tokenizer)
    options = {"until": ["<never>"], "max_gen_toks": 8, "do_sample": False}
    (found,) = harness.generate_until([request("generate_until", text, options)], disable_tqdm=True)
    tokens = harness.tok_batch_encode([text])[0]
    assert tokens.shape[1] > 2048
    answer = model.generate(tokens, max_new_tokens=8, do_sample=False)[0, tokens.shape[1] :]
    assert found == tokenizer.decode(answer, skip_special_tokens=True)
