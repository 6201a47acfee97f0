"""What a record keeps of retrieval: passages, where the evidence stood, which sample it was."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hsa_ultralong.eval.evidence import MAX_CHARACTERS, MAX_PASSAGES, Seen, passage_records, sample_digest
from hsa_ultralong.eval.memory_reader import MemoryReader
from hsa_ultralong.eval.readers import PromptReader
from hsa_ultralong.eval.tasks import Material, Sample, make_samples
from hsa_ultralong.testing.factories import tiny_model
from hsa_ultralong.testing.tokenizers import byte_level


class Letters:
    """Every token is a letter."""

    def decode(self, tokens, skip_special_tokens=False):
        return "".join(chr(97 + token % 26) for token in tokens)


SAMPLE = Sample(
    "t", 0, 100, np.arange(20, dtype=np.int32), [1, 2], ("x",), 4, "exact", 0.5, ((9, 13),), "?", ((30, 31, 32),)
)


def retrieval(*heads: dict[int, float]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """One group: chunks and weights of a row's heads."""
    return [
        (torch.tensor([[list(head) for head in heads]]), torch.tensor([[list(head.values()) for head in heads]]))
    ]  # (1, Hr, K)


def test_passages_are_the_heaviest_chunks_of_any_head_with_their_place_in_their_document():
    seen = Seen(SAMPLE, 8, 4)  # chunks 0..2 of the context, 3 of the note
    seen.note(retrieval({0: 0.1, 2: 0.6, -1: 0.3}, {3: 0.7, 2: 0.2, 1: 0.1}), 0, 0, is_first=True)
    seen.note(retrieval({0: 0.9, -1: 0.1}), 0, 0, is_first=False)
    found = [(p.document, p.start, p.stop, round(p.weight, 6), p.is_evidence) for p in seen.passages()]
    # tokens 9..12 of the evidence lie in chunk 1
    assert found == [(1, 0, 3, 0.7, False), (0, 16, 20, 0.6, False), (0, 0, 8, 0.1, False), (0, 8, 16, 0.1, True)]
    assert (seen.found, seen.rank, seen.certainty) == (True, 3, pytest.approx(0.9))


def test_chunks_of_other_memories_are_left_out():
    seen = Seen(SAMPLE, 8, 4)
    seen.note(retrieval({7: 0.5, 8: 0.4, 3: 0.1}), 0, 4, is_first=True)
    assert [(p.document, p.start) for p in seen.passages()] == [(1, 0)]
    assert (seen.found, seen.rank) == (False, None)


def test_a_record_keeps_few_passages_and_bounded_texts():
    long = replace(SAMPLE, context=np.zeros(20_000, dtype=np.int32), evidence=((0, 20_000),) * 9, notes=())
    seen = Seen(long, 2000, 10)
    seen.note(retrieval({chunk: 0.1 for chunk in range(10)}), 0, 0, is_first=True)
    kept = passage_records(long, seen.passages(), 2000, Letters(), with_text=True)
    assert len(kept["retrieved"]) == len(kept["evidence"]) == MAX_PASSAGES
    assert all(len(place["text"]) <= MAX_CHARACTERS + 4 for places in kept.values() for place in places)
    bare = passage_records(long, seen.passages(), 2000, Letters(), with_text=False)
    assert all("text" not in place for places in bare.values() for place in places)


def test_the_evidence_is_shown_with_its_whole_chunks():
    kept = passage_records(SAMPLE, None, 8, Letters(), with_text=True)
    assert kept == {"retrieved": None, "evidence": [{"document": 0, "start": 8, "stop": 16, "text": "ijklmnop"}]}


@pytest.mark.parametrize(
    "change",
    [
        {"context": np.arange(1, 21, dtype=np.int32)}, {"question": [1, 3]}, {"answers": ("y",)}, {"metric": "all"},
        {"max_new_tokens": 5}, {"notes": ((30, 31),)},
    ],
)  # fmt: skip
def test_samples_that_differ_in_anything_have_other_digests(change):
    assert sample_digest(SAMPLE) == sample_digest(replace(SAMPLE, context=SAMPLE.context.copy()))
    assert sample_digest(SAMPLE) != sample_digest(replace(SAMPLE, **change))


def test_a_memory_says_what_it_retrieved_and_a_plain_prompt_does_not():
    tokenizer = byte_level()
    text = "\n".join(f"Sheep {i * 7919 % 997} sleeps. It snores." for i in range(40))
    material = Material(tokenizer, torch.tensor(tokenizer(text)["input_ids"], dtype=torch.int32))
    model = tiny_model(vocab_size=len(tokenizer), chunk_size=8).eval()
    (sample,) = make_samples("recall_documents", material, 2500, 1)
    sample = replace(sample, max_new_tokens=2)
    (reply,) = MemoryReader(model, material).answer([sample])
    assert reply.retrieved and all(0 < p.weight <= 1 for p in reply.retrieved)
    documents = (sample.context, *sample.notes)
    assert all(0 <= p.start < p.stop <= len(documents[p.document]) for p in reply.retrieved)
    (sample,) = make_samples("passkey", material, 600, 1)
    assert PromptReader(model, material).answer([replace(sample, max_new_tokens=2)])[0].retrieved is None
