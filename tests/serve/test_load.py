"""hsa bench serve: what it counts, and that it can be run."""

import json
import threading

import pytest
import torch
from typer.testing import CliRunner

from hsa_ultralong.bench.serve_report import plot_serve
from hsa_ultralong.cli.main import app
from hsa_ultralong.models import HSAForCausalLM
from hsa_ultralong.models.presets import preset
from hsa_ultralong.serve import load
from hsa_ultralong.serve.load import LoadSettings, Served, kill_results, load_results, quantile
from hsa_ultralong.serve.throughput import ThroughputSettings, throughput_records


def reply(text, source="", status=200):
    choice = {"text": text, "retrieval": {"sources": [{"text": source}]}}
    return Served(status, {"choices": [choice]}, 0.1, 0.2)


def test_errors_other_answers_and_mixtures_are_counted():
    settings = LoadSettings(requests=6, memories=2)
    first, second = (load._code(number) for number in range(2))
    alone = [reply(first), reply(second), reply("a"), reply("b")]
    found = [reply(first, first), reply(first), reply("a", second), reply("b"), reply("", status=500), reply(second)]
    counted = load._summary(alone, found, 2.0, settings)
    assert (counted["errors"], counted["mixed_answers"], counted["other_than_alone"]) == (1, 2, 1)
    assert counted["requests_per_s"] == 3.0 and counted["code_questions"] == 4
    assert counted["answers_with_the_code"] == 2


def test_quantiles_are_values_that_were_seen():
    values = list(range(1, 101))
    assert (quantile(values, 0.5), quantile(values, 0.99), quantile([7], 0.99)) == (50, 99, 7)


def test_a_malformed_request_that_is_answered_ends_the_run():
    class Server:
        status = 400

        def ask(self, namespace, method, path, body):
            return reply("", status=self.status)

    assert load.refusal_seconds(Server(), rounds=2) == [0.2] * 2 * len(load._MALFORMED)
    Server.status = 200
    with pytest.raises(ValueError, match="was not refused"):
        load.refusal_seconds(Server())


class Gone:
    """Stands for a server that answers writes until it is told to stop."""

    def __init__(self, *_):
        self.began, self.is_gone, self.count = 0.0, threading.Event(), 0

    def ask(self, namespace, method, path, body=None, upload=None):
        if self.is_gone.is_set():
            raise ConnectionError
        self.count += 1
        self.is_gone.wait(0.001)
        is_new = path == "/v1/memories" or upload is not None
        return Served(201 if is_new else 200, {"data": []}, 0.0, 0.0)

    def kill(self):
        self.is_gone.set()


def test_writes_that_are_gone_are_counted_as_lost(monkeypatch, tmp_path):
    monkeypatch.setattr(load, "ServerProcess", Gone)
    counted = kill_results(None, tmp_path, LoadSettings(kills=1))
    assert counted["lost_writes"] == counted["acknowledged_writes"] > 2
    assert 0 < counted["acknowledged_uploads"] < counted["acknowledged_writes"]


def test_batches_are_timed():
    torch.manual_seed(0)
    model = HSAForCausalLM(preset("debug")).eval()
    found = {}
    settings = ThroughputSettings((300,), (1, 2), steps=4, prompt=5, long_prompt=40)
    throughput_records(model, settings, lambda metric, tokens, batch, value: found.setdefault((metric, batch), value))
    assert {metric for metric, batch in found if batch == 1} >= {
        "tokens_per_s", "decode_tokens_per_s", "first_token_s_p50", "first_token_s_p99", "read_s", "first_question_s",
        "second_question_s", "long_prompt_first_token_s",
    }  # fmt: skip
    assert found["speedup", 2] == pytest.approx(found["tokens_per_s", 2] / found["tokens_per_s", 1])
    assert ("decode_speedup", 2) in found and all(value >= 0 for value in found.values())


def test_batches_are_drawn_and_nothing_else_is(tmp_path):
    like = {"preset": "debug", "store": "device", "dtype": "fp32"}
    records = [
        {**like, "metric": metric, "tokens": tokens, "batch": batch, "value": 0.5 * batch}
        for metric in ("tokens_per_s", "decode_tokens_per_s", "first_token_s_p50", "first_token_s_p99")
        for tokens in (8192, 1 << 20)
        for batch in (1, 4)
    ]
    plot_serve({"meta": {"hardware": "x"}, "records": records}, tmp_path / "s.png")
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_serve({"meta": {"hardware": "x"}, "records": records[::2]}, tmp_path / "t.png")


def test_the_command_draws_its_batches(tmp_path):
    options = ["--requests", "0", "--kills", "0", "--preset", "debug", "--lengths", "64", "--batches", "1,2"]
    options += ["--steps", "2", "--long-prompt", "20", "--device", "cpu", "--hardware", "x", "-o", str(tmp_path)]
    made = CliRunner().invoke(app, ["bench", "serve", *options])
    assert made.exit_code == 0, made.output
    assert "serve-x.png" in made.output and (tmp_path / "serve-x.png").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preset", "debug"], "needs a model folder"),
        (["--lengths", "8K"], "is measured alone"),
        (["--store", "file"], "--store must be device or host"),
        (["--requests", "0", "--kills", "0"], "nothing is left to measure"),
    ],
)
def test_what_does_not_go_together_is_refused(options, message):
    found = CliRunner().invoke(app, ["bench", "serve", *options])
    assert found.exit_code != 0 and message in str(found.exception) + found.output


@pytest.mark.slow
def test_two_hundred_requests_of_sixteen_clients_are_answered_as_alone(tmp_path):
    found = load_results(None, tmp_path, LoadSettings(server=("--device", "cpu", "--dtype", "fp32")))
    assert found["requests"] == 200 and found["answers_with_the_code"] == found["code_questions"]
    assert found["errors"] == found["mixed_answers"] == found["other_than_alone"] == 0
    assert 0 < found["refused_s_p50"] <= found["refused_s_p99"]


@pytest.mark.slow
def test_a_killed_server_keeps_what_it_acknowledged(tmp_path):
    options = ["--requests", "0", "--kills", "3", "--device", "cpu", "--dtype", "fp32", "-o", str(tmp_path)]
    made = CliRunner().invoke(app, ["bench", "serve", *options])
    assert made.exit_code == 0, made.output
    (path,) = tmp_path.glob("serve-*.json")
    values = {record["metric"]: record["value"] for record in json.loads(path.read_text())["records"]}
    assert 0 < values["kill_acknowledged_uploads"] < values["kill_acknowledged_writes"]
    assert values["kill_lost_writes"] == values["kill_partial_memories"] == 0
