"""Data, sharded, expert and context parallelism: loss, gradients and whole steps equal one process (gloo, fp64)."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from hsa_ultralong.distributed.collectives import Ranks, Travel
from hsa_ultralong.distributed.mesh import ParallelConfig, build_mesh, data_rank, data_world, init_distributed, total
from hsa_ultralong.testing.factories import MODEL_OPTIONS, random_tensor, random_tokens, tiny_model
from hsa_ultralong.testing.processes import HANG_SECONDS, launch
from hsa_ultralong.train.parallelize import (
    alone,
    begin_forward,
    clip_gradients,
    gathered,
    parallelize,
    synchronize_buffers,
)
from hsa_ultralong.train.segmented import segmented_loss_backward
from hsa_ultralong.train.stages import spread_experts, spread_strength

EXACT = {"rtol": 1e-8, "atol": 1e-10}
DENSE = {"num_upper_groups": 1, "tie_word_embeddings": True, **MODEL_OPTIONS["qkv_bias_llama3"]}
EXPERTS = {
    **MODEL_OPTIONS["mixture_of_experts"],
    "num_upper_groups": 1,
    "tie_word_embeddings": False,
    "router_bias_update_rate": 0.1,
}
NUM_STEPS = 2


def rows(step, count=4, length=24):
    """Rows with very different numbers of labels: most of the loss is in the last ones."""
    tokens = random_tokens(count, length, seed=step)
    labels = tokens.clone()
    labels[: count // 2, 3:] = -100
    return {"input_ids": tokens, "labels": labels}


def micro_batches(step, mesh):
    """This rank's part of three micro-batches, and the number of labels of all on all ranks."""
    batches = [rows(3 * step), rows(3 * step + 1), rows(3 * step + 2, length=16)]
    counted = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    parts = []
    for batch in batches:
        part = {name: value.chunk(data_world(mesh))[data_rank(mesh)] for name, value in batch.items()}
        if mesh is not None:
            slices, place = mesh["context"].size(), mesh.get_local_rank("context")
            part = {name: value.chunk(slices, 1)[place] for name, value in part.items()}
        parts.append(part)
    return parts, counted


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(model, mesh, config, **inputs):
    """What two optimiser steps of three micro-batches each see and leave behind."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3)
    found = {}
    for step in range(NUM_STEPS):
        # of experts, if there are any, the first step is spread
        spread_experts(model, spread_strength(1, step))
        parts, counted = micro_batches(step, mesh)
        loss = torch.zeros((), dtype=torch.float64)
        for number, part in enumerate(parts):
            begin_forward(model, config, is_last=number + 1 == len(parts))
            out = model(**part, num_items_in_batch=counted, **inputs).loss
            out.backward()
            loss += out.detach()
        found[f"loss {step}"] = total(loss, mesh)
        if step == 0:
            for name, parameter in model.named_parameters():
                found[f"gradient of {name}"] = whole(parameter.grad).clone()
        found[f"norm {step}"] = clip_gradients(model, 0.5)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize_buffers(model, mesh)
        found[f"imbalance {step}"] = torch.tensor([float(part) for part in model.update_router_bias()])
    for name, value in model.state_dict().items():
        found[f"final {name}"] = whole(value).clone()
    return found


ALONE = {}


def trained_alone(options, inputs):
    """What `train` finds in one process, and how many parameters the model has; once for each model and inputs."""
    key = repr((options, inputs))
    if key not in ALONE:
        one = tiny_model(**options)
        ALONE[key] = (
            train(one, None, ParallelConfig(gradient_sync="last"), **inputs),
            sum(part.numel() for part in one.parameters()),
        )
    return ALONE[key]


def check(options, parallel, *, use_compile=False, **inputs):
    """Two steps of a model spread as `parallel` says leave what they leave in one process."""
    many = tiny_model(**options)
    expected, num_parameters = trained_alone(options, inputs)
    config = ParallelConfig(**parallel)
    mesh = build_mesh(config, "cpu")
    names = list(many.state_dict())
    parallelize(many, mesh, config, use_compile=use_compile)
    assert list(many.state_dict()) == names
    found = train(many, mesh, config, **inputs)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], **EXACT, msg=lambda text, name=name: f"{name}: {text}")
    held = sum(part.to_local().numel() for part in many.parameters())
    assert held < num_parameters or config.replicate == dist.get_world_size()


def check_synchronizations(rank, world):
    """Gradients that wait for the last forward are reduced once a step, and weights that stay are gathered once."""

    def of_step(**parallel):
        config = ParallelConfig(**parallel)
        mesh = build_mesh(config, "cpu")
        model = tiny_model(**DENSE).train()
        parallelize(model, mesh, config)
        parts, counted = micro_batches(0, mesh)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            for number, part in enumerate(parts):
                begin_forward(model, config, is_last=number + 1 == len(parts))
                model(**part, num_items_in_batch=counted).loss.backward()
        assert all(isinstance(part, DTensor) for part in model.parameters())
        names = [event.name for event in profile.events()]
        kinds = "FSDP::post_backward_reduce", "FSDP::all_gather"
        return [sum(name.split(" (")[0] == kind for name in names) for kind in kinds]

    every, last = of_step(), of_step(gradient_sync="last")
    assert every[0] == 3 * last[0] > 0 and 0 < last[1] < every[1]
    every, last = (of_step(reshard_after_forward=False, gradient_sync=sync) for sync in ("every", "last"))
    assert every == [3 * number for number in last] and all(last)


def probe(model, ids):
    """What a reader of parts gets: logits, keys, values and landmarks."""
    hidden = model.model(ids, use_cache=False).last_hidden_state
    lower = model.model.read_lower(model.model.embed_tokens(ids), model.model.rotary(hidden, None))
    return model.lm_head(hidden), *model.model.chunk_encoder(lower.unflatten(1, (-1, model.config.chunk_size)))


def check_direct_calls(rank, world):
    """Parts of the model can be called from outside, before and between steps, with backwards and without."""
    ids = random_tokens(2, 24, seed=9)
    for options, parallel in ((DENSE, {}), (EXPERTS, {"expert": 2}), (DENSE, {"context": 2})):
        one, many = tiny_model(**options), tiny_model(**options)
        config = ParallelConfig(**parallel)
        mesh = build_mesh(config, "cpu")
        parallelize(many, mesh, config)
        for _ in range(2):
            with gathered(many), alone(many), torch.no_grad():
                found = probe(many.eval(), ids)
            assert all(isinstance(part, DTensor) for part in many.parameters())
            for value, expected in zip(found, probe(one.eval(), ids), strict=True):
                torch.testing.assert_close(value, expected, **EXACT)
            many.train()(**micro_batches(0, mesh)[0][0]).loss.backward()
            one.train()(**micro_batches(0, None)[0][0])
        for model in (many, one):
            model.zero_grad()
            with gathered(model), alone(model):
                for part in range(2):
                    probe(model.eval(), ids[part : part + 1])[0].square().sum().backward()
        for (name, value), expected in zip(many.named_parameters(), one.parameters(), strict=True):
            # both ranks have the same rows here, and their gradients add
            torch.testing.assert_close(whole(value.grad), world * expected.grad, **EXACT, msg=name)


def check_segments(rank, world):
    """Segment after segment, recomputed too: the gradients of whole rows on one process."""
    modes = (DENSE, {"activation_checkpointing": "full"}), (EXPERTS, {"activation_checkpointing": "selective"})
    for options, parallel in modes:
        one, many = tiny_model(**options).train(), tiny_model(**options).train()
        config = ParallelConfig(**parallel)
        mesh = build_mesh(config, "cpu")
        parallelize(many, mesh, config)
        (batch, *_), counted = micro_batches(0, None)
        loss = one(**batch, num_items_in_batch=counted).loss
        loss.backward()
        part = micro_batches(0, mesh)[0][0]
        with gathered(many):
            share = segmented_loss_backward(many, part, 8, num_items=counted)
        torch.testing.assert_close(total(share, mesh), loss.detach(), **EXACT)
        for (name, value), expected in zip(many.named_parameters(), one.parameters(), strict=True):
            torch.testing.assert_close(whole(value.grad), expected.grad, **EXACT, msg=name)
        centers = [model.model.chunk_encoder.landmark_center for model in (many, one)]
        torch.testing.assert_close(*centers, **EXACT)


def check_compiled(rank, world):
    """Graphs of the layers end where rows travel to experts; traced by the compiler, run as they are."""
    real = torch.compile
    torch.compile = lambda function=None, **options: real(function, **{**options, "backend": "eager"})
    try:
        check(EXPERTS, {"expert": 2}, use_compile=True)
    finally:
        torch.compile = real


def check_nothing_stays(rank, world):
    """What a step kept for its backward is freed by it, without a search for cycles."""
    config = ParallelConfig(expert=2)
    mesh = build_mesh(config, "cpu")
    model = tiny_model(**EXPERTS).train()
    parallelize(model, mesh, config)
    gc.collect()
    gc.disable()
    try:
        model(**micro_batches(0, mesh)[0][0]).loss.backward()
        assert not [one for one in gc.get_objects() if isinstance(one, Travel)]
    finally:
        gc.enable()


def check_second_gradients(rank, world):
    """Where rows cross processes a gradient has none of its own, and says so."""
    rows = random_tensor(2 * world, 3).requires_grad_()
    ranks, even = Ranks(), [2] * world
    travel = ranks.travel(even, even)
    for moved in (ranks.exchange(rows, even, even), travel.arrive(travel.depart(rows)), ranks.gather(rows[:, None])):
        with pytest.raises(RuntimeError, match="leave create_graph out"):
            torch.autograd.grad(moved.square().sum(), rows, create_graph=True)
        torch.autograd.grad(moved.square().sum(), rows)


def check_refusals(rank, world):
    config = ParallelConfig()
    mesh = build_mesh(config, "cpu")
    with pytest.raises(ValueError, match="seed them alike"):
        parallelize(tiny_model(seed=rank), mesh, config)
    with pytest.raises(ValueError, match="position_decay"):
        parallelize(tiny_model(position_decay=True), mesh, config)
    with pytest.raises(ValueError, match="divide the 3 experts"):
        parallelize(tiny_model(num_experts=3), mesh, ParallelConfig(expert=2))
    with pytest.raises(ValueError, match="needs a mixture"):
        parallelize(tiny_model(), mesh, ParallelConfig(expert=2))
    with pytest.raises(ValueError, match="does not fit 2 processes"):
        build_mesh(ParallelConfig(replicate=3), "cpu")


def check_two_processes(rank, world):
    check_refusals(rank, world)
    check_direct_calls(rank, world)
    check_segments(rank, world)
    check_nothing_stays(rank, world)
    check_second_gradients(rank, world)
    check_compiled(rank, world)
    check_synchronizations(rank, world)
    check(DENSE, {"replicate": 2})
    check(DENSE, {"replicate": 2, "gradient_sync": "last", "reshard_after_forward": False})
    check(DENSE, {"gradient_sync": "last"})
    check(EXPERTS, {"expert": 2, "gradient_sync": "last", "reshard_after_forward": False})
    check(EXPERTS, {"context": 2, "gradient_sync": "last", "activation_checkpointing": "full"})
    check(DENSE, {"shard": 2, "activation_checkpointing": "selective"})
    check(EXPERTS, {"replicate": 2, "activation_checkpointing": "full"})
    check(EXPERTS, {"shard": 2, "activation_checkpointing": "full", "mlp_tile_tokens": 7})
    check(EXPERTS, {"expert": 2, "activation_checkpointing": "selective", "reshard_after_forward": False})
    check(DENSE, {"context": 2, "activation_checkpointing": "full"})
    check(EXPERTS, {"context": 2, "expert": 2, "activation_checkpointing": "selective"})
    check(DENSE, {"pool_over_ranks": True}, pool_memory=True)


def test_two_processes_train_as_one(tmp_path):
    launch(2, tmp_path / "meet", check_two_processes)


def check_four_processes(rank, world):
    for options in (DENSE, EXPERTS):
        check(options, {"replicate": 2, "shard": 2})
        check(options, {"shard": 2, "context": 2, "activation_checkpointing": "selective"})
    check(EXPERTS, {"replicate": 2, "expert": 2})
    check(EXPERTS, {"replicate": 2, "expert": 2, "gradient_sync": "last"})
    check(EXPERTS, {"expert": 4, "gradient_sync": "last", "reshard_after_forward": False})
    check(EXPERTS, {"replicate": 2, "context": 2, "expert": 2, "activation_checkpointing": "full"})
    check(EXPERTS, {"expert": 4, "shard": 2, "context": 2, "pool_over_ranks": True}, pool_memory="compete")


@pytest.mark.slow
def test_four_processes_train_as_one(tmp_path):
    launch(4, tmp_path / "meet", check_four_processes)


def main():
    """What torchrun starts."""
    assert init_distributed("cpu") == torch.device("cpu")
    assert dist.get_world_size() == 2 and dist.get_backend() == "gloo"
    check(DENSE, {})
    dist.destroy_process_group()


@pytest.mark.slow
def test_torchrun_starts_the_processes():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert ended.returncode == 0, ended.stderr


if __name__ == "__main__":
    main()
