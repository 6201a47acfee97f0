"""The beginning of a run with a mixture of experts: choices spread less and less, alike after a resume."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from hsa_ultralong.nn.moe import MixtureOfExperts
from hsa_ultralong.train.stages import balance_experts, spread_strength

EXPERTS = {"num_experts": 8, "num_experts_per_token": 1, "moe_intermediate_size": 16}


def spreads(one):
    return [part.spread for part in one.model.modules() if isinstance(part, MixtureOfExperts)]


def test_spread_falls_to_nothing_over_the_warm_up():
    assert [spread_strength(4, step) for step in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert spread_strength(0, 0) == 0.0


def test_a_run_begins_spread_and_ends_without(tiny_runs, tmp_path):
    one = tiny_runs.trainer(tmp_path, tiny_runs.config(model=EXPERTS, router_warmup_steps=2))
    seen = []
    one.listener = lambda record: seen.append(spreads(one))
    one.train()
    first, second, third = [[None if part is None else float(part) for part in layers] for layers in seen]
    assert set(first) == {1.0} and set(second) == {0.5} and set(third) == {None} and len(first) == 5


def test_a_resumed_run_spreads_as_one_that_was_not_stopped(tiny_runs, tmp_path):
    config = tiny_runs.config(model=EXPERTS, router_warmup_steps=5)
    tiny_runs.trainer(tmp_path / "whole", config).train()
    part = tiny_runs.trainer(tmp_path / "parts", config)
    part.train(max_minutes=0)
    assert part.global_step == 1
    tiny_runs.trainer(tmp_path / "parts", config).train()
    whole, parts = (tiny_runs.records(tmp_path / name) for name in ("whole", "parts"))
    assert len(whole) == len(parts) == 3
    for one, other in zip(whole, parts):
        for name in ("loss", "grad_norm", "expert_imbalance", "expert_imbalance_mean"):
            assert one[name] == other[name], name


def test_the_log_has_the_worst_layer_and_the_mean_of_all(tiny_runs, tmp_path):
    one = tiny_runs.trainer(tmp_path, tiny_runs.config(model=EXPERTS))
    parts = [part for part in one.model.modules() if isinstance(part, MixtureOfExperts)]
    for part in parts:
        part.expert_load[:2] = torch.tensor([4, 4])
    parts[1].expert_load[:2] = torch.tensor([8, 0])
    measured = balance_experts(one.model)
    # of eight experts that share eight tokens
    assert float(measured["expert_imbalance"]) == 8
    assert float(measured["expert_imbalance_mean"]) == pytest.approx(4 + 4 / len(parts))


def test_a_dense_model_has_nothing_to_balance_and_refuses_to_be_spread(tiny_runs, tmp_path):
    one = tiny_runs.trainer(tmp_path / "dense", tiny_runs.config())
    assert balance_experts(one.model) == {}
    for more in ({}, {"twin": "window", "model": EXPERTS}):
        with pytest.raises(ValueError, match="router_warmup_steps=3 spreads tokens over experts, and this model has"):
            tiny_runs.trainer(tmp_path / "run", tiny_runs.config(router_warmup_steps=3, **more))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="router_warmup_steps must be >= 0"):
        tiny_runs.config(router_warmup_steps=-1)


@torch.no_grad()
def test_a_compiled_choice_is_not_compiled_again_as_the_spread_falls():
    sizes = {"hidden_size": 8, "intermediate_size": 6, "num_experts": 5, "num_experts_per_token": 2}
    counter, module, x = CompileCounter(), MixtureOfExperts(**sizes, num_shared_experts=1), torch.randn(20, 8)
    compiled = torch.compile(module.route, backend=counter, fullgraph=True)
    for strength in (1.0, 0.9, 0.8):
        module.spread = torch.tensor(strength)
        assert torch.equal(compiled(x)[0], module.route(x)[0])
    assert counter.frame_count == 1
    module.spread = None
    assert torch.equal(compiled(x)[0], module.route(x)[0]) and counter.frame_count == 2
