"""Rows that share a base read exactly the memories that each would have alone."""

from __future__ import annotations

import pytest
import torch

from hsa_ultralong.inference import DecodingEngine, edit
from hsa_ultralong.memory.row_memories import Chunk, RowMemories
from hsa_ultralong.models import HSACache
from hsa_ultralong.nn.views import ChunkTensors
from hsa_ultralong.testing.factories import MODEL_OPTIONS, random_tokens, tiny_config, tiny_model

EXACT = {"rtol": 1e-9, "atol": 1e-10}
COMPOSABLE = sorted(
    name for name, options in MODEL_OPTIONS.items() if tiny_config(**options).is_composable
)  # fmt: skip


def rows_of(model, base, memories, ranges):
    """RowMemories in which row b has chunks `ranges[b]` of memories[b] in place of the base's."""
    hidden = torch.zeros((len(memories), base.num_chunks), dtype=torch.bool)
    own = []
    for row, (memory, chunks) in enumerate(zip(memories, ranges, strict=True)):
        hidden[row, chunks.start : chunks.stop] = True
        part = memory.part(chunks.start, chunks.stop)
        pairs = (side[0].unflatten(0, (-1, base.chunk_size)) for side in (part.k, part.v))
        own.append([Chunk(*each) for each in zip(*pairs, part.landmarks[0], part.lengths[0].tolist(), strict=True)])
    return RowMemories.laid(base, hidden, own)


@pytest.fixture
def changed():
    """A model, a base, memories that differ from it, and where."""

    def make(options):
        model = tiny_model(**options)
        text = random_tokens(1, 90)[0]
        memories, ranges = [model.memorize([text, text[:7]])], [range(0)]
        for start, stop in ((20, 25), (50, 51)):
            memory = model.memorize([text, text[:7]])
            ranges.append(edit(model, memory, start, stop, (text[start:stop] + 1) % 30))
            memories.append(memory)
        return model, memories[0], memories, ranges

    return make


@pytest.mark.parametrize("name", COMPOSABLE)
def test_each_row_reads_the_memory_that_it_would_have_alone(changed, name):
    model, base, memories, ranges = changed(MODEL_OPTIONS[name])
    rows = rows_of(model, base, memories, ranges)
    assert rows.num_chunks_of_all == base.num_chunks + max(map(len, ranges))
    question = random_tokens(3, 11, seed=5)
    with torch.no_grad():
        found = model(question, past_key_values=HSACache(model.config, memory=rows)).logits
        for row, memory in enumerate(memories):
            alone = model(question[row : row + 1], past_key_values=HSACache(model.config, memory=memory)).logits
            torch.testing.assert_close(found[row], alone[0], **EXACT)


def test_the_engine_answers_prompts_of_different_lengths_as_with_memories_of_their_own(changed):
    model, base, memories, ranges = changed({})
    rows = rows_of(model, base, memories, ranges)
    prompts = [random_tokens(1, length, seed=length)[0] for length in (2, 9, 14)]
    together = DecodingEngine(model, rows, batch=3, max_tokens=40)
    apart = DecodingEngine(model, memories, batch=3, max_tokens=40)
    assert together.generate(prompts, 20) == apart.generate(prompts, 20)
    torch.testing.assert_close(together.logits, apart.logits, **EXACT)


def test_what_rows_cannot_be_is_refused(changed):
    model, base, memories, ranges = changed({})
    rows = rows_of(model, base, memories, ranges)
    with pytest.raises(ValueError, match=r"hidden must be \(3, "):
        RowMemories(base, rows.hidden[:, 1:], rows.own)
    with pytest.raises(ValueError, match="3 memories for batch=2"):
        DecodingEngine(model, rows, batch=2)
    engine = DecodingEngine(model, rows, batch=3, max_tokens=12)
    with pytest.raises(ValueError, match="read together; use stream or generate"):
        engine.start(0, torch.tensor([1]))
    with pytest.raises(ValueError, match="no document to continue"):
        engine.generate([torch.tensor([1])] * 3, 2, continue_document=True)
    with pytest.raises(ValueError, match="1 to 12 tokens here, got 1 to 13"):
        engine.generate([torch.tensor([1]), torch.tensor([1]), torch.arange(13)], 2)
    ordered = tiny_model(fusion="stick_breaking")
    with pytest.raises(ValueError, match="fusion without order"):
        RowMemories(ordered.memorize(random_tokens(1, 9)[0]), rows.hidden, ChunkTensors(*rows.own))
