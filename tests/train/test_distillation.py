"""Distillation by hand (examples/convert_and_distill.py): divergence is KL and falls, so does the loss of long rows."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from hsa_ultralong.models.convert import convert_model
from hsa_ultralong.train.teaching import divergence

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "convert_and_distill.py"
spec = importlib.util.spec_from_file_location("convert_and_distill", EXAMPLE)
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)


def test_divergence_is_kl():
    student, teacher = torch.randn(2, 3, 5, 11, dtype=torch.float64)
    expected = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(divergence(student, teacher), expected.mean())
    assert divergence(teacher, teacher) == 0


def models():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=23, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    teacher = LlamaForCausalLM(config)
    return config, teacher, convert_model(teacher, sliding_window=4, chunk_size=8, retrieval_dim=16, chunk_topk=4).model


def rows(ids):
    return {"input_ids": ids, "labels": ids}


def test_only_matrices_decay_and_no_warm_up_is_needed(monkeypatch):
    _, teacher, student = models()
    made, adamw = [], torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, **options: made.append(adamw(*args, **options)) or made[0])
    ids = torch.arange(16)[None] % 23
    example.distill(student, teacher, iter([rows(ids)]), iter([rows(ids)]), steps=1, learning_rate=1e-3, warmup_steps=0)
    decays = {part: group["weight_decay"] for group in made[0].param_groups for part in group["params"]}
    assert decays.keys() == set(student.parameters())
    assert all((part.dim() >= 2) == (decay > 0) for part, decay in decays.items())


def test_only_tokens_with_a_label_count():
    _, teacher, student = models()
    ids = torch.randint(23, (2, 32), generator=torch.Generator().manual_seed(1))
    labels = torch.full_like(ids, -100)
    labels[0, 20:] = ids[0, 20:]
    with torch.no_grad():
        wanted = divergence(example.student_logits(student, ids)[0, 19:-1], teacher(ids).logits[0, 19:-1])
    texts, far = iter([{"input_ids": ids, "labels": labels}]), iter([rows(ids)])
    (record,) = example.distill(student, teacher, texts, far, steps=1, learning_rate=1e-3, warmup_steps=10)
    assert record["divergence"] == pytest.approx(wanted.item(), rel=1e-5)


def test_divergence_and_long_loss_fall():
    _, teacher, student = models()
    generator = torch.Generator().manual_seed(1)

    def texts(times):
        while True:
            ids = torch.randint(23, (4, 32), generator=generator)
            yield rows(torch.cat([ids] * times, 1))

    records = example.distill(student, teacher, texts(1), texts(2), steps=60, learning_rate=3e-3, warmup_steps=10)
    first, last = records[:5], records[-5:]
    for name in ("divergence", "long_loss"):
        assert sum(r[name] for r in last) < 0.8 * sum(r[name] for r in first), name
    assert not student.training
