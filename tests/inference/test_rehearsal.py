"""A first answer beside the loading: every kind of model runs, nothing of the process is touched, engines wait."""

import threading
import time

import pytest
import torch

from hsa_ultralong.inference import DecodingEngine, beside, rehearsal
from hsa_ultralong.models.presets import preset
from hsa_ultralong.testing.factories import MODEL_OPTIONS, tiny_model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_beside(monkeypatch):
    monkeypatch.setattr(beside, "_threads", [])


def saved(folder, config):
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", sorted(MODEL_OPTIONS))
def test_a_small_model_of_any_forms_answers(tmp_path, name):
    config = tiny_model(**MODEL_OPTIONS[name]).config
    model = rehearsal.small_model(saved(tmp_path, config), torch.float32)
    assert (model is None) == bool(config.num_experts)
    # two tokens from each of two memories
    assert model is None or len(rehearsal.answer(model, CPU)) == 4


def test_it_is_small_whatever_the_model_and_left_out_where_it_cannot_be(tmp_path):
    config = preset("small_345m")
    model = rehearsal.small_model(saved(tmp_path / "large", config), torch.bfloat16)
    assert model.config.num_lower_layers == model.config.num_upper_groups == 1
    for name in ("hidden_size", "head_dim", "retrieval_dim", "vocab_size", "chunk_topk", "intermediate_size"):
        assert getattr(model.config, name) == getattr(config, name)
    assert {(part.dtype, part.device.type) for part in model.parameters()} == {(torch.bfloat16, "meta")}
    wide = saved(tmp_path / "wide", preset("nano", vocab_size=10_000_000))
    assert rehearsal.small_model(wide, torch.bfloat16) is None


def test_nothing_is_drawn_and_errors_are_left_to_who_loads_the_model(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    states, default = torch.get_rng_state(), torch.get_default_dtype()
    model = rehearsal.small_model(tmp_path / "model", torch.float32)
    rehearsal.rehearse(model, CPU)
    rehearsal.rehearse(model, torch.device("cuda", 99))
    assert rehearsal.small_model(tmp_path / "nowhere", torch.float32) is None
    (tmp_path / "config.json").write_text("{")
    assert rehearsal.small_model(tmp_path, torch.float32) is None
    assert torch.equal(states, torch.get_rng_state()) and torch.get_default_dtype() == default


def test_engines_wait_for_it_and_it_does_not_wait_for_itself():
    order, goes_on = [], threading.Event()

    def work():
        goes_on.wait(10)
        beside.wait()
        order.append("rehearsed")

    beside.run_beside(work)
    threading.Timer(0.05, goes_on.set).start()
    DecodingEngine(tiny_model(), None, max_tokens=8)
    order.append("engine")
    assert order == ["rehearsed", "engine"]


def test_all_that_runs_beside_is_waited_for():
    ended = []
    for pause in (0.2, 0.0):
        beside.run_beside(lambda pause=pause: (time.sleep(pause), ended.append(pause)))
    beside.wait()
    assert sorted(ended) == [0.0, 0.2] and beside._threads == []


def test_it_follows_the_meeting_where_a_model_is_going_to_answer(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(rehearsal, "_meet", lambda place: calls.append(str(place)))
    monkeypatch.setattr(rehearsal, "hash_triton_early", lambda: None)
    monkeypatch.setattr(rehearsal, "rehearse", lambda model, place: calls.append((model.config.vocab_size, place)))
    config = tiny_model().config
    for folder in (None, tmp_path / "nowhere", saved(tmp_path, config)):
        rehearsal.prepare_kernels("cuda", folder, torch.float32)
        beside.wait()
    assert calls == ["cuda:0", "cuda:0", "cuda:0", (config.vocab_size, torch.device("cuda", 0))]


def test_it_stops_where_the_process_has_ended(monkeypatch, tmp_path):
    model = rehearsal.small_model(saved(tmp_path, tiny_model().config), torch.float32)
    read = []
    monkeypatch.setattr(rehearsal, "memorize", lambda *arguments: read.append(1))
    monkeypatch.setattr(threading, "main_thread", lambda: threading.Thread())
    assert rehearsal.answer(model, CPU) == [] and not read
    monkeypatch.setattr(rehearsal, "_meet", lambda place: None)
    monkeypatch.setattr(rehearsal, "hash_triton_early", lambda: None)
    monkeypatch.setattr(rehearsal, "rehearse", lambda *arguments: read.append(2))
    rehearsal.prepare_kernels("cuda", tmp_path, torch.float32)
    beside.wait()
    assert not read
