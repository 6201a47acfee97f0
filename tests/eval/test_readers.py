"""A sample answered through an edited memory, a built one, a continued one and a plain prompt."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hsa_ultralong.eval.answers import StopRule, forced_answer
from hsa_ultralong.eval.evidence import Seen
from hsa_ultralong.eval.memory_reader import MemoryReader, changed_chunks
from hsa_ultralong.eval.readers import ContinuingReader, PromptReader, RebuildingReader, changed_spans
from hsa_ultralong.eval.tasks import Material, Sample, make_samples
from hsa_ultralong.inference import ask, memorize
from hsa_ultralong.inference.passages import reread_prompt
from hsa_ultralong.testing.factories import tiny_model
from hsa_ultralong.testing.tokenizers import byte_level

pytest.importorskip("wonderwords")

LENGTH = 3000
# their texts repeat: which of several equal chunks stands first depends on the last bit of its score
SAME_CHUNKS = ("niah_single_1", "niah_multikey_2")


@pytest.fixture(scope="module")
def material() -> Material:
    tokenizer = byte_level()
    text = "\n".join(f"Sheep {i * 7919 % 997} sleeps. It snores." for i in range(120))
    return Material(tokenizer, torch.tensor(tokenizer(text)["input_ids"], dtype=torch.int32))


@pytest.fixture(scope="module")
def model(material):
    return tiny_model(vocab_size=len(material.tokenizer), sliding_window=9, chunk_size=8).eval()


def short_answers(name: str, material: Material, number: int) -> list[Sample]:
    """Samples that want few tokens, since an untrained model never stops by itself."""
    return [replace(sample, max_new_tokens=3) for sample in make_samples(name, material, LENGTH, number)]


def random_edit(rng: np.random.Generator, tokens: np.ndarray) -> np.ndarray:
    new = tokens.copy()
    for _ in range(int(rng.integers(4))):
        start = int(rng.integers(len(new)))
        new[start : start + int(rng.integers(1, 40))] += 1
    if rng.random() < 0.5:
        new = np.concatenate([new, rng.integers(0, 9, int(rng.integers(1, 9)), dtype=np.int32)])
    elif rng.random() < 0.5:
        new = new[: -int(rng.integers(1, 9))]
    return new


def test_the_spans_of_a_change_turn_one_content_into_the_other():
    rng = np.random.default_rng(0)
    for _ in range(300):
        old = rng.integers(0, 9, 2000, dtype=np.int32)
        new = random_edit(rng, old)
        built = old
        for start, stop, size in changed_spans(old, new):
            built = np.concatenate([built[:start], new[start : start + size], built[stop:]])
        assert np.array_equal(built, new)


@pytest.mark.parametrize("name", ["niah_single_1", "niah_multikey_2", "vt", "recall_form_03", "recall_documents", "kv"])
def test_an_edited_memory_answers_as_a_built_one_and_a_batch_as_one_at_a_time(model, material, name):
    samples = short_answers(name, material, 4)
    built = MemoryReader(model, material, edits=False)
    wanted = [built.answer([sample])[0] for sample in samples]
    edited, batched = MemoryReader(model, material), MemoryReader(model, material)
    assert (built.setting, edited.setting) == ("rebuild", "memory")
    found = [edited.answer([sample])[0] for sample in samples]
    pairs = batched.answer(samples[:2]) + batched.answer(samples[2:])
    for one, other, third in zip(wanted, found, pairs, strict=True):
        assert one.tokens == other.tokens == third.tokens
        assert one.certainty == pytest.approx(other.certainty) == pytest.approx(third.certainty)
        if name not in SAME_CHUNKS:
            assert (one.found, one.rank) == (other.found, other.rank) == (third.found, third.rank)


def test_questions_about_the_same_notes_share_one_memory_whatever_their_contexts(model, material, monkeypatch):
    """Questions over passages: a context of few tokens, each of another length, beside many notes."""
    (sample,) = short_answers("recall_documents", material, 1)
    text, notes = sample.context, tuple(tuple(material.encode(f"Town {n} has {n * 37} goats.")) for n in range(40))
    samples = [
        replace(sample, index=n, context=text[: 20 + n % 7], notes=notes, evidence=(), gold_notes=(n,))
        for n in range(12)
    ]
    built = MemoryReader(model, material, edits=False)
    monkeypatch.setattr(built, "_memorized", lambda documents: memorize(model, documents))  # one by one
    wanted = [built.answer([sample])[0] for sample in samples]
    read = []
    reader = MemoryReader(model, material)
    real = reader._memorized
    monkeypatch.setattr(reader, "_memorized", lambda documents: read.append(documents) or real(documents))
    found = reader.answer(samples[:8]) + reader.answer(samples[8:])
    assert len(read) == 1
    assert [one.tokens for one in found] == [one.tokens for one in wanted]
    assert [one.certainty for one in found] == pytest.approx([one.certainty for one in wanted])


@pytest.mark.parametrize("name", ["recall_form_03", "recall_documents"])
def test_passages_are_read_again_as_ask_reads_them_again(model, material, name):
    samples = short_answers(name, material, 2)
    reader = MemoryReader(model, material, reread=2)
    found, forced = reader.answer(samples), reader.forced(samples)
    plain = MemoryReader(model, material).answer(samples)
    rows, numbers = reader._rows(samples)
    seen = [Seen(sample, reader.chunk_size, own.total) for sample, own in zip(samples, numbers, strict=True)]
    prompts = reader._prompts(samples, rows, numbers, seen)
    for sample, reply, bare, prompt, verdict in zip(samples, found, plain, prompts, forced, strict=True):
        documents = [torch.from_numpy(sample.context), *(torch.tensor(note) for note in sample.notes)]
        memory, question = memorize(model, documents), material.tokenizer.decode(sample.question)
        again = reread_prompt(model, material.tokenizer, memory, question, 2)
        assert prompt == again.ids and len(again.chunks) == 2
        wanted = ask(model, material.tokenizer, memory, question, max_new_tokens=5, reread=2)
        assert reply.tokens == wanted.tokens[: len(reply.tokens)]
        # what the bare question retrieved
        assert (reply.found, reply.rank, reply.margin) == (bare.found, bare.rank, pytest.approx(bare.margin))
        answer = forced_answer(sample, material)
        assert answer is not None
        made = ask(model, material.tokenizer, memory, question, max_new_tokens=len(answer), reread=2)
        assert verdict == (made.tokens == answer)


@pytest.mark.parametrize("name", ["niah_single_2", "passkey", "recall_changed"])
def test_a_continued_memory_answers_as_the_whole_prompt(model, material, name):
    samples = short_answers(name, material, 3)
    continued, plain = ContinuingReader(model, material), PromptReader(model, material)
    for sample in samples:
        assert continued.answer([sample])[0].tokens == plain.answer([sample])[0].tokens


def test_documents_cannot_be_continued_and_models_with_an_order_cannot_share_a_memory(model, material):
    (sample,) = make_samples("recall_documents", material, LENGTH, 1)
    with pytest.raises(ValueError, match="ask it with the setting memory"):
        ContinuingReader(model, material).answer([sample])
    ordered = tiny_model(vocab_size=len(material.tokenizer), fusion="stick_breaking")
    with pytest.raises(ValueError, match="use the setting rebuild or continue"):
        MemoryReader(ordered, material)


@pytest.mark.parametrize("name", ["niah_single_2", "s_niah_authors", "recall_form_01"])
def test_a_memory_of_one_context_alone_is_asked_as_one_that_is_edited(model, material, name):
    samples = short_answers(name, material, 3)
    alone, edited = RebuildingReader(model, material), MemoryReader(model, material)
    assert alone.forced(samples) == edited.forced(samples)
    for one, other in zip([alone.answer([sample])[0] for sample in samples], edited.answer(samples), strict=True):
        assert (one.tokens, one.found, one.rank) == (other.tokens, other.found, other.rank)
        assert (one.weight or 0.0) == pytest.approx(other.weight or 0.0, rel=1e-4)


@pytest.mark.parametrize("options", [{"memory_positions": "rope"}, {"memory_softmax": "joint", "fusion": "none"}])
def test_models_whose_memories_cannot_be_laid_together_are_asked_too(material, options):
    torch.manual_seed(0)
    ordered = tiny_model(vocab_size=len(material.tokenizer), **options)
    reader, samples = RebuildingReader(ordered, material), short_answers("s_niah_authors", material, 2)
    assert all(verdict in (True, False) for verdict in reader.forced(samples))
    assert len(reader.answer(samples[:1])[0].tokens) > 0


def test_the_changed_chunks_are_those_that_a_changed_token_can_reach():
    rng = np.random.default_rng(0)
    size, reach = 8, 19
    for _ in range(300):
        old = rng.integers(0, 9, int(rng.integers(100, 130)), dtype=np.int32)
        new = random_edit(rng, old)
        wanted = []
        for chunk in range(-(-len(new) // size)):
            window = slice(max(0, chunk * size - reach), (chunk + 1) * size)
            if not np.array_equal(old[window], new[window]):
                wanted.append(chunk)
        assert changed_chunks(old, new, size, reach).tolist() == wanted


def test_few_tokens_are_read_for_a_sample_whose_context_is_nearly_known(model, material, monkeypatch):
    read: list[int] = []
    reader = MemoryReader(model, material)
    real = reader._stretches.read
    monkeypatch.setattr(
        reader._stretches, "read",
        lambda stretches: read.extend(len(one.lead) + len(one.tokens) for one in stretches) or real(stretches),
    )  # fmt: skip
    samples = short_answers("recall_form_03", material, 6)
    reader.answer(samples)
    once = sum(read)
    assert 0 < once < 2 * len(samples) * (2 * model.config.lower_reach + 200)
    reader.answer(samples)
    assert sum(read) == once


def test_a_prompt_beyond_the_positions_of_a_model_is_refused(material):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(material.tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=1024,
    )  # fmt: skip
    reader = PromptReader(LlamaForCausalLM(config).eval(), material)
    (sample,) = make_samples("niah_single_1", material, LENGTH, 1)
    with pytest.raises(ValueError, match="positions for 1,024 tokens, 3,000 wanted"):
        reader.answer([sample])
    assert reader.limit == 1024
    (short,) = make_samples("recall_form_02", material, 600, 1)
    assert 1 <= len(reader.answer([short])[0].tokens) <= short.max_new_tokens


@pytest.mark.parametrize(
    ("metric", "answers", "said", "read"),
    [
        # the first sentence counts, a line break does not end it
        ("places", ("office",), "office\nkitchen. Garden", "office\nkitchen."),
        ("places", ("office",), "Office<CONTEXT> kitchen", "Office<CONTEXT>"),
        ("givers", ("Mary",), "Mary\n\nFred", "Mary\n\nFred"),
        ("exact", ("12345",), "\n12345\nmore", "\n12345\n"),
        ("part", ("blue",), "It is blue. And", "It is blue"),
    ],
)
def test_an_answer_is_read_as_far_as_it_can_change_the_score(material, metric, answers, said, read):
    (sample,) = make_samples("passkey", material, LENGTH, 1)
    stop = StopRule(replace(sample, metric=metric, answers=answers, max_new_tokens=99), material.tokenizer)
    for token in material.encode(said):
        if not stop.is_done:
            stop.put(token, ())
    assert stop.text == read


@pytest.mark.parametrize(
    ("name", "answer"), [("s_niah_authors", "{}"), ("mq_authors", "{} {}"), ("vt_authors", "{}, {}, {}")]
)
def test_the_authors_lists_are_forced_as_one_text_behind_the_blank_of_the_question(material, name, answer):
    (sample,) = make_samples(name, material, LENGTH, 1)
    tokens = forced_answer(sample, material)
    text = material.tokenizer.decode([*sample.question, *tokens])
    assert text.endswith("Answer: " + answer.format(*sample.answers))


@pytest.mark.parametrize("name", ["passkey", "recall_form_01"])
def test_a_forced_answer_is_right_exactly_where_greedy_decoding_would_give_it(model, material, name):
    """The answer of each sample is made what the model says, or that with another last token."""
    memory = MemoryReader(model, material)
    samples = short_answers(name, material, 4)
    said = [material.tokenizer.decode(reply.tokens[:3]) for reply in memory.answer(samples)]
    own = [replace(sample, answers=(text.lstrip() or "x",)) for sample, text in zip(samples, said, strict=True)]
    for reader in (memory, ContinuingReader(model, material), PromptReader(model, material)):
        verdicts = reader.forced(own)
        for sample, verdict in zip(own, verdicts, strict=True):
            wanted = material.encode(f" {sample.answers[0]}")
            made = replace(sample, max_new_tokens=len(wanted), metric="em")
            (reply,) = reader.answer([made])
            assert verdict == (reply.tokens[: len(wanted)] == wanted), (type(reader).__name__, reply.tokens, wanted)
    several = replace(samples[0], answers=("a", "b"))
    assert memory.forced([several]) == [None]
