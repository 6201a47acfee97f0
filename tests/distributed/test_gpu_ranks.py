"""Two processes on GPUs, over NCCL: training and decoding equal one process. With a single GPU both share it."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor import DTensor

from hsa_ultralong.distributed.mesh import ParallelConfig, build_mesh, data_rank, data_world, total
from hsa_ultralong.inference import DecodingEngine, share_out
from hsa_ultralong.models import HSAForCausalLM
from hsa_ultralong.models.presets import preset
from hsa_ultralong.testing.processes import launch
from hsa_ultralong.train.activations import activation_context
from hsa_ultralong.train.parallelize import clip_gradients, parallelize

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

EXPERTS = {
    "num_experts": 4, "num_experts_per_token": 2, "num_shared_experts": 1, "moe_intermediate_size": 256,
    "num_dense_layers": 1,
}  # fmt: skip


def build(name="nano", **options):
    torch.manual_seed(0)
    with torch.device("cuda"):
        return HSAForCausalLM(preset(name, gumbel_noise=False, **options)).train()


def rows(vocabulary, count=4, length=2048):
    tokens = torch.randint(3, vocabulary, (count, length), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    labels[: count // 2, 9:] = -100
    return {"input_ids": tokens, "labels": labels}


def part_of(batch, mesh):
    part = {name: value.chunk(data_world(mesh))[data_rank(mesh)] for name, value in batch.items()}
    if mesh is not None:
        slices, place = mesh["context"].size(), mesh.get_local_rank("context")
        part = {name: value.chunk(slices, 1)[place].contiguous() for name, value in part.items()}
    return {name: value.cuda() for name, value in part.items()}


def gradients(options, parallel, *, bf16, use_compile=False, name="nano", **inputs):
    """Loss, norm and all gradients in one row, of one step of a model spread as `parallel` says (None: not)."""
    model = build(name, **options)
    config = ParallelConfig(**(parallel or {}))
    mesh = None if parallel is None else build_mesh(config, "cuda")
    parallelize(model, mesh, config, use_compile=use_compile)
    batch = rows(model.config.vocab_size)
    counted = int((batch["labels"][:, 1:] != -100).sum())
    with activation_context(config), torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        loss = model(**part_of(batch, mesh), num_items_in_batch=counted, use_cache=False, **inputs).loss
    loss.backward()
    found = []
    for parameter in model.parameters():
        # experts that no token of this process reached have none
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found.append((gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).detach().flatten().clone())
    return total(loss, mesh).float(), clip_gradients(model, 1.0).float(), torch.cat(found)


def distance(found, expected):
    return float((found - expected).norm() / expected.norm())


def check_training(rank, world):
    cases = [
        ({}, {"shard": 2}, {}),
        ({}, {"replicate": 2, "activation_checkpointing": "selective"}, {}),
        ({}, {"shard": 2, "offload_activations": True}, {}),
        ({}, {"context": 2, "activation_checkpointing": "full"}, {}),
        ({}, {"pool_over_ranks": True}, {"pool_memory": "compete"}),
        (EXPERTS, {"expert": 2}, {}),
        (EXPERTS, {"context": 2, "expert": 2}, {}),
    ]
    for options, parallel, inputs in cases:
        loss, norm, exact = gradients(options, None, bf16=False, **inputs)
        found = gradients(options, {**parallel, "param_dtype": "float32"}, bf16=False, **inputs)
        torch.testing.assert_close(found[0], loss, rtol=1e-4, atol=0)
        torch.testing.assert_close(found[1], norm, rtol=1e-2, atol=0)
        error = distance(found[2], exact)
        assert error < 2e-2, f"{parallel}: gradients are {error:.1e} from those of one process in fp32"
        rounded = gradients(options, None, bf16=True, **inputs)
        use_compile = parallel.get("shard", 0) == 2
        found = gradients(options, parallel, bf16=True, use_compile=use_compile, **inputs)
        torch.testing.assert_close(found[0], loss, rtol=5e-3, atol=0)
        error, usual = distance(found[2], exact), distance(rounded[2], exact)
        if rank == 0:
            print(f"{parallel}: bf16 gradients are {error:.4f} from fp32, those of one process {usual:.4f}")
        assert error < 1.5 * usual + 0.01, f"{parallel}: {error:.1e}, one process in bf16 {usual:.1e}"


def check_size(rank, world):
    """A model of full size on rows that two processes share."""
    loss, _, exact = gradients({}, None, bf16=False, name="small_345m")
    rounded = gradients({}, None, bf16=True, name="small_345m")
    found = gradients({}, {"context": 2}, bf16=True, use_compile=True, name="small_345m")
    torch.testing.assert_close(found[0], loss, rtol=5e-3, atol=0)
    error, usual = distance(found[2], exact), distance(rounded[2], exact)
    if rank == 0:
        print(f"small_345m, context 2: bf16 gradients are {error:.4f} from fp32, those of one process {usual:.4f}")
        print(f"small_345m: loss {found[0]:.5f}, of one process in bf16 {rounded[0]:.5f}, in fp32 {loss:.5f}")
    assert error < 1.5 * usual + 0.01


def test_two_processes_share_the_rows_of_small_345m(tmp_path):
    launch(2, tmp_path / "meet", check_size, device="cuda")


def test_two_processes_train_as_one_on_gpus(tmp_path):
    launch(2, tmp_path / "meet", check_training, device="cuda")


def peak(parallel, length):
    """GiB that a step on one row takes at its highest in this process."""
    config = ParallelConfig(**(parallel or {}))
    mesh = None if parallel is None else build_mesh(config, "cuda")
    model = build("small_345m")
    parallelize(model, mesh, config)
    batch = part_of(rows(1000, 1, length), mesh)
    torch.cuda.reset_peak_memory_stats()
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(input_ids=batch["input_ids"], labels=batch["input_ids"], num_items_in_batch=length).loss
    loss.backward()
    found = torch.cuda.max_memory_allocated() / 2**30
    del model, loss
    torch.cuda.empty_cache()
    return found


def check_length(rank, world, length):
    shared = peak({"context": 2}, 2 * length)
    if rank == 0:
        one = peak(None, length)
        print(f"a row of {length}: {one:.1f} GiB in one process; of {2 * length}: {shared:.1f} GiB in each of two")
        assert shared < one


def test_two_processes_train_rows_twice_as_long_in_the_memory_of_one(tmp_path):
    launch(2, tmp_path / "meet", check_length, 16_384, device="cuda")


def forced(engine, prompt, text):
    """Logits (T, V) of an engine that reads `text` token by token after a prompt."""
    engine.start(0, prompt)
    found = []
    for token in text:
        engine.tokens[0] = token
        engine.step()
        found.append(engine.logits[0].float().clone())
    return torch.stack(found)


def check_decoding(rank, world):
    torch.manual_seed(0)
    model = build().bfloat16().eval()
    generator = torch.Generator().manual_seed(2)
    memory = model.memorize(torch.randint(3, 8000, (70_000,), generator=generator))
    text = torch.randint(3, 8000, (180,), generator=generator).cuda()
    found = {}
    part = share_out(memory)
    for name, held, use_graph in (("whole", memory, None), ("part", part, None), ("eager", part, False)):
        engine = DecodingEngine(model, held, max_tokens=256, use_graph=use_graph)
        assert engine.is_captured == (use_graph is None)
        found[name] = forced(engine, text[:30], text[30:])
    for name in ("part", "eager"):
        error = distance(found[name], found["whole"])
        assert error < 0.02, f"{name}: {error:.1e}"


def test_a_memory_over_two_gpus_decodes_in_one_graph(tmp_path):
    launch(2, tmp_path / "meet", check_decoding, device="cuda")
