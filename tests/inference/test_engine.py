"""The decoding engine's steps equal the parallel forward: shared and separate memories, prompts, continuation."""

import pytest
import torch

from hsa_ultralong.inference import edit
from hsa_ultralong.inference import engine as engine_module
from hsa_ultralong.inference.engine import DecodingEngine, sample
from hsa_ultralong.models import HSACache
from hsa_ultralong.nn.ring_window import RingWindow
from hsa_ultralong.nn.rotary import rotary_at
from hsa_ultralong.testing.factories import MODEL_OPTIONS, random_tensor, random_tokens, tiny_model

EXACT = {"rtol": 1e-9, "atol": 1e-10}


def document(length, seed=0):
    return random_tokens(1, length, seed=seed)[0]


def parallel(model, memory, tokens):
    """Logits of all tokens at once, as one new document."""
    with torch.no_grad():
        return model(tokens[None], past_key_values=HSACache(model.config, memory=memory)).logits[0]


def forced(engine, rows):
    """Logits (B, n, V) of steps that read the given tokens (B, n) in place of the engine's own."""
    found = []
    for column in rows.T:
        engine.tokens.copy_(column)
        engine.step()
        found.append(engine.logits.clone())
    return torch.stack(found, 1)


@pytest.mark.parametrize("options", sorted(MODEL_OPTIONS))
def test_steps_equal_the_parallel_forward(options):
    model = tiny_model(**MODEL_OPTIONS[options])
    memory = model.memorize([document(75), document(40, seed=1)])
    size = model.config.chunk_size
    # prompts of every kind for a few options, one that ends inside a chunk for the others
    every = ("default", "hsa_only_layer", "two_retrieval_heads")
    for prompt_length in (1, size, 2 * size + 3) if options in every else (size + 3,):
        texts = torch.stack([document(prompt_length + 3 * size, seed=seed) for seed in (2, 3)])
        engine = DecodingEngine(model, memory, batch=2, max_tokens=200)
        for row, text in enumerate(texts):
            engine.start(row, text[:prompt_length])
        logits = forced(engine, texts[:, prompt_length:])
        for row, text in enumerate(texts):
            expected = parallel(model, memory, text)
            torch.testing.assert_close(logits[row], expected[prompt_length:], **EXACT)


def test_sequences_of_different_lengths_with_memories_of_their_own():
    model = tiny_model()
    first, second = model.memorize(document(90)), model.memorize(document(200, seed=1))
    memories = [first, second, None, first]
    lengths = [3, 50, 17, 32]
    texts = [document(length + 40, seed=5 + row) for row, length in enumerate(lengths)]
    engine = DecodingEngine(model, memories, batch=4, max_tokens=128)
    for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        engine.start(row, text[:length])
    logits = forced(engine, torch.stack([text[length:] for text, length in zip(texts, lengths, strict=True)]))
    for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        torch.testing.assert_close(logits[row], parallel(model, memories[row], text)[length:], **EXACT)


def test_more_chunks_than_there_are_take_no_memory_and_change_nothing():
    answers = []
    for topk in (100, 10**12):
        model = tiny_model(chunk_topk=topk)
        memory = model.memorize(document(90))
        engine = DecodingEngine(model, memory, batch=1, max_tokens=64)
        engine.start(0, document(10, seed=2))
        answers.append(forced(engine, document(30, seed=3)[None]))
        prompt = document(10, seed=2)[None]
        answers.append(model.generate(prompt, memory=memory, max_new_tokens=5, do_sample=False, pad_token_id=0))
    assert torch.equal(answers[0], answers[2]) and torch.equal(answers[1], answers[3])


@pytest.mark.parametrize("rest", [0, 5])
def test_the_open_document_goes_on(rest):
    model = tiny_model()
    size = model.config.chunk_size
    text = document(6 * size + rest, seed=3)
    whole = torch.cat((text, document(40, seed=4)))
    memory = model.memorize(text, close=False)
    engine = DecodingEngine(model, memory, max_tokens=100)
    engine.start(0, whole[len(text) : len(text) + 7], continue_document=True)
    logits = forced(engine, whole[None, len(text) + 7 :])[0]
    with torch.no_grad():
        expected = model(whole[None], past_key_values=None, use_cache=False).logits[0, len(text) + 7 :]
    torch.testing.assert_close(logits, expected, **EXACT)


def test_a_slot_can_be_used_again():
    model = tiny_model()
    memory = model.memorize(document(90))
    engine = DecodingEngine(model, memory, max_tokens=128)
    engine.start(0, document(60, seed=1))
    forced(engine, document(50, seed=2)[None])
    text = document(45, seed=3)
    engine.start(0, text[:5])
    torch.testing.assert_close(forced(engine, text[None, 5:])[0], parallel(model, memory, text)[5:], **EXACT)


def test_a_memory_edited_between_prompts_is_read_as_it_is_and_one_that_grew_is_refused():
    model = tiny_model()
    memory, prompt = model.memorize([document(90), document(150, seed=1)]), document(21, seed=2)
    engine = DecodingEngine(model, memory, max_tokens=80)
    engine.generate([prompt], 10)
    edit(model, memory, 30, 70, document(40, seed=3), document=1)
    engine.start(0, prompt)
    logits = forced(engine, document(10, seed=4)[None])
    again = DecodingEngine(model, memory, max_tokens=80)
    again.start(0, prompt)
    torch.testing.assert_close(logits, forced(again, document(10, seed=4)[None]), **EXACT)
    edit(model, memory, 30, 30, document(64, seed=5), document=1)
    with pytest.raises(ValueError, match="chunks, now"):
        engine.start(0, prompt)


@pytest.mark.parametrize("store", [{"store": "host", "key_values": "fp64"}, {"landmarks": "int8"}])
def test_memories_on_tiers(store):
    model = tiny_model()
    memory = model.memorize(document(300), **store)
    text = document(30, seed=1)
    engine = DecodingEngine(model, memory, max_tokens=64)
    engine.start(0, text[:4])
    torch.testing.assert_close(forced(engine, text[None, 4:])[0], parallel(model, memory, text)[4:], **EXACT)


def test_generation_equals_transformers_and_stops():
    model = tiny_model()
    memory = model.memorize(document(120))
    prompts = [document(9, seed=1), document(9, seed=2)]
    ids = torch.stack(prompts)
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), memory=memory, max_new_tokens=40, do_sample=False
    )[:, 9:]
    engine = DecodingEngine(model, memory, batch=2, max_tokens=64)
    found = engine.generate(prompts, 40)
    assert found == expected.tolist()
    steps = list(engine.stream(prompts, 40))
    assert [list(row) for row in zip(*(step.tokens for step in steps), strict=True)] == found
    stop = found[0][5]
    short = engine.generate(prompts, 40, stop_tokens=[stop])
    assert short[0] == found[0][: found[0].index(stop) + 1]
    # as many tokens as there is room for
    assert [len(row) for row in engine.generate(prompts, 100)] == [64 - 9 + 1] * 2


def test_what_was_retrieved_is_reported():
    model = tiny_model()
    memory = model.memorize(document(120))
    prompt = document(20, seed=1)
    engine = DecodingEngine(model, memory, max_tokens=64)
    steps = list(engine.stream([prompt], 10))
    text = torch.cat((prompt, torch.tensor([step.tokens[0] for step in steps])))
    cache = HSACache(model.config, memory=memory)
    with torch.no_grad():
        seen = model(text[None], past_key_values=cache, output_retrieval=True).retrieval
    for number, step in enumerate(steps):
        for expected, (indices, weights) in zip(seen, step.retrieved, strict=True):
            place = len(prompt) - 1 + number
            kept = expected.indices.shape[-1]
            # chunks of the sequence itself count from the memory's last on, in another order of arrival
            assert torch.equal(indices[0, :, :kept], expected.indices[0, place])
            torch.testing.assert_close(weights[0, :, :kept], expected.weights[0, place].float())


def test_sampling_keeps_to_what_it_is_told():
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]]).expand(4000, 4)
    assert (sample(logits, 0.0) == 1).all()
    generator = torch.Generator().manual_seed(0)
    shares = torch.bincount(sample(logits, 1.0, generator=generator), minlength=4) / 4000
    torch.testing.assert_close(shares, logits[0].softmax(-1), atol=0.03, rtol=0)
    assert set(sample(logits, 1.0, top_k=2, generator=generator).tolist()) == {1, 2}
    assert set(sample(logits, 1.0, top_p=0.5, generator=generator).tolist()) == {1}
    for temperature in (0.01, 1e-40, 1e-300):
        assert set(sample(logits, temperature, generator=generator).tolist()) == {1}


def test_refusals():
    model = tiny_model()
    memory = model.memorize(document(40))
    with pytest.raises(ValueError, match="memories for batch"):
        DecodingEngine(model, [memory], batch=2)
    with pytest.raises(ValueError, match="temperature"):
        DecodingEngine(model, memory, temperature=-1)
    with pytest.raises(ValueError, match="another model"):
        DecodingEngine(tiny_model(seed=1), memory)
    engine = DecodingEngine(model, memory, max_tokens=8)
    for prompt in (document(9), document(0)):
        with pytest.raises(ValueError, match="a prompt needs"):
            engine.start(0, prompt)
    with pytest.raises(ValueError, match="no open document"):
        engine.start(0, document(3), continue_document=True)
    engine.start(0, document(8))
    with pytest.raises(ValueError, match="max_tokens"):
        engine.step()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compile_layers", [False, True])
@pytest.mark.parametrize(
    "store", [{}, {"store": "host", "key_values": "int8"}, {"store": "tiered", "landmarks": "int8"}]
)
def test_a_graph_decodes_what_eager_steps_decode(store, compile_layers):
    from hsa_ultralong.models import HSAForCausalLM
    from hsa_ultralong.models.presets import preset

    torch.manual_seed(0)
    model = HSAForCausalLM(preset("nano")).cuda().bfloat16().eval()
    memory = model.memorize(torch.randint(3, 8000, (70_000,)), **store)
    texts = torch.randint(3, 8000, (2, 230), device="cuda")
    found = []
    for use_graph in (True, False):
        engine = DecodingEngine(
            model, memory, batch=2, max_tokens=256, use_graph=use_graph, compile_layers=compile_layers and use_graph
        )
        for row, text in enumerate(texts):
            engine.start(row, text[:30])
        found.append(forced(engine, texts[:, 30:]).float())
    assert (found[0] - found[1]).norm() < 0.02 * found[1].norm()
    expected = torch.stack([parallel(model, memory, text) for text in texts])[:, 30:].float()
    assert (found[0] - expected).norm() < 0.03 * expected.norm()


def test_every_compiled_part_is_one_graph(monkeypatch):
    """Traced whole and run as it is, so that a compiler is not needed."""
    parts = []

    def traced(function, tune=False):
        parts.append(function.__name__)
        return torch.compile(function, backend="eager", fullgraph=True, dynamic=False)

    monkeypatch.setattr(engine_module, "compiled", traced)
    model = tiny_model()
    memory, prompt = model.memorize(document(70)), document(11, seed=3)
    expected = DecodingEngine(model, memory, max_tokens=40).generate([prompt], 9)
    assert DecodingEngine(model, memory, max_tokens=40, compile_layers=True).generate([prompt], 9) == expected
    assert parts == ["run_start", "run_layer", "run_queries", "run_window", "run_feed_forward", "run_head"]


def test_many_rows_read_their_windows_as_few_do():
    places = torch.arange(9) * 3
    make = {"window": 7, "heads": 2, "dim": 4, "dtype": torch.float64, "device": torch.device("cpu")}
    many = RingWindow(places, **make)
    many.keys.copy_(random_tensor(*many.keys.shape, seed=1))
    many.values.copy_(random_tensor(*many.values.shape, seed=2))
    q, k, v = (random_tensor(9, 1, heads, 4, seed=heads) for heads in (6, 2, 2))
    few = many.first(5, places[:5])
    few.keys, few.values = few.keys.clone(), few.values.clone()
    expected = few.attend(q[:5], k[:5], v[:5], rotary_at(places[:5], 4, 100.0, torch.float64))
    found = many.attend(q, k, v, rotary_at(places, 4, 100.0, torch.float64))
    torch.testing.assert_close(found[:5], expected, rtol=0, atol=1e-12)
