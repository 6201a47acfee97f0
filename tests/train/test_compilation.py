"""Layer by layer compilation changes no number: traced by the compiler, run as it is, so that no C++ is needed."""

import copy
import functools

import pytest
import torch

from hsa_ultralong.testing.factories import random_tokens, tiny_model
from hsa_ultralong.train import ParallelConfig
from hsa_ultralong.train.parallelize import parallelize


@pytest.mark.parametrize("num_experts", [0, 4], ids=["dense", "experts"])
@pytest.mark.parametrize("recomputed", ["none", "full"])
def test_compiled_parts_give_the_same_loss_and_gradients(monkeypatch, recomputed, num_experts):
    traced = []

    def compile_eagerly(function=None, **options):
        traced.append(function)
        return real(function, **{**options, "backend": "eager"})

    real = torch.compile
    monkeypatch.setattr(torch, "compile", functools.wraps(real)(compile_eagerly))
    plain = tiny_model(gumbel_noise=True, chunk_topk=2, num_experts=num_experts).train()
    compiled = copy.deepcopy(plain)
    parallelize(compiled, None, ParallelConfig(activation_checkpointing=recomputed), use_compile=True)
    groups = compiled.model.upper_groups()
    # the parts of an upper group around retrieval and reading, too
    assert len(traced) >= len(compiled.model.lower_layers) + 6 * len(groups)
    ids = random_tokens(2, 48, seed=1)
    found = []
    for model in (plain, compiled):
        torch.manual_seed(0)
        loss = model(ids, labels=ids).loss
        loss.backward()
        found.append([loss.detach(), *(part.grad for part in model.parameters())])
    for expected, actual in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
