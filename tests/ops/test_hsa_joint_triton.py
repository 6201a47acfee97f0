"""joint_attention's kernels against plain torch; without a GPU they run under the interpreter, in fp32."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from hsa_ultralong.ops import joint_attention
from hsa_ultralong.ops.hsa import joint
from hsa_ultralong.testing.factories import random_attention, random_tensor

pytest.importorskip("triton")
from hsa_ultralong.ops.hsa import triton_joint

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZE = 16
# tokens that choose few of the chunks, then all that there are; no number of tokens is a multiple of a tile
SHAPES = {
    "group_1": {"group": 1, "kv_heads": 1},
    "group_3": {"group": 3, "kv_heads": 1, "num_tokens": 9},
    "group_16": {"group": 16, "kv_heads": 1, "num_tokens": 5},
    "short_chunks": {"is_short": True, "group": 4, "kv_heads": 1},
    "two_memory_heads": {"kv_heads": 2, "group": 2, "num_tokens": 9},
    "retrieval_per_head": {"kv_heads": 2, "heads": 2, "group": 2, "num_tokens": 9},
    "shared_memory": {"kv_batch": 1, "kv_heads": 1, "is_short": True, "batch": 3, "num_tokens": 37},
    "one_slot": {"slots": 1, "kv_heads": 1},
    "all_empty": {"empty": 1.1, "kv_heads": 1},
    "one_chunk": {"num_chunks": 1, "slots": 1, "kv_heads": 1},
    "coverage": {"num_chunks": 3, "slots": 3, "kv_heads": 1, "group": 4, "is_short": True, "empty": 0.0},
    "coverage_per_head": {"num_chunks": 3, "slots": 2, "kv_heads": 2, "heads": 2, "num_tokens": 9},
    "coverage_shared_memory": {"num_chunks": 3, "slots": 5, "kv_batch": 1, "kv_heads": 2, "num_tokens": 9},
    "more_than_a_tile": {"num_tokens": 67, "group": 2, "kv_heads": 1, "batch": 1, "empty": 0.6},
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of 16 rows, so that a few tokens make several tiles, and tiles of a chunk that several programs share."""
    monkeypatch.setattr(triton_joint, "joint_launch", lambda *_: triton_joint.JointLaunch(16, 4, 1))
    monkeypatch.setattr(triton_joint, "_SHARE_TILES", 2)


def problem(**options):
    inputs = random_attention(
        **{"num_tokens": 21, "num_chunks": 7, "chunk_size": SIZE, "dim": 16, "empty": 0.5, **options}
    )
    # the gradient of a weight near 0 is rounding, divided by it
    inputs = inputs._replace(weights=inputs.weights + 0.1)
    return inputs._replace(**{name: x.to(DEVICE) for name, x in inputs._asdict().items() if x is not None})


def run(inputs, impl, *, dtype=torch.float32, weighs=(True, True), size=SIZE, **options):
    """Output, mass and the gradients of q, k, v, weights; weighs: whether output and mass are in the loss."""
    leaves = [x.detach().clone().to(dtype).requires_grad_() for x in inputs[:3]]
    leaves.append(inputs.weights.detach().clone().to(dtype if dtype == torch.float64 else torch.float32))
    out, mass = joint_attention(
        *leaves[:3], inputs.indices, leaves[3].requires_grad_(), chunk_size=size, chunk_lengths=inputs.chunk_lengths,
        impl=impl, **options,
    )  # fmt: skip
    loss = mass.new_zeros(())
    if weighs[0]:
        loss = loss + (out * random_tensor(*out.shape, seed=77).to(out)).sum()
    if weighs[1]:
        # where nothing is read the mass is -inf, of which a caller takes nothing
        slope = random_tensor(*mass.shape, seed=78).to(mass)
        loss = loss + (mass.masked_fill(mass == -torch.inf, 0.0) * slope).sum()
    return [out.detach(), mass.detach(), *torch.autograd.grad(loss, leaves, allow_unused=True)]


def assert_close(actual, expected):
    for left, right in zip(actual, expected, strict=True):
        if left is None or right is None:
            # what no loss asks for, and zeros of it
            assert (left is None or not left.any()) and (right is None or not right.any())
            continue
        assert not left.isnan().any()
        torch.testing.assert_close(left.double(), right.double(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_equal_torch_in_output_mass_and_every_gradient(shape):
    inputs = problem(**SHAPES[shape])
    made = run(inputs, "triton")
    assert_close(made, run(inputs, "torch", dtype=torch.float64))
    is_lone = (inputs.indices < 0).all(-1).expand(-1, -1, inputs.k.shape[2])  # (B, T, Hkv)
    is_lone = is_lone.repeat_interleave(inputs.q.shape[2] // inputs.k.shape[2], 2)
    assert made[0][is_lone].eq(0).all() and made[1][is_lone].eq(-torch.inf).all() and made[2][is_lone].eq(0).all()
    assert made[5][inputs.indices < 0].eq(0).all()


@pytest.mark.parametrize("weighs", [(True, False), (False, True)], ids=["output_alone", "mass_alone"])
def test_output_and_mass_have_gradients_of_their_own(weighs):
    inputs = problem(kv_heads=2, heads=2)
    assert_close(run(inputs, "triton", weighs=weighs), run(inputs, "torch", dtype=torch.float64, weighs=weighs))


@pytest.mark.parametrize("slots", [2, 4])
@pytest.mark.parametrize("num_tokens", [31, 70])
def test_causal_selections_are_read_alike_with_and_without_the_promise(slots, num_tokens):
    inputs = problem(num_tokens=num_tokens, num_chunks=4, slots=slots, kv_heads=1, batch=1, empty=0.1)
    past = torch.arange(num_tokens, device=DEVICE)[:, None, None] // SIZE
    inputs = inputs._replace(indices=torch.where(inputs.indices < past, inputs.indices, -1))
    expected = run(inputs, "torch", dtype=torch.float64, causal=True)
    for causal in (False, True):
        assert_close(run(inputs, "triton", causal=causal), expected)


def test_a_memory_that_begins_further_on_takes_its_own_chunks_alone():
    inputs = problem(is_short=True)
    parts = []
    for impl, dtype in (("triton", torch.float32), ("torch", torch.float64)):
        rest = inputs._replace(
            k=inputs.k[:, 3 * SIZE :], v=inputs.v[:, 3 * SIZE :], chunk_lengths=inputs.chunk_lengths[:, 3:]
        )
        parts.append(run(rest, impl, dtype=dtype, first_chunk=3))
    assert_close(*parts)


def test_two_memories_joined_by_their_masses_are_one_with_all_gradients():
    inputs = problem(is_short=True, empty=0.3)
    leaves = [x.detach().float().requires_grad_() for x in (*inputs[:3], inputs.weights)]
    q, k, v, weights = leaves

    def read(first, last):
        part = slice(first * SIZE, last * SIZE)
        lengths = inputs.chunk_lengths[:, first:last]
        return joint_attention(
            q, k[:, part], v[:, part], inputs.indices, weights, chunk_size=SIZE, chunk_lengths=lengths,
            first_chunk=first, impl="triton",
        )  # fmt: skip

    outputs, masses = (torch.stack(parts) for parts in zip(read(0, 3), read(3, 7), strict=True))
    share = masses.masked_fill((masses == -torch.inf).all(0), 0.0).softmax(0)[..., None]
    upward = random_tensor(*q.shape, seed=77).to(q)
    joined = (share * outputs).sum(0)
    grads = torch.autograd.grad(joined, leaves, upward)
    wanted = run(inputs, "torch", dtype=torch.float64, weighs=(True, False))
    assert_close([joined.detach(), *grads], [wanted[0], *wanted[2:]])


def test_weights_of_zero_are_read_at_the_least_weight_and_get_no_gradient():
    inputs = problem(kv_heads=1, empty=0.2)
    weights = inputs.weights.clone()
    weights[..., ::2] = 0.0
    inputs = inputs._replace(weights=weights)
    made = run(inputs, "triton")
    assert_close(made, run(inputs, "torch", dtype=torch.float64))
    assert made[5][..., ::2].eq(0).all() and made[5][..., 1].any()


def test_what_lies_beyond_a_chunks_length_reaches_nothing():
    inputs = problem(is_short=True, kv_heads=1, num_chunks=3, slots=3, empty=0.0)
    expected = run(inputs, "triton")
    slots = torch.arange(SIZE, device=DEVICE) >= inputs.chunk_lengths[..., None]  # (B, C, S)
    spoil = [x.masked_fill(slots.flatten(1)[..., None, None], torch.nan) for x in (inputs.k, inputs.v)]
    assert_close(run(inputs._replace(k=spoil[0], v=spoil[1]), "triton"), expected)


@pytest.mark.parametrize("wanted", ["none", "q", "k", "weights"])
def test_only_gradients_that_are_asked_for_are_made(wanted):
    found = []
    for impl, dtype in (("triton", torch.float32), ("torch", torch.float64)):
        inputs = problem(kv_heads=1)
        leaves = {name: getattr(inputs, name).to(dtype) for name in ("q", "k", "v", "weights")}
        if wanted != "none":
            leaves[wanted].requires_grad_()
        q, k, v, weights = leaves.values()
        out, mass = joint_attention(q, k, v, inputs.indices, weights, chunk_size=SIZE, impl=impl)
        grads = () if wanted == "none" else torch.autograd.grad(out.square().sum(), leaves[wanted])
        found.append([out.detach(), mass.detach(), *grads])
    assert_close(*found)


def test_the_host_reads_no_number_of_the_device(monkeypatch):
    """On tensors without numbers all steps around the kernels run, as they must while a graph is captured."""

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **constants: None

    for name in ("joint_forward_kernel", "joint_query_gradient_kernel", "joint_memory_gradient_kernel"):
        monkeypatch.setattr(triton_joint.kernel_joint, name, Kernel())
    inputs = problem(kv_heads=2, is_short=True)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        run(inputs._make(mode.from_tensor(x) for x in inputs), "triton", first_chunk=1)
        with pytest.raises(DataDependentOutputException):
            mode.from_tensor(inputs.q).sum().item()


def test_lists_hold_what_is_met_in_order():
    is_met = torch.tensor([[True, False, True, True], [False] * 4, [True] * 4])
    lists, counts = triton_joint.list_met(is_met)
    assert counts.tolist() == [3, 0, 4] and counts.dtype == lists.dtype == torch.int32
    assert [row[:n].tolist() for row, n in zip(lists, counts, strict=True)] == [[0, 2, 3], [], [0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("dtype", "dim", "size", "tokens", "grad", "impl"),
    [
        (torch.bfloat16, 16, 16, 80, False, "triton"),
        (torch.float16, 16, 16, 3, True, "triton"),
        (torch.bfloat16, 16, 16, 3, False, "torch"),
        (torch.float32, 16, 16, 80, True, "torch"),
        (torch.bfloat16, 8, 16, 80, True, "torch"),
        (torch.bfloat16, 16, 8, 80, True, "torch"),
    ],
)
def test_the_automatic_choice_follows_from_shapes(monkeypatch, dtype, dim, size, tokens, grad, impl):
    monkeypatch.setattr(joint, "triton_runs_on", lambda _: True)
    q, k, v = (torch.zeros(1, n, 1, dim, dtype=dtype, requires_grad=grad) for n in (tokens, 4 * size, 4 * size))
    weights = torch.zeros(1, tokens, 1, 2)
    assert joint._automatic(q, k, v, weights, size) == impl
    assert joint._automatic(q, k.double(), v, weights, size) == "torch"
    monkeypatch.setattr(joint, "_BIAS_BYTES", 4 * tokens * 4 - 1)
    assert joint._automatic(q, k, v, weights, size) == "torch"


def test_what_no_kernel_takes_is_refused_in_one_line(monkeypatch):
    inputs = problem(dim=8)
    with pytest.raises(ValueError, match=r'^joint_attention: impl="triton" takes head dimension .*; use impl="auto"$'):
        run(inputs, "triton")
    with pytest.raises(ValueError, match=r"takes bfloat16, float16, float32, got torch\.float64; use"):
        run(problem(), "triton", dtype=torch.float64)
    with pytest.raises(ValueError, match="impl='dense' is not available"):
        run(problem(), "dense")
    with pytest.raises(ValueError, match="indices must have shape"):
        run(inputs._replace(indices=inputs.indices[:1]), "torch")
    monkeypatch.setattr(triton_joint, "shared_memory", lambda _: 101_376)
    with pytest.raises(ValueError, match="this card has 101,376; use bf16"):
        run(problem(dim=128, chunk_size=128, num_chunks=2), "triton", size=128)


@pytest.mark.parametrize("slots", [3, 1])
def test_a_weight_that_is_no_number_is_seen_in_its_own_token_as_without_kernels(slots):
    inputs = problem(kv_heads=1, group=4, batch=1, slots=slots, empty=0.0)
    inputs.weights[0, 3, 0, 0] = torch.nan
    found, expected = run(inputs, "triton"), run(inputs, "torch", dtype=torch.float64)
    assert expected[0][0, 3].isnan().all() and expected[0].isnan().any(-1).any(-1).sum() == 1
    for left, right in zip(found[:3], expected[:3], strict=True):
        assert torch.equal(left.isnan(), right.isnan())
    for left, right in zip(found, expected, strict=True):
        # products of all tokens spread it further in gradients of plain torch
        assert right[left.isnan()].isnan().all()
        known = ~right.isnan()
        torch.testing.assert_close(left.double()[known], right[known], rtol=2e-5, atol=2e-5)


def test_an_unknown_implementation_is_refused_where_nothing_is_read_too():
    inputs = problem(slots=1, num_chunks=1, kv_heads=1)
    nothing = inputs._replace(indices=inputs.indices[..., :0], weights=inputs.weights[..., :0])
    with pytest.raises(ValueError, match="bogus"):
        run(nothing, "bogus")
