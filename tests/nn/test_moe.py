"""Mixture of experts: dropless, equal to its formula, balanced by the router bias."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hsa_ultralong.nn.moe import MixtureOfExperts
from hsa_ultralong.ops._permute import inverse, take_rows
from hsa_ultralong.testing.factories import random_tensor, randomize

EXACT = {"rtol": 1e-11, "atol": 1e-11}


def mixture(**options):
    fields = {
        "hidden_size": 8,
        "intermediate_size": 6,
        "num_experts": 5,
        "num_experts_per_token": 2,
        "num_shared_experts": 1,
    }
    module = MixtureOfExperts(**{**fields, **options}).double()
    randomize(module, std=0.5)
    return module.eval()


def by_formula(module, x):
    """Every expert on every token, weighted by its normalised sigmoid affinity where chosen."""
    affinity = (x @ module.router.weight.T).sigmoid()
    out = torch.zeros_like(x) if module.shared is None else module.shared(x)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in x.shape[:-1])).view(-1, x.dim() - 1).tolist():
        place = tuple(index)
        preference = (affinity[place].detach() + module.router_bias).tolist()
        order = sorted(range(module.num_experts), key=lambda e, preference=preference: -preference[e])
        chosen = order[: module.num_experts_per_token]
        total = sum(affinity[place][e] for e in chosen)
        for e in chosen:
            gate, up = (x[place] @ module.gate_up[e]).chunk(2)
            out[place] = out[place] + affinity[place][e] / total * ((F.silu(gate) * up) @ module.down[e])
    return out


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_experts_per_token": 1},
        {"num_experts_per_token": 5},
        {"num_shared_experts": 0},
        {"num_shared_experts": 2},
    ],
)
@torch.no_grad()
def test_output_equals_the_formula(options):
    module, x = mixture(**options), random_tensor(2, 7, 8)
    torch.testing.assert_close(module(x), by_formula(module, x), **EXACT)


@torch.no_grad()
def test_a_token_does_not_depend_on_the_rest_of_the_batch():
    module, x = mixture(), random_tensor(40, 8)
    whole = module(x)
    # all tokens alike: one expert gets everything and nothing is dropped
    crowd = module(torch.cat((x[:1].expand(100, -1), x)))
    torch.testing.assert_close(crowd[100:], whole, **EXACT)
    for t in (0, 17, 39):
        torch.testing.assert_close(module(x[t : t + 1]), whole[t : t + 1], **EXACT)


@torch.no_grad()
def test_weights_sum_to_one_and_the_bias_only_steers_the_choice():
    module, x = mixture(), random_tensor(30, 8)
    module.router_bias.zero_()
    plain, weights = module.route(x)
    torch.testing.assert_close(weights.sum(-1), torch.ones(30, dtype=torch.float64), **EXACT)
    module.router_bias[3] = 10.0
    chosen, weights = module.route(x)
    assert bool((chosen == 3).any(-1).all()) and not bool((plain == 3).any(-1).all())
    affinity = (x @ module.router.weight.T).sigmoid().gather(-1, chosen)
    torch.testing.assert_close(weights, affinity / affinity.sum(-1, keepdim=True), **EXACT)


@torch.no_grad()
def test_bias_updates_move_the_load_toward_even():
    module, x = mixture(), random_tensor(400, 8)
    module.router_bias.copy_(torch.tensor([2.0, 1.0, 0.0, 0.0, -1.0]))
    module.train()
    module(x)
    first = module.update_router_bias(0.02)
    for _ in range(200):
        module(x)
        last = module.update_router_bias(0.02)
    assert float(first) > 2 and float(last) < 1.25


@torch.no_grad()
def test_one_bias_update_raises_starved_experts_and_lowers_crowded_ones():
    module = mixture()
    module.router_bias.zero_()
    module.expert_load.copy_(torch.tensor([10.0, 0.0, 4.0, 4.0, 2.0]))
    imbalance = module.update_router_bias(0.5)
    assert float(imbalance) == 2.5
    assert module.router_bias.tolist() == [-0.5, 0.5, 0.0, 0.0, 0.5]
    assert not bool(module.expert_load.any())


def nearly_alike(count=2000, width=32):
    """Hidden states as in the first steps of a run: one direction, and a tenth of its length of their own."""
    return random_tensor(1, width, seed=5) + 0.1 * random_tensor(count, width, seed=6)


@torch.no_grad()
def test_spread_choices_are_even_where_tokens_are_nearly_alike_and_bias_updates_cannot_be():
    module, x = mixture(hidden_size=32, num_experts=16).train(), nearly_alike()
    module.router_bias.zero_()
    module(x)
    assert float(module.update_router_bias(0.0)) > 6
    module.spread = torch.tensor(1.0)
    module(x)
    assert float(module.update_router_bias(0.0)) < 2
    for _ in range(40):
        module(x)
        last = module.update_router_bias(0.02)
    assert float(last) < 1.2


@torch.no_grad()
def test_a_spread_choice_follows_from_the_token_and_weights_from_affinity_alone():
    module, x = mixture(hidden_size=32, num_experts=16).train(), nearly_alike(200)
    plain, _ = module.route(x)
    module.spread = torch.tensor(1.0)
    chosen, weights = module.route(x)
    assert not torch.equal(chosen, plain)
    again, _ = module.route(x[50:60])
    assert torch.equal(again, chosen[50:60])
    affinity = (x @ module.router.weight.T).sigmoid().gather(-1, chosen)
    torch.testing.assert_close(weights, affinity / affinity.sum(-1, keepdim=True), **EXACT)
    # a reader never spreads
    assert torch.equal(module.eval().route(x)[0], plain)


@torch.no_grad()
def test_what_spreads_choices_is_standard_gumbel_noise():
    module = mixture(hidden_size=32, num_experts=16)
    noise = module._waves(nearly_alike() @ module.router.weight.T)
    assert float(noise.mean()) == pytest.approx(0.577, abs=0.05)
    assert float(noise.std()) == pytest.approx(1.283, abs=0.05)


@torch.no_grad()
def test_load_is_counted_in_training_only():
    module, x = mixture(), random_tensor(3, 10, 8)
    module(x)
    assert not bool(module.expert_load.any())
    module.train()(x)
    assert float(module.expert_load.sum()) == 60


def test_gradients_reach_the_router_every_used_expert_and_the_input():
    module, x = mixture(), random_tensor(40, 8).requires_grad_()
    module(x).square().sum().backward()
    assert float(x.grad.abs().max()) > 0
    missing = [name for name, p in module.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert not missing


def test_router_gradient_equals_that_of_the_formula():
    grads = []
    for compute in (lambda m, x: m(x), by_formula):
        module, x = mixture(), random_tensor(9, 8)
        (compute(module, x) * random_tensor(9, 8, seed=4)).sum().backward()
        grads.append((module.router.weight.grad, module.gate_up.grad, module.down.grad))
    for actual, expected in zip(*grads):
        torch.testing.assert_close(actual, expected, **EXACT)


@torch.no_grad()
def test_routing_in_bf16_scores_in_fp32():
    module, x = mixture().bfloat16(), random_tensor(20, 8).bfloat16()
    _, weights = module.route(x)
    assert weights.dtype == torch.float32
    assert module(x).dtype == torch.bfloat16


def test_the_learned_bias_is_saved_and_the_load_is_not():
    names = mixture().state_dict().keys()
    assert "router_bias" in names and "expert_load" not in names


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_grouped_products_equal_the_loop_also_for_experts_without_tokens(monkeypatch):
    module = mixture(hidden_size=128, intermediate_size=64, num_experts=8).float().cuda().train()
    randomize(module, std=0.05)
    module.router_bias[3] = -10.0  # nobody chooses it
    x = random_tensor(2, 500, 128).float().cuda()
    found = []
    for _ in range(2):
        module.zero_grad()
        rows = x.clone().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16):
            out = module(rows)
        out.float().square().sum().backward()
        assert module.gate_up.grad[3].count_nonzero() == 0
        found.append([out.detach(), rows.grad, *(part.grad for part in module.parameters())])
        monkeypatch.setattr(MixtureOfExperts, "_is_grouped", staticmethod(lambda rows: False))
    for grouped, looped in zip(*found, strict=True):
        assert (grouped.float() - looped.float()).norm() <= 0.02 * looped.float().norm()


@pytest.mark.parametrize("copies", [1, 3])
def test_rows_are_taken_and_their_gradients_gathered(copies):
    order = torch.randperm(5 * copies, generator=torch.Generator().manual_seed(0))
    rows = random_tensor(5, 4).requires_grad_()
    taken = take_rows(rows, order // copies, inverse(order), copies=copies)
    assert torch.equal(taken, rows[order // copies])
    upstream = random_tensor(5 * copies, 4)
    (found,) = torch.autograd.grad(taken, rows, upstream)
    (expected,) = torch.autograd.grad(rows[order // copies], rows, upstream)
    torch.testing.assert_close(found, expected, **EXACT)
    # sums of 16-bit gradients are those of the rows' own precision
    short = take_rows(rows, order // copies, inverse(order), copies=copies, dtype=torch.bfloat16)
    (found,) = torch.autograd.grad(short, rows, upstream.bfloat16())
    (expected,) = torch.autograd.grad(rows[order // copies], rows, upstream.bfloat16().double())
    assert short.dtype == torch.bfloat16 and torch.equal(found, expected)


def test_second_derivatives_of_a_mixture_are_those_of_small_steps():
    module, x = mixture(), random_tensor(3, 8).requires_grad_()
    # the steps are too small to change a choice
    assert torch.autograd.gradgradcheck(module, x)


def test_a_mixture_repeats_bit_for_bit_and_its_gradient_is_that_of_the_formula():
    module, x = mixture(), random_tensor(2, 7, 8).requires_grad_()
    upstream = random_tensor(2, 7, 8)
    found = torch.autograd.grad(module(x), [x, *module.parameters()], upstream)
    again = torch.autograd.grad(module(x), [x, *module.parameters()], upstream)
    assert all(torch.equal(one, two) for one, two in zip(found, again, strict=True))
    expected = torch.autograd.grad(by_formula(module, x), [x, *module.parameters()], upstream)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, **EXACT)


def test_no_tokens_give_none_and_too_many_experts_are_refused():
    module = mixture().train()
    assert module(random_tensor(0, 8)).shape == (0, 8) and int(module.expert_load.sum()) == 0
    with pytest.raises(ValueError, match="num_experts must be at most 32,766, got 40,000"):
        mixture(num_experts=40_000, hidden_size=1, intermediate_size=1)
