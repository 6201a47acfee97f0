"""Training the upper half: memories built before stay valid, to the bit; what is trained is what would be."""

import pytest
import torch

from hsa_ultralong.inference import ask, memory_fingerprint
from hsa_ultralong.models.accounting import count_memory_parameters
from hsa_ultralong.testing.factories import random_tokens, tiny_model
from hsa_ultralong.train.export import export_model
from hsa_ultralong.train.freezing import freeze_memory, freeze_source
from hsa_ultralong.train.lora import is_memory
from hsa_ultralong.train.optim import build_optimizers
from hsa_ultralong.train.planning import plan_run
from hsa_ultralong.train.segmented import segmented_loss_backward


def lower_state(model):
    inner = model.model
    parts = {"embed": inner.embed_tokens, "lower": inner.lower_layers, "encoder": inner.chunk_encoder}
    return {f"{name}.{key}": value.clone() for name, part in parts.items() for key, value in part.state_dict().items()}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("num_experts", [0, 4], ids=["dense", "experts"])
def test_the_upper_half_learns_and_nothing_below_changes_a_bit(tiny_runs, tmp_path, optimizer, num_experts):
    stage = tiny_runs.stage(tokens=256 * 6, learning_rate=1e-2)
    config = tiny_runs.config(stage, optimizer=optimizer, freeze_memory=True, model={"num_experts": num_experts})
    one = tiny_runs.trainer(tmp_path / "whole", config)
    before, fingerprint = lower_state(one.model), memory_fingerprint(one.model)
    upper = {name: part.clone() for name, part in one.model.model.groups.state_dict().items()}
    part = tiny_runs.trainer(tmp_path / "cut", config)
    assert one.train()
    assert memory_fingerprint(one.model) == fingerprint
    for name, value in lower_state(one.model).items():
        assert torch.equal(value, before[name]), name
    moved = [name for name, value in one.model.model.groups.state_dict().items() if not torch.equal(value, upper[name])]
    assert any("q_proj" in name for name in moved) and any("mlp" in name for name in moved)
    losses = [loss for _, loss, _ in tiny_runs.losses(tmp_path / "whole")]
    assert losses[-1] < losses[0]
    # cut and resumed it takes the same steps
    part.listener = lambda record: setattr(part, "should_stop", record["global_step"] == 3)
    part.train()
    assert tiny_runs.trainer(tmp_path / "cut", config).train()
    assert tiny_runs.losses(tmp_path / "cut") == tiny_runs.losses(tmp_path / "whole")


def test_gradients_of_the_upper_half_are_those_of_the_whole(tiny_runs):
    model, ids = tiny_model().train(), random_tokens(2, 96, seed=1)
    for module in (model.model.chunk_encoder,):
        module.eval()  # the centre of a frozen memory does not move
    model(ids, labels=ids).loss.backward()
    wanted = {name: part.grad.clone() for name, part in model.model.groups.named_parameters()}
    model.zero_grad()
    freeze_memory(model)
    model.train()
    held = [
        part
        for one in build_optimizers(model, tiny_runs.config())
        for group in one.param_groups
        for part in group["params"]
    ]
    assert held and all(part.requires_grad for part in held)
    for run in (
        lambda: model(ids, labels=ids).loss.backward(),
        lambda: segmented_loss_backward(model, {"input_ids": ids, "labels": ids}, 32, num_items=2 * 95),
    ):
        run()
        for name, part in model.model.groups.named_parameters():
            torch.testing.assert_close(part.grad, wanted[name], rtol=1e-9, atol=1e-12)
        assert all(part.grad is None for part in model.model.lower_layers.parameters())
        model.zero_grad()


def test_a_memory_built_before_answers_the_tuned_model_and_the_plan_counts_what_is_trained(tiny_runs, tmp_path):
    config = tiny_runs.config(freeze_memory=True)
    one = tiny_runs.trainer(tmp_path / "run", config)
    one.model.to(torch.bfloat16).float()  # as from an exported checkpoint
    one.model.eval()
    memory = one.model.memorize(random_tokens(1, 300, seed=2)[0] % 200)
    one.model.train()
    assert one.train()
    export_model(one.model, tiny_runs.tokenizer, tmp_path / "model", topk=one.topk)
    from hsa_ultralong import HSAForCausalLM

    tuned = HSAForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    assert isinstance(ask(tuned, tiny_runs.tokenizer, memory, "alpha", max_new_tokens=2).text, str)
    whole, upper = plan_run(tiny_runs.config())[0], plan_run(config)[0]
    trained = sum(part.numel() for part in one.model.parameters() if part.requires_grad)
    assert upper.gradients == pytest.approx(4 * trained, rel=0.01) and upper.weights == whole.weights
    assert upper.optimizer == 2 * upper.gradients


def test_what_does_not_go_with_a_frozen_memory(tiny_runs, tmp_path):
    with pytest.raises(ValueError, match="sliding_window=8"):
        tiny_runs.trainer(tmp_path, tiny_runs.config(tiny_runs.stage(sliding_window=8), freeze_memory=True))


@pytest.mark.parametrize("skip", [0.0, 2.0])
def test_with_a_frozen_source_the_memory_alone_trains_and_is_counted(skip):
    model = tiny_model(embedding_skip=skip)
    freeze_source(model)
    trained = {name: part.numel() for name, part in model.named_parameters() if part.requires_grad}
    assert all(is_memory(f".{name}") for name in trained) and any("retriever" in name for name in trained)
    assert sum(trained.values()) == count_memory_parameters(model.config)
    held = {name for name, part in model.named_parameters() if not part.requires_grad}
    assert any("window_attention" in name for name in held) and any("lower_layers" in name for name in held)
