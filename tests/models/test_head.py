"""The loss honours whatever stands as the head: adapters, hooks, biases, quantised weights, replaced forwards."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from hsa_ultralong.models import head as head_file
from hsa_ultralong.nn.plain_linear import is_plain_linear
from hsa_ultralong.testing.factories import generator, random_tensor, random_tokens, tiny_model
from hsa_ultralong.train.segmented import segmented_loss_backward

EXACT = {"rtol": 1e-10, "atol": 1e-10}


class Adapted(nn.Module):
    """A linear layer with a low-rank adapter, its base weight in sight as with peft."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.down, self.up = nn.Linear(16, 2, bias=False).double(), nn.Linear(2, 37, bias=False).double()

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


class Wrapped(torch.Tensor):
    """Stands for the tensor subclasses of quantisation."""


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def adapted(model):
    model.lm_head = Adapted(model.lm_head)


def biased(model):
    head = nn.Linear(16, 37, bias=True).double()
    head.weight = model.lm_head.weight
    model.lm_head = head


def hooked_after(model):
    model.lm_head.register_forward_hook(lambda _, __, out: 3 * out)


def hooked_before(model):
    model.lm_head.register_forward_pre_hook(lambda _, args: (args[0] * 0.5,))


def parametrized(model):
    parametrize.register_parametrization(model.lm_head, "weight", Doubled())


def replaced_forward(model):
    plain = model.lm_head.forward
    model.lm_head.forward = lambda x: plain(x).tanh()


def subclassed(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().as_subclass(Wrapped))


HEADS = [adapted, biased, hooked_after, hooked_before, parametrized, replaced_forward, subclassed]


def changed(change):
    torch.manual_seed(0)
    model = tiny_model(tie_word_embeddings=False)
    change(model)
    return model


def gradients(model):
    return {name: None if part.grad is None else part.grad.clone() for name, part in model.named_parameters()}


@pytest.mark.parametrize("pieces", [1 << 25, 200])
@pytest.mark.parametrize("change", HEADS)
def test_the_loss_is_that_of_the_logits_of_the_head_itself(monkeypatch, change, pieces):
    monkeypatch.setattr(head_file, "_PIECE_ELEMENTS", pieces)
    model, tokens = changed(change).train(), random_tokens(2, 19)
    assert not is_plain_linear(model.lm_head)
    labels = tokens.masked_fill(torch.rand(2, 19, generator=generator(1)) < 0.3, -100)
    logits = model(tokens).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    expected.backward()
    wanted = gradients(model)
    model.zero_grad()
    loss = model(tokens, labels=labels).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, **EXACT)
    plain = tiny_model(tie_word_embeddings=False)(tokens, labels=labels).loss
    assert change is subclassed or float((loss - plain).detach().abs()) > 1e-6
    for name, found in gradients(model).items():
        torch.testing.assert_close(found, wanted[name], **EXACT)


@pytest.mark.parametrize("change", [adapted, hooked_after])
def test_the_segmented_loss_honours_the_head_too(change):
    model, tokens = changed(change).train(), random_tokens(2, 20)
    model(tokens, labels=tokens).loss.backward()
    wanted = gradients(model)
    model.zero_grad()
    segmented_loss_backward(model, {"input_ids": tokens, "labels": tokens}, 8)
    for name, found in gradients(model).items():
        torch.testing.assert_close(found, wanted[name], **EXACT)


def test_a_head_that_is_not_plain_sees_few_tokens_at_a_time(monkeypatch):
    monkeypatch.setattr(head_file, "_PIECE_ELEMENTS", 37 * 2 * 5)
    model, seen = tiny_model().train(), []
    model.lm_head.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[:2]))
    tokens = random_tokens(2, 13)
    model(tokens, labels=tokens).loss.backward()
    assert set(seen) == {(2, 5), (2, 3)}


def test_a_plain_head_takes_the_fused_loss(monkeypatch):
    calls, fused = [], head_file.linear_cross_entropy
    monkeypatch.setattr(head_file, "linear_cross_entropy", lambda *args: calls.append(1) or fused(*args))
    model, tokens = tiny_model().train(), random_tokens(1, 9)
    model(tokens, labels=tokens)
    assert calls == [1] and is_plain_linear(model.lm_head)


@pytest.mark.parametrize("change", [adapted, hooked_after])
def test_a_loss_in_bf16_is_fp32(change):
    model, tokens = changed(change).to(torch.bfloat16).train(), random_tokens(1, 9)
    loss = model(tokens, labels=tokens).loss
    assert loss.dtype == torch.float32 and bool(loss.isfinite())


def test_an_adapter_on_the_router_of_the_experts_is_honoured():
    model, tokens = tiny_model(num_experts=4), random_tokens(2, 11)
    with torch.no_grad():
        before = model(tokens).logits
        for layer in model.modules():
            if hasattr(layer, "router"):
                layer.router.register_forward_hook(lambda _, __, out: -out)
        assert float((model(tokens).logits - before).abs().max()) > 1e-3


def test_a_hook_on_an_hsa_layer_runs_before_the_first_chunk_too():
    model, seen = tiny_model(), []
    for group in model.model.groups:
        group.hsa_layer.register_forward_hook(lambda _, __, out: seen.append(out.shape))
    model(random_tokens(1, 3), use_cache=False)
    assert seen == [(1, 3, 16)] * 2


def test_an_adapter_without_any_target_adds_no_gradient():
    model = changed(adapted).train()
    loss = head_file.head_loss(
        model.lm_head, random_tensor(1, 5, 16).requires_grad_(), torch.full((1, 5), -100), vocab_size=37
    )
    loss.backward()
    assert float(loss.detach()) == 0 and not bool(model.lm_head.up.weight.grad.any())
