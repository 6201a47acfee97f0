"""hsa bench memory: records of every point, runs that add up, a figure."""

import json

import pytest
import torch
from typer.testing import CliRunner

from hsa_ultralong.bench.memory import MemorySettings, add_record, continued, file_records, memory_records
from hsa_ultralong.bench.memory_report import plot_memory
from hsa_ultralong.cli.main import app
from hsa_ultralong.memory import landmark_index
from hsa_ultralong.models import HSAForCausalLM
from hsa_ultralong.models.presets import preset
from hsa_ultralong.testing.processes import launch


@pytest.fixture(scope="module")
def records():
    torch.manual_seed(0)
    found = []
    settings = MemorySettings(lengths=(600, 1200), steps=2, batches=(1, 3), file_max=700)
    memory_records(HSAForCausalLM(preset("debug")).eval(), "debug", settings, found.append)
    return found


def test_every_metric_of_the_suite_is_measured(records):
    assert {record["metric"] for record in records} == {
        "read_s", "read_tokens_per_s", "peak_host_bytes", "bytes_per_token", "decode_ms", "first_token_s", "save_s",
        "disk_s", "open_s", "hit_rate", "fetch_fraction", "host_share",
    }  # fmt: skip
    assert {"metric", "preset", "store", "dtype", "tokens", "batch", "value"} == set(records[0])
    decoded = {(r["store"], r["dtype"], r["tokens"], r["batch"]) for r in records if r["metric"] == "decode_ms"}
    assert {("device", "fp32", 1200, 3), ("file", "int8", 600, 1), ("host", "bf16", 600, 1)} <= decoded
    assert not any(store == "file" and tokens == 1200 for store, _, tokens, _ in decoded)
    read = {(r["store"], r["dtype"], r["tokens"]) for r in records if r["metric"] == "read_tokens_per_s"}
    assert read == {("device", "fp32", 600), ("device", "fp32", 1200), ("file", "bf16", 600), ("file", "int8", 600)}
    assert all(record["value"] > 0 for record in records)
    assert all(record["value"] <= 1 for record in records if record["metric"] in ("hit_rate", "fetch_fraction"))


def test_a_memory_on_tiers_says_how_much_was_read_on_the_host():
    torch.manual_seed(0)
    model, found = HSAForCausalLM(preset("debug")).eval(), []
    settings = MemorySettings(lengths=(900,), steps=2, store="host", key_values="int8", landmarks="int8")
    memory_records(model, "debug", settings, found.append)
    values = {record["metric"]: record["value"] for record in found}
    assert values["host_share"] == 1.0 and values["decode_ms"] > 0


def test_a_later_run_replaces_its_own_points_and_keeps_the_others(tmp_path, records):
    path = tmp_path / "memory-x.json"
    meta = {"command": "first", "commit": "1", "date": "d", "hardware": "x"}
    result = continued(path, meta)
    for record in records[:3]:
        add_record(result, record)
    path.write_text(json.dumps(result))
    result = continued(path, {**meta, "command": "second"})
    add_record(result, {**records[0], "value": 123.0})
    assert len(result["records"]) == 3 and [run["command"] for run in result["meta"]["runs"]] == ["first", "second"]
    assert [(r["run"], r["value"]) for r in result["records"]][-1] == (1, 123.0)


def test_the_figure_needs_something_to_draw(tmp_path, records):
    result = {"meta": {"hardware": "x"}, "records": records}
    plot_memory(result, tmp_path / "m.png")
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_memory({"meta": {"hardware": "x"}, "records": []}, tmp_path / "n.png")


def test_the_command_writes_results_and_figure(tmp_path):
    arguments = ["bench", "memory", "--preset", "debug", "--lengths", "512", "--steps", "1", "--file-max", "1", "-o"]
    result = CliRunner().invoke(app, [*arguments, str(tmp_path), "--hardware", "here", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "memory-here.json").read_text())["records"]
    assert (tmp_path / "memory-here.png").is_file() and "decode_ms" in result.stdout
    again = CliRunner().invoke(app, ["plot", str(tmp_path / "memory-here.json"), "-o", str(tmp_path / "x.png")])
    assert again.exit_code == 0 and (tmp_path / "x.png").is_file()


@pytest.mark.parametrize(
    ("options", "is_together", "said"),
    [
        (["--lookups", "sketch"], False, "name one by --file"),
        (["--formats", "int8"], True, "several processes make no files"),
        (["--file-max", "1K"], True, "several processes make no files"),
        (["--stores", "host"], True, "several processes make no files"),
    ],
)
def test_options_that_nothing_would_read_are_refused(tmp_path, monkeypatch, options, is_together, said):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: is_together)
    arguments = ["bench", "memory", "--preset", "debug", "--lengths", "512", "--device", "cpu", "-o", str(tmp_path)]
    result = CliRunner().invoke(app, [*arguments, *options])
    assert result.exit_code != 0 and said in " ".join(result.output.split())
    assert not list(tmp_path.iterdir())


def test_a_file_is_measured_with_and_without_a_lookup(tmp_path, monkeypatch):
    monkeypatch.setattr(landmark_index, "_FIT_CHUNKS", 32)
    torch.manual_seed(0)
    model, found = HSAForCausalLM(preset("debug")).eval(), []
    model.memorize(torch.randint(3, 500, (3000,))).save(tmp_path / "a.hsa", key_values="int8")
    settings = MemorySettings(stores=("file",), lookups=("exact", "sketch", "lists"), steps=3)
    file_records(model, "debug", tmp_path / "a.hsa", settings, found.append)
    values = {(record["metric"], record["store"]): record["value"] for record in found}
    assert values["recall_32", "sketch"] > 0.9 and values["lookup_ms", "sketch"] > 0
    assert values["recall_32", "lists"] > 0.9 and values["lookup_ms", "lists"] > 0
    assert all(values["decode_ms", place] > 0 for place in ("file", "file, sketch", "file, lists"))
    assert {record["dtype"] for record in found} == {"int8"} and {record["tokens"] for record in found} == {3000}


def work_together(rank, world, path):
    torch.manual_seed(0)
    model, found = HSAForCausalLM(preset("debug")).eval(), []
    memory_records(model, "debug", MemorySettings(lengths=(600,), steps=2), found.append)
    places = {record["store"] for record in found if record["metric"] == "decode_ms"}
    assert places == {"device", "device, 2 processes"}
    reading = {record["store"]: record["value"] for record in found if record["metric"] == "read_tokens_per_s"}
    assert reading.keys() == places and min(reading.values()) > 0
    found.clear()
    file_records(model, "debug", path, MemorySettings(stores=("file",), steps=2), found.append)
    assert {record["store"] for record in found} == {"file, 2 processes"}
    assert {record["tokens"] for record in found} == {900}


def test_processes_decode_alone_and_together(tmp_path):
    torch.manual_seed(0)
    HSAForCausalLM(preset("debug")).eval().memorize(torch.randint(3, 500, (900,))).save(tmp_path / "a.hsa")
    launch(2, tmp_path / "meet", work_together, tmp_path / "a.hsa")
