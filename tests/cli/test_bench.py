"""`hsa bench ops` on a CPU with tiny sizes: the file, the figure, the printed JSON, and refusals in one line."""

import json

import pytest
from typer.testing import CliRunner

from hsa_ultralong.bench import ops
from hsa_ultralong.cli import common
from hsa_ultralong.cli.main import app
from hsa_ultralong.train.graphs import CudaCapture


def hsa(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


SMALL = ("bench", "ops", "--device", "cpu", "--quick", "--lengths", "64,128", "--topk", 2)


def test_bench_ops_writes_json_and_figure_and_plot_draws_it_again(tmp_path):
    result = hsa(*SMALL, "--ops", "hsa,full_attention", "-o", tmp_path, "--hardware", "test")
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "ops-test.json").read_text())
    assert {"command", "commit", "date", "hardware", "versions", "seed", "failures"} <= set(written["meta"])
    assert {record["T"] for record in written["records"]} == {64, 128}
    figure = tmp_path / "ops-test.png"
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert "ops-test.json" in result.stdout and "SDPA" in result.stdout
    figure.unlink()
    assert hsa("plot", tmp_path / "ops-test.json").exit_code == 0
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_bench_ops_prints_only_json_on_request(tmp_path):
    result = hsa(*SMALL, "--ops", "full_attention", "-o", tmp_path, "--json", "--seed", 3)
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["meta"]["seed"] == 3 and len(printed["records"]) == 4
    assert len(list(tmp_path.glob("ops-cpu*.json"))) == 1


def test_bench_ops_takes_landmarks_of_any_width(tmp_path):
    result = hsa(*SMALL, "--ops", "decode", "--retrieval-dim", 48, "-o", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["records"]
    assert {one["R"] for one in found} == {48} and any(one["op"] == "decode_topk" for one in found)
    assert hsa(*SMALL, "--retrieval-dim", 8, "-o", tmp_path / "no").exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--ops", "wrong"), "operators to measure are"),
        (("--lengths", "ten"), "expected a size"),
        (("--lengths", "32"), "at least one chunk of 64"),
        (("--topk", "0"), "--topk must be whole numbers from 1"),
        (("--text", "no-such-file"), "is no file"),
        (("--graphs",), "--graphs needs a CUDA device, got cpu"),
    ],
)
def test_bench_ops_refuses_bad_input_in_one_line(arguments, words, tmp_path):
    result = hsa("bench", "ops", "--device", "cpu", "-o", tmp_path, *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and words in result.stderr and result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("graphs", [True, False])
def test_times_by_graphs_have_a_file_of_their_own(graphs, tmp_path, monkeypatch):
    found = {}

    def run_ops(operators, settings, meta, *, path, **_):
        found.update(capture=settings.make_capture, name=path.name)
        return {"meta": {**meta, "failures": [{"error": "no card"}]}, "records": []}

    monkeypatch.setattr(common, "choose_device", lambda name: "cuda")
    monkeypatch.setattr(ops, "run_ops", run_ops)
    result = hsa("bench", "ops", "-o", tmp_path, "--hardware", "test", *(["--graphs"] if graphs else []))
    assert "nothing was measured: no card" in result.stderr
    want = (CudaCapture, "ops-graphs-test.json") if graphs else (None, "ops-test.json")
    assert (found["capture"], found["name"]) == want


def test_help_of_bench_shows_examples():
    result = hsa("bench", "ops", "--help")
    assert result.exit_code == 0 and "hsa bench ops --quick" in result.stdout
    assert "hsa bench ops --graphs --ops hsa:triton" in result.stdout
    assert "ops" in hsa("bench", "--help").stdout
