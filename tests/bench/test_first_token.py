"""`hsa bench first` and what it rests on: processes in turn, kernels counted, a first token that waits for no graph."""

import json
import threading
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from hsa_ultralong.bench import first_token
from hsa_ultralong.bench.first_token import METRICS, FirstTokenSettings, answer_once, main, measure_first_tokens
from hsa_ultralong.cli.main import app
from hsa_ultralong.inference import DecodingEngine, memorize, rehearsal
from hsa_ultralong.inference import engine as engine_module
from hsa_ultralong.ops._triton import hash_triton_early
from hsa_ultralong.testing.factories import random_tokens, tiny_model
from hsa_ultralong.testing.graphs import EagerGraphs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(path)
    return path


def small(folder, **changes):
    return FirstTokenSettings(str(folder), "cpu", "float32", tokens=60, prompt_tokens=5, new_tokens=3, **changes)


@pytest.mark.slow
def test_two_processes_answer_from_a_memory_that_another_wrote(folder, tmp_path):
    first, second = measure_first_tokens(small(folder), tmp_path, ways=(False,))
    assert (first["process"], second["process"]) == ("first", "second")
    for found in (first, second):
        assert found["warm"] is False and set(METRICS) < set(found)
        assert 0 < found["open_s"] < found["first_token_s"] <= found["second_token_s"] <= found["answer_s"]


def test_processes_come_in_turn_and_share_the_caches_of_their_way_alone(tmp_path, monkeypatch):
    seen = []

    def run(command, env, **options):
        work = json.loads(command[-1])
        seen.append((work["task"], work["is_warm"], env["TRITON_CACHE_DIR"], env["TORCHINDUCTOR_CACHE_DIR"]))
        return SimpleNamespace(returncode=0, stdout='noise\n{"first_token_s": 1}\n', stderr="")

    monkeypatch.setattr(first_token.subprocess, "run", run)
    found = list(measure_first_tokens(small("m"), tmp_path))
    assert [(one["process"], one["warm"]) for one in found] == [
        ("first", False), ("second", False), ("first", True), ("second", True)
    ]  # fmt: skip
    assert [one[:2] for one in seen] == [("write", False), *[("ask", False)] * 2, *[("ask", True)] * 2]
    assert seen[1] == seen[2] and seen[3] == seen[4] and len({one[2] for one in seen}) == 3

    fail = lambda *args, **options: SimpleNamespace(returncode=1, stdout="", stderr="trace\nValueError: no")  # noqa: E731
    monkeypatch.setattr(first_token.subprocess, "run", fail)
    with pytest.raises(RuntimeError, match="a process that should write failed: ValueError: no"):
        list(measure_first_tokens(small("m"), tmp_path))


@pytest.mark.parametrize("is_warm", [False, True])
def test_a_process_writes_and_asks(folder, tmp_path, capsys, is_warm):
    path = tmp_path / "m.hsa"
    for task in ("write", "ask"):
        work = {**vars(small(folder, is_warm=is_warm)), "task": task, "memory": str(path), "began": 0.0}
        assert main(json.dumps(work)) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(found) == set(METRICS) and 0 < found["first_token_s"] <= found["second_token_s"] <= found["answer_s"]
    assert (found["warmup_s"] > 1e-3) == is_warm


@pytest.mark.skipif(find_spec("triton") is None, reason="needs the triton package")
def test_kernels_are_counted_as_triton_tells_them(folder, tmp_path, monkeypatch):
    from triton import knobs

    model, path = tiny_model(), tmp_path / "m.hsa"
    first_token.write_memory(model, path, small(folder))
    monkeypatch.setattr(knobs.compilation, "listener", None)

    def now():
        if not told:
            for is_hit in (True, False, False):
                knobs.compilation.listener(
                    src=None, metadata={}, metadata_group={}, times=SimpleNamespace(total=500_000), cache_hit=is_hit
                )
        told.append(1)
        return float(len(told))

    told = []
    counts = first_token._Compilations()
    counts.listen()
    found = answer_once(model, path, small(folder), now, counts)
    assert (found["kernels_compiled"], found["kernels_from_cache"], found["compile_s"]) == (2, 1, 1.5)


@pytest.mark.skipif(find_spec("triton") is None, reason="needs the triton package")
def test_what_triton_hashes_is_hashed_beside_and_once():
    from triton.runtime.cache import triton_key

    thread = hash_triton_early()
    thread.join()
    assert triton_key.cache_info().currsize == 1


def test_a_device_is_met_beside_the_loading_of_weights(monkeypatch):
    met, alive = [], threading.Event()

    def meet(device):
        met.append((str(device), threading.current_thread().name))
        alive.set()

    monkeypatch.setattr(rehearsal, "_meet", meet)
    monkeypatch.setattr(rehearsal, "hash_triton_early", lambda: None)
    rehearsal.prepare_kernels("cpu")
    assert not met
    rehearsal.prepare_kernels("cuda")
    assert alive.wait(10) and met == [("cuda:0", "meet-device")]
    # of several processes each meets its own, which a new thread does not know
    alive.clear()
    monkeypatch.setattr(rehearsal.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    rehearsal.prepare_kernels("cuda")
    assert alive.wait(10) and met[1] == ("cuda:3", "meet-device")


def test_what_is_used_of_a_device_runs_and_a_device_that_is_not_there_is_left_to_others(monkeypatch):
    used = []
    monkeypatch.setattr(rehearsal.functional, "embedding", lambda *operands: used.append(1) or operands[1])
    monkeypatch.setattr(torch.Tensor, "sort", lambda self: used.append(2))
    monkeypatch.setattr(rehearsal, "checksums", lambda tensors: used.append(3) or torch.stack(tensors[1:]))
    rehearsal._meet(torch.device("cpu"))
    assert used == [1, 2, 2, 3], "all of it runs: errors are kept quiet"
    rehearsal._meet(torch.device("cuda", 99))


def test_the_first_token_does_not_wait_for_a_graph_and_the_others_are_the_same(monkeypatch):
    model = tiny_model()
    memory, prompts = memorize(model, random_tokens(1, 60)[0]), random_tokens(2, 7, seed=1)
    expected = DecodingEngine(model, memory, batch=2, max_tokens=40).generate(prompts, 20)
    monkeypatch.setattr(engine_module, "StepGraphs", EagerGraphs)
    monkeypatch.setattr(EagerGraphs, "made", 0)
    engine = DecodingEngine(model, memory, batch=2, max_tokens=40, use_graph=True)
    assert engine.generate(prompts, 1) == [answer[:1] for answer in expected] and EagerGraphs.made == 0
    steps = engine.stream(prompts, 20)
    found = [next(steps).tokens]
    assert EagerGraphs.made == 0
    found += [step.tokens for step in steps]
    assert EagerGraphs.made == 1 and [list(answer) for answer in zip(*found, strict=True)] == expected
    assert engine.generate(prompts, 20) == expected and EagerGraphs.made == 1


def test_a_seed_gives_the_same_words_whether_or_not_a_graph_is_made_meanwhile(monkeypatch):
    model, prompts = tiny_model(), random_tokens(2, 7, seed=1)
    monkeypatch.setattr(engine_module, "StepGraphs", EagerGraphs)
    answers = []
    engine = DecodingEngine(model, None, batch=2, max_tokens=40, use_graph=True, temperature=1.0)
    for _ in range(2):
        torch.manual_seed(5)
        answers.append(engine.generate(prompts, 20))
    assert answers[0] == answers[1]


def test_the_command_writes_the_records_and_refuses_in_one_line(folder, tmp_path, monkeypatch):
    told = {name: 0.5 for name in METRICS}
    monkeypatch.setattr(
        first_token, "measure_first_tokens",
        lambda settings, work, ways: iter([{"process": "first", "warm": way, **told} for way in ways]),
    )  # fmt: skip
    call = ["bench", "first", "--device", "cpu", "-o", str(tmp_path), "--hardware", "test", "--model", str(folder)]
    result = CliRunner().invoke(app, [*call, "--warm", "no", "--tokens", "1K", "--dtype", "fp32"])
    assert result.exit_code == 0, result.output
    (record,) = json.loads((tmp_path / "first-test.json").read_text())["records"]
    assert (record["tokens"], record["dtype"], record["warm"], record["first_token_s"]) == (1024, "float32", False, 0.5)
    for wrong, words in ((("--warm", "maybe"), "--warm must be"), (("--store", "cloud"), "--store must be")):
        result = CliRunner().invoke(app, [*call, *wrong])
        assert result.exit_code == 2 and words in result.stderr and result.stderr.count("\n") == 1
    assert torch.get_default_dtype() == torch.float32
