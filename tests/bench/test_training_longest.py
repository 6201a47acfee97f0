"""hsa bench training --longest: the search, what caps teach each other, going on, the command on a CPU."""

import io
import json
import math
import time
from contextlib import contextmanager

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from hsa_ultralong.baselines import FullAttentionLM
from hsa_ultralong.bench import training_longest
from hsa_ultralong.bench.training_longest import (
    METHODS,
    Cap,
    LongestSearch,
    LongestSettings,
    Method,
    RowTrainer,
    Trial,
    choose_caps,
    choose_methods,
    next_length,
    parse_cap,
    usable_trials,
)
from hsa_ultralong.bench.training_report import add_record, plot_training_speed, tables
from hsa_ultralong.cli.main import app
from hsa_ultralong.models.presets import preset
from hsa_ultralong.train.activations import recompute_activations
from hsa_ultralong.train.segmented import segmented_loss_backward

CPU = torch.device("cpu")
SIZES = {"first": 64, "unit": 16, "precision": 1 / 8}
SMALL, CARD = Cap("80GB", 80), Cap("card", 141)


@pytest.mark.parametrize("true_longest", [0, 16, 48, 64, 100, 500, 512, 1000, 4000, 4096, 9000])
def test_the_search_ends_within_an_eighth_of_the_longest_row(true_longest):
    longest, failed, tried = 0, None, []
    while (tokens := next_length(longest, failed, last=4096, **SIZES)) is not None:
        assert tokens % 16 == 0 and tokens <= 4096 and tokens not in tried
        tried.append(tokens)
        longest, failed = (tokens, failed) if tokens <= true_longest else (longest, tokens)
    assert longest <= true_longest
    assert longest == 4096 or failed - longest <= max(16, longest / 8)
    assert len(tried) <= 7 + 3


def test_a_lower_bound_than_an_earlier_runs_ends_the_search():
    assert next_length(512, None, last=256, **SIZES) is None
    assert next_length(128, 1024, last=256, **SIZES) == 256


def test_caps_are_read_and_sorted():
    assert parse_cap("80GB", 1) == ("80GB", 80 * 10**9) and parse_cap("1.5GiB", 1) == ("1.5GiB", 3 * 2**29)
    assert parse_cap("card", 7) == ("card", 7)
    for wrong in ("80", "GB", "80KB", "-1GB", "0GB", "cards"):
        with pytest.raises(ValueError, match="such as 80GB"):
            parse_cap(wrong, 1)
    assert choose_caps(None, CPU) == (Cap("host", None),)
    with pytest.raises(ValueError, match="needs a GPU"):
        choose_caps("80GB", CPU)


def test_methods_have_names_of_their_own():
    names = [method.parallel for method in choose_methods(METHODS, 64)]
    assert names == ["checkpointing none", "checkpointing full", "segments of 64", "segments of 64, offloaded"]
    assert choose_methods(["segmented"], 64, True)[0].parallel == "segments of 64, compiled"
    with pytest.raises(ValueError, match="methods are plain, checkpointing, segmented, offloaded; got none"):
        choose_methods(["none"], 64)


class Card:
    """Trains `rows[parallel]` tokens in 80 bytes, twice as many in 141; counts what is tried."""

    def __init__(self, monkeypatch, rows):
        self.rows, self.cap, self.tried = rows, None, []
        monkeypatch.setattr(RowTrainer, "trial", lambda trainer, tokens: self.trial(trainer.method, tokens))
        monkeypatch.setattr(training_longest, "_limited", self.limited)

    @contextmanager
    def limited(self, device, cap):
        self.cap = cap
        yield
        self.cap = None

    def trial(self, method, tokens):
        if self.cap is None:
            # the row that warms up
            return Trial(True)
        self.tried.append((method.parallel, self.cap.name, tokens))
        room = self.rows[method.parallel] * (2 if self.cap == CARD else 1)
        return Trial(True, 1000.0, tokens // 100) if tokens <= room else Trial(False)


def search(records, known=(), attention="hsa", said=None, **options):
    options = {"max_tokens": 65_536, "methods": choose_methods(METHODS[:3], 64), "caps": (SMALL, CARD), **options}
    LongestSearch(
        preset("debug"), "debug", attention, LongestSettings(**options), CPU, segmented=segmented_loss_backward,
        prepare=lambda model, checkpointing: None, on_record=records.append, known=known,
        say=(lambda text: None) if said is None else said.append,
    ).run()  # fmt: skip
    return {(r["parallel"], r["cap"]): r for r in records if r["metric"] == "longest_sequence"}


ROWS = {"checkpointing none": 3000, "checkpointing full": 20_000, "segments of 64": 1 << 20}


def test_caps_learn_from_each_other_and_the_longest_carries_its_numbers(monkeypatch):
    card, records = Card(monkeypatch, ROWS), []
    found = search(records)
    plain, large = found["checkpointing none", "80GB"], found["checkpointing none", "card"]
    assert plain["limit"] == "memory" and 2600 < plain["value"] <= 3000 < plain["shortest_failed"] < 1.125 * 3000
    assert large["value"] > 5200 and plain["context"] is None and plain["cap_bytes"] == 80
    assert (plain["peak_bytes"], plain["tokens_per_s"]) == (plain["value"] // 100, 1000.0)
    # what fitted under the small cap is not tried under the large one
    tried = [tokens for parallel, cap, tokens in card.tried if (parallel, cap) == ("checkpointing none", "card")]
    assert min(tried) > plain["value"]
    both = [found["segments of 64", cap] for cap in ("80GB", "card")]
    assert {(one["limit"], one["value"]) for one in both} == {("max_tokens", 65_536)}
    assert not [cap for parallel, cap, _ in card.tried if (parallel, cap) == ("segments of 64", "card")]


def test_a_search_that_was_cut_off_goes_on_where_it_stood(monkeypatch):
    card, whole = Card(monkeypatch, ROWS), []
    expected = search(whole)
    tried = card.tried.copy()

    class Kept(list):
        def append(self, record):
            super().append(record)
            if len(self) == self.limit:
                raise KeyboardInterrupt

    for number in (1, 20):
        card.tried.clear()
        kept = Kept()
        kept.limit = number
        with pytest.raises(KeyboardInterrupt):
            search(kept)
        assert search([], known=kept) == expected and card.tried == tried


def test_time_that_is_up_begins_no_trial_and_says_so(monkeypatch):
    card, records, said = Card(monkeypatch, ROWS), [], []
    found = search(records, deadline=time.monotonic() + 5, said=said)
    # 1,000 tokens/s, two steps a trial: 1,024 tokens would take 2 s, 2,048 more than 5
    assert max(tokens for _, _, tokens in card.tried) <= 8192
    assert {one["limit"] for one in found.values()} == {"time"} and any("run again" in text for text in said)
    assert search([], known=[one for one in records if one["metric"] == "trial"])["segments of 64", "card"]["value"]


def test_out_of_memory_is_a_result_and_other_errors_are_not():
    model = training_longest.build("hsa", preset("debug"), CPU, "none")
    step = RowTrainer(model, 512, Method(), segmented_loss_backward, 0)
    model.register_forward_pre_hook(lambda module, inputs: fail(inputs[0].shape[1]))
    errors = {64: torch.OutOfMemoryError("no room"), 96: RuntimeError("CUDA error: out of memory"), 128: MemoryError()}

    def fail(tokens):
        if tokens == 80:
            raise RuntimeError("an error of ours")
        if tokens in errors:
            raise errors[tokens]

    assert [step.trial(tokens) for tokens in errors] == [Trial(False)] * 3
    fine = step.trial(32)
    assert fine.fits and fine.tokens_per_s > 0 and fine.peak_bytes is None
    with pytest.raises(RuntimeError, match="an error of ours"):
        step.trial(80)


def test_every_method_takes_the_same_first_step():
    """Weights after one optimiser step on the same row, from the same seed."""
    weights = []
    for method in choose_methods(METHODS, 32):
        torch.manual_seed(0)
        model = training_longest.build("hsa", preset("debug", gumbel_noise=False), CPU, method.checkpointing)
        recompute_activations(model, method.checkpointing)
        RowTrainer(model, 512, method, segmented_loss_backward, 0)._step(96)
        weights.append(torch.cat([part.detach().flatten() for part in model.parameters()]))
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=1e-4, atol=1e-5)


def test_the_twin_has_no_segments(monkeypatch):
    Card(monkeypatch, ROWS)
    assert {parallel for parallel, _ in search([], attention="full")} == {"checkpointing none", "checkpointing full"}
    model = training_longest.build("full", preset("debug"), CPU, "full")
    assert isinstance(model, FullAttentionLM) and model.gradient_checkpointing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 8}, "at least one chunk of 16"),
        ({"methods": choose_methods(["segmented"], 24)}, "multiple of chunk_size=16"),
        ({"attention": "half"}, "attention is one of hsa, full"),
    ],
)
def test_what_cannot_be_searched_is_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        search([], **options)


def test_trials_of_another_commit_are_not_believed():
    def trial(run, context, name="debug"):
        return {"metric": "trial", "preset": name, "context": context, "run": run}

    meta = {"runs": [{"commit": "a"}, {"commit": "b"}, {"commit": "b"}]}
    result = {"meta": meta, "records": [trial(0, 64), trial(1, 128), trial(0, 64, "nano")]}
    assert usable_trials(result, "debug") == [trial(1, 128)]
    assert result["records"] == [trial(1, 128), trial(0, 64, "nano")]


def test_the_report_shows_every_cap_and_what_ended_the_search(monkeypatch, tmp_path):
    Card(monkeypatch, ROWS)
    result, records = {"meta": {"hardware": "H", "runs": [{}]}, "records": []}, []
    search(records)
    for record in records + records:
        add_record(result, record)
    assert len(result["records"]) == len(records)
    (table,) = tables(result)
    assert table.row_count == 6 and set(table.columns[1].cells) == {"80GB", "card"}
    assert set(table.columns[-1].cells) == {"memory", "--max-tokens"}
    # nothing is cut off in a narrow terminal
    printed = io.StringIO()
    Console(file=printed, width=80).print(table)
    assert "…" not in printed.getvalue()
    assert all(f"{one['value']:,}" in printed.getvalue() for one in records if one["metric"] == "longest_sequence")
    plot_training_speed(result, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_training_speed({"meta": {"hardware": "H"}, "records": records[:1]}, tmp_path / "none.png")
    # taken from the log of a run, which does not say how a step was spread
    logged = {"metric": "tokens_per_s", "preset": "debug", "attention": "hsa", "gpus": 2, "context": 64, "value": 1.0}
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_training_speed({"meta": {"hardware": "H"}, "records": [logged]}, tmp_path / "none.png")


def test_the_command_searches_on_a_cpu_and_goes_on(tmp_path):
    arguments = "bench training --longest --preset debug --piece-tokens 32 --device cpu --hardware x --attention hsa"
    arguments += " --methods plain,segmented"

    def run(*more):
        return CliRunner().invoke(app, [*arguments.split(), "-o", str(tmp_path), *more], env={"COLUMNS": "200"})

    for bound in ("32", "64"):
        result = run("--max-tokens", bound)
        assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "training-x.json").read_text())
    trials = [record for record in found["records"] if record["metric"] == "trial"]
    assert {(one["parallel"], one["context"], one["run"]) for one in trials} == {
        (parallel, context, int(context == 64))
        for parallel in ("checkpointing none", "segments of 32")
        for context in (16, 32, 64)
    }
    longest = [record for record in found["records"] if record["metric"] == "longest_sequence"]
    assert {one["value"] for one in longest} == {64} and {one["limit"] for one in longest} == {"max_tokens"}
    assert all(one["cap"] == "host" and one["peak_bytes"] is None and one["tokens_per_s"] > 0 for one in longest)
    assert "hsa, segments of 32, host: 64 tokens: trains" in result.stderr and "unknown" in result.stdout
    assert (tmp_path / "training-x.png").is_file()
    assert CliRunner().invoke(app, ["plot", str(tmp_path / "training-x.json")]).exit_code == 0
    refused = run()
    assert refused.exit_code == 2 and "needs a bound, such as --max-tokens" in refused.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_cap_ends_the_search(tmp_path):
    arguments = (
        "bench training --longest --preset nano --caps 2GB,4GB --max-tokens 256K --piece-tokens 4K --device cuda"
    )
    result = CliRunner().invoke(app, [*arguments.split(), "--attention", "hsa", "-o", str(tmp_path), "--hardware", "x"])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "training-x.json").read_text())["records"]
    longest = {(r["parallel"], r["cap"]): r for r in found if r["metric"] == "longest_sequence"}
    for record in longest.values():
        assert 0 < record["peak_bytes"] <= record["cap_bytes"] and math.isfinite(record["tokens_per_s"])
    for cap in ("2GB", "4GB"):
        plain, parts = longest["checkpointing none", cap], longest["segments of 4096", cap]
        assert plain["limit"] == "memory" and plain["value"] < longest["checkpointing full", cap]["value"]
        assert plain["value"] < parts["value"]
