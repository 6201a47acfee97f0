"""Questions, continuations and `ask`: logits equal the parallel forward of the same chunks, sources are true."""

import pytest
import torch

from hsa_ultralong.inference import Library, ask
from hsa_ultralong.memory.chunk_memory import ChunkMemory
from hsa_ultralong.models import HSACache
from hsa_ultralong.nn.chunk_retriever import ChunkRetriever
from hsa_ultralong.testing.factories import MODEL_OPTIONS, random_tokens, tiny_model

EXACT = {"rtol": 1e-10, "atol": 1e-11}
GREEDY = {"max_new_tokens": 7, "do_sample": False}
SIZE = 4
ORDER_FREE = [name for name, options in MODEL_OPTIONS.items() if tiny_model(**options).config.is_composable]


def document(length, seed=0):
    return random_tokens(1, length, seed=seed)[0]


class Words:
    """A tokenizer of numbers: "3 7" <-> [3, 7]."""

    def __call__(self, text, **_):
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, tokens, **_):
        return " ".join(str(token) for token in tokens)


def packed(parts):
    """One row of documents, each from a multiple of the chunk size, and their segments."""
    tokens, segments = [], []
    for number, part in enumerate(parts):
        padding = -len(part) % SIZE
        tokens.append(torch.nn.functional.pad(part, (0, padding)))
        segments += [number] * len(part) + [-1] * padding
    return torch.cat(tokens)[None], torch.tensor([segments], dtype=torch.int32)


@pytest.mark.parametrize("options", MODEL_OPTIONS)
@torch.no_grad()
def test_a_question_to_a_memory_equals_the_packed_row(options):
    model, parts, question = tiny_model(**MODEL_OPTIONS[options]), [document(22), document(7, seed=1)], document(11, 2)
    cache = HSACache(model.config, memory=model.memorize(parts))
    asked = model(question[None], past_key_values=cache).logits[0]
    row, segments = packed([*parts, question])
    whole = model(row, segment_ids=segments, use_cache=False).logits[0]
    torch.testing.assert_close(asked, whole[32 : 32 + 11], **EXACT)


@pytest.mark.parametrize("options", ORDER_FREE)
@torch.no_grad()
def test_question_logits_do_not_depend_on_the_order_of_documents(options):
    model, question = tiny_model(**MODEL_OPTIONS[options]), document(9, 9)[None]
    parts = [model.memorize(document(length, seed)) for seed, length in enumerate((18, 3, 11))]

    def logits(order):
        library = ChunkMemory.concat([parts[i] for i in order])
        return model(question, past_key_values=HSACache(model.config, memory=library)).logits

    first = logits((0, 1, 2))
    for order in ((2, 1, 0), (1, 2, 0)):
        torch.testing.assert_close(logits(order), first, **EXACT)


@pytest.mark.parametrize("options", ["default", "two_retrieval_heads", "stick_breaking"])
@torch.no_grad()
def test_a_question_in_steps_equals_the_question_at_once(options):
    model, question = tiny_model(**MODEL_OPTIONS[options]), document(13, 2)[None]
    memory = model.memorize([document(22), document(7, seed=1)])
    once = model(question, past_key_values=HSACache(model.config, memory=memory)).logits
    cache = HSACache(model.config, memory=memory)
    steps = [model(part, past_key_values=cache).logits for part in question.split((5, 1, 1, 6), dim=1)]
    torch.testing.assert_close(torch.cat(steps, 1), once, **EXACT)


@pytest.mark.parametrize("length", [1, 3, 4, 8])
def test_short_open_documents_are_continued_exactly(length):
    model, tokens = tiny_model(), random_tokens(1, length + 2)
    plain = model.generate(tokens, attention_mask=torch.ones_like(tokens), **GREEDY)
    memory, prompt = model.memorize(tokens[0, :length], close=False), tokens[:, length:]
    continued = model.generate(prompt, memory=memory, continue_document=True, **GREEDY)
    assert torch.equal(continued, plain[:, length:])


@pytest.mark.parametrize("length", [12, 14])
def test_continuing_the_last_document_also_reads_the_others(length):
    model, first, tokens = tiny_model(), document(22), random_tokens(1, length + 3, seed=1)
    cache = HSACache(model.config, memory=model.memorize(first))
    whole = model.generate(tokens, attention_mask=torch.ones_like(tokens), past_key_values=cache, **GREEDY)
    memory = model.memorize([first, tokens[0, :length]], close=False)
    continued = model.generate(tokens[:, length:], memory=memory, continue_document=True, **GREEDY)
    assert torch.equal(continued, whole[:, length:])


def test_generating_leaves_the_memory_as_it_was():
    model, prompt = tiny_model(), random_tokens(1, 5, seed=1)
    memory = model.memorize(document(30), close=False)
    before = [part.clone() for part in memory.tensors]
    runs = [model.generate(prompt, memory=memory, continue_document=True, **GREEDY) for _ in range(2)]
    model.generate(prompt, memory=memory, **GREEDY)
    assert torch.equal(*runs) and memory.num_tokens == 30 and memory.open_document is not None
    assert all(torch.equal(a, b) for a, b in zip(before, memory.tensors, strict=True))


def test_lengths_and_dictionaries_of_a_continuation_count_only_the_prompt_and_the_new_tokens():
    model, prompt = tiny_model(), random_tokens(1, 5, seed=1)
    memory = model.memorize(document(30), close=False)
    options = {"memory": memory, "continue_document": True, "do_sample": False}
    plain = model.generate(prompt, max_new_tokens=4, **options)
    assert plain.shape == (1, 9) and torch.equal(plain[:, :5], prompt)
    assert torch.equal(model.generate(prompt, max_length=9, **options), plain)
    detailed = model.generate(prompt, max_new_tokens=4, return_dict_in_generate=True, **options)
    assert torch.equal(detailed.sequences, plain)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_of_questions_equals_single_ones(beams):
    model, memory = tiny_model(), tiny_model().memorize([document(30), document(7, 1)])
    questions = [random_tokens(1, length, seed=length) for length in (10, 3, 6)]
    options = {**GREEDY, "num_beams": beams, "pad_token_id": 0}
    single = [
        model.generate(part, memory=memory, attention_mask=torch.ones_like(part), **options)[0, part.shape[1] :]
        for part in questions
    ]
    rows = torch.cat([torch.nn.functional.pad(part, (10 - part.shape[1], 0)) for part in questions])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(part), (10 - part.shape[1], 0)) for part in questions])
    together = model.generate(rows, memory=memory, attention_mask=mask, **options)[:, 10:]
    assert torch.equal(together, torch.stack(single))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_beams": 2}, "one sequence"), ({"num_return_sequences": 2, "do_sample": True}, "one sequence"),
     ({"attention_mask": torch.tensor([[0, 1, 1]])}, "no padding")],
)  # fmt: skip
def test_what_would_not_be_one_sequence_is_not_continued(options, message):
    model, memory = tiny_model(), tiny_model().memorize(document(30), close=False)
    with pytest.raises(ValueError, match=message):
        model.generate(random_tokens(1, 3), memory=memory, continue_document=True, max_new_tokens=2, **options)


def test_memories_of_another_model_answer_nothing():
    memory = tiny_model(seed=1).memorize(document(30), close=False)
    for options in ({}, {"continue_document": True}):
        with pytest.raises(ValueError, match="another model"):
            tiny_model().generate(random_tokens(1, 3), memory=memory, max_new_tokens=1, **options)
    with pytest.raises(ValueError, match="another model"):
        ask(tiny_model(), Words(), memory, "1 2 3")


def test_the_weight_of_an_answer_is_the_largest_fusion_weight_on_the_memory():
    model, prompt = tiny_model(), "3 1 4 1 5 9 2 6 5"
    memory = model.memorize([document(30), document(10, 1)])
    best = {}

    def record(_, __, retrieval):
        pairs = zip(retrieval.indices[0, -1].flatten(), retrieval.weights[0, -1].flatten(), strict=True)
        for index, weight in pairs:
            if 0 <= index < memory.num_chunks:
                best[int(index)] = max(best.get(int(index), 0.0), float(weight))

    handles = [part.register_forward_hook(record) for part in model.modules() if isinstance(part, ChunkRetriever)]
    tokens = torch.tensor([Words()(prompt)["input_ids"]])
    with torch.no_grad():
        model(tokens, past_key_values=HSACache(model.config, memory=memory))
    for handle in handles:
        handle.remove()
    answer = ask(model, Words(), memory, prompt, max_new_tokens=1, num_sources=99)
    assert answer.weight == pytest.approx(max(best.values()))
    assert [source.weight for source in answer.sources] == pytest.approx(sorted(best.values(), reverse=True))
    located = {8 * source.document + source.start // SIZE for source in answer.sources}
    assert located == set(best)
    # the short chunks end with their documents
    assert all(source.stop <= memory.documents[source.document].num_tokens for source in answer.sources)


@pytest.mark.parametrize("num_sources", [0, 1, 3])
def test_the_weight_does_not_depend_on_how_many_sources_are_listed(num_sources):
    model, memory = tiny_model(unsure_below=[[1, 0.5]]), tiny_model().memorize(document(40))
    answer = ask(model, Words(), memory, "1 2 3", max_new_tokens=2, num_sources=num_sources)
    full = ask(model, Words(), memory, "1 2 3", max_new_tokens=2, num_sources=99)
    assert len(answer.sources) == num_sources and answer.weight == full.weight > 0
    assert answer.is_uncertain == (answer.weight < answer.threshold)


def test_asking_leaves_no_hooks_and_the_mode_as_it_was():
    model = tiny_model().train()
    memory = model.memorize(document(30))
    ask(model, Words(), memory, "1 2 3", max_new_tokens=1)
    with pytest.raises(TypeError):
        ask(model, Words(), memory, "1 2 3", max_new_tokens="many")
    assert model.training
    assert not any(part._forward_hooks for part in model.modules() if isinstance(part, ChunkRetriever))


@pytest.mark.parametrize(("num_tokens", "words"), [(0, "it holds no document"), (3, "has no full chunk yet")])
def test_asking_an_empty_memory_says_that_it_is_empty(num_tokens, words, tmp_path):
    model = tiny_model()
    with Library.create(model, tmp_path / "a.hsa", key_values="fp64", landmarks="fp64") as library:
        if num_tokens:
            library.add(list(range(num_tokens)), close=False)
    with pytest.raises(ValueError, match=f"the memory is empty: .*{words}"):
        ask(model, Words(), ChunkMemory.load(tmp_path / "a.hsa"), "1 2 3")
