"""One forward in many forms: parallel, decoded, segmented, padded, batched; and causality."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from hsa_ultralong.models import HSACache
from hsa_ultralong.testing.factories import MODEL_OPTIONS, encode_documents, random_tokens, tiny_model

EXACT = {"rtol": 1e-10, "atol": 1e-10}


@torch.no_grad()
def parallel(model, tokens, **options):
    return model(tokens, use_cache=False, **options).logits


@torch.no_grad()
def in_pieces(model, tokens, cuts, mask=None, cache=None):
    """Logits of the pieces between the cuts, one cache; `mask` covers all tokens."""
    cache = HSACache(model.config) if cache is None else cache
    edges, parts = [0, *cuts, tokens.shape[1]], []
    for start, stop in itertools.pairwise(edges):
        part_mask = None if mask is None else mask[:, :stop]
        parts.append(model(tokens[:, start:stop], attention_mask=part_mask, past_key_values=cache).logits)
        assert cache.get_seq_length() == stop
    return torch.cat(parts, 1)


def padded(rows, length, side="left", fill=5):
    """Rows of tokens (n,) as one batch of `length` with a mask; padding holds a real token id."""
    tokens, mask = torch.full((len(rows), length), fill), torch.zeros(len(rows), length, dtype=torch.long)
    for b, row in enumerate(rows):
        part = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        tokens[b, part], mask[b, part] = row, 1
    return tokens, mask


@pytest.mark.parametrize("options", MODEL_OPTIONS)
def test_decode_matches_parallel(options):
    model, tokens = tiny_model(**MODEL_OPTIONS[options]), random_tokens(2, 27)
    torch.testing.assert_close(in_pieces(model, tokens, range(1, 27)), parallel(model, tokens), **EXACT)


@pytest.mark.parametrize("options", MODEL_OPTIONS)
def test_segments_with_a_cache_match_parallel(options):
    model, tokens = tiny_model(**MODEL_OPTIONS[options]), random_tokens(2, 27)
    expected = parallel(model, tokens)
    for cuts in ([8, 16, 24], [3, 4, 17], [26], [1, 2, 13]):
        torch.testing.assert_close(in_pieces(model, tokens, cuts), expected, **EXACT)


@pytest.mark.parametrize("options", MODEL_OPTIONS)
def test_left_padding_changes_nothing_with_and_without_a_cache(options):
    model, rows = tiny_model(**MODEL_OPTIONS[options]), [random_tokens(1, n, seed=n)[0] for n in (19, 14, 3)]
    tokens, mask = padded(rows, 19)
    whole = parallel(model, tokens, attention_mask=mask)
    pieces = in_pieces(model, tokens, [17, 18], mask)
    for b, row in enumerate(rows):
        expected = parallel(model, row[None])[0]
        torch.testing.assert_close(whole[b, 19 - len(row) :], expected, **EXACT)
        torch.testing.assert_close(pieces[b, 19 - len(row) :], expected, **EXACT)


@pytest.mark.parametrize("options", MODEL_OPTIONS)
def test_no_token_sees_the_future(options):
    model, length = tiny_model(**MODEL_OPTIONS[options]), 21
    base = random_tokens(1, length)
    # row t keeps the tokens up to t and changes all later ones
    other = (base + 1 + random_tokens(1, length, vocab_size=30, seed=1)) % 37
    kept = torch.ones(length, length).tril().bool()
    logits = parallel(model, torch.where(kept, base, other))
    expected = parallel(model, base)
    for t in range(length):
        torch.testing.assert_close(logits[t, : t + 1], expected[0, : t + 1], rtol=0, atol=1e-12)
    assert float((logits[0, 1:] - expected[0, 1:]).abs().min(0).values.max()) > 0


@settings(max_examples=10, phases=[Phase.generate])
@given(st.data())
def test_any_cut_of_any_padded_batch_matches_parallel(data):
    model = tiny_model()
    length = data.draw(st.integers(1, 24))
    lengths = data.draw(st.lists(st.integers(1, length), min_size=1, max_size=3))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, length - 1)), max_size=4)) - {length})
    rows = [random_tokens(1, n, seed=n)[0] for n in lengths]
    tokens, mask = padded(rows, length)
    logits = in_pieces(model, tokens, cuts, mask)
    for b, row in enumerate(rows):
        torch.testing.assert_close(logits[b, length - len(row) :], parallel(model, row[None])[0], **EXACT)


def test_left_padding_longer_than_the_first_segments_changes_nothing():
    model, rows = tiny_model(), [random_tokens(1, n, seed=n)[0] for n in (20, 7)]
    tokens, mask = padded(rows, 20)
    for cuts in ([4, 8, 12, 16], [5, 14], [13]):
        logits = in_pieces(model, tokens, cuts, mask)
        for b, row in enumerate(rows):
            torch.testing.assert_close(logits[b, 20 - len(row) :], parallel(model, row[None])[0], **EXACT)


def test_right_padding_changes_nothing():
    model, rows = tiny_model(), [random_tokens(1, n, seed=n)[0] for n in (19, 14, 3)]
    tokens, mask = padded(rows, 19, side="right")
    for logits in (parallel(model, tokens, attention_mask=mask), in_pieces(model, tokens, [], mask)):
        for b, row in enumerate(rows):
            torch.testing.assert_close(logits[b, : len(row)], parallel(model, row[None])[0], **EXACT)


def test_content_of_padding_does_not_matter():
    model, rows = tiny_model(), [random_tokens(1, n, seed=n)[0] for n in (12, 5)]
    first, mask = padded(rows, 12)
    second, _ = padded(rows, 12, fill=9)
    left, right = parallel(model, first, attention_mask=mask), parallel(model, second, attention_mask=mask)
    torch.testing.assert_close(left[1, 7:], right[1, 7:], **EXACT)


def test_a_batch_equals_its_rows_alone():
    model, tokens = tiny_model(), random_tokens(4, 19)
    for logits in (parallel(model, tokens), in_pieces(model, tokens, [6, 11])):
        for b in range(4):
            torch.testing.assert_close(logits[b], parallel(model, tokens[b : b + 1])[0], **EXACT)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9])
def test_short_inputs_decode_like_parallel(length):
    model, tokens = tiny_model(), random_tokens(2, length)
    torch.testing.assert_close(in_pieces(model, tokens, range(1, length)), parallel(model, tokens), **EXACT)


def test_a_long_sequence_decodes_like_parallel_beyond_the_rewind_and_the_windows():
    model, tokens = tiny_model(), random_tokens(1, 150)
    cuts = [100, *range(101, 150)]
    torch.testing.assert_close(in_pieces(model, tokens, cuts), parallel(model, tokens), **EXACT)


def test_a_token_sees_a_chunk_only_after_its_last_token():
    # windows of one token: only memory carries information from one token to another
    model = tiny_model(sliding_window=1, hsa_sliding_window=1, chunk_topk=100)
    base = random_tokens(1, 16)
    changed = base.clone()
    changed[0, 0] = (changed[0, 0] + 1) % 37
    moved = (parallel(model, base) - parallel(model, changed))[0].abs().amax(-1)
    assert float(moved[0]) > 0 and bool((moved[1:4] == 0).all())
    assert float(moved[4:].min()) > 0


def test_with_every_chunk_selected_more_slots_change_nothing():
    tokens = random_tokens(2, 23)
    logits = [parallel(tiny_model(chunk_topk=topk), tokens) for topk in (5, 6, 1000)]
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


def test_selection_matters_when_fewer_chunks_are_kept():
    tokens = random_tokens(2, 23)
    few, all_chunks = (parallel(tiny_model(chunk_topk=topk), tokens) for topk in (1, 5))
    assert float((few - all_chunks).abs().max()) > 1e-3
    torch.testing.assert_close(few[:, :8], all_chunks[:, :8], **EXACT)


def test_inputs_embeds_equal_input_ids():
    model, tokens = tiny_model(), random_tokens(2, 11)
    with torch.no_grad():
        embedded = model(inputs_embeds=model.get_input_embeddings()(tokens), use_cache=False).logits
    assert torch.equal(embedded, parallel(model, tokens))


@pytest.mark.parametrize("keep", [1, 3])
def test_logits_to_keep_returns_the_last_ones(keep):
    model, tokens = tiny_model(), random_tokens(2, 11)
    torch.testing.assert_close(
        parallel(model, tokens, logits_to_keep=keep), parallel(model, tokens)[:, -keep:], **EXACT
    )
    chosen = torch.tensor([2, 7])
    torch.testing.assert_close(
        parallel(model, tokens, logits_to_keep=chosen), parallel(model, tokens)[:, chosen], **EXACT
    )


def test_loss_is_the_mean_cross_entropy_of_the_next_token():
    model, tokens = tiny_model(), random_tokens(2, 11)
    labels = tokens.clone()
    labels[0, :4] = -100
    out = model(tokens, labels=labels, use_cache=False)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected, **EXACT)
    trained = model.train()(tokens, labels=labels)
    torch.testing.assert_close(trained.loss, expected, **EXACT)
    assert trained.logits is None and trained.past_key_values is None
    counted = model(tokens, labels=labels, num_items_in_batch=100).loss
    torch.testing.assert_close(counted, expected * 17 / 100, **EXACT)


def test_the_order_of_a_librarys_documents_does_not_matter():
    model, tokens = tiny_model(), random_tokens(2, 9)
    documents = [random_tokens(1, n, seed=n)[0] for n in (7, 12, 2)]
    logits = [
        in_pieces(
            model, tokens, [5], cache=HSACache(model.config, encode_documents(model, [documents[i] for i in order]))
        )
        for order in ([0, 1, 2], [2, 0, 1])
    ]
    torch.testing.assert_close(logits[0], logits[1], **EXACT)
    assert float((logits[0] - parallel(model, tokens)).abs().max()) > 1e-3


def test_a_library_of_the_first_chunks_replaces_them_where_windows_do_not_reach():
    # every token sees itself only, so the text before it enters through memory alone
    model, tokens = tiny_model(sliding_window=1, hsa_sliding_window=1), random_tokens(1, 22)
    library = encode_documents(model, [tokens[0, :12]])
    continued = in_pieces(model, tokens[:, 12:], [3], cache=HSACache(model.config, library))
    torch.testing.assert_close(continued, parallel(model, tokens)[:, 12:], **EXACT)


@pytest.mark.parametrize("options", ["default", "stick_breaking", "two_retrieval_heads", "position_decay"])
def test_a_library_is_read_alike_by_prefill_and_decode_and_left_padded_rows(options):
    model, rows = tiny_model(**MODEL_OPTIONS[options]), [random_tokens(1, n, seed=n)[0] for n in (13, 6)]
    library = encode_documents(model, [random_tokens(1, n, seed=n)[0] for n in (9, 20)])
    tokens, mask = padded(rows, 13)
    whole = in_pieces(model, tokens, [], mask, HSACache(model.config, library))
    steps = in_pieces(model, tokens, range(1, 13), mask, HSACache(model.config, library))
    for b, row in enumerate(rows):
        alone = in_pieces(model, row[None], [], cache=HSACache(model.config, library))[0]
        torch.testing.assert_close(whole[b, 13 - len(row) :], alone, **EXACT)
        torch.testing.assert_close(steps[b, 13 - len(row) :], alone, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_decode_stays_close_to_fp64(dtype):
    tokens = random_tokens(2, 27)
    exact = parallel(tiny_model(chunk_topk=100), tokens)
    model = tiny_model(dtype=dtype, chunk_topk=100)
    whole, steps = parallel(model, tokens), in_pieces(model, tokens, range(1, 27))
    budget = float((whole.double() - exact).abs().max())
    assert budget < (1e-4 if dtype == torch.float32 else 1.0)
    assert float((steps.double() - exact).abs().max()) <= 3 * budget + 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either input_ids or inputs_embeds"),
        (
            {"input_ids": random_tokens(1, 3), "inputs_embeds": torch.zeros(1, 3, 16)},
            "either input_ids or inputs_embeds",
        ),
        ({"input_ids": random_tokens(1, 3), "attention_mask": torch.ones(1, 4)}, "attention_mask must be"),
        ({"input_ids": random_tokens(1, 3), "past_key_values": object()}, "must be an HSACache"),
        ({"input_ids": random_tokens(1, 0)}, "at least one row and one token"),
        ({"input_ids": random_tokens(0, 3)}, "at least one row and one token"),
        ({"input_ids": random_tokens(1, 3)[0]}, "at least one row and one token"),
        ({"input_ids": random_tokens(1, 3), "labels": random_tokens(1, 4)}, "labels must be"),
        ({"input_ids": random_tokens(1, 5), "segment_ids": torch.zeros(1, 5)}, "multiple of chunk_size"),
        (
            {
                "input_ids": random_tokens(1, 4),
                "segment_ids": torch.zeros(1, 4),
                "attention_mask": torch.tensor([[1, 1, 1, 0]]),
            },
            "0 at the same tokens",
        ),
    ],
)
def test_inputs_that_do_not_fit_raise_one_clear_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(**arguments)
