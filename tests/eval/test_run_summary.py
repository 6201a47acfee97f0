"""What a results file says of a run is what its log says."""

import pytest

from hsa_ultralong.eval.run_summary import run_summary

CONFIG = {
    "preset": "nano",
    "stages": [{"name": "a", "seq_len": 64}, {"name": "b", "seq_len": 128}],
    "optimizer": "muon",
    "synthetic_share": {"a": 0.5, "b": 0.0},
}


def step(stage, number, loss, speed, **more):
    return {"stage": stage, "step": number, "loss": loss, "tokens_per_s": speed, "time": 100.0 + number, **more}


def probe(stage, length, accuracy):
    return {"stage": stage, "probe": {"length": length, "needle_accuracy": accuracy}, "time": 111.0}


def values(summary, stage):
    return {
        (one["metric"], one["context"]): one["value"] for one in summary["records"] if one["stage"] == stage
    }  # fmt: skip


def test_medians_peaks_last_losses_and_last_probes_of_each_stage():
    log = [step("a", i, 9.0 - i, speed, peak_gib=i, mfu=0.1 * i) for i, speed in enumerate((1.0, 30.0, 20.0, 40.0), 1)]
    log += [
        probe("a", 64, 0.1),
        probe("a", 64, 0.2),
        probe("a", 256, 0.3),
        step("b", 1, 2.0, 7.0, expert_imbalance=1.5),
    ]
    summary = run_summary(log, CONFIG, {"seed": 3}, gpus=2)
    assert values(summary, "a") == {
        ("tokens_per_s", 64): 30.0,
        ("mfu", 64): pytest.approx(0.3),
        ("peak_bytes", 64): 4 * 2**30,
        ("loss", 64): 6.5,
        ("needle_accuracy", 64): 0.2,
        ("needle_accuracy", 256): 0.3,
    }
    assert values(summary, "b") == {("tokens_per_s", 128): 7.0, ("loss", 128): 2.0, ("expert_imbalance", 128): 1.5}
    assert {(one["gpus"], one["preset"]) for one in summary["records"]} == {(2, "nano")}
    assert summary["meta"] == {
        "seed": 3,
        "optimizer": "muon",
        "synthetic_share": {"a": 0.5, "b": 0.0},
        "logged_seconds": 10.0,
    }


def test_a_run_that_was_stopped_before_its_first_step():
    assert run_summary([], CONFIG, {})["records"] == []
