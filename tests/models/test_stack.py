"""One runner: whatever stands before the tokens of a call, and however its parts are run, outputs are equal."""

from __future__ import annotations

import pytest
import torch

from hsa_ultralong.models import HSACache
from hsa_ultralong.models.pieces import SplitParts
from hsa_ultralong.models.views import memory_view
from hsa_ultralong.testing.factories import MODEL_OPTIONS, random_tokens, tiny_model
from hsa_ultralong.train.segmented import BorderWindows


def lower_outputs(model, tokens, windows=None, **options):
    x = model.model.embed_tokens(tokens)
    return model.model.read_lower(x, model.model.rotary(x, windows), None, windows, **options)


@pytest.mark.parametrize("options", ["default", "qkv_bias_llama3", "mixture_of_experts"])
def test_lower_outputs_in_pieces_equal_the_whole_whatever_carries_the_windows(options):
    model, tokens = tiny_model(**MODEL_OPTIONS[options]), random_tokens(2, 21)
    sizes = model.config.layer_windows[: model.config.num_lower_layers]
    with torch.no_grad():
        whole = lower_outputs(model, tokens)
        cache, carried = HSACache(model.config), [None] * len(sizes)
        for start, stop in ((0, 9), (9, 10), (10, 21)):
            border = BorderWindows(0, sizes, carried)
            for windows in (cache, border):
                assert windows.length <= start
                found = lower_outputs(model, tokens[:, start:stop], windows)
                torch.testing.assert_close(found, whole[:, start:stop], rtol=1e-12, atol=1e-12)
            carried = border.leave()


def test_run_in_pieces_equals_run_as_modules():
    model, tokens = tiny_model(), random_tokens(1, 22)
    inner, places = model.model, torch.arange(22, dtype=torch.int32)[None]
    views = [memory_view(model.memorize(random_tokens(1, 40, seed=1)[0]), torch.zeros_like(places), places)]
    with torch.no_grad():
        lower = lower_outputs(model, tokens)
        assert torch.equal(lower_outputs(model, tokens, parts=SplitParts()), lower)
        outputs, retrieved = [], []
        for parts in ({}, {"parts": SplitParts()}):
            found: list = []
            outputs.append(inner.decode_upper(lower, inner.rotary(lower, None), views, note=found.append, **parts))
            retrieved.append(found)
    assert torch.equal(*outputs) and len(retrieved[0]) == model.config.num_upper_groups
    for left, right in zip(*retrieved):
        assert torch.equal(left.indices, right.indices) and torch.equal(left.weights, right.weights)


def test_without_a_memory_a_group_retrieves_nothing_and_its_outputs_are_exact():
    model, tokens = tiny_model(), random_tokens(2, 3)
    found: list = []
    with torch.no_grad():
        lower = lower_outputs(model, tokens)
        out = model.model.decode_upper(lower, model.model.rotary(lower, None), [], note=found.append)
        torch.testing.assert_close(model.model.norm(out), model.model(tokens).last_hidden_state)
    heads = model.config.num_retrieval_heads
    assert [retrieval.indices.shape for retrieval in found] == [(2, 3, heads, 0)] * model.config.num_upper_groups
