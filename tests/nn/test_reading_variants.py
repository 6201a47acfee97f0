"""RoPE in HSA and one softmax for all chunks: against formulas, over a memory as over one row, refusals."""

from __future__ import annotations

import pytest
import torch

from hsa_ultralong.inference import memorize
from hsa_ultralong.memory.row_memories import RowMemories
from hsa_ultralong.models import HSACache
from hsa_ultralong.nn.fusion import equal_fusion
from hsa_ultralong.nn.reading_variants import ReadingVariant
from hsa_ultralong.nn.rotary import apply_rotary, rotary_table
from hsa_ultralong.testing.factories import random_tensor, random_tokens, tiny_model

EXACT = {"rtol": 1e-10, "atol": 1e-10}
VARIANTS = {
    "rope": {"memory_positions": "rope"},
    "joint": {"memory_softmax": "joint"},
    "both": {"memory_softmax": "joint", "memory_positions": "rope"},
    "chosen_only": {"memory_softmax": "joint", "fusion": "none"},
}


def test_places_are_turned_as_a_rotary_table_turns_them():
    x = random_tensor(2, 7, 3, 4)
    turned = ReadingVariant(False, 100.0).rotate(x, torch.arange(7)[None])
    torch.testing.assert_close(turned, apply_rotary(x, rotary_table(7, 4, 100.0, x.device, x.dtype)), **EXACT)


def test_rope_depends_on_distances_alone():
    variant, q, k = ReadingVariant(False, 100.0), random_tensor(1, 5, 1, 4), random_tensor(1, 5, 1, 4, seed=1)
    near, far = (
        variant.rotate(q, torch.arange(5)[None] + shift + 9) @ variant.rotate(k, torch.arange(5)[None] + shift).mT
        for shift in (0, 100_000)
    )
    torch.testing.assert_close(near, far, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_with_rope_the_order_of_chunks_matters_and_without_it_does_not():
    tokens = random_tokens(1, 40)[0]
    moved = torch.cat((tokens[12:24], tokens[:12], tokens[24:]))
    for options, is_same in (({}, True), (VARIANTS["joint"], True), (VARIANTS["rope"], False)):
        # windows of one token, so that a chunk's content does not depend on its neighbours
        model = tiny_model(sliding_window=1, hsa_sliding_window=1, chunk_topk=100, **options)
        one, other = (model(text[None], use_cache=False).logits[0, -1] for text in (tokens, moved))
        assert torch.allclose(one, other, rtol=1e-9) == is_same


@pytest.mark.parametrize("options", VARIANTS)
@torch.no_grad()
def test_a_question_over_a_memory_reads_it_as_if_it_stood_before_the_question(options):
    """The memory's documents and the question as packed documents of one row: the same places, the same chunks."""
    model = tiny_model(**VARIANTS[options])
    texts = [random_tokens(1, n, seed=n)[0] for n in (12, 8, 10)]
    memory = memorize(model, texts[:2])
    asked = model(texts[2][None], past_key_values=HSACache(model.config, memory=memory)).logits[0]
    row = torch.cat((*texts, texts[0][:2]))[None]
    segments = torch.tensor([0] * 12 + [1] * 8 + [2] * 10 + [-1] * 2)[None]
    packed = model(row, segment_ids=segments, use_cache=False).logits[0, 20:30]
    torch.testing.assert_close(asked, packed, **EXACT)


def test_scores_that_only_choose_get_no_gradient_and_those_of_a_joint_softmax_do():
    tokens = random_tokens(2, 32)
    for name, is_taught in (("chosen_only", False), ("joint", True), ("rope", True)):
        model = tiny_model(**VARIANTS[name]).train()
        model(tokens, labels=tokens).loss.backward()
        grad = model.model.groups[0].retriever.query_proj.weight.grad
        assert bool(grad is not None and grad.abs().sum() > 0) == is_taught


def test_equal_weights_leave_empty_slots_out():
    scores = torch.tensor([[3.0, -1.0, -torch.inf], [-torch.inf] * 3])
    assert equal_fusion(scores).tolist() == [[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]


@torch.no_grad()
def test_memories_that_are_laid_together_pooled_or_stored_elsewhere_are_refused(tmp_path):
    model, tokens = tiny_model(**VARIANTS["joint"]), random_tokens(2, 16)
    with pytest.raises(ValueError, match="pool_memory needs"):
        model(tokens, pool_memory=True)
    memory = memorize(model, tokens[0])
    with pytest.raises(ValueError, match="without order"):
        RowMemories.laid(memory, torch.zeros((1, memory.num_chunks), dtype=torch.bool), [[]])
    stored = memorize(model, tokens[0], store="host")
    with pytest.raises(ValueError, match="read one memory on the device"):
        model(tokens[:1], past_key_values=HSACache(model.config, memory=stored))
