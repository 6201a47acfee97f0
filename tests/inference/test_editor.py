"""Edits equal rebuilding and touch no other chunks."""

import pytest
import torch

from hsa_ultralong.inference import edit, last_logits
from hsa_ultralong.testing.factories import MODEL_OPTIONS, random_tokens, tiny_model

EXACT = {"rtol": 1e-10, "atol": 1e-11}


def changed(tokens, start, stop):
    other = tokens.clone()
    other[start:stop] = (other[start:stop] + 5) % 37
    return other


def used(memory):
    """What slots of tokens hold."""
    present = (torch.arange(memory.chunk_size) < memory.lengths[..., None]).flatten(1)
    return memory.k[present], memory.v[present], memory.landmarks


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (0, 9), (20, 27), (33, 34), (55, 62), (61, 62), (0, 62)])
@pytest.mark.parametrize("options", ["default", "mixture_of_experts", "window_of_one", "two_encoder_layers"])
def test_edit_equals_rebuild(options, start, stop):
    model, tokens = tiny_model(**MODEL_OPTIONS[options]), random_tokens(1, 62)[0]
    memory, other = model.memorize(tokens), changed(tokens, start, stop)
    chunks = edit(model, memory, start, stop, other[start:stop])
    for a, b in zip(used(memory), used(model.memorize(other)), strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    reach = model.config.num_lower_layers * (model.config.sliding_window - 1)
    assert chunks == range(start // 4, min(16, (stop - 1 + reach) // 4 + 1))
    assert torch.equal(memory.documents[0].tokens, other.int())


def test_chunks_outside_the_returned_range_are_bit_identical():
    model, tokens = tiny_model(), random_tokens(1, 80)[0]
    memory = model.memorize(tokens)
    before = [part.clone() for part in memory.tensors]
    chunks = edit(model, memory, 30, 33, [1, 2, 3])
    outside = [i for i in range(memory.num_chunks) if i not in chunks]
    assert torch.equal(before[2][:, outside], memory.landmarks[:, outside])
    slots = [slot for i in outside for slot in range(4 * i, 4 * i + 4)]
    assert torch.equal(before[0][:, slots], memory.k[:, slots]) and torch.equal(before[1][:, slots], memory.v[:, slots])
    assert not torch.equal(before[2], memory.landmarks)


def test_editing_back_restores_the_memory():
    model, tokens = tiny_model(), random_tokens(1, 70)[0]
    memory, untouched = model.memorize(tokens), model.memorize(tokens)
    edit(model, memory, 31, 40, [3] * 9)
    edit(model, memory, 31, 40, tokens[31:40])
    for a, b in zip(used(memory), used(untouched), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_editing_the_second_document_leaves_the_first_alone():
    model = tiny_model()
    first, second = random_tokens(1, 21)[0], random_tokens(1, 30, seed=1)[0]
    memory, other = model.memorize([first, second]), changed(second, 10, 12)
    edit(model, memory, 10, 12, other[10:12], document=1)
    for a, b in zip(used(memory), used(model.memorize([first, other])), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize(("start", "stop"), [(5, 6), (55, 62), (61, 62)])
@torch.no_grad()
def test_an_open_document_can_be_edited_and_continued(start, stop):
    model, tokens = tiny_model(), random_tokens(1, 62)[0]
    memory, other = model.memorize(tokens, close=False), changed(tokens, start, stop)
    edit(model, memory, start, stop, other[start:stop])
    full = model(other[None], use_cache=False).logits[0]
    torch.testing.assert_close(last_logits(model, memory, 4), full[-4:], **EXACT)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((5, 3, [1]), {}, "not a range"),
        ((0, 99, [1]), {}, "not a range"),
        ((0, 1, [99]), {}, "0..36"),
        ((0, 1, [1]), {"document": 2}, "does not exist"),
    ],
)
def test_bad_edits_are_refused_and_change_nothing(arguments, options, message):
    model = tiny_model()
    memory = model.memorize(random_tokens(1, 20)[0])
    before = [part.clone() for part in memory.tensors]
    with pytest.raises(ValueError, match=message):
        edit(model, memory, *arguments, **options)
    assert all(torch.equal(a, b) for a, b in zip(before, memory.tensors, strict=True))
