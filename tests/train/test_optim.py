"""Every parameter belongs to one optimiser; decay is on matrices; Muon takes the layers and learns."""

import pytest
import torch

from hsa_ultralong.testing.factories import tiny_model
from hsa_ultralong.train.optim import build_optimizers


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_parameter_is_held_once_and_only_matrices_decay(tiny_runs, kind):
    model = tiny_model(num_experts=4, tie_word_embeddings=False).float()
    optimizers = build_optimizers(model, tiny_runs.config(optimizer=kind, weight_decay=0.3))
    groups = [group for one in optimizers for group in one.param_groups]
    held = [parameter for group in groups for parameter in group["params"]]
    assert {id(part) for part in held} == {id(part) for part in model.parameters()} and len(held) == len(set(held))
    for group in groups:
        assert all((part.dim() >= 2) == (group["weight_decay"] == 0.3) for part in group["params"])


def test_muon_takes_the_matrices_of_the_layers_and_neither_tables_nor_experts(tiny_runs):
    model = tiny_model(num_experts=4, tie_word_embeddings=False).float()
    muon, adamw = build_optimizers(model, tiny_runs.config(optimizer="muon"))
    assert isinstance(muon, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
    names = {id(part): name for name, part in model.named_parameters()}
    chosen = {names[id(part)] for group in muon.param_groups for part in group["params"]}
    assert any(name.endswith("q_proj.weight") for name in chosen)
    assert not any(word in name for name in chosen for word in ("embed", "lm_head", "gate_up", "norm"))


def test_muon_learns_and_resumes_bit_for_bit(tiny_runs, tmp_path):
    config = tiny_runs.config(tiny_runs.stage(tokens=256 * 12, learning_rate=1e-2), optimizer="muon")
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
