"""The plan of a run: exact where it can be, near the measured peaks elsewhere."""

import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from hsa_ultralong.cli.train_plan import plan_table
from hsa_ultralong.models import HSAForCausalLM, accounting
from hsa_ultralong.models.presets import preset
from hsa_ultralong.recipes import RECIPES, recipe
from hsa_ultralong.testing.factories import random_tokens, tiny_model
from hsa_ultralong.testing.live_bytes import LiveBytes, SavedBytes
from hsa_ultralong.train import ParallelConfig, StageConfig, TrainConfig
from hsa_ultralong.train.planning import ASSUMED_PEAK_FLOPS, plan_as_dict, plan_run, planned_gpus, segmented_bytes
from hsa_ultralong.train.segmented import segmented_loss_backward


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
    assert first(activation_checkpointing="full", checkpointing_tokens=2**30).activations == plain.activations
    assert first(activation_checkpointing="full", checkpointing_tokens=1024).activations == full.activations
    assert first(context=2).activations * 2 == plain.activations
    config.stages[0].piece_tokens = 2048
    assert first().activations < plain.activations / 2


def test_gradients_that_wait_for_the_last_forward_are_whole_on_every_gpu():
    config = recipe("moe_8b_a1b")
    counted = accounting.count_parameters(config.shape())
    experts = accounting.count_expert_parameters(config.shape())

    def first(**parallel):
        config.parallel = replace(config.parallel, **parallel)
        return plan_run(config)[0].gradients

    assert first() == 4 * (counted.total // 8)
    assert first(gradient_sync="last") == 4 * (counted.total - experts + experts // 8)
    assert first(expert=1) == 4 * counted.total
    # a step of one forward keeps nothing
    config.stages[0].batch_tokens = 256 * config.stages[0].seq_len
    assert first() == 4 * (counted.total // 8)


def stage_plan(seq_len, preset="small_345m", model=None, **options):
    """One row of seq_len tokens on one GPU."""
    stage = StageConfig("long", seq_len, seq_len, seq_len, 1e-4, {"text": 1.0}, **{"chunk_topk": 32, **options})
    return plan_run(TrainConfig(preset, [stage], model=model or {}))[0]


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_the_table_of_a_plan_is_whole_in_a_narrow_terminal(name):
    config = recipe(name)
    plan, printed = plan_as_dict(config, plan_run(config)), io.StringIO()
    Console(file=printed, width=80).print(plan_table(config, plan))
    text = printed.getvalue()
    assert "…" not in text and all(stage.name in text and f"{stage.seq_len:,}" in text for stage in config.stages)


def test_the_peaks_seen_for_rows_in_segments_are_met_within_five_percent():
    # docs/log.md, "the longest row of small_345m on one card", GB
    for tokens, offload, measured in (
        (2**21, False, 42.5),
        (2**21, True, 34.2),
        (2**23, False, 76.5),
        (2**24, False, 121.8),
        # benchmarks/results/training-h200.json
        (6 * 2**20, False, 66.6),
        (12 * 2**20, False, 100.6),
    ):
        plan = stage_plan(tokens, piece_tokens=32_768, piece_offload=offload)
        assert plan.total_bytes / 1e9 == pytest.approx(measured, rel=0.05)
        assert plan.host == (4 * 1024 * tokens if offload else 0)


TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "chunk_size": 16, "retrieval_dim": 32, "sliding_window": 16, "hsa_sliding_window": 16, "chunk_topk": 2,
}  # fmt: skip


@pytest.mark.parametrize(("lower", "groups", "vocabulary", "half"), [(1, 2, 512, 0), (3, 1, 64, 1)])
def test_what_segments_keep_of_the_row_grows_as_planned(lower, groups, vocabulary, half):
    """Bytes per token of all live tensors, under autocast as on a GPU, where the upper or the lower half decides."""
    sizes = {"num_lower_layers": lower, "num_upper_groups": groups, "num_layers_per_group": 2 - half}
    model = tiny_model(dtype=torch.float32, vocab_size=vocabulary, **TINY, **sizes).train()

    def most(length):
        with LiveBytes() as live, torch.autocast("cpu", torch.bfloat16):
            ids = random_tokens(1, length, seed=1).clone()
            segmented_loss_backward(model, {"input_ids": ids, "labels": ids.clone()}, 16)
        return live.most

    most(32)
    slope = (most(128) - most(64)) / 64
    assert slope == pytest.approx(segmented_bytes(model.config, 16)[half], rel=0.05)


def test_a_segment_saves_one_half_of_the_model():
    """Saved tensors of a pass in segments and of an ordinary one are to each other as their plans are."""
    sizes = {"num_lower_layers": 2, "num_upper_groups": 2, "num_layers_per_group": 2}
    model = tiny_model(dtype=torch.float32, **TINY, **sizes).train()
    ids = random_tokens(1, 256, seed=1)
    batch = {"input_ids": ids, "labels": ids}

    def planned(segment):
        plan = stage_plan(256, "debug", {**TINY, **sizes}, piece_tokens=segment, chunk_topk=2)
        return plan.activations - (256 * segmented_bytes(model.config, segment)[0] if segment else 0)

    with SavedBytes() as whole, torch.autocast("cpu", torch.bfloat16):
        model(**batch, use_cache=False).loss.backward()
    # what a segment reads of the past, whose scores a CPU keeps, counts the more the shorter it is
    for segment, tolerance in ((256, 0.1), (64, 0.3)):
        with SavedBytes() as part, torch.autocast("cpu", torch.bfloat16):
            segmented_loss_backward(model, batch, segment)
        assert part.most / whole.most == pytest.approx(planned(segment) / planned(0), rel=tolerance)


def test_a_plan_counts_the_gpus_that_the_mesh_needs():
    assert planned_gpus(recipe("moe_8b_a1b")) == 256 and planned_gpus(recipe("dense_0_5b")) == 32
    config = recipe("dense_0_5b")
    config.gpus = 48
    with pytest.raises(ValueError, match="cannot be shared out over 48 processes"):
        plan_run(config)


def test_a_plan_takes_as_many_gpus_as_the_copies_and_slices_need_or_says_that_they_do_not_fit():
    config = recipe("debug")
    config.parallel.replicate = 2
    assert planned_gpus(config) == 2 and plan_run(config)
    config.gpus = 6
    assert planned_gpus(config) == 6
    config.gpus = 7
    with pytest.raises(ValueError, match="replicate=2 x context=1 does not fit gpus=7"):
        plan_run(config)


def test_a_vocabulary_of_its_own_is_counted():
    config = recipe("nano")
    larger, usual = plan_run(config, vocab_size=16_384)[0], plan_run(config)[0]
    assert larger.gradients - usual.gradients == 4 * 8192 * 256
