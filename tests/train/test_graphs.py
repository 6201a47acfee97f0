"""Training steps by CUDA graphs have the numbers of steps without; what no graph can hold is refused by its name."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hsa_ultralong.baselines import RivalForCausalLM
from hsa_ultralong.baselines.twins import TWINS, twin_config
from hsa_ultralong.distributed.mesh import ParallelConfig
from hsa_ultralong.models.presets import preset
from hsa_ultralong.testing.factories import MODEL_OPTIONS, random_tokens, tiny_model
from hsa_ultralong.testing.graphs import EagerCapture
from hsa_ultralong.train import graphs, loop
from hsa_ultralong.train.activations import recompute_activations
from hsa_ultralong.train.config import StageConfig
from hsa_ultralong.train.evidence import EvidenceLoss, Told
from hsa_ultralong.train.graphs import WARMUP_STEPS, GraphedSteps, require_graphs, row_shapes

GRAPHS, GPU = ParallelConfig(cuda_graphs=True), torch.device("cuda")
# shapes in turn, two forwards a step of the short ones
# fewer chunks than there are to choose from
NOISE = {"gumbel_noise": True, "chunk_topk": 1}
SHAPES = {"seq_len": 64, "shapes": ((32, 2), (64, 2)), "batch_tokens": 128, "tokens": 128 * 8}


@pytest.fixture
def stand_in(monkeypatch):
    EagerCapture.reset()
    monkeypatch.setattr(graphs, "CudaCapture", EagerCapture)
    monkeypatch.setattr(
        loop, "require_graphs", lambda config, shape, _, count: require_graphs(config, shape, GPU, count)
    )


def stages(tiny_runs, **options):
    fields = {"gumbel_noise": False, "chunk_topk": 4, **SHAPES, **options}
    kinds = {"text": 0.4, "self_copy": 0.3, "documents": 0.3}
    first = tiny_runs.stage("first", mixture=kinds, **fields)
    return first, tiny_runs.stage("second", mixture={"self_copy": 1.0}, **{**fields, "sliding_window": 32})


def results(tiny_runs, folder, config, device="cpu"):
    """Losses and norms of all steps, the weights, and the trainer."""
    trainer = tiny_runs.trainer(folder, config, device=device)
    assert trainer.train()
    weights = {name: part.detach().cpu() for name, part in trainer.model.state_dict().items()}
    return tiny_runs.losses(folder), weights, trainer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimizer": "muon", "pool": "compete"},
        {"lora_rank": 2, "decay": 0.5},
        {"activation": "selective", "pool": "attended"},
        {"twin": "moba"},
        {"noise": True},
        {"noise": True, "activation": "selective", "pool": "attended"},
        {"noise": True, "activation": "full", "pool": "compete"},
    ],
    ids=str,
)
def test_a_run_by_graphs_is_the_run_without_bit_for_bit(tiny_runs, tmp_path, stand_in, options):
    """On a CPU, where a stand-in runs what a graph would: shapes in turn, several forwards a step, two stages."""
    more = dict(options)
    checkpointing, decay = more.pop("activation", "none"), more.pop("decay", 0.0)
    fields = {"pool_memory": more.pop("pool", ""), "average_decay": decay}
    if more.pop("noise", False):
        fields |= NOISE
    found = []
    for name, has_graphs in (("plain", False), ("graphs", True)):
        parallel = ParallelConfig(activation_checkpointing=checkpointing, cuda_graphs=has_graphs)
        parts = stages(tiny_runs, **fields)
        if options:
            parts = parts[:1]
        if "twin" in more:
            parts = [tiny_runs.stage("first", mixture={"text": 1.0}, **SHAPES)]
        config = tiny_runs.config(*parts, parallel=parallel, **more)
        found.append(results(tiny_runs, tmp_path / name, config)[:2])
    count = len(parts)
    assert EagerCapture.captured == 2 * count
    # of 4 steps of each shape three run before; those of short rows have two forwards
    assert EagerCapture.replayed == count * (2 + 1)
    assert EagerCapture.waited == count * [*[True] * 6, *[False] * 3]
    (losses, weights), (again, others) = found
    assert losses == again and len(losses) == 8 * count
    assert weights.keys() == others.keys()
    for name, part in weights.items():
        assert torch.equal(part, others[name]), name


@pytest.mark.parametrize("options", [{}, {"pool_memory": "compete", "average_decay": 0.5}], ids=str)
def test_what_tells_a_token_teaches_by_graphs_as_without(tiny_runs, tmp_path, stand_in, options):
    """Up to the order of sums: a graph has as many told tokens in every forward, of which some teach nothing."""
    found = []
    for name, has_graphs in (("plain", False), ("graphs", True)):
        kinds = {"text": 0.3, "self_copy": 0.7}
        one = tiny_runs.stage(mixture=kinds, evidence_loss=0.5, gumbel_noise=False, chunk_topk=4, **SHAPES, **options)
        config = tiny_runs.config(one, parallel=ParallelConfig(cuda_graphs=has_graphs))
        losses, weights, _ = results(tiny_runs, tmp_path / name, config)
        steps = [record for record in tiny_runs.records(tmp_path / name) if "loss" in record]
        taught = [(record.get("evidence_loss", -1), record.get("evidence_first", -1)) for record in steps]
        found.append((losses, taught, weights))
    assert EagerCapture.captured == 2 and EagerCapture.replayed == 3
    (losses, taught, weights), (again, others, same) = found
    # a step without anything told says nothing of it
    assert len(taught) == 8 and sum(one > 0 for one, _ in taught) >= 6 and max(taught[-3:])[0] > 0
    torch.testing.assert_close(torch.tensor(again), torch.tensor(losses), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.tensor(others), torch.tensor(taught), rtol=1e-4, atol=1e-5)
    for key, part in weights.items():
        torch.testing.assert_close(same[key], part, rtol=1e-3, atol=1e-4, msg=key)


def test_every_replay_draws_noise_of_its_own_that_of_a_forward_without(tiny_runs, stand_in):
    stage = tiny_runs.stage(seq_len=64, batch_tokens=64, micro_batch_rows=1)
    model = tiny_model(dtype=torch.float32, **NOISE).train()
    graphed, batch = GraphedSteps(model, torch.device("cpu")), batch_of(1, 64)
    ids = random_tokens(1, 64)
    batch |= {"input_ids": ids, "labels": ids}

    def step(seed):
        model.zero_grad(set_to_none=True)
        graphed.begin(stage)
        torch.manual_seed(seed)
        return [float(graphed.backward(stage, batch, [63])[0]), torch.rand(())]

    for seed in (1, 2, 3):
        step(seed)
    again, other, last = step(1), step(2), step(1)
    assert EagerCapture.replayed == 3 and again == last and again[0] != other[0]
    for seed, found in ((1, again), (2, other)):
        torch.manual_seed(seed)
        loss = model(ids, labels=ids, segment_ids=batch["segment_ids"], num_items_in_batch=63).loss
        # what is drawn next is the same too
        assert [float(loss), torch.rand(())] == found


class Linear(nn.Module):
    """A model whose loss does not reach all of its weights."""

    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))

    def forward(self, input_ids, labels, segment_ids, num_items_in_batch):
        loss = (self.used * input_ids.float().sum()).sum() / num_items_in_batch
        return SimpleNamespace(loss=loss)


def batch_of(rows, length, value=1, isolated=False):
    ids = torch.full((rows, length), value)
    return {"input_ids": ids, "labels": ids, "segment_ids": ids * 0, "isolated": torch.full((rows,), isolated)}


@pytest.fixture
def steps(tiny_runs, stand_in):
    """A few steps of the linear model: a function of the rows of each forward, and what it runs."""
    stage = tiny_runs.stage(seq_len=32, batch_tokens=64, micro_batch_rows=1)
    model = Linear()
    graphed = GraphedSteps(model, torch.device("cpu"))

    def step(*batches):
        model.zero_grad(set_to_none=True)
        graphed.begin(stage)
        return [graphed.backward(stage, batch, [2])[0] for batch in batches]

    return SimpleNamespace(step=step, model=model, stage=stage, graphed=graphed)


def test_gradients_lie_at_one_place_and_are_those_of_the_step(steps):
    places = []
    for number in range(1, WARMUP_STEPS + 4):
        losses = steps.step(batch_of(1, 32, number), batch_of(1, 32, 2 * number))
        torch.testing.assert_close(steps.model.used.grad, torch.full((4,), 32 * 3 * number / 2))
        assert losses[1] == 2 * losses[0], "a loss is a copy, which the next replay leaves alone"
        places.append(steps.model.used.grad.data_ptr())
    assert len(set(places[WARMUP_STEPS:])) == 1 and EagerCapture.captured == 1


def test_what_learns_nothing_has_no_gradient_and_so_no_decay(steps):
    for _ in range(WARMUP_STEPS + 2):
        steps.step(batch_of(1, 32))
        assert steps.model.idle.grad is None and steps.model.used.grad is not None


def test_rows_of_a_shape_that_the_stage_does_not_say_are_refused(steps):
    assert row_shapes(steps.stage) == {(1, 32)}
    with pytest.raises(ValueError, match=r"needs forwards of \(1, 32\), got \(2, 32\)"):
        steps.step(batch_of(2, 32))
    steps.step(batch_of(1, 32))
    with pytest.raises(ValueError, match="labels of a forward changed"):
        steps.step({**batch_of(1, 32), "labels": torch.zeros(1, 16, dtype=torch.int64)})
    with pytest.raises(ValueError, match="no isolated documents"):
        steps.step(batch_of(1, 32, isolated=True))


def test_row_shapes_are_those_of_the_steps_in_turn(tiny_runs):
    assert row_shapes(tiny_runs.stage(**SHAPES)) == {(2, 32), (2, 64)}
    twins = tiny_runs.stage(seq_len=128, shapes=((128, 0), (32, 0)), micro_batch_rows=1, batch_tokens=256)
    assert row_shapes(twins) == {(1, 128), (4, 32)}


def test_what_asks_the_host_stops_the_run_in_one_line_and_memory_says_so_itself(steps, monkeypatch):
    def fail(error):
        def function(*_, **__):
            raise error

        return function

    for _ in range(WARMUP_STEPS - 1):
        steps.step(batch_of(1, 32))
    with monkeypatch.context() as patch:
        patch.setattr(steps.model, "forward", fail(RuntimeError("called a synchronizing CUDA operation\nmore")))
        with pytest.raises(
            ValueError, match=r"hold a forward of \(1, 32\) \(called a sync.* operation\); leave it out$"
        ):
            steps.step(batch_of(1, 32))
        patch.setattr(EagerCapture, "__call__", fail(torch.OutOfMemoryError("full")))
        with pytest.raises(torch.OutOfMemoryError):
            steps.step(batch_of(1, 32))
        patch.setattr(EagerCapture, "__call__", fail(RuntimeError("operation not permitted when stream is capturing")))
        with pytest.raises(ValueError, match="not permitted"):
            steps.step(batch_of(1, 32))


@pytest.mark.parametrize(
    ("stage", "config", "model", "words"),
    [
        ({"piece_tokens": 32}, {}, {}, "piece_tokens"),
        ({"divergence": 1.0}, {}, {}, "divergence"),
        ({}, {}, {"num_experts": 4}, "mixture of experts"),
        ({}, {"parallel": ParallelConfig(cuda_graphs=True, offload_activations=True)}, {}, "offload_activations"),
    ],
)
def test_what_no_graph_holds_is_refused_by_its_name(tiny_runs, stage, config, model, words):
    wanted = tiny_runs.config(tiny_runs.stage(**stage), **{"parallel": GRAPHS, **config})
    shape = preset("debug", vocab_size=64, **model)
    with pytest.raises(ValueError, match=f"stage 'warmup': parallel.cuda_graphs cannot hold .*{words}") as caught:
        require_graphs(wanted, shape, GPU, 1)
    assert "\n" not in str(caught.value)


def test_other_devices_and_several_processes_are_refused_before_any_work(tiny_runs, tmp_path):
    with pytest.raises(ValueError, match="needs a CUDA device, got cpu"):
        tiny_runs.trainer(tmp_path / "run", tiny_runs.config(parallel=GRAPHS))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="one process, no graph holds the exchanges of 2"):
        require_graphs(tiny_runs.config(parallel=GRAPHS), preset("debug", vocab_size=64), GPU, 2)
    require_graphs(tiny_runs.config(), preset("debug", vocab_size=64), torch.device("cpu"), 2)


def test_a_stage_that_cannot_be_held_is_refused_before_the_run(tiny_runs, tmp_path, stand_in):
    config = tiny_runs.config(*stages(tiny_runs)[:1], tiny_runs.stage("taught", divergence=1.0), parallel=GRAPHS)
    with pytest.raises(ValueError, match=r"stage 'taught': .*divergence"):
        tiny_runs.trainer(tmp_path / "run", config)
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("twin", ["", "noise", "pool", "told", "window", "full_rope", "moba"])
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu_steps_by_graphs_have_the_losses_of_steps_without(tiny_runs, tmp_path, monkeypatch, twin, compiled):
    """To 1e-6, or twice what two runs without differ by: some kernels add in varying order.

    A graph pads the tokens that evidence_loss tells, which changes the order of sums; under autocast to bf16 every step
    carries that further, and a weight whose gradient is near 0 may step the other way: losses and norms of "told" are
    compared to 2%, its weights by the root of their mean square difference, a tenth of what they began with.
    """
    replays = []
    real = graphs.CudaCapture.__call__

    def counted(self, function):
        replay, result = real(self, function)

        def count():
            replays.append(1)
            replay()

        return count, result

    monkeypatch.setattr(graphs.CudaCapture, "__call__", counted)
    found = []
    for name, has_graphs in (("plain", False), ("again", False), ("graphs", True)):
        fields = {"told": {"evidence_loss": 0.1}, "pool": {"pool_memory": "compete"}, "noise": NOISE}
        parts = stages(tiny_runs, **fields.get(twin, {}))
        is_twin = twin not in ("", *fields)
        if is_twin:
            parts = [tiny_runs.stage("first", mixture={"text": 1.0}, **SHAPES)]
        config = tiny_runs.config(*parts, parallel=ParallelConfig(cuda_graphs=has_graphs))
        config.twin = twin if is_twin else ""
        config.compile = compiled
        losses, weights, _ = results(tiny_runs, tmp_path / name, config, device="cuda")
        found.append((torch.tensor(losses, dtype=torch.float64), weights))
    assert len(replays) == len(parts) * 3
    (losses, weights), (again, others), (graphed, last) = found
    spread = (losses - again).abs().max()
    is_told = twin == "told"
    share = 0.02 if is_told else 0.0
    assert bool(((losses - graphed).abs() <= (share * losses.abs()).clamp_min(max(1e-6, 2 * float(spread)))).all())
    for key, part in weights.items():
        if part.is_floating_point():
            allowed = 2e-3 if is_told else max(1e-6, 2 * float((part - others[key]).abs().max()))
            apart = (part - last[key]).abs()
            assert float(apart.square().mean().sqrt() if is_told else apart.max()) <= allowed, key


@pytest.fixture
def nothing_on_the_host(monkeypatch):
    """Meta tensors have no values: what would wait for a card to read one is an error. They know no autocast."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)

    def step(model, auxiliary=lambda: 0.0, **inputs):
        model = model.train().to("meta")
        ids = torch.zeros(2, 64, dtype=torch.int64, device="meta")
        divisor = torch.ones((), dtype=torch.int64, device="meta")
        loss = model(ids, labels=ids, segment_ids=ids.int(), num_items_in_batch=divisor, **inputs).loss
        (loss + auxiliary()).backward()
        return {name for name, part in model.named_parameters() if part.grad is not None}

    return step


@pytest.mark.parametrize(
    ("name", "mode", "pool"),
    [(name, "none", "") for name in MODEL_OPTIONS]
    + [("default", "selective", ""), ("default", "full", "compete"), ("default", "none", "attended")],
)
def test_a_step_reads_nothing_back_but_for_a_mixture_of_experts(nothing_on_the_host, name, mode, pool):
    options = MODEL_OPTIONS[name]
    model = tiny_model(dtype=torch.float32, **options)
    recompute_activations(model, mode)
    isolated = torch.zeros(2, dtype=torch.bool, device="meta")
    if options.get("num_experts"):
        with pytest.raises(NotImplementedError, match="no data"):
            nothing_on_the_host(model, isolate_documents=isolated)
    else:
        nothing_on_the_host(model, isolate_documents=isolated, pool_memory=pool or False)


@pytest.mark.parametrize(("mode", "pool"), [("none", ""), ("full", "compete"), ("none", "attended")])
def test_noise_of_a_seed_on_the_device_reads_nothing_back(nothing_on_the_host, mode, pool):
    model = tiny_model(dtype=torch.float32, **NOISE)
    recompute_activations(model, mode)
    isolated, seed = torch.zeros(2, dtype=torch.bool, device="meta"), torch.zeros((), device="meta").long()
    options = {"isolate_documents": isolated, "pool_memory": pool or False}
    learning = nothing_on_the_host(model, **options, noise_seed=seed)
    assert any("query_proj" in name for name in learning) and any("landmark_proj" in name for name in learning)
    with pytest.raises(ValueError, match="training mode with gumbel_noise"):
        model.eval()(torch.zeros(1, 64, dtype=torch.int64, device="meta"), noise_seed=seed)
    # the host's number is drawn where none is given, and changes nothing of what learns
    model.zero_grad(set_to_none=True)
    assert nothing_on_the_host(model, **options) == learning


@pytest.mark.parametrize("name", TWINS)
def test_a_step_of_a_twin_reads_nothing_back(nothing_on_the_host, name):
    model = RivalForCausalLM(twin_config(preset("debug", vocab_size=64), name))
    learning = nothing_on_the_host(model)
    assert "model.embed_tokens.weight" in learning and any("attention" in name for name in learning), learning


def test_what_tells_a_token_reads_nothing_back(nothing_on_the_host):
    model = tiny_model(dtype=torch.float32)
    evidence = EvidenceLoss(model)
    numbers = torch.zeros(64, dtype=torch.int64, device="meta")
    told = Told(numbers, numbers, torch.zeros(64, 2, dtype=torch.int64, device="meta"), numbers.bool())
    stage = StageConfig("one", 64, 128, 128, 1e-3, mixture={"text": 1.0}, evidence_loss=1.0, evidence_chunks=999)
    evidence.watch(told, torch.zeros(64, device="meta"), stage)
    isolated, found = torch.zeros(2, dtype=torch.bool, device="meta"), []

    def taught():
        found.extend(evidence.take())
        return found[0]

    learning = nothing_on_the_host(model, taught, isolate_documents=isolated)
    loss, first = found
    assert loss.requires_grad and not first.requires_grad and {loss.device.type, first.device.type} == {"meta"}
    assert any("query_proj" in name for name in learning) and any("landmark_proj" in name for name in learning)
