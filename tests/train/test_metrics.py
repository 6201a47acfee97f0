"""What a run measures: means that survive a resume, spikes, MFU, retrieval, and the curves that others are told."""

import logging
import math
import sys

import pytest
import torch

from hsa_ultralong.models.accounting import flops_per_token
from hsa_ultralong.train import TrainingDiverged
from hsa_ultralong.train.checkpoint import list_checkpoints
from hsa_ultralong.train.metrics import Meter, SpikeGuard, scalars, training_flops
from hsa_ultralong.train.run_folder import RunLog


def test_a_meter_that_was_saved_goes_on_with_the_same_numbers():
    one, other = Meter(), Meter()
    for value in (0.1, 0.7):
        one.add(10, loss=torch.tensor(value), grad_norm=torch.tensor(value / 3))
    other.restore(one.state(), torch.device("cpu"))
    for meter in (one, other):
        meter.add(10, loss=torch.tensor(0.2), grad_norm=torch.tensor(1.0))
    first, second = one.take(), other.take()
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert one.take() == {} and one.speed() > 0 and one.tokens == 0


def test_a_loss_that_stays_high_is_a_spike_and_a_single_one_is_not():
    guard = SpikeGuard(1.0, 3)
    assert guard.see([3.0] * 30 + [9.0, 9.0, 3.0, 9.0, 3.5]) == "" and guard.high == 0
    assert guard.see([9.0, 9.0]) == "" and guard.high == 2
    again = SpikeGuard(1.0, 3)
    again.load(guard.state())
    assert guard.see([9.0]) == again.see([9.0]) == "loss 9.000 has been 1 above its median 3.000 for 3 steps"
    guard.restart()
    assert guard.see([9.0] * 10) == ""


def test_a_falling_loss_is_never_a_spike():
    guard = SpikeGuard(0.5, 2)
    assert guard.see([8 * math.exp(-i / 20) + 2 for i in range(300)]) == ""


@pytest.mark.parametrize("on_spike", ["stop", "warn"])
def test_a_spike_stops_the_run_or_warns(tiny_runs, tmp_path, monkeypatch, caplog, on_spike):
    config = tiny_runs.config(
        tiny_runs.stage(tokens=128 * 30, batch_tokens=128), on_spike=on_spike, spike_threshold=0.5, spike_steps=3,
        checkpoint_minutes=0.005 if on_spike == "stop" else 10, log_every=2,
    )  # fmt: skip
    one = tiny_runs.trainer(tmp_path, config)
    step = one._optimizer_step

    def high_from_24(*args):
        measured = step(*args)
        return {**measured, "loss": measured["loss"] + 5.0 * (one.step >= 24)}

    monkeypatch.setattr(one, "_optimizer_step", high_from_24)
    if on_spike == "warn":
        with caplog.at_level(logging.WARNING):
            assert one.train()
        assert "above its median" in caplog.text
        return
    with pytest.raises(TrainingDiverged, match=r"above its median .*step 28.*intact: .*on_spike=warn"):
        one.train()
    one.checkpoints.wait()
    # nothing of the spike was saved: it was seen with the line of step 26
    assert list_checkpoints(tmp_path)[-1].name <= "step-00000025"


def test_flop_per_token_follow_the_window_and_k_of_the_stage(tiny_runs, tmp_path):
    one = tiny_runs.trainer(tmp_path, tiny_runs.config(tiny_runs.stage(sliding_window=8, chunk_topk=2)))
    before = training_flops(one.model, one.config.stages[0])
    one.train()
    after = training_flops(one.model, one.config.stages[0])
    assert after == flops_per_token(one.model.config, 128, training=True) < before


def test_curves_are_named_by_what_they_show():
    step = {"stage": "long", "step": 2, "global_step": 7, "tokens": 64, "loss": 2.0, "mfu": 0.3}
    assert scalars(step) == {"train/tokens": 64, "train/loss": 2.0, "train/mfu": 0.3}
    probe = {"global_step": 7, "probe": {"length": 512, "needle_accuracy": 0.5, "answer_loss": 1.0},
             "retrieval": {"entropy": [1.0, 2.0]}}  # fmt: skip
    assert scalars(probe) == {
        "needles/512/accuracy": 0.5, "needles/512/answer_loss": 1.0, "retrieval/entropy/0": 1.0,
        "retrieval/entropy/1": 2.0,
    }  # fmt: skip


def test_a_log_forgets_what_came_after_the_checkpoint_and_what_is_cut_off(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"global_step": 1}\n{"global_step": 2}\n{"global_step": 3}\n{"glob')
    RunLog(tmp_path, 2).write({"global_step": 3, "loss": 1.5})
    assert (
        tmp_path / "log.jsonl"
    ).read_text() == '{"global_step": 1}\n{"global_step": 2}\n{"global_step": 3, "loss": 1.5}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_tensorboard_shows_every_curve_once_after_a_resume(tiny_runs, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny_runs.config(tensorboard=True, model={"num_experts": 4, "moe_intermediate_size": 16})
    tiny_runs.trainer(tmp_path, config).train(max_minutes=0)
    tiny_runs.trainer(tmp_path, config).train()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"train/loss", "train/grad_norm", "train/tokens_per_s", "train/expert_imbalance"} <= set(
        events.Tags()["scalars"]
    )
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert shown == [(step, pytest.approx(loss)) for step, loss, _ in tiny_runs.losses(tmp_path)]


def test_without_tensorboard_a_run_goes_on_and_without_wandb_it_says_what_to_install(tiny_runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert tiny_runs.trainer(tmp_path / "a", tiny_runs.config(tensorboard=True)).train()
    with pytest.raises(ImportError, match=r"hsa-ultralong\[wandb\]"):
        tiny_runs.trainer(tmp_path / "b", tiny_runs.config(wandb="project")).train()


def test_expert_balance_is_logged(tiny_runs, tmp_path):
    config = tiny_runs.config(model={"num_experts": 4, "moe_intermediate_size": 16})
    tiny_runs.trainer(tmp_path, config).train()
    assert all(1.0 <= record["expert_imbalance"] <= 4.0 for record in tiny_runs.records(tmp_path))
