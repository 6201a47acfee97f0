"""Several studies or runs in one figure: what is drawn, and what cannot be compared."""

import json

import matplotlib.pyplot as plt
import pytest

from hsa_ultralong.cli.figures import compare
from hsa_ultralong.eval import comparisons


def study(right, margins=None):
    """Lines of 4 needles at 4K and 4 at 8K, the first `right[i]` of each right."""
    margins = margins or [None] * 8
    return [
        {"length": length, "correct": place < good, "margin": margins[4 * number + place]}
        for number, (length, good) in enumerate(zip((4096, 8192), right, strict=True))
        for place in range(4)
    ]


def run(*losses):
    steps = [
        {"stage": "a", "tokens": 1_000_000 * i, "loss": loss, "grad_norm": 1.0} for i, loss in enumerate(losses, 1)
    ]
    return [*steps, {"stage": "a", "tokens": 1_000_000, "probe": {"length": 512, "needle_accuracy": 0.5}}]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were made, closed when the test ends."""
    figures = []
    with monkeypatch.context() as patch:
        patch.setattr(comparisons.plt, "close", figures.append)
        yield figures
    plt.close("all")


def test_recall_and_margins_of_studies_by_length(tmp_path, drawn):
    studies = {"with": study((4, 3), [1.0, 2.0, 3.0, 4.0] * 2), "without": study((2, 0))}
    comparisons.compare_needles(studies, tmp_path / "a.png", "title")
    recall, margin = drawn[0].axes
    lines = {container.get_label(): container.lines[0] for container in recall.containers}
    assert list(lines["with"].get_ydata()) == [1.0, 0.75] and list(lines["without"].get_ydata()) == [0.5, 0.0]
    (median,) = [line for line in margin.lines if line.get_label() == "with"]
    assert list(median.get_xdata()) == [4096, 8192] and list(median.get_ydata()) == [2.5, 2.5]
    assert [text.get_text() for text in recall.get_xticklabels()] == ["4K", "8K"]
    comparisons.compare_needles({"plain": study((4, 4))}, tmp_path / "b.png", "no margins")
    assert len(drawn[1].axes) == 1 and (tmp_path / "b.png").stat().st_size > 5000


def test_curves_of_runs_that_all_of_them_have(tmp_path, drawn):
    runs = {"one": run(3.0, 2.0), "other": [line for line in run(3.5, 2.5, 1.5) if "probe" not in line]}
    comparisons.compare_training(runs, tmp_path / "a.png", "title")
    titles = [axes.get_title() for axes in drawn[0].axes if axes.get_title()]
    assert titles == ["training loss (nats per token)", "gradient norm before clipping"]
    curves = {line.get_label(): list(line.get_ydata()) for line in drawn[0].axes[0].lines}
    assert curves == {"one": [3.0, 2.0], "other": [3.5, 2.5, 1.5]}
    with pytest.raises(ValueError, match="other holds no training step"):
        comparisons.compare_training({"one": run(3.0), "other": []}, tmp_path / "b.png", "title")


def test_only_like_with_like_and_by_different_names(tmp_path):
    for folder, name, lines in (("a", "log.jsonl", run(1.0)), ("b", "records.jsonl", study((1, 1)))):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text("\n".join(json.dumps(line) for line in lines))
    log, records = tmp_path / "a" / "log.jsonl", tmp_path / "b" / "records.jsonl"
    with pytest.raises(ValueError, match="only runs"):
        compare([log, records], tmp_path / "c.png", "")
    with pytest.raises(ValueError, match="names of their folders"):
        compare([log, log], tmp_path / "c.png", "")
    compare([records, _copy(records, tmp_path / "d")], tmp_path / "c.png", "")
    assert (tmp_path / "c.png").stat().st_size > 4000


def _copy(file, folder):
    folder.mkdir()
    (folder / file.name).write_text(file.read_text())
    return folder / file.name
