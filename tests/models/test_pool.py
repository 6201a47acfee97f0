"""Pooled memory equals the explicit long context: all other sources' chunks, then the document, windows restarted."""

from __future__ import annotations

import pytest
import torch

from hsa_ultralong.models.layout import plain_layout, restrict
from hsa_ultralong.models.views import pooled_view
from hsa_ultralong.testing.comparison import force_backends, loss_and_gradients
from hsa_ultralong.testing.factories import MODEL_OPTIONS, random_chunks, random_tokens, tiny_model

EXACT = {"rtol": 1e-9, "atol": 1e-11}
SIZE = 4
COMPOSABLE = ["default", "hsa_only_layer", "two_retrieval_heads", "mixture_of_experts", "full_coverage", "one_chunk"]


def pad(part):
    return torch.cat((part, part.new_full((-len(part) % SIZE,), 5)))


def after_others(model, others, own, part, pool="attended"):
    """Summed loss of document `part` in one explicit row: the others, then `own` (earlier of its source), then itself.

    In the variant "compete" the values of the others' chunks are zero.
    """
    before = [*others, *own]
    tokens = torch.cat([pad(document) for document in [*before, part]])[None]
    segments = torch.cat(
        [
            torch.cat((torch.full((len(document),), number), torch.full((-len(document) % SIZE,), -1)))
            for number, document in enumerate([*before, part])
        ]
    )[None]
    labels = torch.where(segments == len(before), tokens, -100)
    labels[0, -len(pad(part))] = -100
    foreign = sum(len(pad(document)) for document in others)

    def without_values(module, inputs, output):
        k, v, landmarks = output
        keep = (torch.arange(v.shape[1]) >= foreign).to(v.dtype)[:, None, None]
        return k, v * keep, landmarks

    hooks = [model.model.chunk_encoder.register_forward_hook(without_values)] if pool == "compete" else []
    try:
        return model(tokens, segment_ids=segments, labels=labels, num_items_in_batch=1, use_cache=False).loss
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("pool", ["attended", "compete"])
@pytest.mark.parametrize("options", COMPOSABLE)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_pooled_loss_and_gradients_equal_the_explicit_long_context(options, pool, mode):
    model, tokens = tiny_model(**MODEL_OPTIONS[options]), random_tokens(3, 12)
    rows = list(tokens)
    losses = [after_others(model, rows[:b] + rows[b + 1 :], [], row, pool) for b, row in enumerate(rows)]
    expected = loss_and_gradients(model, losses)
    model.train(mode == "train")
    pooled = model(tokens, labels=tokens, pool_memory=pool, num_items_in_batch=1, use_cache=False).loss
    torch.testing.assert_close(loss_and_gradients(model, [pooled]), expected, **EXACT)


@pytest.mark.parametrize("pool", ["attended", "compete"])
def test_chunks_of_the_same_source_stay_out(pool):
    model, tokens = tiny_model(), random_tokens(4, 12)
    sources = torch.tensor([2**40 + 3, 9, 2**40 + 3, -1])
    losses = []
    for b, row in enumerate(tokens):
        others = [tokens[i] for i in range(4) if sources[i] != sources[b]]
        losses.append(after_others(model, others, [], row, pool))
    expected = loss_and_gradients(model, losses)
    pooled = model(tokens, labels=tokens, pool_memory=pool, source_ids=sources, num_items_in_batch=1).loss
    torch.testing.assert_close(loss_and_gradients(model, [pooled]), expected, **EXACT)


LENGTHS, SOURCES = ((6, 2, 7), (3, 4, 9)), ((0, 1, 0), (2, 1, 3))


def packed_rows():
    """Two rows of documents with short last chunks: tokens, segments, sources and labels (2, 20), and the documents."""
    tokens, segments = torch.full((2, 20), 5), torch.full((2, 20), -1)
    sources, labels, parts = torch.full((2, 20), -1), torch.full((2, 20), -100), []
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for number, length in enumerate(lengths):
            part, place = random_tokens(1, length, seed=10 * row + number)[0], slice(start, start + length)
            tokens[row, place], segments[row, place], sources[row, place] = part, number, SOURCES[row][number]
            labels[row, start + 1 : start + length] = part[1:]
            parts.append((row, number, SOURCES[row][number], part))
            start += len(pad(part))
    return tokens, segments, sources, labels, parts


@pytest.mark.parametrize("pool", ["attended", "compete"])
@pytest.mark.parametrize("per", ["row", "document"])
def test_packed_documents_read_other_sources_and_the_earlier_of_their_own(per, pool):
    model = tiny_model()
    tokens, segments, sources, labels, parts = packed_rows()
    if per == "row":
        parts = [(row, number, row, part) for row, number, _, part in parts]
    losses = []
    for row, number, source, part in parts:
        others = [other for _, _, of, other in parts if of != source]
        own = [other for at, n, of, other in parts if of == source and at == row and n < number]
        losses.append(after_others(model, others, own, part, pool))
    expected = loss_and_gradients(model, losses)
    given = None if per == "row" else sources
    pooled = model(
        tokens, segment_ids=segments, labels=labels, pool_memory=pool, source_ids=given, num_items_in_batch=1
    ).loss
    torch.testing.assert_close(loss_and_gradients(model, [pooled]), expected, **EXACT)


def test_true_is_attended_and_sources_matter_in_a_pool_only():
    model, tokens = tiny_model(), random_tokens(2, 12)
    with torch.no_grad():
        assert torch.equal(model(tokens, pool_memory=True).logits, model(tokens, pool_memory="attended").logits)
        one_source = model(tokens, pool_memory=True, source_ids=torch.zeros(2).long()).logits
        torch.testing.assert_close(one_source, model(tokens).logits, **EXACT)
        assert torch.equal(model(tokens, source_ids=torch.zeros(2).long()).logits, model(tokens).logits)


@pytest.mark.parametrize("pool", ["attended", "compete"])
def test_noise_moves_the_choice_only(pool):
    tokens = random_tokens(3, 16)

    def train(seed, **options):
        torch.manual_seed(seed)
        model = tiny_model(**options).train()
        loss = model(tokens, labels=tokens, pool_memory=pool).loss
        return loss_and_gradients(model, [loss])

    plain, noisy = (train(0, gumbel_noise=noise) for noise in (False, True))
    assert noisy[0] != plain[0] and noisy[0] != train(1, gumbel_noise=True)[0]
    assert torch.equal(noisy[0], train(0, gumbel_noise=True)[0])
    assert all(bool(grad.isfinite().all()) for grad in noisy[1].values())
    full = [train(0, gumbel_noise=noise, chunk_topk=100) for noise in (False, True)]
    torch.testing.assert_close(full[1], full[0], **EXACT)


def test_a_competing_chunk_gets_its_gradient_through_its_landmark_only():
    model, tokens = tiny_model(chunk_topk=100), random_tokens(2, 12)
    kept = []

    def keep(module, inputs, output):
        kept[:] = output
        [part.retain_grad() for part in output]

    model.model.chunk_encoder.register_forward_hook(keep)
    labels = tokens.clone()
    labels[1] = -100
    model(tokens, labels=labels, pool_memory="compete", use_cache=False).loss.backward()
    k, v, landmarks = (part.grad[1] for part in kept)
    assert not k.any() and not v.any() and float(landmarks.abs().amax((-1, -2)).min()) > 0


def test_a_pool_is_one_memory_for_the_batch_and_competes_without_keys():
    own = random_chunks(3, 5)
    x = torch.zeros(3, 20, 8)
    layout = restrict(plain_layout(x), None)
    attended, competing = (pooled_view(own, layout, is_read=is_read) for is_read in (True, False))
    assert attended.memory.landmarks.shape == competing.memory.landmarks.shape == (1, 15, 1, 8)
    assert attended.memory.k.shape == (1, 60, 1, 4) and competing.memory.k.shape == (1, 0, 1, 4)
    assert attended.visible.chunk_segment.shape == (1, 15) and attended.visible.query_segment.shape == (3, 20)
    seen = attended.visible.mask()  # (3, 20, 15)
    assert all(bool((seen[b] == (torch.arange(15) // 5 != b)).all()) for b in range(3))


@pytest.mark.parametrize("pool", ["attended", "compete"])
@pytest.mark.parametrize("topk", [pytest.param(2, marks=pytest.mark.slow), 100])
def test_the_kernels_take_a_pool(monkeypatch, pool, topk):
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = {"chunk_size": 16, "head_dim": 16, "retrieval_dim": 16, "sliding_window": 9, "chunk_topk": topk}
    # one group: a choice that rounding decides would change all that follows it
    model = tiny_model(dtype=torch.float32, num_upper_groups=1, num_layers_per_group=1, **sizes).to(device)
    tokens = random_tokens(2, 48).to(device)

    def found(impl):
        with monkeypatch.context() as patch:
            force_backends(patch, impl, impl if impl == "triton" else "reference")
            return loss_and_gradients(model, [model(tokens, labels=tokens, pool_memory=pool, use_cache=False).loss])

    torch.testing.assert_close(found("triton"), found("reference"), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"pool_memory": "all"}, "pool_memory must be one of"),
        ({"pool_memory": True, "source_ids": torch.zeros(3).long()}, r"source_ids must be \(2,\)"),
        ({"pool_memory": True, "source_ids": torch.zeros(2, 8).long()}, "with segment_ids"),
    ],
)
def test_wrong_pools_are_refused(keywords, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(random_tokens(2, 8), **keywords)
