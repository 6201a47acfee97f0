"""The figure of a run has a panel for everything that its log holds, and none for what it does not."""

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from hsa_ultralong.cli.main import app
from hsa_ultralong.eval.plots import plot_needles, plot_training, plot_tuning, read_tuning, training_panels


def step(tokens, **more):
    return {"stage": "warmup", "global_step": tokens, "tokens": tokens, "loss": 3.0, "grad_norm": 1.0, **more}


def probe(tokens, length, accuracy, entropy):
    return {
        "stage": "warmup", "global_step": tokens, "tokens": tokens,
        "probe": {"length": length, "needle_accuracy": accuracy, "answer_loss": 1.0},
        "retrieval": {"entropy": entropy, "distance": [9.0, 8.0], "beyond_window": [0.5, 0.6]},
    }  # fmt: skip


def test_a_panel_for_each_thing_measured_and_a_curve_for_each_length_and_group():
    log = [
        step(1_000_000, mfu=0.3, expert_imbalance=1.5),
        probe(1_000_000, 512, 0.1, [1.0, 2.0]),
        probe(1_000_000, 2048, 0.2, [3.0, 4.0]),
        step(2_000_000, mfu=0.4, expert_imbalance=1.2),
    ]
    panels = training_panels(log)
    assert panels["model FLOP utilisation"][0].points == [(1.0, 0.3), (2.0, 0.4)]
    needles = panels["held-out questions answered exactly, by length"]
    assert [(curve.label, curve.points) for curve in needles] == [("512", [(1.0, 0.1)]), ("2K", [(1.0, 0.2)])]
    # of the lengths measured after one step, the longest
    entropy = panels["retrieval: entropy of the weights (nats)"]
    assert [(curve.label, curve.points) for curve in entropy] == [("group 1", [(1.0, 3.0)]), ("group 2", [(1.0, 4.0)])]
    assert len(panels) == 8
    assert list(training_panels([step(1, evidence_first=0.5)]))[-1].startswith("retrieval: share of tokens")
    families = probe(1_000_000, 512, 0.1, [1.0])
    families["probe"]["family/facts/similar"] = 0.25
    (family,) = training_panels([step(1), families])["held-out questions answered exactly, by family"]
    assert (family.label, family.points) == ("facts/similar", [(1.0, 0.25)])
    assert list(training_panels([step(1)])) == ["training loss (nats per token)", "gradient norm before clipping"]


def test_runs_with_and_without_probes_are_drawn(tmp_path):
    log = [step(1_000_000), {**step(2_000_000), "stage": "long"}]
    for name, records in (("plain", log), ("one", [{**log[0]}]), ("probed", [*log, probe(2_000_000, 512, 1.0, [1.0])])):
        plot_training(records, tmp_path / f"{name}.png", name)
        assert (tmp_path / f"{name}.png").stat().st_size > 5000


def tuned(step, f1):
    return {"step": step, "loss": 0.5 if step else 0.0, "f1": f1, "em": f1 / 2}


def test_a_tuning_is_drawn_from_its_folder_and_from_its_file(tmp_path):
    folder = tmp_path / "tuned"
    folder.mkdir()
    records = [tuned(0.0, 0.1), tuned(100.0, 0.7), tuned(200.0, 0.6)]
    (folder / "tuning.json").write_text(json.dumps({"source": "s", "records": records, "metadata": {}}))
    for source in (folder, folder / "tuning.json"):
        target = tmp_path / f"{source.stem}.png"
        drawn = CliRunner().invoke(app, ["plot", str(source), "-o", str(target)])
        assert drawn.exit_code == 0 and target.read_bytes().startswith(b"\x89PNG"), drawn.output
    assert read_tuning(folder / "tuning.json") == records
    plot_tuning(records[:1], tmp_path / "untrained.png", "no step yet")


@pytest.mark.parametrize(
    "content",
    ["{}", '{"records": []}', '{"records": [{"step": 1, "loss": 1, "f1": 1}]}', '{"records": [{"step": "1"}]}'],
)
def test_a_tuning_without_scores_is_refused_with_its_name(tmp_path, content):
    (tmp_path / "tuning.json").write_text(content)
    with pytest.raises(ValueError, match=r"tuning\.json"):
        read_tuning(tmp_path / "tuning.json")


def test_a_picture_has_few_colours_and_a_map_enough_for_its_bar(tmp_path):
    curves, heat = tmp_path / "curves.png", tmp_path / "map.png"
    plot_training([step(1_000_000), step(2_000_000, mfu=0.4), probe(2_000_000, 512, 0.5, [1.0])], curves, "")
    plot_needles([{"length": 512, "depth": 0.1, "correct": True}], heat, "")
    with Image.open(curves) as few, Image.open(heat) as many:
        assert len(few.getcolors()) <= 48 < len(many.getcolors()) <= 128
