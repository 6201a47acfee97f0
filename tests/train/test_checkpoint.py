"""Checkpoints are whole or absent, and a run that died at any moment goes on bit for bit."""

import json
import math
import multiprocessing
import random
import shutil
import time

import pytest
import torch
from torch.distributed.checkpoint import HuggingFaceStorageWriter

from hsa_ultralong.train import TrainingDiverged
from hsa_ultralong.train.checkpoint import CheckpointError, list_checkpoints, load_weights, model_tensors


def weights(one):
    return {name: tensor.clone() for name, tensor in one.model.state_dict().items()}


def assert_equal_weights(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def check_kills(runs, folder, times):
    """A run that is killed (SIGKILL) `times` times at random moments is, in the end, the run that never was."""
    config = runs.config(
        runs.stage(tokens=256 * 5, gumbel_noise=True, chunk_topk=2),
        runs.stage("long", seq_len=256, tokens=256 * 3, schedule="linear"),
        checkpoint_minutes=0.0,
        log_every=3,
        model={"num_experts": 4, "moe_intermediate_size": 16},
    )
    whole = runs.trainer(folder / "whole", config)
    start = time.monotonic()
    assert whole.train()
    duration = time.monotonic() - start
    generator, context = random.Random(times), multiprocessing.get_context("fork")

    def run():
        # nothing may depend on the state of the random generator
        torch.manual_seed(time.monotonic_ns())
        assert runs.trainer(folder / "killed", config).train()

    killed = 0
    while killed < times:
        child = context.Process(target=run)
        child.start()
        child.join(generator.uniform(0, 0.6 * duration))
        assert child.exitcode in (None, 0)
        killed += child.exitcode is None
        child.kill()
        child.join()
        if child.exitcode == 0 or killed == times:
            runs.trainer(folder / "killed", config).train()
            assert runs.losses(folder / "killed") == runs.losses(folder / "whole")
            assert_equal_weights(weights(runs.trainer(folder / "killed", config)), weights(whole))
            shutil.rmtree(folder / "killed")


def test_a_run_killed_at_random_moments_continues_identically(tiny_runs, tmp_path):
    check_kills(tiny_runs, tmp_path, times=3)


@pytest.mark.slow
def test_a_run_killed_twenty_times_continues_identically(tiny_runs, tmp_path):
    check_kills(tiny_runs, tmp_path, times=20)


@pytest.mark.parametrize("has_checkpoint", [True, False])
def test_a_run_that_died_takes_its_lost_steps_again_and_logs_them_once(tiny_runs, tmp_path, has_checkpoint):
    config = tiny_runs.config(tiny_runs.stage(tokens=1024))
    whole = tiny_runs.trainer(tmp_path / "whole", config)
    whole.train()
    died = tiny_runs.trainer(tmp_path / "died", config)

    def die(record):
        if record["global_step"] == 1 and has_checkpoint:
            died.save()
        if record["global_step"] == 3:
            raise KeyboardInterrupt

    died.listener = die
    with pytest.raises(KeyboardInterrupt):
        died.train()
    with (tmp_path / "died" / "log.jsonl").open("a") as stream:
        stream.write('{"stage": "war')
    resumed = tiny_runs.trainer(tmp_path / "died", config)
    assert resumed.global_step == int(has_checkpoint)
    assert resumed.train()
    assert tiny_runs.losses(tmp_path / "died") == tiny_runs.losses(tmp_path / "whole")
    assert_equal_weights(weights(whole), weights(resumed))


def test_what_is_saved_is_the_moment_of_the_call_not_of_the_writing(tiny_runs, tmp_path, monkeypatch):
    one = tiny_runs.trainer(tmp_path)
    one.train(max_minutes=0)
    before = weights(one)
    real = HuggingFaceStorageWriter.write_data

    def late(self, *args):
        time.sleep(0.3)
        return real(self, *args)

    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", late)
    one.global_step = 2
    one.save(wait=False)
    with torch.no_grad():
        for parameter in one.model.parameters():
            parameter.zero_()
        for state in one.optimizers[0].state.values():
            state["exp_avg"].zero_()
    assert len(list_checkpoints(tmp_path)) == 1
    one.checkpoints.wait()
    again = tiny_runs.trainer(tmp_path)
    assert again.global_step == 2
    assert_equal_weights(before, weights(again))
    assert any(state["exp_avg"].abs().max() > 0 for state in again.optimizers[0].state.values())


def test_a_run_that_keeps_no_checkpoint_writes_none(tiny_runs, tmp_path):
    assert tiny_runs.trainer(tmp_path, tiny_runs.config(checkpoint_minutes=0.0, keep_checkpoints=0)).train()
    assert not list_checkpoints(tmp_path) and (tmp_path / "log.jsonl").is_file()


def test_only_the_newest_checkpoints_are_kept_and_no_file_is_a_pickle(tiny_runs, tmp_path):
    tiny_runs.trainer(tmp_path, tiny_runs.config(checkpoint_minutes=0.0, keep_checkpoints=2)).train()
    saved = list_checkpoints(tmp_path)
    assert [path.name for path in saved] == ["step-00000002", "step-00000003"]
    assert {file.suffix for path in saved for file in path.iterdir()} == {".safetensors", ".json"}


@pytest.fixture(scope="module")
def finished(tiny_runs, tmp_path_factory):
    """A run with its two newest checkpoints."""
    folder = tmp_path_factory.mktemp("finished")
    tiny_runs.trainer(folder, tiny_runs.config(checkpoint_minutes=0.0)).train()
    return folder


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "format", "state", "unreadable"])
def test_a_damaged_checkpoint_is_refused_by_name_and_the_older_one_works(tiny_runs, finished, tmp_path, damage):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    newest = list_checkpoints(tmp_path)[-1]
    (file,) = newest.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    elif damage == "unreadable":
        file.unlink()
        file.mkdir()
    elif damage == "state":
        (newest / "state.json").write_text("{")
    elif damage == "format":
        (newest / "state.json").write_text('{"format": 1}')
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content if damage == "flip" else content[:100])
    words = {"format": "format 1, this version reads 2 and 3", "state": "state.json"}.get(damage, file.name)
    with pytest.raises(ValueError, match=words):
        tiny_runs.trainer(tmp_path)
    shutil.rmtree(newest)
    assert tiny_runs.trainer(tmp_path).global_step == 2


def fill_disk(monkeypatch, where):
    """Writing fails as on a full disk: the tensors, or state.json."""

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    if where == "tensors":
        monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", full)
    else:
        monkeypatch.setattr("hsa_ultralong.train.checkpoint.write_whole", full)


@pytest.mark.parametrize("where", ["tensors", "state"])
def test_a_full_disk_is_one_clear_error_and_leaves_the_last_checkpoint_alone(tiny_runs, tmp_path, monkeypatch, where):
    one = tiny_runs.trainer(tmp_path, tiny_runs.config(tiny_runs.stage(tokens=256 * 6), checkpoint_minutes=0.0))
    one.train(max_minutes=0)
    (before,) = list_checkpoints(tmp_path)
    content = {file.name: file.read_bytes() for file in before.iterdir()}
    fill_disk(monkeypatch, where)
    with pytest.raises(CheckpointError, match=r"No space left.*step-00000001, is intact.*run the same command again"):
        one.train()
    monkeypatch.undo()
    assert list_checkpoints(tmp_path) == [before]
    assert {file.name: file.read_bytes() for file in before.iterdir()} == content
    # what was half written does not keep its room
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [before.name]
    resumed = tiny_runs.trainer(tmp_path)
    assert resumed.global_step == 1 and resumed.train()


def test_rows_that_cannot_be_read_stop_the_run_with_the_last_checkpoint_intact(tiny_runs, tmp_path, monkeypatch):
    from hsa_ultralong.data.sampler import DocumentSampler

    one = tiny_runs.trainer(tmp_path, tiny_runs.config(checkpoint_minutes=0.0))
    one.train(max_minutes=0)

    def listener(record):
        def broken(*_, **__):
            raise OSError(5, "Input/output error")

        for name in ("slice", "fill"):
            monkeypatch.setattr(DocumentSampler, name, broken)

    one.listener = listener
    with pytest.raises(OSError, match=r"cannot read the rows of step 2 of stage 'warmup' .*Input/output error"):
        one.train()
    monkeypatch.undo()
    assert tiny_runs.trainer(tmp_path).train()


@pytest.mark.parametrize("log_every", [1, 100])
def test_a_gradient_that_is_not_finite_is_never_saved(tiny_runs, tmp_path, log_every):
    tiny_runs.trainer(tmp_path).train(max_minutes=0)
    one = tiny_runs.trainer(tmp_path, tiny_runs.config(log_every=log_every))
    one.model.model.norm.weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(TrainingDiverged, match=r"not finite .*intact: lower the learning rate"):
        one.train(max_minutes=0)
    (saved,) = list_checkpoints(tmp_path)
    assert saved.name == "step-00000001"
    assert all(torch.isfinite(tensor).all() for tensor in weights(tiny_runs.trainer(tmp_path)).values())


def test_a_checkpoint_of_another_model_is_refused(tiny_runs, tmp_path):
    tiny_runs.trainer(tmp_path).train(max_minutes=0)
    for options in ({"hidden_size": 64}, {"num_lower_layers": 3}):
        with pytest.raises(ValueError, match="does not fit the model"):
            tiny_runs.trainer(tmp_path, tiny_runs.config(model=options))


def test_a_checkpoint_with_another_optimisers_state_is_refused(tiny_runs, tmp_path):
    tiny_runs.trainer(tmp_path, tiny_runs.config(optimizer="muon")).train(max_minutes=0)
    with pytest.raises(ValueError, match="state of muon, this run uses adamw: keep --set optimizer=muon"):
        tiny_runs.trainer(tmp_path)


def test_weights_of_another_model_cannot_be_loaded(tiny_runs, tmp_path):
    model = tiny_runs.trainer(tmp_path).model
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    load_weights(model, {name: torch.full_like(tensor, 0.5) for name, tensor in whole.items()})
    assert all((tensor == 0.5).all() for tensor in model_tensors(model).values())
    with pytest.raises(ValueError, match="does not fit"):
        load_weights(model, {**whole, "model.norm.weight": torch.zeros(3)})
    del whole["model.norm.weight"]
    with pytest.raises(ValueError, match=r"missing \['model.norm.weight'\]"):
        load_weights(model, whole)


def test_state_json_describes_every_file(tiny_runs, tmp_path):
    tiny_runs.trainer(tmp_path).train()
    (saved,) = list_checkpoints(tmp_path)
    state = json.loads((saved / "state.json").read_text())
    assert set(state["files"]) == {file.name for file in saved.glob("*.safetensors")}
    assert (state["format"], state["global_step"], state["stage_index"], state["step"]) == (3, 3, 1, 0)
