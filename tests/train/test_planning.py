"""The plan of a run: exact where it can be, near the measured peaks elsewhere."""

import pytest
import torch

from hsa_ultralong.models import HSAForCausalLM
from hsa_ultralong.models.presets import preset
from hsa_ultralong.recipes import recipe
from hsa_ultralong.train import ParallelConfig
from hsa_ultralong.train.planning import ASSUMED_PEAK_FLOPS, plan_as_dict, plan_run, planned_gpus


def test_the_peaks_measured_for_nano_are_met_within_fifteen_percent():
    measured = {"warmup": 10.02, "long": 11.35, "longer": 28.21}
    for plan in plan_run(recipe("nano")):
        assert plan.total_bytes / 2**30 == pytest.approx(measured[plan.stage], rel=0.15)


def test_weights_gradients_and_state_are_those_of_the_model():
    config = recipe("debug")
    model = HSAForCausalLM(preset("debug"))
    total = sum(part.numel() for part in model.parameters())
    (plan, _) = plan_run(config)
    assert (plan.weights, plan.gradients, plan.optimizer) == (6 * total, 4 * total, 8 * total)
    optimizer = torch.optim.AdamW(model.parameters())
    for part in model.parameters():
        part.grad = torch.zeros_like(part)
    optimizer.step()
    held = sum(value.nbytes for state in optimizer.state.values() for value in state.values() if value.dim())
    assert held == plan.optimizer
    config.optimizer = "muon"
    assert plan_run(config)[0].optimizer < plan.optimizer


def test_time_is_flop_over_what_the_gpus_are_assumed_to_do():
    config = recipe("small_345m")
    for gpus in (8, 16):
        config.gpus = gpus
        for plan in plan_run(config):
            seconds = plan.tokens * plan.flops_per_token / (gpus * ASSUMED_PEAK_FLOPS * config.mfu)
            assert plan.seconds == pytest.approx(seconds)
    table = plan_as_dict(config, plan_run(config))
    assert table["gpus"] == 16 and table["seconds"] == pytest.approx(sum(one["seconds"] for one in table["stages"]))


def test_spreading_and_recomputing_save_memory():
    config = recipe("dense_0_5b")
    config.gpus = 32

    def first(**parallel):
        config.parallel = ParallelConfig(**parallel)
        return plan_run(config)[0]

    plain = first()
    assert first(replicate=4).gradients == pytest.approx(4 * plain.gradients, rel=1e-6)
    full, selective = first(activation_checkpointing="full"), first(activation_checkpointing="selective")
    assert full.activations < selective.activations < plain.activations
    assert first(context=2).activations * 2 == plain.activations
    config.stages[0].segment_tokens = 2048
    assert first().activations < plain.activations / 2


def test_a_plan_counts_the_gpus_that_the_mesh_needs():
    assert planned_gpus(recipe("moe_8b_a1b")) == 256 and planned_gpus(recipe("dense_0_5b")) == 32
    config = recipe("dense_0_5b")
    config.gpus = 48
    with pytest.raises(ValueError, match="cannot be shared out over 48 processes"):
        plan_run(config)


def test_a_vocabulary_of_its_own_is_counted():
    config = recipe("nano")
    larger, usual = plan_run(config, vocab_size=16_384)[0], plan_run(config)[0]
    assert larger.gradients - usual.gradients == 4 * 8192 * 256
