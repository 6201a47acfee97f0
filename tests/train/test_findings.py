"""The paper's findings: every variant is a run that can start, and a finding goes from shards to a report in pieces."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from hsa_ultralong.cli.main import app
from hsa_ultralong.data import MixtureConfig
from hsa_ultralong.files.packed import pack
from hsa_ultralong.models.presets import preset
from hsa_ultralong.recipes import recipe
from hsa_ultralong.recipes.findings import FINDINGS, QUICK
from hsa_ultralong.train import apply_overrides
from hsa_ultralong.train.graphs import require_graphs
from hsa_ultralong.train.twins import rival_of

ROOT = Path(__file__).resolve().parents[2]
AUTHORS = ("s_niah_authors", "mq_authors", "vt_authors")
VARIANTS = [(name, variant) for name, finding in FINDINGS.items() for variant in finding.variants]


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def findings():
    return script("findings")


@pytest.mark.parametrize("settings", [(), QUICK], ids=["full", "quick"])
@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_every_variant_is_a_run_whose_stages_fit_its_model_and_rows(name, variant, settings):
    config = apply_overrides(recipe("findings"), [*FINDINGS[name].settings(variant), *settings])
    model = config.shape()
    rival_of(config, model)
    require_graphs(config, model, torch.device("cuda"), 1)
    for stage in config.stages:
        stage.forward_rows(1)
        MixtureConfig(weights=stage.mixture, seq_len=stage.seq_len, chunk_size=model.chunk_size)
        assert stage.warmup_steps < stage.num_steps


def test_runs_of_a_finding_have_the_same_tokens_and_differ_in_what_is_claimed():
    for name, finding in FINDINGS.items():
        assert len(finding.variants) >= 2 and len(set(finding.variants.values())) == len(finding.variants), name
        runs = [apply_overrides(recipe("findings"), finding.settings(variant)) for variant in finding.variants]
        assert len({tuple((stage.tokens, stage.batch_tokens) for stage in run.stages) for run in runs}) == 1, name
        assert sum(stage.tokens for stage in runs[0].stages) <= 75_000_000


def test_the_authors_protocol_is_measured_and_its_kinds_are_taught_wherever_it_is():
    kinds = {"needles", "facts", "multi_query", "variable_tracking"}
    for name, finding in FINDINGS.items():
        assert "paper" in finding.measures or name == "parity"
        for variant in finding.variants if "paper" in finding.measures else ():
            stages = apply_overrides(recipe("findings"), finding.settings(variant)).stages
            assert all(kinds <= set(stage.mixture) for stage in stages[1:]), (name, variant)
            # what cannot be laid together is asked otherwise, and so is what it is compared with
            model = apply_overrides(recipe("findings"), finding.settings(variant)).shape()
            assert model.is_composable or finding.setting == "rebuild", (name, variant)
    assert FINDINGS["effective_length"].lengths.endswith("16M") and "ruler" in FINDINGS["effective_length"].measures


def test_a_dry_run_prints_commands_that_parse_and_does_nothing(findings, tmp_path, capsys, parse_command):
    for name, finding in FINDINGS.items():
        arguments = ["run", name, "--data", "shards", "--dry-run", "--runs", str(tmp_path)]
        if "short" in finding.measures:
            arguments += ["--short", "short"]
        else:
            with pytest.raises(ValueError, match=f"{name} measures no short tasks: leave --short out"):
                findings.main([*arguments, "--short", "short"])
        assert findings.main(arguments, lambda *_: pytest.fail("performed")) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == len(finding.variants) * (1 + len(finding.measures))
        for line in lines:
            parse_command(line.partition(": ")[2])
    assert not list(tmp_path.iterdir())


def test_the_shared_run_is_the_recipe_as_it_is():
    assert preset("nano") == recipe("findings").shape()
    assert sum(not FINDINGS[name].settings(variant) for name, variant in VARIANTS) == 3


@pytest.fixture(scope="module")
def quick(findings, shards_folder, tmp_path_factory, unpainted):
    """`positions` at toy size, in two calls; the commands that were performed, and the folder."""
    folder, performed = tmp_path_factory.mktemp("findings"), []
    text = folder / "held-out.txt"
    text.write_text((shards_folder[0].parent / "corpus.txt").read_text(encoding="utf-8")[:9000], encoding="utf-8")

    def perform(command, seconds):
        performed.append(list(command))
        if len(performed) == 2:  # asked to end within its time
            return -1
        result = CliRunner().invoke(app, list(command))
        assert result.exit_code == 0, result.output
        return 0

    arguments = [
        "run", "positions", "--data", shards_folder[0], "--quick", "--device", "cpu", "--runs", folder / "runs",
        "--lengths", "512", "--needles", "2", "--ppl-lengths", "1K", "--samples", "1", "--text", text,
    ]  # fmt: skip
    with unpainted():
        codes = [findings.main(list(map(str, arguments)), perform) for _ in range(2)]
    assert codes == [3, 0]
    return performed, folder


def test_a_finding_goes_on_where_it_stopped_and_does_nothing_twice(quick):
    performed, _ = quick
    kinds = [command[1] if command[0] == "train" else command[command.index("-o") + 1].rsplit("/", 1)[1]
             for command in performed]  # fmt: skip
    measured = ["needles", "paper-rebuild", "perplexity"]
    assert kinds == ["findings", "needles", *measured, "findings", *measured]
    assert "--max-minutes" in performed[0] and "model.memory_positions=rope" in performed[5]


def test_its_summary_has_records_of_every_variant_configurations_and_where_they_came_from(findings, quick):
    folder = quick[1] / "runs" / "results" / "positions"
    found = findings.read_summary(folder)
    assert {(r["variant"], r["task"]) for r in found["records"]} == {
        (variant, task) for variant in ("nope", "rope") for task in ("training", "s_niah", "ppl_last_512", *AUTHORS)
    }
    assert {r["depth"] for r in found["records"] if r["task"] == "s_niah"} == {None}
    assert found["meta"]["seeds"] == [0] and found["meta"]["settings"]["rope"] == ["model.memory_positions=rope"]
    assert set(found["meta"]["runs"]) == {"nope-0", "rope-0"} and found["meta"]["commits"] and found["meta"]["hardware"]
    assert found["configs"]["rope-0"]["model"]["memory_positions"] == "rope"


def test_a_run_that_was_asked_at_another_commit_keeps_both(findings, quick, tmp_path):
    shutil.copytree(quick[1] / "runs", tmp_path / "runs")
    path = tmp_path / "runs" / "positions-rope-0" / "needles" / "summary.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    trained, found["meta"]["commit"] = found["meta"]["commit"], "0123456"
    path.write_text(json.dumps(found), encoding="utf-8")
    runs = findings.collect("positions", tmp_path / "runs", tmp_path / "results")["meta"]["runs"]
    assert runs["rope-0"]["commit"] == trained and runs["rope-0"]["asked"] == sorted({trained, "0123456"})
    assert "asked" not in runs["nope-0"]


def test_seeds_measured_elsewhere_are_kept(findings, quick, tmp_path):
    shutil.copytree(quick[1] / "runs" / "results", tmp_path / "results")
    place = tmp_path / "results" / "positions"
    found = findings.read_summary(place)
    moved = [{**record, "seed": 7} for record in found["records"]]
    others = {"meta": {**found["meta"], "runs": {"nope-7": found["meta"]["runs"]["nope-0"]}},
              "configs": found["configs"], "records": moved}  # fmt: skip
    (place / "summary.json.xz").write_bytes(pack(json.dumps(others).encode()))
    joined = findings.collect("positions", quick[1] / "runs", tmp_path / "results")
    assert joined["meta"]["seeds"] == [0, 7] and len(joined["records"]) == 2 * len(moved)
    assert set(joined["meta"]["runs"]) == {"nope-0", "rope-0", "nope-7"}


def test_nothing_measured_and_failed_commands_are_one_clear_error(findings, tmp_path, capsys):
    with pytest.raises(ValueError, match="nothing of window was measured"):
        findings.collect("window", tmp_path, tmp_path)
    options = findings.Options(tmp_path, runs=tmp_path / "runs")
    with pytest.raises(ValueError, match="exit code 2; run it again"):
        findings.run("window", 0, options, perform=lambda *_: 2)
    assert "[1/12] window window_128 seed 0: hsa train findings" in capsys.readouterr().err


def test_places_are_told_apart_by_length_and_tenth(findings):
    lines = [{"length": 512, "depth": depth, "correct": depth > 0.5} for depth in (0.0, 0.05, 0.95, 1.0)]
    cells = {(one["length"], one["depth"]): (one["value"], one["samples"]) for one in findings._by_depth(lines)}
    assert cells == {(512, 0.05): (0.0, 2), (512, 0.95): (1.0, 2)}
