"""Every parameter belongs to one optimiser; decay is on matrices; Muon takes the layers and learns."""

import pytest
import torch

from hsa_ultralong.testing.factories import tiny_model
from hsa_ultralong.train.optim import StackedMuon, build_optimizers


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_parameter_is_held_once_and_only_matrices_decay(tiny_runs, kind):
    model = tiny_model(num_experts=4, tie_word_embeddings=False).float()
    optimizers = build_optimizers(model, tiny_runs.config(optimizer=kind, weight_decay=0.3))
    groups = [group for one in optimizers for group in one.param_groups]
    held = [parameter for group in groups for parameter in group["params"]]
    assert {id(part) for part in held} == {id(part) for part in model.parameters()} and len(held) == len(set(held))
    for group in groups:
        assert all((part.dim() >= 2) == (group["weight_decay"] == 0.3) for part in group["params"])


def test_muon_takes_the_matrices_of_the_layers_and_of_the_experts_but_no_tables(tiny_runs):
    model = tiny_model(num_experts=4, tie_word_embeddings=False).float()
    muon, experts, adamw = build_optimizers(model, tiny_runs.config(optimizer="muon"))
    assert isinstance(muon, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
    names = {id(part): name for name, part in model.named_parameters()}
    chosen = {names[id(part)] for group in muon.param_groups for part in group["params"]}
    assert any(name.endswith("q_proj.weight") for name in chosen)
    assert not any(word in name for name in chosen for word in ("embed", "lm_head", "norm"))
    stacked = {names[id(part)]: group["matrices"] for group in experts.param_groups for part in group["params"]}
    assert stacked and all(count == (2 if name.endswith("gate_up") else 1) for name, count in stacked.items())
    assert all(name.endswith(("gate_up", "down")) for name in stacked)


@pytest.mark.parametrize("shape", [(3, 8, 20), (3, 20, 8)])
@pytest.mark.parametrize("matrices", [1, 2])
def test_a_stack_moves_as_its_matrices_would_one_by_one(shape, matrices):
    torch.manual_seed(0)
    experts, rows, columns = shape
    stack = torch.nn.Parameter(torch.randn(experts, rows, columns * matrices))
    singles = [torch.nn.Parameter(part.clone()) for expert in stack.detach() for part in expert.split(columns, -1)]
    stacked = StackedMuon(*(([stack], []) if matrices == 1 else ([], [stack])), lr=0.02, weight_decay=0.1)
    separate = torch.optim.Muon(singles, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        stack.grad = torch.randn_like(stack)
        for single, grad in zip(singles, [p for g in stack.grad for p in g.split(columns, -1)], strict=True):
            single.grad = grad.clone()
        stacked.step()
        separate.step()
    moved = torch.stack([torch.cat(singles[i : i + matrices], -1) for i in range(0, len(singles), matrices)])
    # bf16 products in another order: 1% of a step of 0.2 * 0.02 * sqrt(20)
    torch.testing.assert_close(stack.detach(), moved.detach(), rtol=0, atol=2e-3)
    assert (stack - moved).norm() < 0.02 * 3 * 0.02 * 0.2 * (20 * stack.numel()) ** 0.5


@pytest.mark.parametrize("model", [{}, {"num_experts": 4}], ids=["dense", "experts"])
def test_muon_learns_and_resumes_bit_for_bit(tiny_runs, tmp_path, model):
    stage = tiny_runs.stage(tokens=256 * 12, learning_rate=1e-2)
    config = tiny_runs.config(stage, optimizer="muon", model=model)
    whole = tiny_runs.trainer(tmp_path / "whole", config)
    assert whole.train()
    losses = [loss for _, loss, _ in tiny_runs.losses(tmp_path / "whole")]
    assert losses[-1] < losses[0] - 1
    part = tiny_runs.trainer(tmp_path / "cut", config)
    part.listener = lambda record: setattr(part, "should_stop", record["global_step"] == 5)
    part.train()
    resumed = tiny_runs.trainer(tmp_path / "cut", config)
    assert resumed.global_step == 5 and resumed.train()
    assert tiny_runs.losses(tmp_path / "cut") == tiny_runs.losses(tmp_path / "whole")
