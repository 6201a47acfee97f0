"""Layer by layer compilation changes no number: traced by the compiler, run as it is, so that no C++ is needed."""

import copy
import functools

import pytest
import torch

from hsa_ultralong.nn.upper_group import asking
from hsa_ultralong.testing.factories import MODEL_OPTIONS, random_tokens, tiny_model
from hsa_ultralong.train import ParallelConfig
from hsa_ultralong.train.compilation import compile_layers
from hsa_ultralong.train.parallelize import parallelize


@pytest.mark.parametrize("num_experts", [0, 4], ids=["dense", "experts"])
@pytest.mark.parametrize(
    ("recomputed", "window", "is_cut"),
    [("none", 3, False), ("full", 3, False), ("none", 0, False), ("full", 0, False), ("none", 0, True)],
)
def test_compiled_parts_give_the_same_loss_and_gradients(monkeypatch, recomputed, window, is_cut, num_experts):
    traced = []

    def compile_eagerly(function=None, **options):
        traced.append(function)
        return real(function, **{**options, "backend": "eager"})

    real = torch.compile
    monkeypatch.setattr(torch, "compile", functools.wraps(real)(compile_eagerly))
    options = {"hsa_sliding_window": window, "hsa_residual": "standard" if window else "bypass"}
    plain = tiny_model(gumbel_noise=True, chunk_topk=2, num_experts=num_experts, **options).train()
    compiled = copy.deepcopy(plain)
    if is_cut:
        # as for FSDP, whose ranks tests/distributed have
        compile_layers(compiled, is_cut=True)
    else:
        parallelize(compiled, None, ParallelConfig(activation_checkpointing=recomputed), use_compile=True)
    groups = compiled.model.upper_groups()
    # the parts of an upper group around retrieval and reading, too
    assert len(traced) >= len(compiled.model.lower_layers) + 6 * len(groups)
    # what a layer that runs again would not keep stays in the layer
    assert {group.ask is not None for group in groups} == {recomputed == "none"}
    ids = random_tokens(2, 48, seed=1)
    found = []
    for model in (plain, compiled):
        torch.manual_seed(0)
        loss = model(ids, labels=ids).loss
        loss.backward()
        found.append([loss.detach(), *(part.grad for part in model.parameters())])
    for expected, actual in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["default", "hsa_only_layer", "bypass", "two_retrieval_heads", "all_at_once"])
def test_a_group_that_asks_at_once_gives_the_same_and_its_parts_are_called_as_before(name):
    plain = tiny_model(**MODEL_OPTIONS[name]).train()
    joined = copy.deepcopy(plain)
    called = []
    for group in joined.model.upper_groups():
        group.ask = asking(group)
        for part in (group.retriever, group.hsa_layer):
            part.register_forward_hook(lambda part, args, out: called.append((type(part), args[0].shape)))
    ids = random_tokens(2, 48, seed=1)
    found = []
    for model in (plain, joined):
        loss = model(ids, labels=ids).loss
        loss.backward()
        found.append([loss.detach(), *(part.grad for part in model.parameters())])
    for expected, actual in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-13)
    group = joined.model.upper_groups()[0]
    assert called == [(type(part), (2, 48, 16)) for part in (group.retriever, group.hsa_layer)] * len(
        joined.model.groups
    )


def test_a_group_that_asks_at_once_continues_a_cache():
    model, ids = tiny_model().eval(), random_tokens(1, 30, seed=2)
    whole = model(ids).logits
    for group in model.model.upper_groups():
        group.ask = asking(group)
    first = model(ids[:, :17], use_cache=True)
    rest = model(ids[:, 17:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(torch.cat((first.logits, rest), 1), whole, rtol=1e-10, atol=1e-10)


def test_what_a_group_asks_and_the_encoder_are_a_graph_each(monkeypatch):
    whole = []

    def compile_whole(function=None, **options):
        is_whole = getattr(function, "__name__", "") in ("ask", "run")
        whole.extend([function] * is_whole)
        return real(function, **{**options, "backend": "eager", "fullgraph": is_whole})

    real = torch.compile
    monkeypatch.setattr(torch, "compile", functools.wraps(real)(compile_whole))
    # without a window, which ends a graph on a CPU
    model = tiny_model(hsa_sliding_window=0).train()
    parallelize(model, None, ParallelConfig(), use_compile=True)
    ids = random_tokens(2, 48, seed=1)
    model(ids, labels=ids).loss.backward()
    assert len(whole) == 1 + len(model.model.upper_groups())
