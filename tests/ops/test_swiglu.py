"""swiglu_fp8: scales, errors, gradients; the kernels against the reference, without a GPU under the interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hsa_ultralong.nn.mlp import SwiGLU
from hsa_ultralong.ops import swiglu_fp8
from hsa_ultralong.ops.swiglu import api
from hsa_ultralong.ops.swiglu.reference import TorchSteps, scales_of
from hsa_ultralong.testing.factories import random_tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTH, SIZE = 32, 48
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def operands(rows=37, width=WIDTH, size=SIZE, dtype=torch.float32, weight_dtype=torch.float32):
    weights = [
        random_tensor(*shape, seed=seed) * 0.2 for seed, shape in enumerate([(size, width)] * 2 + [(width, size)])
    ]
    x = random_tensor(rows, width, seed=5).to(DEVICE, dtype)
    return [x, *(weight.to(DEVICE, weight_dtype) for weight in weights)]


def run(function, inputs, factor=1e-4):
    """Output and the gradients of all inputs."""
    leaves = [part.detach().clone().requires_grad_() for part in inputs]
    out = function(*leaves)
    out.backward(factor * random_tensor(*out.shape, seed=9).to(out))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def exact(x, gate, up, down):
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def errors(found, expected):
    return [float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize("rows", [1, 16, 37])
def test_output_and_every_gradient_are_near_those_of_exact_products(rows):
    inputs = operands(rows)
    expected = run(exact, [part.double() for part in inputs])
    found = run(lambda *parts: swiglu_fp8(*parts, impl="reference"), inputs)
    assert [part.dtype for part in found] == [torch.float32] * 5
    assert max(errors(found, expected)) < 0.1


def test_scales_are_the_least_powers_of_two_that_fit():
    rows = random_tensor(50, 16) * torch.logspace(-20, 20, 50)[:, None]
    scales = scales_of(rows)
    assert bool((torch.frexp(scales)[0] == 0.5).all())
    largest = (rows.abs().amax(-1, keepdim=True) / scales).flatten()
    assert bool(((largest > 224) & (largest <= 448)).all())
    assert scales_of(torch.tensor([[448.0, 1.0], [0.0, 0.0], [-449.0, 0.0]])).flatten().tolist()[::2] == [1.0, 2.0]


def test_what_comes_back_is_the_product_of_what_was_rounded():
    steps = TorchSteps()
    a, b = (steps.quantize(random_tensor(count, 16, seed=count)) for count in (5, 7))
    left, right = (part.values.float() * part.scales for part in (a, b))
    torch.testing.assert_close(steps.product(a, b, torch.float32), left @ right.t())
    turned = steps.transpose(a, b)
    whole = torch.cat((left, right)).t()
    assert turned.values.shape == (16, 16) and len(turned.scales.unique()) == 1
    back = turned.values.float() * turned.scales
    assert not back[:, 12:].any()
    # one scale for all: the least numbers lose bits
    torch.testing.assert_close(back[:, :12], whole, rtol=0, atol=float(turned.scales[0]) * 2**-10)


# the interpreter makes a number of a NaN
@pytest.mark.parametrize("impl", ["reference", pytest.param("triton", marks=[pytest.mark.gpu, needs_gpu])])
def test_a_row_that_is_not_finite_stays_alone(impl):
    inputs = operands(dtype=torch.bfloat16)
    clean = run(lambda *parts: swiglu_fp8(*parts, impl=impl), inputs)
    for bad in (torch.nan, torch.inf):
        inputs[0][3, 5] = bad
        spoiled = run(lambda *parts: swiglu_fp8(*parts, impl=impl), inputs)
        others = [row for row in range(37) if row != 3]
        for before, after in zip(clean[:2], spoiled[:2], strict=True):
            assert torch.equal(before[others], after[others]) and not after[3].isfinite().any()
        assert not spoiled[2].isfinite().all()


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width", "size"), [(37, 32, 48), (1, 16, 16), (50, 64, 144)])
def test_kernels_do_what_the_reference_does(rows, width, size, weight_dtype):
    pytest.importorskip("triton")
    from hsa_ultralong.ops.swiglu.triton_swiglu import TritonSteps

    inputs = operands(rows, width, size, torch.bfloat16, weight_dtype)
    found = run(lambda *parts: swiglu_fp8(*parts, impl="triton"), inputs)
    expected = run(lambda *parts: swiglu_fp8(*parts, impl="reference"), inputs)
    assert [part.dtype for part in found] == [part.dtype for part in expected]
    assert max(errors(found, expected)) < (0.03 if DEVICE == "cuda" else 0.5)
    kernels, torch_steps = TritonSteps(), TorchSteps()
    gate, up, grad = (random_tensor(rows, size, seed=seed).to(DEVICE, torch.bfloat16) for seed in range(3))
    for name, arguments in (
        ("quantize", (inputs[0],)), ("quantize", (inputs[1],)), ("activate", (gate, up)),
        ("activate_backward", (gate, up, grad)), ("transpose", (torch_steps.quantize(gate),)),
        ("transpose", (torch_steps.quantize(gate), torch_steps.quantize(1000 * up))),
    ):  # fmt: skip
        one, other = (getattr(steps, name)(*arguments) for steps in (kernels, torch_steps))
        assert torch.equal(one.scales, other.scales) and one.values.shape == other.values.shape
        mine, theirs = one.values.float(), other.values.float()
        is_near = (mine - theirs).abs() <= 0.13 * theirs.abs() + 0.004
        # the interpreter loses a carry: what rounds up to a power of two is half of it there
        assert bool((is_near | ((mine == theirs / 2) & (DEVICE == "cpu"))).all())


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_frozen_inputs_get_no_gradients_and_the_others_theirs(impl):
    inputs = operands(17, dtype=torch.bfloat16)
    everything = run(lambda *parts: swiglu_fp8(*parts, impl=impl), inputs)[1:]
    upward = 1e-4 * random_tensor(17, WIDTH, seed=9).to(inputs[0])
    for frozen in ([0], [1, 2, 3], [2]):
        leaves = [part.clone().requires_grad_(place not in frozen) for place, part in enumerate(inputs)]
        swiglu_fp8(*leaves, impl=impl).backward(upward)
        assert [place for place, leaf in enumerate(leaves) if leaf.grad is None] == frozen
        for leaf, expected in zip(leaves, everything, strict=True):
            assert leaf.grad is None or torch.equal(leaf.grad, expected)
    # in fp32, not rounded to the dtype of x
    assert all(bool((grad != grad.bfloat16().float()).any()) for grad in everything[1:])


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_no_rows_are_zeros_and_so_are_their_gradients(impl):
    out, *gradients = run(lambda *parts: swiglu_fp8(*parts, impl=impl), operands(0, dtype=torch.bfloat16))
    assert out.shape == (0, WIDTH) and gradients[0].shape == (0, WIDTH)
    assert all(gradient.shape and not gradient.any() for gradient in gradients)


class _Undefined(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_an_undefined_gradient_is_none(impl):
    leaves = [part.requires_grad_() for part in operands(3, dtype=torch.bfloat16)]
    _Undefined.apply(swiglu_fp8(*leaves, impl=impl)).sum().backward()
    assert all(leaf.grad is None or not leaf.grad.any() for leaf in leaves)


def test_what_it_does_not_take_is_refused():
    x, gate, up, down = operands()
    with pytest.raises(ValueError, match=r"up must have shape \(48, 32\)"):
        swiglu_fp8(x, gate, up[:16], down)
    with pytest.raises(ValueError, match="multiples of 16, got 32 and 40"):
        swiglu_fp8(x, gate[:40], up[:40], down[:, :40])
    with pytest.raises(ValueError, match="at most 16,384"):
        wide = torch.empty(16_400, 16, device="meta")
        swiglu_fp8(torch.empty(1, 16, device="meta"), wide, wide, wide.t())
    with pytest.raises(ValueError, match="impl='torch' is not available"):
        swiglu_fp8(x[:0], gate, up, down, impl="torch")
    with pytest.raises(ValueError, match="down must have shape"):
        swiglu_fp8(x, gate, up, down[0])
    for impl in ("reference", "triton"):
        leaf = x.to(torch.bfloat16).requires_grad_()
        out = swiglu_fp8(leaf, gate, up, down, impl=impl)
        with pytest.raises(RuntimeError, match=r"first derivatives only.* precision=bf16"):
            torch.autograd.grad(out.sum(), leaf, create_graph=True)


def test_a_compiled_block_holds_the_operators_and_gives_the_same(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(api, "fp8_runs_on", lambda x: True)
    block = SwiGLU(hidden_size=WIDTH, intermediate_size=SIZE).to(DEVICE)
    block.trains_fp8 = True
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=False)
    x = random_tensor(2, 20, WIDTH).to(DEVICE, torch.float32)
    found = []
    for function in (block, compiled):
        block.zero_grad()
        leaf = x.clone().requires_grad_()
        with torch.autocast(DEVICE, torch.bfloat16):
            out = function(F.rms_norm(leaf, (WIDTH,)))
        out.backward(torch.ones_like(out))
        found.append([out.detach(), leaf.grad, *(part.grad.clone() for part in block.parameters())])
    assert found[0][0].dtype == torch.bfloat16
    for plain, other in zip(*found, strict=True):
        assert torch.equal(plain, other)


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_kernels_round_as_the_reference_and_repeat_bit_for_bit():
    from hsa_ultralong.ops.swiglu.triton_swiglu import TritonSteps

    kernels, steps = TritonSteps(), TorchSteps()
    rows = random_tensor(333, 1024).to(DEVICE, torch.bfloat16) * torch.rand(333, 1, device=DEVICE).pow(8).bfloat16()
    for one, other in ((kernels.quantize(rows), steps.quantize(rows)),
                       (kernels.transpose(steps.quantize(rows)), steps.transpose(steps.quantize(rows)))):  # fmt: skip
        assert torch.equal(one.values.view(torch.uint8), other.values.view(torch.uint8))
        assert torch.equal(one.scales, other.scales)
    inputs = operands(3000, 1024, 4096, torch.bfloat16)
    expected = run(exact, [part.double() for part in inputs])
    first = run(lambda *parts: swiglu_fp8(*parts, impl="triton"), inputs)
    reference = run(lambda *parts: swiglu_fp8(*parts, impl="reference"), inputs)
    for mine, theirs in zip(errors(first, expected), errors(reference, expected), strict=True):
        assert mine < 1.02 * theirs < 0.1
    for _ in range(20):
        again = run(lambda *parts: swiglu_fp8(*parts, impl="triton"), inputs)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
