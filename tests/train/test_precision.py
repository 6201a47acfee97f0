"""precision=fp8: feed-forward blocks train by 8-bit floats, or the run is refused before it begins."""

import copy

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from hsa_ultralong.baselines import FullAttentionLM
from hsa_ultralong.bench.training import full_attention_twin
from hsa_ultralong.cli.bench_training import _preparation
from hsa_ultralong.cli.main import app
from hsa_ultralong.models.presets import preset
from hsa_ultralong.nn.mlp import SwiGLU
from hsa_ultralong.testing.factories import random_tokens, tiny_model
from hsa_ultralong.train import TrainConfig, loop
from hsa_ultralong.train.precision import require_precision, set_precision
from hsa_ultralong.train.segmented import segmented_loss_backward


def losses(model, steps=12):
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = random_tokens(4, 48, seed=1)
    found = []
    for _ in range(steps):
        loss = model(ids, ids) if isinstance(model, FullAttentionLM) else model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return torch.tensor(found)


def test_a_model_and_a_twin_learn_as_by_exact_products_and_their_weights_are_ordinary():
    torch.manual_seed(0)
    model = tiny_model(hidden_size=32, intermediate_size=64, encoder_intermediate_size=64).float()
    for plain in (model, full_attention_twin(preset("debug", vocab_size=64, intermediate_size=64))):
        rounded = copy.deepcopy(plain)
        set_precision(rounded, "fp8")
        assert any(part.trains_fp8 for part in rounded.modules() if isinstance(part, SwiGLU))
        assert not any(part.trains_fp8 for part in plain.modules() if isinstance(part, SwiGLU))
        assert rounded.state_dict().keys() == plain.state_dict().keys()
        before, after = losses(plain.train()), losses(rounded.train())
        assert after[-1] < 0.9 * after[0]
        torch.testing.assert_close(after, before, rtol=0.1, atol=0)
        assert not torch.equal(after, before)


def test_in_evaluation_a_block_is_what_it_was_and_in_training_rounded_without_gradients_too():
    block = SwiGLU(hidden_size=16, intermediate_size=32).eval()
    x = torch.randn(2, 3, 16)
    before = block(x)
    set_precision(block, "fp8")
    assert torch.equal(block(x), before)
    rounded = block.train()(x)
    with torch.no_grad():
        assert torch.equal(block(x), rounded) and not torch.equal(rounded, before)
        assert block(x[0, 0]).shape == (16,)


def test_rows_in_pieces_train_as_whole_rows():
    torch.manual_seed(0)
    whole = tiny_model(hidden_size=32, intermediate_size=64, encoder_intermediate_size=64).float().train()
    set_precision(whole, "fp8")
    pieces, ids = copy.deepcopy(whole), random_tokens(2, 48, seed=1)
    loss = whole(ids, labels=ids).loss
    loss.backward()
    found = segmented_loss_backward(pieces, {"input_ids": ids, "labels": ids}, 8)
    torch.testing.assert_close(torch.as_tensor(found), loss.detach(), rtol=1e-4, atol=0)
    for one, other in zip(pieces.parameters(), whole.parameters(), strict=True):
        assert float((one.grad - other.grad).norm()) <= 1e-3 * float(other.grad.norm()) + 1e-6


def test_the_trainer_and_the_benchmark_set_it(tiny_runs, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "require_precision", lambda precision, device: None)
    for precision in ("bf16", "fp8"):
        config = tiny_runs.config(tiny_runs.stage("first"), precision=precision)
        config.model = {**config.model, "hidden_size": 32, "intermediate_size": 64, "encoder_intermediate_size": 64}
        trainer = tiny_runs.trainer(tmp_path / precision, config)
        blocks = [part for part in trainer.model.modules() if isinstance(part, SwiGLU)]
        assert blocks and {part.trains_fp8 for part in blocks} == {precision == "fp8"}
        trainer.train()
        # goes on with the checkpoint of the other one
        config = tiny_runs.config(
            *config.stages, tiny_runs.stage("second"), precision={"bf16": "fp8"}.get(precision, "bf16")
        )
        config.model = trainer.config.model
        other = tiny_runs.trainer(tmp_path / precision, config)
        assert other.global_step == trainer.global_step > 0 and other.train()
        block = SwiGLU(hidden_size=16, intermediate_size=32)
        _preparation(False, precision)(block, "none")
        assert block.trains_fp8 == (precision == "fp8")


def test_blocks_that_cannot_are_refused():
    with pytest.raises(ValueError, match="not for experts: use precision=bf16"):
        set_precision(tiny_model(num_experts=4), "fp8")
    with pytest.raises(ValueError, match="multiples of 16, got 16 and 24; use precision=bf16"):
        set_precision(SwiGLU(hidden_size=16, intermediate_size=24), "fp8")
    block = SwiGLU(hidden_size=16, intermediate_size=32)
    block.up_proj.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="without adapters or hooks: use precision=bf16"):
        set_precision(nn.Sequential(block), "fp8")


def test_runs_that_cannot_are_refused_in_one_line(tmp_path, shards_folder):
    with pytest.raises(ValueError, match=r"precision must be one of \('bf16', 'fp8'\), got 'fp16'"):
        TrainConfig(preset="debug", stages=[], precision="fp16")
    with pytest.raises(ValueError, match="lora_rank changes feed-forward blocks"):
        TrainConfig(preset="debug", stages=[], precision="fp8", lora_rank=4)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"compute capability 8.9 or newer, got cpu: use precision=bf16"):
            require_precision("fp8", torch.device("cpu"))
    run = tmp_path / "run"
    result = CliRunner().invoke(app, ["train", "moe_8b_a1b", "--set", "precision=fp8", "--dry-run"])
    assert result.exit_code == 2 and "not for experts: use precision=bf16" in result.output
    command = ["train", "debug", "--data", str(shards_folder[0]), "-o", str(run), "--device", "cpu"]
    result = CliRunner().invoke(app, [*command, "--set", "precision=fp8"])
    assert result.exit_code == 2 and "use precision=bf16" in result.output and not run.exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--precision", "fp8"], "needs an NVIDIA GPU of compute capability 8.9"),
        (["--precision", "fp8", "--preset", "moe_8b_a1b"], "not for experts: use precision=bf16"),
        (["--precision", "int8"], "--precision is one of bf16, fp8"),
        (["--precision", "fp8", "--longest", "--max-tokens", "512"], "for timed steps of one process"),
    ],
)
def test_the_benchmark_refuses_what_it_would_not_measure(tmp_path, options, reason):
    command = ["bench", "training", "--preset", "debug", "--contexts", "256", "--device", "cpu", "-o", str(tmp_path)]
    result = CliRunner().invoke(app, [*command, *options])
    assert result.exit_code == 2 and reason in result.output and not list(tmp_path.iterdir())
