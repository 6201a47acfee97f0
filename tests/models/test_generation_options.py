"""generate in every form of call: what is asked for is honoured, or refused in one line before any work."""

from __future__ import annotations

import pytest
import torch
from transformers import CompileConfig, GenerationConfig, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from hsa_ultralong.inference import edit
from hsa_ultralong.models import HSACache
from hsa_ultralong.models.cache_hsa import REWIND
from hsa_ultralong.testing.factories import random_tokens, tiny_model

PLAIN = {"max_new_tokens": 10, "do_sample": False}


def both(model, tokens=None, **options):
    """The answer without and with a memory, and after an open document."""
    closed, opened = model.memorize(random_tokens(1, 23)[0]), model.memorize(random_tokens(1, 22)[0], close=False)
    yield lambda *args, **more: model.generate(*args, **more)
    yield lambda *args, **more: model.generate(*args, memory=closed, **more)
    yield lambda *args, **more: model.generate(*args, memory=opened, continue_document=True, **more)


def test_a_prompt_goes_by_every_name_and_place():
    model, tokens = tiny_model(), random_tokens(1, 6)
    config = GenerationConfig(**PLAIN)
    for generate in both(model):
        expected = generate(input_ids=tokens, **PLAIN)
        for found in (
            generate(tokens, **PLAIN),
            generate(inputs=tokens, **PLAIN),
            generate(tokens, config),
            generate(tokens, generation_config=config),
            generate(tokens, config, LogitsProcessorList()),
            generate(generation_config=config, inputs=tokens),
        ):
            assert torch.equal(found, expected)
        with pytest.raises(ValueError, match="name the same thing"):
            generate(tokens, input_ids=tokens, **PLAIN)
        with pytest.raises(TypeError, match="by position and by name"):
            generate(tokens, config, generation_config=config)
        with pytest.raises(TypeError, match="at most"):
            generate(tokens, *[None] * 20)


def test_embeddings_as_a_prompt_answer_like_their_tokens_with_a_memory_too():
    model, tokens = tiny_model(), random_tokens(2, 6)
    embeds = model.get_input_embeddings()(tokens)
    memory = model.memorize(random_tokens(1, 23)[0])
    for options in ({}, {"memory": memory}):
        expected = model.generate(tokens, **options, **PLAIN)[:, 6:]
        assert torch.equal(model.generate(inputs_embeds=embeds, **options, **PLAIN), expected)
    opened = model.memorize(random_tokens(1, 22)[0], close=False)
    with pytest.raises(ValueError, match=r"input_ids \(1, T\)"):
        model.generate(inputs_embeds=embeds[:1], memory=opened, continue_document=True, **PLAIN)
    with pytest.raises(ValueError, match="prompt of at least one token"):
        model.generate(memory=memory, **PLAIN)


REFUSED = {
    "cache_implementation": ["static", "dynamic", "offloaded", "quantized", "paged"],
    "cache_config": [{"backend": "quanto"}],
    "compile_config": [CompileConfig()],
    "low_memory": [True],
    "output_attentions": [True],
    "assistant_early_exit": [1],
    "penalty_alpha": [0.6],
    "dola_layers": ["low"],
    "num_beam_groups": [2],
    "constraints": [[1]],
    "force_words_ids": [[[1]]],
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_cannot_be_honoured_are_refused_at_the_start(name, monkeypatch):
    model, tokens = tiny_model(), random_tokens(1, 6)
    calls = list(both(model))
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: pytest.fail("no work was to be done"))
    for value in REFUSED[name]:
        for generate in calls:
            with pytest.raises(ValueError, match=f"{name}.*HSA-UltraLong"):
                generate(tokens, **PLAIN, **{name: value})


def test_options_of_the_models_own_generation_configuration_are_refused_too():
    model, tokens = tiny_model(), random_tokens(1, 6)
    model.generation_config.cache_implementation = "static"
    with pytest.raises(ValueError, match="has its own cache"):
        model.generate(tokens, **PLAIN)


@pytest.mark.parametrize("name", ["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"])
def test_continuous_batching_is_refused_with_what_to_use(name):
    with pytest.raises(ValueError, match="DecodingEngine"):
        getattr(tiny_model(), name)([[1, 2]], generation_config=GenerationConfig())


def repeated(length):
    """A prompt whose n-grams come again, so that lookup drafts much."""
    return torch.cat([random_tokens(1, length)] * 3, 1)


@pytest.mark.parametrize("num_tokens", [3, REWIND + 1])
def test_prompt_lookup_of_any_length_equals_greedy_decoding(num_tokens):
    model, tokens = tiny_model(), repeated(70)
    for generate in both(model):
        options = {**PLAIN, "max_new_tokens": 70 if num_tokens > REWIND else 20}
        found = generate(tokens, prompt_lookup_num_tokens=num_tokens, max_matching_ngram_size=1, **options)
        assert torch.equal(found, generate(tokens, **options))


@pytest.mark.parametrize(
    "schedule, num_tokens, same",
    [
        ("constant", 5, True),
        ("constant", REWIND + 6, False),
        ("heuristic", REWIND, True),
        ("heuristic_transient", 5, False),
    ],
)
def test_drafts_of_an_assistant_of_any_length_equal_greedy_decoding(schedule, num_tokens, same):
    model, tokens = tiny_model(), random_tokens(1, 20)
    assistant = tiny_model(seed=0 if same else 1)
    assistant.generation_config.num_assistant_tokens = num_tokens
    assistant.generation_config.num_assistant_tokens_schedule = schedule
    assistant.generation_config.assistant_confidence_threshold = 0.0
    for generate in both(model):
        options = {**PLAIN, "max_new_tokens": 80}
        expected = generate(tokens, **options)
        if not same:
            # an early end: every draft of a stranger is as long as ever, and refused at its first token
            options["eos_token_id"] = int(expected[0, 24])
            expected = generate(tokens, **options)
        assert torch.equal(generate(tokens, assistant_model=assistant, **options), expected)


def test_assisted_decoding_returns_the_hidden_states_of_greedy_decoding():
    model, tokens = tiny_model(), repeated(8)
    for generate in both(model):
        options = {**PLAIN, "output_hidden_states": True, "return_dict_in_generate": True, "output_logits": True}
        plain, assisted = generate(tokens, **options), generate(tokens, prompt_lookup_num_tokens=4, **options)
        assert torch.equal(plain.sequences, assisted.sequences)
        assert len(plain.hidden_states) == len(assisted.hidden_states) == 10
        for one, other in zip(plain.hidden_states[1:], assisted.hidden_states[1:]):
            for layer, same in zip(one, other):
                torch.testing.assert_close(layer, same, rtol=1e-9, atol=1e-9)
        for one, other in zip(plain.logits, assisted.logits):
            torch.testing.assert_close(one.double(), other.double(), rtol=1e-5, atol=1e-5)


def test_a_cache_that_cannot_take_a_draft_back_is_refused_at_the_start():
    model, tokens = tiny_model(), repeated(40)
    with pytest.raises(ValueError, match=r"HSACache\(config, rewind=100\)"):
        model.generate(tokens, cache=HSACache(model.config), prompt_lookup_num_tokens=100, **PLAIN)
    cache = HSACache(model.config, rewind=100)
    found = model.generate(tokens, cache=cache, prompt_lookup_num_tokens=100, **PLAIN)
    assert torch.equal(found, model.generate(tokens, **PLAIN))


@pytest.mark.parametrize("options", [{"guidance_scale": 1.5}, {"prefill_chunk_size": 5}, {"num_beams": 2}])
def test_guidance_chunked_prompts_and_beams_equal_those_without_a_cache(options):
    model, tokens = tiny_model(), random_tokens(1, 13)
    expected = model.generate(tokens, use_cache=False, **{**PLAIN, **options, "prefill_chunk_size": None})
    assert torch.equal(model.generate(tokens, **PLAIN, **options), expected)
    memory = model.memorize(random_tokens(1, 23)[0])
    found = model.generate(tokens, memory=memory, **PLAIN, **options)
    if "prefill_chunk_size" in options:
        assert torch.equal(found, model.generate(tokens, memory=memory, **PLAIN))


class Seen(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_a_streamer_sees_the_prompt_and_the_answer_and_nothing_else():
    model, tokens = tiny_model(), random_tokens(1, 6)
    for generate in both(model):
        streamer = Seen()
        found = generate(tokens, streamer=streamer, **PLAIN)
        assert streamer.ended and streamer.tokens == found[0].tolist()


def test_healing_the_end_of_a_continued_document_is_refused():
    model = tiny_model()
    opened = model.memorize(random_tokens(1, 22)[0], close=False)
    with pytest.raises(ValueError, match="token_healing"):
        model.generate(random_tokens(1, 4), memory=opened, continue_document=True, token_healing=True, **PLAIN)


def test_prompts_that_somebody_else_prepares_take_no_memory():
    model = tiny_model()
    memory = model.memorize(random_tokens(1, 22)[0])
    model.prepare_inputs_for_generation = model.prepare_inputs_for_generation
    with pytest.raises(ValueError, match="prompt tuning"):
        model.generate(random_tokens(1, 4), memory=memory, **PLAIN)


def test_a_document_can_be_edited_between_answers():
    model, tokens = tiny_model(), random_tokens(1, 6)
    memory = model.memorize(random_tokens(1, 22)[0])
    edit(model, memory, 3, 5, random_tokens(1, 2, seed=9)[0])
    assert model.generate(inputs=tokens, memory=memory, **PLAIN).shape == (1, 16)


def test_assisted_decoding_goes_on_from_a_cache_without_reading_its_tokens_again():
    model, tokens = tiny_model(), repeated(9)
    first = model.generate(tokens, return_dict_in_generate=True, **PLAIN)
    cache = first.past_key_values if "past_key_values" in first else first.cache
    found = model.generate(first.sequences, cache=cache, prompt_lookup_num_tokens=4, **PLAIN)
    assert torch.equal(found, model.generate(first.sequences, **PLAIN))
