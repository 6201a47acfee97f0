"""linear_cross_entropy: sliced loss and gradients against the loss of all logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from hsa_ultralong.ops import linear_cross_entropy
from hsa_ultralong.ops.linear_cross_entropy import torch_chunked
from hsa_ultralong.testing.factories import random_tensor, random_tokens
from hsa_ultralong.testing.oracles import max_error

EXACT = {"rtol": 1e-11, "atol": 1e-11}


def inputs(count=11, width=5, vocab=13, dtype=torch.float64):
    labels = random_tokens(1, count, vocab_size=vocab)[0]
    labels[1::3] = -100
    return random_tensor(count, width, dtype=dtype), random_tensor(vocab, width, seed=1, dtype=dtype), labels


def run(hidden, weight, labels, impl, **options):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels, impl=impl, **options)
    (loss * 0.3).backward()
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("elements", [1, 26, 40, 1 << 24])
def test_torch_equals_reference_with_gradients_for_every_slice_size(monkeypatch, elements):
    monkeypatch.setattr(torch_chunked, "_SLICE_ELEMENTS", {"cpu": elements})
    for expected, actual in zip(run(*inputs(), "reference"), run(*inputs(), "torch")):
        torch.testing.assert_close(actual, expected, **EXACT)


def test_second_derivatives_are_refused_and_the_reference_is_named():
    hidden, weight, labels = inputs()
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, labels, impl="torch")
    with pytest.raises(RuntimeError, match=r'first derivatives only.* use impl="reference"'):
        torch.autograd.grad(loss, hidden, create_graph=True)


@given(st.integers(0, 20), st.integers(1, 6), st.integers(1, 20), st.integers(1, 50))
def test_torch_equals_plain_cross_entropy_for_any_shape(count, width, vocab, elements):
    hidden, weight, labels = inputs(count, width, vocab)
    expected = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_chunked, "_SLICE_ELEMENTS", {"cpu": elements})
        torch.testing.assert_close(run(hidden, weight, labels, "torch")[0], expected, **EXACT)


def test_gradients_pass_gradcheck():
    hidden, weight, labels = inputs(5, 3, 4)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, labels, impl="torch"), (hidden, weight))


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_ignored_labels_count_nothing_and_give_no_gradient(impl):
    hidden, weight, labels = inputs()
    loss, grad, _ = run(hidden, weight, labels, impl)
    kept = labels != -100
    torch.testing.assert_close(loss, run(hidden[kept], weight, labels[kept], impl)[0], **EXACT)
    assert bool((grad[~kept] == 0).all()) and float(grad[kept].abs().min()) > 0
    nothing = run(hidden, weight, torch.full_like(labels, -100), impl)
    assert all(float(x.abs().max()) == 0 for x in nothing)


def test_another_ignore_index_is_respected():
    hidden, weight, labels = inputs()
    labels = labels.clamp_min(0)
    for expected, actual in zip(
        run(hidden, weight, labels, "reference", ignore_index=0), run(hidden, weight, labels, "torch", ignore_index=0)
    ):
        torch.testing.assert_close(actual, expected, **EXACT)


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_loss_is_fp32_and_its_error_is_within_twice_the_reference(autocast):
    low = inputs(64, 16, 50, dtype=torch.bfloat16)
    exact = run(low[0].double(), low[1].double(), low[2], "reference")
    budget = run(*low, "reference")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        actual = run(*low, "torch")
    assert actual[0].dtype == torch.float32
    for value, allowed, truth in zip(actual, budget, exact):
        assert max_error(value, truth) <= 2 * max_error(allowed, truth) + 1e-3


def test_loss_without_gradients_needs_none():
    hidden, weight, labels = inputs()
    loss = linear_cross_entropy(hidden, weight, labels, impl="torch")
    assert not loss.requires_grad and float(loss) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 3, 4)}, "hidden must have shape"),
        ({"weight": torch.zeros(13, 4)}, "weight must have shape"),
        ({"labels": torch.zeros(10, dtype=torch.long)}, "labels must have shape"),
        ({"impl": "triton"}, "impl='triton' is not available"),
    ],
)
def test_bad_arguments_raise_one_clear_error(change, message):
    hidden, weight, labels = inputs()
    arguments = {"hidden": hidden, "weight": weight, "labels": labels, **change}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(arguments.pop("hidden"), arguments.pop("weight"), arguments.pop("labels"), **arguments)


def test_under_autocast_the_operands_are_those_of_a_linear_layer():
    hidden, weight = random_tensor(40, 8, dtype=torch.float32), random_tensor(11, 8, seed=1, dtype=torch.float32)
    labels = torch.randint(11, (40,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, linear_cross_entropy(hidden.bfloat16(), weight, labels))


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_an_ignored_row_counts_nothing_whatever_it_holds(impl, number):
    hidden, weight = random_tensor(7, 6), random_tensor(11, 6, seed=1)
    labels = torch.tensor([1, -100, 3, 4, -100, 0, 2])
    spoiled = hidden.clone()
    spoiled[1], spoiled[4, 2] = number, number
    results = []
    for rows in (hidden, spoiled):
        leaves = [part.detach().clone().requires_grad_() for part in (rows, weight)]
        loss = linear_cross_entropy(*leaves, labels, impl=impl)
        loss.backward()
        results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_a_row_that_is_not_finite_spoils_of_the_hidden_gradient_its_own_row_only(impl):
    hidden, weight = random_tensor(5, 6), random_tensor(11, 6, seed=1)
    hidden[2, 3] = float("nan")
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1, 0, 3, 4, 2]), impl=impl)
    loss.backward()
    assert loss.isnan() and hidden.grad[2].isnan().any()
    assert hidden.grad[[0, 1, 3, 4]].isfinite().all()
