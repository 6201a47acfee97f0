"""A run on several processes is the run of one: losses, weights, checkpoints that any number of processes resumes."""

import copy
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import HuggingFaceStorageWriter

from hsa_ultralong.distributed.mesh import everywhere, on_first, patient_group
from hsa_ultralong.models import HSAForCausalLM
from hsa_ultralong.testing.processes import launch
from hsa_ultralong.train import ParallelConfig, checkpoint
from hsa_ultralong.train.checkpoint import CheckpointError, list_checkpoints, load_weights
from hsa_ultralong.train.export import export_model
from hsa_ultralong.train.run_folder import RunFolder

CLOSE = {"rtol": 1e-3, "atol": 2e-5}


def recipe(runs, **options):
    first = runs.stage(tokens=1024, batch_tokens=512, micro_batch_rows=1)
    second = runs.stage("long", seq_len=256, tokens=1024, batch_tokens=512, schedule="cosine", chunk_topk=3)
    return runs.config(first, second, **options)


def spread(config, **parallel):
    config = copy.deepcopy(config)
    config.parallel = ParallelConfig(**parallel)
    return config


def noisy(runs):
    """Forwards of two rows, then of one, each with the noise of its own and told what it should retrieve."""
    options = {
        "chunk_topk": 2,
        "gumbel_noise": True,
        "shapes": ((64, 2), (128, 1)),
        "evidence_loss": 1.0,
        "average_decay": 0.5,
    }
    return runs.config(runs.stage(tokens=1024, batch_tokens=512, **options))


def probe(model, length):
    tokens = torch.arange(3, 3 + length)[None] % 300
    hidden = model.model(tokens, use_cache=False).last_hidden_state
    return {"needle_accuracy": float(model.lm_head(hidden).float().std())}


def whole(model):
    return {name: getattr(part, "full_tensor", lambda part=part: part)() for name, part in model.named_parameters()}


def assert_same_run(runs, folder, expected):
    if dist.is_initialized() and dist.get_rank():
        return
    for one, other in zip(runs.losses(folder), runs.losses(expected), strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), **CLOSE)


def check_noise(runs, folder):
    """Rows have the noise that they have in one process; copies of the weights add up their gradients once a step."""
    one = runs.trainer(folder / "noisy-two", spread(noisy(runs), replicate=2))
    all_reduce, sizes = dist.all_reduce, []

    def count(tensor, *args, **options):
        sizes.append(tensor.numel())
        return all_reduce(tensor, *args, **options)

    dist.all_reduce = count
    assert one.train()
    dist.all_reduce = all_reduce
    assert_same_run(runs, folder / "noisy-two", folder / "noisy")
    if not dist.get_rank():
        told = [[line["evidence_loss"] for line in runs.records(folder / name)] for name in ("noisy-two", "noisy")]
        torch.testing.assert_close(*map(torch.tensor, told), **CLOSE)
    weights = sum(part.numel() for part in one.model.parameters())
    assert weights * 2 <= sum(sizes) < weights * 2.1


def check_failures(rank, runs, folder):
    """What fails on one process fails on all, at the same step: none is left waiting."""
    # tokenising a corpus or a slow disk may take longer than a step may
    group = patient_group()
    assert group._get_backend(torch.device("cpu")).options._timeout >= timedelta(days=1)
    assert on_first(lambda: rank + 5, group) == 5 and everywhere(lambda: rank, group) == [0, 1]
    checkpoint._VISIBLE_SECONDS = 0.5
    with pytest.raises(ValueError, match=r"process 1 does not see .*: the run folder must be one that all hosts share"):
        runs.trainer(folder / f"host-{rank}")
    # one process of each run asks for the folder; all of a run are refused
    with pytest.raises((ValueError, OSError), match="is being trained by process"):
        runs.trainer(folder / "held", spread(runs.config(), shard=2))

    def full(*_):
        raise OSError(28, "No space left on device")

    config = spread(runs.config(runs.stage(tokens=256 * 9), checkpoint_minutes=0.0), shard=2)
    for place, name, failing in ((HuggingFaceStorageWriter, "write_data", 1), (checkpoint, "write_whole", 0)):
        one = runs.trainer(folder / name, config)
        one.train(max_minutes=0)
        works = getattr(place, name)
        if rank == failing:
            setattr(place, name, full)
        with pytest.raises(CheckpointError, match=r"No space left.*step-00000001, is intact"):
            one.train()
        setattr(place, name, works)
        dist.barrier()
        assert [path.name for path in (folder / name / "checkpoints").iterdir()] == ["step-00000001"]


def check_two(rank, world, runs, folder):
    config, expected = recipe(runs, probe_every=2), folder / "one"
    # one process began: two go on, sharded; their half is resumed by the parent
    going_on = runs.trainer(folder / "begun", spread(config, shard=2), probe=probe)
    assert going_on.global_step == 1
    # only one process hears of it, both stop
    going_on.listener = lambda record: setattr(going_on, "should_stop", record["global_step"] == 3)
    assert not going_on.train() and going_on.global_step == 3
    for name, parallel in {
        "sharded": {"shard": 2, "activation_checkpointing": "selective"},
        "context": {"context": 2},
        "last": {"shard": 2, "gradient_sync": "last", "reshard_after_forward": False},
    }.items():
        one = runs.trainer(folder / name, spread(config, **parallel), probe=probe)
        assert one.train()
        assert_same_run(runs, folder / name, expected)
        export_model(one.model, runs.tokenizer, folder / f"{name}-model", topk=one.topk)
    pieces = spread(config, shard=2)
    for stage in pieces.stages:
        stage.piece_tokens = 64
    assert runs.trainer(folder / "pieces", pieces, probe=probe).train()
    assert_same_run(runs, folder / "pieces", expected)
    muon = runs.trainer(folder / "muon-two", spread(recipe(runs, optimizer="muon"), replicate=2))
    assert muon.train()
    assert_same_run(runs, folder / "muon-two", folder / "muon")
    with pytest.raises(ValueError, match="whole matrices"):
        runs.trainer(folder / "x", spread(recipe(runs, optimizer="muon"), shard=2))
    with pytest.raises(ValueError, match="2 rows a step cannot be shared out over 2 processes in forwards of 2"):
        odd = runs.config(runs.stage(batch_tokens=256, micro_batch_rows=2))
        runs.trainer(folder / "x", spread(odd, shard=2))
    check_noise(runs, folder)
    check_failures(rank, runs, folder)
    weights = {name: torch.full_like(part, 0.25) for name, part in whole(muon.model).items()}
    fresh = runs.trainer(folder / "fresh", spread(config, shard=2))
    buffers = {name: part for name, part in fresh.model.state_dict().items() if name.endswith("landmark_center")}
    load_weights(fresh.model, {**weights, **buffers})
    assert all((part == 0.25).all() for part in whole(fresh.model).values())


def test_two_processes_make_the_run_of_one_and_share_its_checkpoints(tiny_runs, tmp_path):
    config = recipe(tiny_runs, probe_every=2)
    one = tiny_runs.trainer(tmp_path / "one", config, probe=probe)
    assert one.train()
    tiny_runs.trainer(tmp_path / "muon", recipe(tiny_runs, optimizer="muon")).train()
    tiny_runs.trainer(tmp_path / "noisy", noisy(tiny_runs)).train()
    tiny_runs.trainer(tmp_path / "begun", config, probe=probe).train(max_minutes=0)
    held = RunFolder(tmp_path / "held")
    held.take()
    launch(2, tmp_path / "meet", check_two, tiny_runs, tmp_path)
    held.release()
    (*_, newest) = list_checkpoints(tmp_path / "begun")
    assert len(list(newest.glob("*.safetensors"))) == 2
    resumed = tiny_runs.trainer(tmp_path / "begun", config, probe=probe)
    assert resumed.global_step == 3 and resumed.train()
    assert_same_run(tiny_runs, tmp_path / "begun", tmp_path / "one")
    seen = [[one for one in tiny_runs.records(tmp_path / name) if "probe" in one] for name in ("one", "sharded")]
    assert len(seen[0]) == 2 and [one["probe"] == pytest.approx(two["probe"], rel=1e-3) for one, two in zip(*seen)]
    for name in ("sharded", "context"):
        loaded = HSAForCausalLM.from_pretrained(tmp_path / f"{name}-model")
        for key, part in loaded.named_parameters():
            expected = one.model.get_parameter(key)
            torch.testing.assert_close(part.float(), expected.detach(), rtol=2e-2, atol=2e-3)
