"""Edits of many documents, of open ones and of merged memories, and how far a change may reach (fact 6)."""

import pytest
import torch

from hsa_ultralong.inference import append, edit, last_logits
from hsa_ultralong.inference.editor import plan_edit
from hsa_ultralong.memory.chunk_memory import ChunkMemory
from hsa_ultralong.testing.factories import MODEL_OPTIONS, random_tokens, tiny_model

EXACT = {"rtol": 1e-10, "atol": 1e-11}
SIZE = 4


def document(length, seed=0):
    return random_tokens(1, length, seed=seed)[0]


def changed(tokens, start, stop):
    other = tokens.clone()
    other[start:stop] = (other[start:stop] + 5) % 37
    return other


def used(memory):
    """Keys, values and landmarks of slots that hold a token."""
    present = (torch.arange(memory.chunk_size) < memory.lengths[..., None]).flatten(1)
    return memory.k[present], memory.v[present], memory.landmarks


def assert_same(one, other):
    for a, b in zip(used(one), used(other), strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    for a, b in zip(one.documents, other.documents, strict=True):
        assert torch.equal(a.tokens, b.tokens)


@pytest.mark.parametrize("position", [0, 3, 4, 17, 40, 59])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 1}, {"num_lower_layers": 1}, {"sliding_window": 9}])
def test_exactly_the_chunks_of_fact_6_can_change(options, position):
    model, tokens = tiny_model(**options), document(62)
    config = model.config
    before = model.memorize(tokens)
    after = model.memorize(changed(tokens, position, position + 1))
    plan = plan_edit(config, len(tokens), position, position + 1, 1)
    stated = range(plan.first, plan.new_stop)
    differs = (before.landmarks - after.landmarks).abs().amax((0, 2, 3)) > 1e-12
    moved = differs.nonzero().flatten().tolist()
    assert set(moved) <= set(stated) and moved[0] == stated[0]
    # the bound is tight: with random weights every chunk in reach moves
    assert moved == list(stated)
    assert stated[-1] == min(15, (position + config.num_lower_layers * (config.sliding_window - 1)) // SIZE)


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_an_edit_of_one_of_several_documents_equals_rebuilding_all(number):
    model = tiny_model()
    parts = [document(length, seed) for seed, length in enumerate((22, 3, 16, 9))]
    memory, other = model.memorize(parts), [part.clone() for part in parts]
    before = [part.clone() for part in memory.tensors]
    other[number] = changed(parts[number], 1, 3)
    chunks = edit(model, memory, 1, 3, other[number][1:3], document=number)
    assert_same(memory, model.memorize(other))
    first = memory.documents[number].first_chunk
    outside = [i for i in range(memory.num_chunks) if i - first not in chunks]
    assert torch.equal(before[2][:, outside], memory.landmarks[:, outside])
    for old, new in ((before[0], memory.k), (before[1], memory.v)):
        assert torch.equal(old.unflatten(1, (-1, SIZE))[:, outside], new.unflatten(1, (-1, SIZE))[:, outside])


@pytest.mark.parametrize("options", ["default", "hsa_only_layer", "mixture_of_experts", "window_of_one", "all_at_once"])
@pytest.mark.parametrize(("length", "start", "stop"), [(3, 0, 1), (4, 3, 4), (40, 0, 40), (43, 20, 30), (43, 41, 43)])
@torch.no_grad()
def test_an_edited_open_document_goes_on_like_the_whole(options, length, start, stop):
    model, tokens = tiny_model(**MODEL_OPTIONS[options]), document(length)
    memory, other = model.memorize(tokens, close=False), changed(tokens, start, stop)
    edit(model, memory, start, stop, other[start:stop])
    full = model(other[None], use_cache=False).logits[0]
    count = min(SIZE, length)
    torch.testing.assert_close(last_logits(model, memory, count), full[-count:], **EXACT)
    more = document(9, seed=1)
    append(model, memory, more, document=0, close=False)
    full = model(torch.cat((other, more))[None], use_cache=False).logits[0]
    torch.testing.assert_close(last_logits(model, memory, SIZE), full[-SIZE:], **EXACT)


def test_editing_a_closed_document_reaches_the_logits_of_the_open_one():
    model, first, second = tiny_model(chunk_topk=100), document(22), document(13, seed=1)
    memory, other = model.memorize([first, second], close=False), changed(first, 4, 9)
    before = last_logits(model, memory, SIZE)
    edit(model, memory, 4, 9, other[4:9], document=0)
    rebuilt = model.memorize([other, second], close=False)
    torch.testing.assert_close(last_logits(model, memory, SIZE), last_logits(model, rebuilt, SIZE), **EXACT)
    assert not torch.allclose(before, last_logits(model, memory, SIZE))


def test_many_edits_equal_one_rebuild():
    model, tokens = tiny_model(), document(53)
    memory, other = model.memorize(tokens), tokens.clone()
    for start, stop in ((50, 53), (0, 2), (20, 21), (19, 30), (52, 53), (7, 8)):
        other = changed(other, start, stop)
        edit(model, memory, start, stop, other[start:stop])
    assert_same(memory, model.memorize(other))


def test_editing_back_is_the_original_again_bit_for_bit_outside_and_exactly_inside():
    model, tokens = tiny_model(), document(51)
    memory, original = model.memorize(tokens), model.memorize(tokens)
    for start, stop in ((0, 1), (23, 31), (48, 51)):
        other = changed(tokens, start, stop)
        edit(model, memory, start, stop, other[start:stop])
        edit(model, memory, start, stop, tokens[start:stop])
    assert_same(memory, original)


def test_a_merged_memory_is_edited_without_touching_its_sources():
    model, parts = tiny_model(), [document(14), document(9, seed=1)]
    sources = [model.memorize(part) for part in parts]
    merged, other = ChunkMemory.concat(sources), changed(parts[1], 2, 5)
    edit(model, merged, 2, 5, other[2:5], document=1)
    assert_same(merged, model.memorize([parts[0], other]))
    for source, part in zip(sources, parts, strict=True):
        assert_same(source, model.memorize(part))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, 20, []), {}, "delete the document"),
        ((-1, 1, [1, 2]), {}, "not a range"),
        ((19, 21, [1, 2]), {}, "not a range"),
        ((0, 1, [1]), {"document": -1}, "does not exist"),
        ((0, 1, [2**32]), {}, r"0\.\.36"),
        ((0, 1, [1.0]), {}, "token ids"),
    ],
)
def test_impossible_edits_change_nothing(arguments, options, message):
    model, tokens = tiny_model(), document(20)
    memory = model.memorize(tokens)
    before = [part.clone() for part in memory.tensors]
    with pytest.raises(ValueError, match=message):
        edit(model, memory, *arguments, **options)
    assert torch.equal(memory.documents[0].tokens, tokens.int())
    assert all(torch.equal(a, b) for a, b in zip(before, memory.tensors, strict=True))


def test_another_models_memory_is_not_edited():
    memory = tiny_model(seed=1).memorize(document(20))
    with pytest.raises(ValueError, match="another model"):
        edit(tiny_model(), memory, 0, 1, [1])
