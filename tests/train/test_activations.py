"""Recomputation, tiles and host memory change what a step keeps, never what it computes (fp64)."""

from __future__ import annotations

import pytest
import torch

from hsa_ultralong.distributed.mesh import ParallelConfig
from hsa_ultralong.models import HSACache
from hsa_ultralong.testing.factories import MODEL_OPTIONS, random_tokens, tiny_model
from hsa_ultralong.train.activations import _is_weight, activation_context, recompute_activations, tile_mlps

EXACT = {"rtol": 1e-10, "atol": 1e-12}
LENGTH = 24


def gradients(model, **inputs):
    """Loss and every gradient, and the bytes that autograd keeps outside recomputed regions."""
    kept = 0

    def count(tensor):
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    tokens = random_tokens(2, LENGTH)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = model(tokens, labels=tokens, **inputs).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: part.grad for name, part in model.named_parameters()}}, kept


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], **EXACT, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("options", ["default", "bypass", "hsa_only_layer", "mixture_of_experts", "qkv_bias_llama3"])
def test_recomputation_keeps_less_and_changes_no_gradient(options):
    expected, kept = gradients(tiny_model(**MODEL_OPTIONS[options]).train())
    for mode in ("selective", "full"):
        model = tiny_model(**MODEL_OPTIONS[options]).train()
        names = list(model.state_dict())
        recompute_activations(model, mode)
        assert list(model.state_dict()) == names
        found, less = gradients(model)
        assert_equal(found, expected)
        assert less < kept
        kept = less


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_forwards_of_few_tokens_keep_everything(mode):
    _, whole = gradients(tiny_model().train())
    kept = []
    for least in (0, 2**20):
        model = tiny_model().train()
        recompute_activations(model, mode, least)
        kept.append(gradients(model)[1])
    assert kept[0] < kept[1] == whole


def test_noise_on_the_selection_is_the_same_when_layers_run_again():
    found = []
    for mode in ("none", "full"):
        model = tiny_model(gumbel_noise=True, chunk_topk=1).train()
        recompute_activations(model, mode)
        torch.manual_seed(3)
        found.append(gradients(model)[0])
    assert_equal(*found)


def test_a_cache_is_extended_once_although_layers_are_recomputed():
    found = []
    for mode in ("none", "full"):
        model = tiny_model().train()
        recompute_activations(model, mode)
        cache, tokens = HSACache(model.config), random_tokens(1, 24)
        model(tokens[:, :10], past_key_values=cache)
        model(tokens[:, 10:], past_key_values=cache, labels=tokens[:, 10:]).loss.backward()
        found.append({name: part.grad for name, part in model.named_parameters() if part.grad is not None})
    assert_equal(*found)


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("tile", [1, 7, 1000])
def test_tiles_change_no_gradient(mode, tile):
    expected, _ = gradients(tiny_model(num_experts=3).train())
    model = tiny_model(num_experts=3).train()
    tile_mlps(model, tile)
    recompute_activations(model, mode)
    assert_equal(gradients(model)[0], expected)


def test_no_tensor_wider_than_a_tile_is_kept_by_a_tiled_block():
    model = tiny_model(intermediate_size=50).train()
    tile_mlps(model, 5)
    widest = 0

    def look(tensor):
        nonlocal widest
        # weights are as wide
        if tensor.shape[-1:] == (50,) and not _is_weight(tensor):
            widest = max(widest, tensor.numel() // 50)
        return tensor

    tokens = random_tokens(2, LENGTH)
    with torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
    assert widest <= 5
    with torch.no_grad():
        plain = tiny_model(intermediate_size=50)(tokens).logits
        torch.testing.assert_close(model.eval()(tokens).logits, plain, **EXACT)


def test_offloading_knows_weights_their_casts_and_their_views():
    linear, seen = torch.nn.Linear(4, 5, bias=False), []

    def look(tensor):
        seen.append((_is_weight(tensor), tuple(tensor.shape)))
        return tensor

    x = torch.randn(2, 3, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor):
        linear(x + 1)
        with torch.autocast("cpu", torch.bfloat16):
            linear(x + 1)
    assert {shape for is_weight, shape in seen if is_weight} == {(4, 5)}
    assert {shape for is_weight, shape in seen if not is_weight} == {(6, 4)}


def test_offloading_leaves_what_lies_on_the_host_alone():
    expected, _ = gradients(tiny_model().train())
    with activation_context(ParallelConfig(offload_activations=True)):
        found, _ = gradients(tiny_model().train())
    assert_equal(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_offloaded_activations_free_the_card_and_change_no_gradient(mode):
    found = []
    for offload in (False, True):
        model = tiny_model(hidden_size=64, intermediate_size=256, sliding_window=32).cuda().train()
        recompute_activations(model, mode)
        tokens = random_tokens(4, 4096).cuda()
        before = torch.cuda.memory_allocated()
        with activation_context(ParallelConfig(offload_activations=offload)):
            loss = model(tokens, labels=tokens).loss
        torch.cuda.synchronize()
        kept = torch.cuda.memory_allocated() - before
        loss.backward()
        found.append((kept, {name: part.grad for name, part in model.named_parameters()}))
    assert found[1][0] < found[0][0]
    assert_equal(found[1][1], found[0][1])
