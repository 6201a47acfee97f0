"""peft around and inside the model: answers use the active adapters, and a memory belongs to those below it."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from hsa_ultralong.inference import (
    DecodingEngine,
    Library,
    append,
    ask,
    close_document,
    edit,
    last_logits,
    memorize,
    memory_fingerprint,
)
from hsa_ultralong.models.adapters import LORA_TARGETS, UPPER_LORA_TARGETS
from hsa_ultralong.testing.factories import random_tokens, tiny_model

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

EXACT = {"rtol": 1e-9, "atol": 1e-9}
LOWER = r".*(lower_layers|chunk_encoder).*\.(q_proj|v_proj|down_proj)"
UPPER = r".*groups.*\.(q_proj|query_proj|down_proj)"
KINDS = {
    "lora": lambda where: peft.LoraConfig(r=3, target_modules=where),
    "rank_stabilised": lambda where: peft.LoraConfig(r=3, use_rslora=True, target_modules=where),
    "dora": lambda where: peft.LoraConfig(r=3, use_dora=True, target_modules=where),
    "ia3": lambda where: peft.IA3Config(target_modules=where, feedforward_modules=[]),
    "loha": lambda where: peft.LoHaConfig(r=3, target_modules=where),
    "lokr": lambda where: peft.LoKrConfig(r=3, target_modules=where),
    "vera": lambda where: peft.VeraConfig(r=3, target_modules=r".*(q_proj)" if where is LOWER else where),
    "oft": lambda where: peft.OFTConfig(oft_block_size=4, target_modules=where),
}


def randomize_adapters(model: nn.Module, seed: int) -> None:
    """Adapters as if they had been trained."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("lora_", "ia3_", "hada_", "lokr_", "vera_", "oft_", "modules_to_save")):
                parameter += 0.2 * torch.randn(parameter.shape, generator=source, dtype=torch.float64).to(
                    parameter.dtype
                )


def adapted(config, *, seed: int = 1, **options):
    model = peft.get_peft_model(tiny_model(**options), config, autocast_adapter_dtype=False).eval()
    randomize_adapters(model, seed)
    return model.double()


def logits_after(model, memory, prompt):
    """Logits of a prompt that reads the memory, by the model as transformers calls it."""
    with torch.no_grad():
        found = model.generate(
            prompt, memory=memory, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    return torch.stack(found.logits, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_every_entry_computes_with_the_active_adapter(kind):
    """Reading, asking and decoding equal those of a plain model into which the adapter was merged."""
    model = adapted(KINDS[kind](LOWER if kind == "vera" else r".*(q_proj|v_proj|down_proj)"))
    tokens, prompt = random_tokens(1, 47), random_tokens(1, 5, seed=3)
    memory = memorize(model, tokens[0, :30], close=False)
    append(model, memory, tokens[0, 30:43], document=0, close=False)
    edit(model, memory, 2, 6, random_tokens(1, 4, seed=5)[0])
    tail = last_logits(model, memory, 3)
    close_document(model, memory)
    answers = logits_after(model, memory, prompt)
    engine = DecodingEngine(model, memory, max_tokens=16)
    decoded = engine.generate([prompt[0]], 6)
    forward = model(tokens).logits
    plain = tiny_model()
    assert memory.fingerprint != memory_fingerprint(plain)

    merged = model.merge_and_unload().eval()
    other = memorize(merged, tokens[0, :43], close=False)
    edit(merged, other, 2, 6, random_tokens(1, 4, seed=5)[0])
    torch.testing.assert_close(tail, last_logits(merged, other, 3), **EXACT)
    close_document(merged, other)
    torch.testing.assert_close(memory.tensors.k, other.tensors.k, **EXACT)
    torch.testing.assert_close(answers, logits_after(merged, other, prompt), **EXACT)
    assert decoded == DecodingEngine(merged, other, max_tokens=16).generate([prompt[0]], 6)
    torch.testing.assert_close(forward, merged(tokens).logits, **EXACT)
    assert not torch.allclose(tail, last_logits(plain, plain.memorize(tokens[0, :43], close=False), 3), atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_memory_belongs_to_the_adapter_that_is_active_below_it(kind):
    model, plain = adapted(KINDS[kind](LOWER)), tiny_model()
    tokens, prompt = random_tokens(1, 20)[0], random_tokens(1, 4, seed=2)
    memory = memorize(model, tokens)
    with model.disable_adapter():
        assert memory_fingerprint(model) == memory_fingerprint(plain)
        with pytest.raises(ValueError, match="another model"):
            logits_after(model, memory, prompt)
        base = memorize(model, tokens)
        expected = logits_after(plain, plain.memorize(tokens), prompt)
        torch.testing.assert_close(logits_after(model, base, prompt), expected, **EXACT)
    for call in (
        lambda: logits_after(model, base, prompt),
        lambda: append(model, base, tokens),
        lambda: edit(model, base, 0, 1, tokens[:1]),
        lambda: DecodingEngine(model, base),
    ):
        with pytest.raises(ValueError, match="another model"):
            call()
    assert memory.fingerprint == memory_fingerprint(model)
    randomize_adapters(model, 7)
    assert memory.fingerprint != memory_fingerprint(model)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "vera"])
def test_an_adapter_above_the_memory_leaves_it_valid(kind):
    model, plain = adapted(KINDS[kind](UPPER)), tiny_model()
    tokens, prompt = random_tokens(1, 20)[0], random_tokens(1, 4, seed=2)
    memory = plain.memorize(tokens)
    assert memory.fingerprint == memory_fingerprint(model)
    expected, found = logits_after(plain, memory, prompt), logits_after(model, memory, prompt)
    assert not torch.allclose(found, expected, atol=1e-3)
    merged = model.merge_and_unload()
    torch.testing.assert_close(found, logits_after(merged, memory, prompt), **EXACT)


def test_switching_renaming_scaling_and_joining_adapters_are_seen():
    model = adapted(peft.LoraConfig(r=3, target_modules=LOWER))
    model.add_adapter("second", peft.LoraConfig(r=3, target_modules=LOWER), autocast_adapter_dtype=False)
    randomize_adapters(model, 3)
    seen = [memory_fingerprint(model)]
    model.set_adapter("second")
    seen.append(memory_fingerprint(model))
    model.base_model.set_adapter(["default", "second"])
    seen.append(memory_fingerprint(model))
    model.set_adapter("default")
    assert memory_fingerprint(model) == seen[0]
    model.base_model.model.model.lower_layers[0].attention.q_proj.set_scale("default", 0.5)
    seen.append(memory_fingerprint(model))
    assert len(set(seen)) == 4


def test_the_name_of_an_adapter_does_not_count(tmp_path):
    model = adapted(peft.LoraConfig(r=3, target_modules=LOWER))
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny_model(), tmp_path, adapter_name="other", autocast_adapter_dtype=False)
    assert memory_fingerprint(again.double()) == memory_fingerprint(model)
    tokens = random_tokens(2, 20)
    torch.testing.assert_close(again.eval()(tokens).logits, model(tokens).logits, **EXACT)


def test_merging_unmerging_and_unloading_are_seen_though_they_write_past_the_version_of_a_tensor():
    model = adapted(peft.LoraConfig(r=3, target_modules=LOWER))
    plain = memory_fingerprint(tiny_model())
    apart = memory_fingerprint(model)
    model.merge_adapter()
    merged = memory_fingerprint(model)
    assert len({plain, apart, merged}) == 3
    with model.disable_adapter(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # disabling takes the adapter out of the weights again, up to rounding
        memory = memorize(model, random_tokens(1, 20)[0])
        expected = tiny_model().memorize(random_tokens(1, 20)[0])
        torch.testing.assert_close(memory.tensors.k, expected.tensors.k, **EXACT)
    model.merge_adapter()
    found = memory_fingerprint(model)
    assert memory_fingerprint(model.merge_and_unload()) == found


@pytest.mark.parametrize(
    "part", ["chunk_encoder", "embed_tokens", "retriever", "groups.1", "lm_head", "lower_layers.0"]
)
def test_modules_that_are_trained_as_a_whole_count_as_themselves(part):
    config = peft.LoraConfig(r=3, target_modules=r".*k_proj", modules_to_save=[part])
    model = adapted(config, tie_word_embeddings=False)
    below = part in ("chunk_encoder", "embed_tokens", "lower_layers.0")
    tokens, prompt = random_tokens(1, 20)[0], random_tokens(1, 4, seed=2)
    memory = memorize(model, tokens)
    answer = DecodingEngine(model, memory, max_tokens=16).generate([prompt[0]], 6)
    found = logits_after(model, memory, prompt)
    merged = model.merge_and_unload()
    other = memorize(merged, tokens)
    torch.testing.assert_close(found, logits_after(merged, other, prompt), **EXACT)
    assert answer == DecodingEngine(merged, other, max_tokens=16).generate([prompt[0]], 6)
    only = adapted(
        peft.LoraConfig(r=3, target_modules=r".*groups.*o_proj", modules_to_save=[part]), tie_word_embeddings=False
    )
    assert (memory_fingerprint(only) == memory_fingerprint(tiny_model(tie_word_embeddings=False))) != below


def test_adapters_on_embedding_head_router_and_experts_take_part():
    options = {"num_experts": 4, "moe_intermediate_size": 8, "num_dense_layers": 0}
    config = peft.LoraConfig(r=3, target_modules=["embed_tokens", "lm_head", "router", "gate_proj"])
    model = adapted(config, tie_word_embeddings=False, **options)
    tokens, prompt = random_tokens(1, 20)[0], random_tokens(1, 4, seed=2)
    assert memory_fingerprint(model) != memory_fingerprint(tiny_model(tie_word_embeddings=False, **options))
    memory = memorize(model, tokens)
    found, answer = logits_after(model, memory, prompt), DecodingEngine(model, memory).generate([prompt[0]], 6)
    merged = model.merge_and_unload()
    other = memorize(merged, tokens)
    torch.testing.assert_close(memory.tensors.k, other.tensors.k, **EXACT)
    torch.testing.assert_close(found, logits_after(merged, other, prompt), **EXACT)
    assert answer == DecodingEngine(merged, other).generate([prompt[0]], 6)


def test_an_adapter_injected_into_the_model_is_one_too():
    model, plain = tiny_model(), tiny_model()
    peft.inject_adapter_in_model(peft.LoraConfig(r=3, target_modules=LOWER), model)
    randomize_adapters(model.double().eval(), 1)
    memory = model.memorize(random_tokens(1, 20)[0])
    assert memory.fingerprint != memory_fingerprint(plain)
    for part in model.modules():
        if hasattr(part, "merged_adapters"):
            part.enable_adapters(False)
    assert memory_fingerprint(model) == memory_fingerprint(plain)


def test_an_engine_and_a_library_refuse_another_adapter_than_they_were_made_with(tmp_path):
    model = adapted(peft.LoraConfig(r=3, target_modules=r".*q_proj"))
    tokens = random_tokens(1, 20)[0]
    engine = DecodingEngine(model, memorize(model, tokens), max_tokens=16)
    engine.generate([tokens[:4]], 2)
    with Library.create(model, tmp_path / "a.hsa") as library:
        library.add(tokens)
        with model.disable_adapter():
            with pytest.raises(ValueError, match="changed after this engine"):
                engine.start(0, tokens[:4])
            with pytest.raises(ValueError, match="changed after this memory was opened"):
                library.add(tokens)
        library.add(tokens, name="again")
        assert [document.name for document in library.documents] == ["", "again"]
    engine.start(0, tokens[:4])
    with pytest.raises(ValueError, match="plain layers"):
        DecodingEngine(model, compile_layers=True)


def test_ask_uses_the_adapter():
    class Tokenizer:
        def __call__(self, text):
            return {"input_ids": [ord(letter) % 37 for letter in text]}

        def decode(self, tokens, **_):
            return " ".join(map(str, tokens))

    model = adapted(peft.LoraConfig(r=3, target_modules=r".*q_proj"))
    memory = memorize(model, random_tokens(1, 40)[0])
    answer = ask(model, Tokenizer(), memory, "a question", max_new_tokens=8)
    merged = model.merge_and_unload()
    again = ask(merged, Tokenizer(), memorize(merged, random_tokens(1, 40)[0]), "a question", max_new_tokens=8)
    assert answer.tokens == again.tokens and answer.weight == pytest.approx(again.weight)


@pytest.mark.parametrize(
    "config",
    [
        lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj"], alora_invocation_tokens=[1, 2]),
    ],
)
def test_adapters_around_the_model_are_refused_until_they_are_disabled(config):
    model = peft.get_peft_model(tiny_model(), config())
    with pytest.raises(ValueError, match="around the model"):
        memorize(model, random_tokens(1, 20)[0])
    with model.disable_adapter():
        assert memory_fingerprint(model) == memory_fingerprint(tiny_model())


def test_rows_with_adapters_of_their_own_need_one_memory():
    model = adapted(peft.LoraConfig(r=3, target_modules=r".*q_proj"))
    memory = memorize(model, random_tokens(1, 20)[0])
    with pytest.raises(ValueError, match="hook"):
        model.generate(random_tokens(2, 4), memory=memory, adapter_names=["default", "__base__"], max_new_tokens=2)


def test_adapters_without_named_targets_go_on_the_projections_of_llama():
    for config, names in ((peft.LoraConfig(), LORA_TARGETS), (peft.IA3Config(), ["k_proj", "v_proj", "down_proj"])):
        model = peft.get_peft_model(tiny_model(), config)
        assert sorted(model.peft_config["default"].target_modules) == sorted(names)
    model = adapted(peft.LoraConfig(r=3, target_modules=UPPER_LORA_TARGETS))
    assert memory_fingerprint(model) == memory_fingerprint(tiny_model())
    touched = {name.split(".")[-1] for name, part in model.named_modules() if hasattr(part, "merged_adapters")}
    assert touched == {"q_proj", "v_proj", "query_proj"}
