"""Packing isolated rows changes no gradient."""

from __future__ import annotations

import pytest
import torch

from hsa_ultralong.testing.comparison import force_backends, loss_and_gradients
from hsa_ultralong.testing.factories import MODEL_OPTIONS, random_tokens, tiny_model

EXACT = {"rtol": 1e-9, "atol": 1e-11}
SIZE = 4
LENGTHS = ((6, 8, 5, 1), (3, 17, 0, 0))


def documents(lengths, seed):
    return [random_tokens(1, n, seed=seed + i)[0] for i, n in enumerate(lengths) if n]


def pack(rows):
    """Token ids, documents and labels (B, 24): of whole chunks."""
    tokens = torch.full((len(rows), 24), 7)
    segments = torch.full((len(rows), 24), -1, dtype=torch.int32)
    labels = torch.full((len(rows), 24), -100)
    for row, parts in enumerate(rows):
        start = 0
        for number, part in enumerate(parts):
            place = slice(start, start + len(part))
            tokens[row, place], segments[row, place] = part, number
            labels[row, start + 1 : start + len(part)] = part[1:]
            start += -(-len(part) // SIZE) * SIZE
    return tokens, segments, labels


def alone(model, part):
    """Loss of one document."""
    return model(part[None], labels=part[None], use_cache=False, num_items_in_batch=1).loss


@pytest.mark.parametrize(
    "impls", [("torch", "torch_gather"), ("torch", "torch_dense"), ("reference", "reference"), ("auto", "auto")]
)
@pytest.mark.parametrize("options", ["default", "full_coverage", "mixture_of_experts", "all_at_once"])
def test_isolated_packed_loss_and_gradients_equal_separate_documents(monkeypatch, options, impls):
    force_backends(monkeypatch, *impls)
    model = tiny_model(**MODEL_OPTIONS[options])
    rows = [documents(lengths, 10 * seed) for seed, lengths in enumerate(LENGTHS)]
    tokens, segments, labels = pack(rows)
    packed = model(tokens, segment_ids=segments, labels=labels, isolate_documents=True, num_items_in_batch=1).loss
    expected = loss_and_gradients(model, [alone(model, part) for row in rows for part in row])
    torch.testing.assert_close(loss_and_gradients(model, [packed]), expected, **EXACT)


def test_training_mode_gives_the_same_because_one_centre_serves_all_chunks():
    model = tiny_model()
    rows = [documents(LENGTHS[0], 0)]
    tokens, segments, labels = pack(rows)
    expected = loss_and_gradients(model, [alone(model, part) for part in rows[0]])
    model.train()
    packed = model(tokens, segment_ids=segments, labels=labels, isolate_documents=True, num_items_in_batch=1).loss
    torch.testing.assert_close(loss_and_gradients(model, [packed]), expected, **EXACT)


@pytest.mark.parametrize("options", ["default", "full_coverage"])
def test_isolated_and_other_rows_go_together_in_one_batch(options):
    model = tiny_model(**MODEL_OPTIONS[options])
    tokens, segments, _ = pack([documents(lengths, 10 * seed) for seed, lengths in enumerate(LENGTHS)])
    with torch.no_grad():
        both = [model(tokens, segment_ids=segments, isolate_documents=kind).logits for kind in (True, None)]
        mixed = model(tokens, segment_ids=segments, isolate_documents=torch.tensor([True, False])).logits
    torch.testing.assert_close(mixed[0], both[0][0], **EXACT)
    torch.testing.assert_close(mixed[1], both[1][1], **EXACT)
    real = segments >= 0
    assert float((both[0] - both[1])[real & (segments > 0)].abs().max()) > 1e-8


@pytest.mark.parametrize("pool", ["attended", "compete"])
def test_isolated_rows_read_nothing_of_a_pool_while_others_read_them(pool):
    model, tokens = tiny_model(), random_tokens(3, 12)
    with torch.no_grad():
        logits = model(tokens, pool_memory=pool, isolate_documents=torch.tensor([False, True, False])).logits
        plain, pooled = model(tokens).logits, model(tokens, pool_memory=pool).logits
    torch.testing.assert_close(logits[1], plain[1], **EXACT)
    torch.testing.assert_close(logits[[0, 2]], pooled[[0, 2]], **EXACT)


def test_one_value_per_row_is_asked_for():
    with pytest.raises(ValueError, match=r"a bool or \(2,\)"):
        tiny_model()(random_tokens(2, 8), isolate_documents=torch.tensor([True]))
