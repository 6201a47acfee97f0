"""HSACache: crop, reorder, repeat, select, reset, and bytes per token (fact 7)."""

from __future__ import annotations

import pytest
import torch

from hsa_ultralong.models import HSACache
from hsa_ultralong.models.cache_hsa import REWIND
from hsa_ultralong.nn.rotary import rotary_table
from hsa_ultralong.testing.factories import MODEL_OPTIONS, random_tokens, tiny_model

EXACT = {"rtol": 1e-10, "atol": 1e-10}


@torch.no_grad()
def read(model, tokens, cache, mask=None):
    return model(tokens, past_key_values=cache, attention_mask=mask).logits


@torch.no_grad()
def parallel(model, tokens):
    return model(tokens, use_cache=False).logits


@pytest.mark.parametrize("options", ["default", "hsa_only_layer", "window_of_one", "all_at_once"])
@pytest.mark.parametrize(("length", "remove"), [(9, 1), (9, 5), (22, 6), (90, 3), (90, 64), (9, 9)])
def test_cropped_tokens_are_as_if_never_read(options, length, remove):
    model, tokens, other = tiny_model(**MODEL_OPTIONS[options]), random_tokens(2, length), random_tokens(2, 11, seed=1)
    cache = HSACache(model.config)
    read(model, tokens[:, :-1], cache)
    read(model, tokens[:, -1:], cache)
    cache.crop(-remove)
    assert cache.get_seq_length() == length - remove
    kept = torch.cat((tokens[:, : length - remove], other), 1)
    expected = parallel(model, kept)[:, length - remove :]
    torch.testing.assert_close(read(model, other, cache), expected, **EXACT)


def test_crop_accepts_the_length_to_keep_and_ignores_zero():
    model, tokens = tiny_model(), random_tokens(1, 9)
    cache = HSACache(model.config)
    read(model, tokens, cache)
    cache.crop(0)
    assert cache.get_seq_length() == 9
    cache.crop(20)
    assert cache.get_seq_length() == 9
    cache.crop(6)
    assert cache.get_seq_length() == 6


def test_crop_with_left_padding_keeps_every_rows_grid():
    model, rows = tiny_model(), [random_tokens(1, n, seed=n)[0] for n in (13, 7)]
    tokens, mask = torch.zeros(2, 13, dtype=torch.long), torch.zeros(2, 13, dtype=torch.long)
    for b, row in enumerate(rows):
        tokens[b, 13 - len(row) :], mask[b, 13 - len(row) :] = row, 1
    cache = HSACache(model.config)
    read(model, tokens, cache, mask)
    cache.crop(-3)
    more = random_tokens(2, 8, seed=5)
    logits = read(model, more, cache, torch.cat((mask[:, :10], torch.ones_like(more)), 1))
    for b, row in enumerate(rows):
        expected = parallel(model, torch.cat((row[:-3], more[b]))[None])[:, len(row) - 3 :]
        torch.testing.assert_close(logits[b], expected[0], **EXACT)


def test_crop_refuses_more_than_it_kept_and_changes_nothing_then():
    model, tokens = tiny_model(), random_tokens(1, 200)
    cache = HSACache(model.config)
    read(model, tokens[:, :190], cache)
    with pytest.raises(ValueError, match=f"at most {REWIND} tokens"):
        cache.crop(-REWIND - 1)
    torch.testing.assert_close(read(model, tokens[:, 190:], cache), parallel(model, tokens)[:, 190:], **EXACT)


def test_a_second_crop_beyond_the_kept_keys_is_refused_and_changes_nothing():
    model, tokens = tiny_model(sliding_window=90, hsa_sliding_window=3), random_tokens(1, 80)
    cache = HSACache(model.config)
    read(model, tokens[:, :70], cache)
    cache.crop(-64)
    with pytest.raises(ValueError, match="no longer hold"):
        cache.crop(-3)
    torch.testing.assert_close(read(model, tokens[:, 6:], cache), parallel(model, tokens)[:, 6:], **EXACT)


@pytest.mark.parametrize("has_padding", [False, True])
def test_reordered_repeated_and_selected_rows_continue_like_their_origin(has_padding):
    model, tokens, more = tiny_model(), random_tokens(3, 11), random_tokens(6, 7, seed=1)
    mask = torch.ones_like(tokens)
    if has_padding:
        mask[1, :5] = 0
    operations = {
        "reorder_cache": (torch.tensor([2, 0, 0]), [2, 0, 0]),
        "batch_repeat_interleave": (2, [0, 0, 1, 1, 2, 2]),
        "batch_select_indices": (torch.tensor([1, 2]), [1, 2]),
    }
    for name, (argument, origin) in operations.items():
        cache = HSACache(model.config)
        read(model, tokens, cache, mask)
        getattr(cache, name)(argument)
        new = more[: len(origin)]
        logits = read(model, new, cache, torch.cat((mask[origin], torch.ones_like(new)), 1))
        for b, row in enumerate(origin):
            whole = torch.cat((tokens[row][mask[row] == 1], new[b]))
            torch.testing.assert_close(logits[b], parallel(model, whole[None])[0, -7:], **EXACT)


def test_reordering_moves_rows_and_leaves_the_original_batch_size():
    model, tokens = tiny_model(), random_tokens(2, 9)
    cache = HSACache(model.config)
    read(model, tokens, cache)
    before = cache.own_memory.k.clone()
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(cache.own_memory.k, before[[1, 0]])
    assert cache.get_seq_length() == 9 and cache.pending.shape[0] == 2


def test_a_reset_cache_starts_again():
    model, tokens = tiny_model(), random_tokens(2, 13)
    cache = HSACache(model.config)
    read(model, tokens, cache)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.own_memory is None and cache.pending is None
    torch.testing.assert_close(read(model, tokens, cache), parallel(model, tokens), **EXACT)


def test_windows_and_open_chunk_stay_bounded_while_memory_grows():
    model, tokens = tiny_model(), random_tokens(1, 400)
    cache = HSACache(model.config)
    for start in range(0, 400, 50):
        read(model, tokens[:, start : start + 50], cache)
    assert cache.own_memory.num_chunks == 100
    assert cache.pending.shape[1] == 4 - 1 + REWIND
    assert [cache.state(i).length for i in range(6)] == [
        4 + REWIND,
        4 + REWIND,
        2 + REWIND,
        4 + REWIND,
        2 + REWIND,
        4 + REWIND,
    ]


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("layers", [1, 3])
def test_bytes_per_token_do_not_depend_on_the_number_of_hsa_layers(groups, layers):
    model = tiny_model(num_upper_groups=groups, num_layers_per_group=layers, dtype=torch.bfloat16)
    cache = HSACache(model.config)
    read(model, random_tokens(1, 40), cache)
    bookkeeping = 3 * 4 * cache.own_memory.num_chunks
    # 2 * Hkv * D + Hr * R / S numbers of 2 bytes
    assert cache.own_memory.num_bytes - bookkeeping == 40 * 2 * (2 * 1 * 4 + 8 / 4)


def test_fp32_decoding_is_as_exact_at_the_end_as_at_the_start():
    # angles come from the index inside the window, so the cached length never enters them
    model, exact = tiny_model(dtype=torch.float32, chunk_topk=1000), tiny_model(chunk_topk=1000)
    tokens = random_tokens(1, 300)
    cache = HSACache(model.config)
    logits = torch.cat([read(model, tokens[:, i : i + 60], cache) for i in range(0, 300, 60)], 1)
    error = (logits.double() - parallel(exact, tokens)).abs().amax((0, 2))
    assert float(error[200:].max()) < 5 * float(error[:100].max()) + 1e-6


def test_a_call_after_a_million_tokens_forms_angles_from_its_window_only(monkeypatch):
    from hsa_ultralong.models import modeling_hsa

    lengths = []
    monkeypatch.setattr(modeling_hsa, "rotary_table", lambda n, *rest: lengths.append(n) or rotary_table(n, *rest))
    model, tokens = tiny_model(), random_tokens(1, 130)
    cache = HSACache(model.config)
    near = read(model, tokens, cache)
    far_cache = HSACache(model.config)
    # a row whose grid has counted a million chunks of nothing: same windows, same text
    far_cache.advance(4_000_000)
    far_cache.padding = [4_000_000]
    far = read(model, tokens, far_cache)
    torch.testing.assert_close(far, near, **EXACT)
    read(model, tokens[:, :1], cache)
    assert lengths == [130, 130, 4 + REWIND + 1]


def test_a_packed_row_leaves_no_cache_that_would_continue_wrongly():
    model, tokens = tiny_model(), random_tokens(1, 8)
    segments = torch.tensor([[0] * 4 + [1] * 4])
    with torch.no_grad():
        cache = model(tokens, segment_ids=segments, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="packed row"):
        read(model, tokens, cache)
    cache.reset()
    torch.testing.assert_close(read(model, tokens, cache), parallel(model, tokens), **EXACT)


def test_the_former_name_of_the_memory_is_taken_with_a_warning():
    model = tiny_model()
    memory = model.memorize(torch.arange(8))
    with pytest.warns(FutureWarning, match="called memory now"):
        assert HSACache(model.config, library=memory).memory is memory
    with pytest.raises(ValueError, match="give memory alone"):
        HSACache(model.config, memory, library=memory)
