"""Masked tokens anywhere: a row equals itself without them, in every way of running the model."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from hsa_ultralong.models import HSACache
from hsa_ultralong.testing.factories import MODEL_OPTIONS, encode_documents, generator, random_tokens, tiny_model

EXACT = {"rtol": 1e-10, "atol": 1e-10}
GREEDY = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}


def random_mask(batch, length, *, seed=0, masked=0.4):
    """(B, T) with zeros anywhere; row 0 is padded on both sides."""
    mask = (torch.rand(batch, length, generator=generator(seed)) >= masked).long()
    mask[0, :2] = mask[0, -3:] = 0
    mask[:, length // 2] = 1
    return mask


@torch.no_grad()
def alone(model, tokens, mask, library=None):
    """Logits of the real tokens of every row, each row without its masked tokens."""
    caches = [None if library is None else HSACache(model.config, library) for _ in tokens]
    return [
        model(row[kept.bool()][None], past_key_values=cache).logits[0] for row, kept, cache in zip(tokens, mask, caches)
    ]


@torch.no_grad()
def in_pieces(model, tokens, mask, cuts, library=None):
    cache, parts = HSACache(model.config, library), []
    for start, stop in itertools.pairwise([0, *cuts, tokens.shape[1]]):
        parts.append(model(tokens[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache).logits)
        assert cache.get_seq_length() == stop
    return torch.cat(parts, 1)


def assert_rows_equal(logits, mask, expected):
    for b, row in enumerate(expected):
        torch.testing.assert_close(logits[b, mask[b].bool()], row, **EXACT)


@pytest.mark.parametrize("options", MODEL_OPTIONS)
def test_a_row_with_masked_tokens_equals_itself_without_them(options):
    model, tokens, mask = tiny_model(**MODEL_OPTIONS[options]), random_tokens(3, 29), random_mask(3, 29)
    expected = alone(model, tokens, mask)
    with torch.no_grad():
        whole = model(tokens, attention_mask=mask, use_cache=False).logits
    assert_rows_equal(whole, mask, expected)
    for cuts in ([], [5, 11, 12, 20], range(1, 29)):
        assert_rows_equal(in_pieces(model, tokens, mask, cuts), mask, expected)


@settings(max_examples=15, phases=[Phase.generate])
@given(st.data())
def test_any_mask_and_any_cuts_change_nothing(data):
    model, length = tiny_model(), data.draw(st.integers(2, 26))
    rows = data.draw(st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=1, max_size=3))
    mask, tokens = torch.tensor(rows), random_tokens(len(rows), length)
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=4)))
    logits = in_pieces(model, tokens, mask, cuts)
    for b in range(len(rows)):
        if bool(mask[b].any()):
            assert_rows_equal(logits[b : b + 1], mask[b : b + 1], alone(model, tokens[b : b + 1], mask[b : b + 1]))


def test_masked_tokens_beyond_the_windows_and_the_rewind_change_nothing():
    model, tokens, mask = tiny_model(), random_tokens(2, 300), torch.ones(2, 300, dtype=torch.long)
    mask[0, 20:150] = mask[1, 100:] = 0
    assert_rows_equal(in_pieces(model, tokens, mask, [10, 160, 161]), mask, alone(model, tokens, mask))


def test_a_masked_token_changes_nothing():
    model, tokens, mask = tiny_model(), random_tokens(3, 23), random_mask(3, 23)
    other = torch.where(mask == 1, tokens, (tokens + 5) % 37)
    with torch.no_grad():
        assert torch.equal(model(tokens, attention_mask=mask).logits, model(other, attention_mask=mask).logits)


def test_a_masked_column_repeats_the_last_real_token_and_is_zero_before_the_first():
    model, tokens, mask = tiny_model(), random_tokens(1, 8), torch.tensor([[0, 0, 1, 1, 0, 1, 0, 0]])
    with torch.no_grad():
        logits = model(tokens, attention_mask=mask).logits[0]
    assert not bool(logits[:2].any())
    for column, source in ((4, 3), (6, 5), (7, 5)):
        assert torch.equal(logits[column], logits[source])


def test_masked_rows_read_a_library():
    model, tokens, mask = tiny_model(), random_tokens(3, 19), random_mask(3, 19)
    library = encode_documents(model, [random_tokens(1, n, seed=n)[0] for n in (9, 20)])
    expected = alone(model, tokens, mask, library)
    assert_rows_equal(in_pieces(model, tokens, mask, [7, 8], library), mask, expected)


@pytest.mark.parametrize("pool", ["attended", "compete"])
def test_masked_rows_pool_like_their_rows_without_masked_tokens(pool):
    model, tokens, mask = tiny_model(), random_tokens(2, 25), random_mask(2, 25)
    # both rows keep as many tokens, so that the rows without masked tokens make one batch
    mask[1] = mask[0].flip(0)
    kept = torch.stack([row[m.bool()] for row, m in zip(tokens, mask)])
    with torch.no_grad():
        expected = model(kept, pool_memory=pool, use_cache=False).logits
        logits = model(tokens, attention_mask=mask, pool_memory=pool, use_cache=False).logits
    assert_rows_equal(logits, mask, expected)


@pytest.mark.parametrize("training", [False, True])
def test_loss_and_gradients_of_masked_rows_are_those_of_the_rows_without_masked_tokens(training):
    model, tokens, mask = tiny_model(), random_tokens(3, 23), random_mask(3, 23)
    model.train(training)
    labels = tokens.masked_fill(mask == 0, -100)
    model(tokens, attention_mask=mask, labels=labels).loss.backward()
    found = {name: part.grad.clone() for name, part in model.named_parameters()}
    model.zero_grad()
    rows = [row[m.bool()][None] for row, m in zip(tokens, mask)]
    count = sum(row.shape[1] - 1 for row in rows)
    sum(model(row, labels=row, num_items_in_batch=count).loss for row in rows).backward()
    for name, part in model.named_parameters():
        torch.testing.assert_close(found[name], part.grad, **EXACT)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_after_masked_prompts_is_that_of_the_prompts_without_masked_tokens(use_cache, beams):
    model, tokens, mask = tiny_model(), random_tokens(3, 19), random_mask(3, 19)
    options = {**GREEDY, "use_cache": use_cache, "num_beams": beams}
    together = model.generate(tokens, attention_mask=mask, **options)[:, 19:]
    for b, row in enumerate(tokens):
        prompt = row[mask[b].bool()][None]
        single = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, prompt.shape[1] :]
        assert torch.equal(together[b], single)


def test_a_second_turn_after_right_padded_rows_is_exact():
    model, first, second = tiny_model(), random_tokens(2, 17), random_tokens(2, 12, seed=1)
    mask = torch.ones(2, 29, dtype=torch.long)
    mask[1, 9:17] = mask[0, 25:] = 0
    cache = HSACache(model.config)
    with torch.no_grad():
        model(first, attention_mask=mask[:, :17], past_key_values=cache)
    tokens = torch.cat((first, second), 1)
    out = model.generate(tokens, attention_mask=mask, past_key_values=cache, **GREEDY)[:, 29:]
    for b, row in enumerate(tokens):
        prompt = row[mask[b].bool()][None]
        single = model.generate(prompt, attention_mask=torch.ones_like(prompt), **GREEDY)
        assert torch.equal(out[b], single[0, prompt.shape[1] :])


def test_masked_questions_to_a_memory_are_exact():
    model, tokens, mask = tiny_model(), random_tokens(3, 15), random_mask(3, 15)
    memory = model.memorize(random_tokens(1, 50, seed=3)[0])
    together = model.generate(tokens, memory=memory, attention_mask=mask, **GREEDY)[:, 15:]
    for b, row in enumerate(tokens):
        prompt = row[mask[b].bool()][None]
        single = model.generate(prompt, memory=memory, attention_mask=torch.ones_like(prompt), **GREEDY)
        assert torch.equal(together[b], single[0, prompt.shape[1] :])


@pytest.mark.parametrize("remove", [2, 5])
def test_a_cache_with_masked_tokens_can_be_cropped_reordered_and_repeated(remove):
    model, tokens, more = tiny_model(), random_tokens(2, 26), random_tokens(4, 6, seed=1)
    mask = random_mask(2, 26)
    mask[:, 20:] = 1
    cache = HSACache(model.config)
    with torch.no_grad():
        for start, stop in ((0, 13), (13, 26)):
            model(tokens[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache)
        cache.crop(-remove)
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.batch_repeat_interleave(2)
        rows, row_masks = tokens[[1, 1, 0, 0], :-remove], mask[[1, 1, 0, 0], :-remove]
        logits = model(more, past_key_values=cache).logits
    whole = torch.cat((rows, more), 1)
    expected = alone(model, whole, torch.cat((row_masks, torch.ones_like(more)), 1))
    for b in range(4):
        torch.testing.assert_close(logits[b], expected[b][-6:], **EXACT)


def test_tokens_cannot_be_taken_back_across_masked_ones():
    model, mask = tiny_model(), torch.ones(1, 12, dtype=torch.long)
    mask[0, 8] = 0
    cache = HSACache(model.config)
    with torch.no_grad():
        model(random_tokens(1, 12), attention_mask=mask, past_key_values=cache)
    cache.crop(-3)
    with pytest.raises(ValueError, match="together with masked ones"):
        cache.crop(-1)


def test_masks_of_any_integer_or_bool_type_mean_the_same():
    model, tokens, mask = tiny_model(), random_tokens(2, 11), random_mask(2, 11)
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask).logits
        for dtype in (torch.bool, torch.int32, torch.float32, torch.bfloat16):
            assert torch.equal(model(tokens, attention_mask=mask.to(dtype)).logits, expected)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.zeros(1, 1, 5, 5), ValueError, "segment_ids"),
        (torch.tensor([[1, 1, 2, 2, 2]]), ValueError, "segment_ids"),
        (torch.tensor([[0.0, 0.0, -1e9, 0.0, 0.0]]), ValueError, "added to scores"),
        (torch.zeros(1, 5), ValueError, "added to scores"),
        ({"full_attention": None}, TypeError, "must be a tensor"),
        (torch.ones(1, 4), ValueError, r"must be \(1, 5\)"),
    ],
)
def test_other_masks_are_refused(mask, error, message):
    with pytest.raises(error, match=message):
        tiny_model()(random_tokens(1, 5), attention_mask=mask)


def test_a_mask_that_contradicts_the_cache_is_refused():
    model, tokens = tiny_model(), random_tokens(1, 9)
    cache = HSACache(model.config)
    with torch.no_grad():
        model(tokens[:, :6], attention_mask=torch.tensor([[0, 1, 1, 0, 1, 1]]), past_key_values=cache)
    for mask in ([[1] * 9], [[0, 1, 1, 1, 0, 1, 1, 1, 1]]):
        with pytest.raises(ValueError, match="other cached tokens"):
            model(tokens[:, 6:], attention_mask=torch.tensor(mask), past_key_values=cache)
