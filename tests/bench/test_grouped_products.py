"""scripts/grouped_products.py: every way computes the same, and the file says what was measured."""

import importlib.util
import json
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location(
    "grouped_products", Path(__file__).parents[2] / "scripts/grouped_products.py"
)
grouped = importlib.util.module_from_spec(spec)
spec.loader.exec_module(grouped)

SMALL = ["--tokens", "64", "--topk", "2", "--width", "32", "--inner", "16", "--seconds", "0", "--device", "cpu"]


@pytest.mark.parametrize("largest", [1.0, 3.0])
def test_loads_have_all_rows_and_the_largest_is_so_many_times_the_mean(largest):
    found = grouped.loads(131_072, 64, largest)
    assert sum(found) == 131_072 and min(found) > 0
    assert abs(max(found) - largest * 2048) <= 1


def test_every_way_agrees_with_fp32_and_is_timed_twenty_times(tmp_path, capsys):
    path = tmp_path / "grouped.json"
    assert grouped.main([*SMALL, "--experts", "8,4", "-o", str(path)]) == 0
    found = json.loads(path.read_text())
    records = found["records"]
    assert not [record for record in records if "error" in record]
    assert {(r["experts"], r["load"], r["impl"], r["direction"]) for r in records} == {
        (experts, load, way, direction)
        for experts in (8, 4)
        for load in ("balanced", "skewed")
        for way in ("ours", "loop", "padded")
        for direction in ("fwd", "fwd_bwd")
    }
    for record in records:
        assert record["repeats"] >= 20 and record["rows"] == 128 and 0 < record["rel_error"] < 0.01
        assert record["rel_error_gradients"] < 0.01
    assert {"command", "commit", "hardware", "versions", "seed", "cache"} <= set(found["meta"])
    assert capsys.readouterr().out.count("TFLOP/s") == len(records)


def test_a_way_with_wrong_results_is_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(
        grouped, "padded", lambda *_: lambda rows, gate_up, down: rows + 0 * (gate_up.sum() + down.sum())
    )
    path = tmp_path / "grouped.json"
    grouped.main([*SMALL, "--experts", "4", "--ways", "padded", "--loads", "balanced", "-o", str(path)])
    (record,) = json.loads(path.read_text())["records"]
    assert "its results are wrong" in record["error"]
