"""Packed documents and pooled batches equal documents given as a library."""

from __future__ import annotations

import pytest
import torch

from hsa_ultralong.models import HSACache
from hsa_ultralong.nn import views
from hsa_ultralong.testing.factories import MODEL_OPTIONS, encode_documents, random_tokens, tiny_model

EXACT = {"rtol": 1e-10, "atol": 1e-10}
LENGTHS = (6, 8, 5, 1)
COMPOSABLE = [
    "default", "hsa_only_layer", "bypass", "two_retrieval_heads", "mean_landmark", "mixture_of_experts", "unnormalized",
    "full_coverage", "one_chunk",
]  # fmt: skip


def pack(documents, size=4, fill=0):
    """One row with its segment ids; every document starts a chunk, padding has segment -1."""
    tokens, segments = [], []
    for number, document in enumerate(documents):
        missing = -len(document) % size
        tokens += [document, torch.full((missing,), fill)]
        segments += [number] * len(document) + [-1] * missing
    return torch.cat(tokens)[None], torch.tensor([segments], dtype=torch.int32)


def documents(lengths=LENGTHS, seed=0):
    return [random_tokens(1, n, seed=seed + i)[0] for i, n in enumerate(lengths)]


@torch.no_grad()
def packed_logits(model, parts, fill=0, use_cache=False):
    """Logits of each document in the packed row."""
    tokens, segments = pack(parts, fill=fill)
    logits = model(tokens, segment_ids=segments, use_cache=use_cache).logits[0]
    return [logits[segments[0] == number] for number in range(len(parts))]


@torch.no_grad()
def alone(model, tokens, library=None):
    if library is None:
        return model(tokens[None], use_cache=False).logits[0]
    return model(tokens[None], past_key_values=HSACache(model.config, library)).logits[0]


@pytest.mark.parametrize("options", COMPOSABLE)
def test_a_packed_document_equals_itself_after_the_earlier_ones_as_library(options):
    model, parts = tiny_model(**MODEL_OPTIONS[options]), documents()
    packed = packed_logits(model, parts)
    torch.testing.assert_close(packed[0], alone(model, parts[0]), **EXACT)
    for number in range(1, len(parts)):
        library = encode_documents(model, parts[:number])
        torch.testing.assert_close(packed[number], alone(model, parts[number], library), **EXACT)


def test_earlier_documents_never_see_later_ones_and_later_ones_see_earlier():
    model, parts = tiny_model(chunk_topk=100), documents()
    base = packed_logits(model, parts)
    for changed in range(len(parts)):
        other = [(part + 1) % 37 if number == changed else part for number, part in enumerate(parts)]
        logits = packed_logits(model, other)
        for number in range(len(parts)):
            moved = (logits[number] - base[number]).abs().amax(-1)
            if number < changed:
                assert float(moved.max()) == 0
            else:
                assert float(moved.min()) > 1e-8


def test_windows_stay_inside_their_document():
    model, parts = tiny_model(), documents()
    with torch.no_grad():
        for group in model.model.groups:
            group.hsa_layer.hsa.o_proj.weight.zero_()
    for actual, part in zip(packed_logits(model, parts), parts):
        torch.testing.assert_close(actual, alone(model, part), **EXACT)


def test_padding_between_documents_reaches_nothing():
    model, parts = tiny_model(), documents()
    for left, right in zip(packed_logits(model, parts), packed_logits(model, parts, fill=9)):
        torch.testing.assert_close(right, left, **EXACT)


def test_a_packed_row_gives_the_same_with_a_cache():
    model, parts = tiny_model(), documents()
    for left, right in zip(packed_logits(model, parts), packed_logits(model, parts, use_cache=True)):
        torch.testing.assert_close(right, left, **EXACT)


@pytest.mark.parametrize("options", ["default", "stick_breaking", "position_decay", "all_at_once"])
def test_one_packed_document_equals_the_plain_row(options):
    model, tokens = tiny_model(**MODEL_OPTIONS[options]), random_tokens(2, 24)
    with torch.no_grad():
        packed = model(tokens, segment_ids=torch.zeros_like(tokens), use_cache=False).logits
        plain = model(tokens, use_cache=False).logits
    torch.testing.assert_close(packed, plain, **EXACT)


def test_packed_loss_and_gradients_are_finite_and_reach_earlier_documents():
    model, parts = tiny_model().train(), documents()
    tokens, segments = pack(parts)
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
    labels = tokens.masked_fill(segments != 2, -100)
    model(inputs_embeds=embedded, segment_ids=segments, labels=labels).loss.backward()
    reached = embedded.grad[0].abs().amax(-1)
    # chunks of documents 0 and 1, not their padding; nothing of document 3
    assert float(reached[segments[0] == 1].min()) > 0
    assert bool((reached[segments[0] == -1] == 0).all()) and bool((reached[segments[0] == 3] == 0).all())
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def rows_as_library(model, rows, without):
    """The full chunks of all other rows: a row of a pool is an open document, its tail is no chunk."""
    return encode_documents(model, [row for number, row in enumerate(rows) if number != without], is_open=True)


@pytest.mark.parametrize("options", COMPOSABLE)
@pytest.mark.parametrize("length", [12, 14])
def test_pooled_loss_equals_each_row_with_the_others_as_library(options, length):
    model, tokens = tiny_model(**MODEL_OPTIONS[options]), random_tokens(3, length)
    with torch.no_grad():
        pooled = model(tokens, labels=tokens, pool_memory=True, use_cache=False)
    losses = []
    for b in range(3):
        library = rows_as_library(model, tokens, b)
        with torch.no_grad():
            out = model(tokens[b : b + 1], labels=tokens[b : b + 1], past_key_values=HSACache(model.config, library))
        torch.testing.assert_close(pooled.logits[b], out.logits[0], **EXACT)
        losses.append(out.loss)
    torch.testing.assert_close(pooled.loss, torch.stack(losses).mean(), **EXACT)


def test_pooling_changes_the_logits_from_the_first_token_on():
    model, tokens = tiny_model(), random_tokens(3, 12)
    with torch.no_grad():
        difference = model(tokens, pool_memory=True).logits - model(tokens).logits
    assert float(difference.abs().amax(-1).min()) > 1e-8


def test_a_pool_of_one_row_is_the_row():
    model, tokens = tiny_model(), random_tokens(1, 14)
    with torch.no_grad():
        pooled, plain = model(tokens, pool_memory=True).logits, model(tokens).logits
    torch.testing.assert_close(pooled, plain, **EXACT)


def test_pooled_packed_rows_see_all_documents_of_the_other_rows():
    model, rows = tiny_model(), [documents((6, 2), seed=0), documents((3, 7), seed=9)]
    tokens, segments = (torch.cat(parts) for parts in zip(*(pack(row) for row in rows)))
    with torch.no_grad():
        logits = model(tokens, segment_ids=segments, pool_memory=True, use_cache=False).logits
    for b, row in enumerate(rows):
        for number, part in enumerate(row):
            library = encode_documents(model, [*rows[1 - b], *row[:number]])
            torch.testing.assert_close(logits[b][segments[b] == number], alone(model, part, library), **EXACT)


@pytest.mark.parametrize(("side", "use_cache"), [("left", False), ("left", True), ("right", False)])
def test_padding_never_enters_the_pool(side, use_cache):
    model, rows = tiny_model(), [random_tokens(1, n, seed=n)[0] for n in (14, 6, 3)]
    tokens, mask = torch.full((3, 14), 5), torch.zeros(3, 14, dtype=torch.long)
    for b, row in enumerate(rows):
        part = slice(14 - len(row), 14) if side == "left" else slice(0, len(row))
        tokens[b, part], mask[b, part] = row, 1
    with torch.no_grad():
        logits = model(tokens, attention_mask=mask, pool_memory=True, use_cache=use_cache).logits
    for b, row in enumerate(rows):
        expected = alone(model, row, rows_as_library(model, rows, b))
        torch.testing.assert_close(logits[b][mask[b] == 1], expected, **EXACT)


def test_pooled_gradients_reach_the_other_rows_chunks():
    model, tokens = tiny_model().train(), random_tokens(2, 12)
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
    labels = tokens.clone()
    labels[1] = -100
    model(inputs_embeds=embedded, labels=labels, pool_memory=True).loss.backward()
    assert float(embedded.grad[1].abs().amax(-1).min()) > 0


def test_chunks_have_lengths_where_documents_may_leave_them_short_and_only_there(monkeypatch):
    model, seen = tiny_model(), []
    attention = views.hsa_attention
    monkeypatch.setattr(
        views, "hsa_attention", lambda *a, **k: (seen.append(k["chunk_lengths"] is None), attention(*a, **k))[1]
    )
    tokens, segments = pack(documents())
    for options in ({"segment_ids": segments}, {}):
        model(tokens, use_cache=False, **options)
        assert seen and all(is_full == (not options) for is_full in seen)
        seen.clear()
    model(tokens, use_cache=True)
    assert seen and not any(seen)
