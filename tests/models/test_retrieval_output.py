"""output_retrieval: what every group retrieved, in every mode of the forward, for the tokens that are asked for."""

from __future__ import annotations

import pytest
import torch

from hsa_ultralong.models import HSACache
from hsa_ultralong.testing.factories import MODEL_OPTIONS, random_tokens, tiny_model

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def retrieved(model, tokens, **inputs):
    with torch.no_grad():
        return model(tokens, output_retrieval=True, **inputs)


def assert_same(found, expected):
    assert len(found) == len(expected)
    for left, right in zip(found, expected):
        kept = min(left.indices.shape[-1], right.indices.shape[-1])
        assert torch.equal(left.indices[..., :kept], right.indices[..., :kept])
        for one in (left, right):
            assert bool((one.indices[..., kept:] == -1).all())
        torch.testing.assert_close(left.weights[..., :kept], right.weights[..., :kept], **EXACT)
        torch.testing.assert_close(left.scores[..., :kept], right.scores[..., :kept], **EXACT)


def columns(retrieval, wanted):
    return [part._replace(**{n: getattr(part, n)[:, wanted] for n in ("indices", "weights", "scores")})
            for part in retrieval]  # fmt: skip


@pytest.mark.parametrize("options", ["default", "two_retrieval_heads", "all_at_once", "mixture_of_experts"])
def test_every_group_says_what_its_tokens_read(options):
    model, tokens = tiny_model(**MODEL_OPTIONS[options]), random_tokens(2, 22)
    outputs = retrieved(model, tokens)
    assert torch.equal(outputs.logits, model(tokens).logits)
    config, chunks = model.config, 22 // model.config.chunk_size
    assert len(outputs.retrieval) == config.num_upper_groups and model(tokens).retrieval is None
    for found in outputs.retrieval:
        shape = (2, 22, config.num_retrieval_heads, min(config.chunk_topk, chunks))
        assert found.indices.shape == found.weights.shape == found.scores.shape == shape
        assert found.indices.dtype == torch.int32 and found.offsets == (0,)
        last = (torch.arange(22) // config.chunk_size - 1)[None, :, None, None]
        assert bool((found.indices <= last).all()) and bool(((found.indices < 0) == (found.weights == 0)).all())
        assert bool((found.scores[found.indices < 0] == -torch.inf).all())


@pytest.mark.parametrize("options", ["default", "all_at_once"])
def test_with_a_cache_pieces_retrieve_what_the_whole_does(options):
    model, tokens = tiny_model(**MODEL_OPTIONS[options]), random_tokens(2, 22)
    whole = retrieved(model, tokens).retrieval
    cache = HSACache(model.config)
    for start, stop in ((0, 3), (3, 13), (13, 14), (14, 22)):
        part = retrieved(model, tokens[:, start:stop], past_key_values=cache).retrieval
        assert_same(part, columns(whole, slice(start, stop)))


def test_indices_count_through_the_library_and_then_the_rows_own_chunks():
    model, tokens = tiny_model(chunk_topk=20), random_tokens(1, 22)
    memory = model.memorize(random_tokens(1, 24, seed=1)[0])
    found = retrieved(model, tokens, past_key_values=HSACache(model.config, memory=memory)).retrieval
    own = 22 // model.config.chunk_size
    for part in found:
        assert part.offsets == (0, memory.num_chunks)
        assert sorted(part.indices[0, -1, 0][part.indices[0, -1, 0] >= 0].tolist()) == list(
            range(memory.num_chunks + own)
        )


@pytest.mark.parametrize("wanted", [1, 5, torch.tensor([2, 9, 21])])
@pytest.mark.parametrize("masked", [False, True])
def test_it_is_given_for_the_tokens_whose_logits_are_kept(wanted, masked):
    model, tokens = tiny_model(), random_tokens(2, 22)
    mask = torch.ones_like(tokens)
    if masked:
        mask[0, :4], mask[1, 7:9], mask[1, 20:] = 0, 0, 0
    whole = retrieved(model, tokens, attention_mask=mask)
    part = retrieved(model, tokens, attention_mask=mask, logits_to_keep=wanted)
    kept = slice(-wanted, None) if isinstance(wanted, int) else wanted
    torch.testing.assert_close(part.logits, whole.logits[:, kept], **EXACT)
    assert_same(part.retrieval, columns(whole.retrieval, kept))
    body = model.model(tokens, attention_mask=mask, output_retrieval=True, retrieval_to_keep=wanted)
    assert_same(body.retrieval, part.retrieval)


def test_a_masked_token_repeats_the_last_real_one_and_reads_nothing_before_the_first():
    model, tokens = tiny_model(), random_tokens(1, 22)
    mask = torch.ones_like(tokens)
    mask[0, :3] = mask[0, 15:18] = 0
    found = retrieved(model, tokens, attention_mask=mask).retrieval
    alone = retrieved(model, tokens[mask.bool()][None]).retrieval
    assert_same(columns(found, mask[0].bool()), alone)
    for part in found:
        assert bool((part.indices[0, :3] == -1).all()) and not bool(part.weights[0, :3].any())
        assert torch.equal(part.indices[0, 15:18], part.indices[0, 14:15].expand(3, -1, -1))


def test_without_a_chunk_every_token_has_no_slots():
    model = tiny_model()
    (first, *_) = retrieved(model, random_tokens(2, 3)).retrieval
    assert first.indices.shape == (2, 3, model.config.num_retrieval_heads, 0) and first.offsets == ()


def test_a_tuple_ends_with_it():
    model, tokens = tiny_model(), random_tokens(1, 9)
    for part in (model, model.model):
        *_, last = part(tokens, output_retrieval=True, return_dict=False)
        assert len(last) == model.config.num_upper_groups and last[0].indices.shape[:2] == (1, 9)
    assert len(model(tokens, return_dict=False)) + 1 == len(model(tokens, output_retrieval=True, return_dict=False))


def test_weights_and_scores_carry_gradients_with_gradient_checkpointing_too():
    found = []
    for checkpointing in (False, True):
        model, tokens = tiny_model().train(), random_tokens(2, 18)
        if checkpointing:
            model.gradient_checkpointing_enable()
        retrieval = model(tokens, labels=tokens, output_retrieval=True).retrieval
        sum((part.weights.pow(2) * (part.indices >= 0)).sum() for part in retrieval).backward()
        found.append([part.grad for part in model.parameters()])
    assert any(grad is not None and bool(grad.any()) for grad in found[0])
    torch.testing.assert_close(found[0], found[1], **EXACT)


def test_generate_refuses_it_and_says_who_reports_it():
    model, tokens = tiny_model(), random_tokens(1, 9)
    with pytest.raises(ValueError, match="DecodingEngine"):
        model.generate(tokens, output_retrieval=True, max_new_tokens=2)
    with pytest.raises(TypeError, match="retrieval_to_keep"):
        model(tokens, retrieval_to_keep=1)


def test_what_is_kept_of_a_long_prompt_holds_no_more_than_was_asked_for():
    model, tokens = tiny_model(), random_tokens(1, 60)
    for found in retrieved(model, tokens, logits_to_keep=2).retrieval:
        for part in (found.indices, found.weights, found.scores):
            assert part.untyped_storage().nbytes() == part.numel() * part.element_size()
    more = retrieved(model, tokens, logits_to_keep=100)
    assert more.retrieval[0].indices.shape[1] == 60 == more.logits.shape[1]
