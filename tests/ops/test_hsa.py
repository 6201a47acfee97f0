"""hsa_attention: backends against the reference, the reference against a loop, and facts 1 to 4."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hsa_ultralong.ops import ChunkVisibility, hsa_attention
from hsa_ultralong.ops.hsa import torch_dense, torch_gather
from hsa_ultralong.testing.factories import random_attention, random_selection, random_tensor
from hsa_ultralong.testing.oracles import chunk_logsumexp, dense_chunk_attention, max_error, naive_hsa

EXACT = {"rtol": 1e-11, "atol": 1e-11}
BACKENDS = ["torch_gather", "torch_dense"]
SHAPES = {
    "group_1": {"group": 1},
    "group_2": {"group": 2},
    "group_4": {"group": 4},
    "group_16": {"group": 16, "kv_heads": 1},
    "retrieval_per_head": {"kv_heads": 2, "heads": 2, "group": 2},
    "short_chunks": {"is_short": True},
    "short_chunks_per_head": {"is_short": True, "kv_heads": 2, "heads": 2},
    "shared_memory": {"kv_batch": 1},
    "shared_memory_retrieval_per_head": {"kv_batch": 1, "is_short": True, "kv_heads": 2, "heads": 2},
    "shared_memory_short": {"kv_batch": 1, "is_short": True},
    "fewer_tokens_than_a_chunk": {"num_tokens": 2},
    "batch_1": {"batch": 1},
    "batch_3": {"batch": 3},
    "one_slot": {"slots": 1},
    "one_chunk": {"num_chunks": 1, "slots": 1},
    "more_slots_than_chunks": {"slots": 8},
    "all_empty": {"empty": 1.1},
    "none_empty": {"empty": 0.0},
    "wide_heads": {"dim": 16, "chunk_size": 2},
    "long_chunks": {"dim": 2, "chunk_size": 16, "num_tokens": 19},
    "chunks_of_one": {"chunk_size": 1},
}


def run(inputs, impl, *, chunk_size=4, scale=None, causal=False, grad=None):
    """Output and the gradients of q, k, v, weights."""
    leaves = [x.detach().clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v, inputs.weights)]
    q, k, v, weights = leaves
    out = hsa_attention(
        q, k, v, inputs.indices, weights,
        chunk_size=chunk_size, chunk_lengths=inputs.chunk_lengths, scale=scale, causal=causal, impl=impl,
    )  # fmt: skip
    slope = random_tensor(*out.shape, seed=77).to(out.dtype) if grad is None else grad
    (out * slope).sum().backward()
    return [out.detach(), *(x.grad for x in leaves)]


def small_tiles(monkeypatch, elements):
    monkeypatch.setattr(torch_gather, "_BLOCK_ELEMENTS", {"cpu": elements})
    monkeypatch.setattr(torch_dense, "_TILE_ELEMENTS", {"cpu": elements})


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_backend_equals_reference_in_output_and_every_gradient(impl, shape):
    inputs, size = random_attention(**SHAPES[shape]), SHAPES[shape].get("chunk_size", 4)
    for expected, actual in zip(run(inputs, "reference", chunk_size=size), run(inputs, impl, chunk_size=size)):
        assert actual.dtype == torch.float64
        torch.testing.assert_close(actual, expected, **EXACT)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_chunk_that_is_gathered_once_for_many_tokens_gives_the_same(shape, dtype, monkeypatch):
    monkeypatch.setattr(torch_gather, "_FEWEST_PAIRS", 1)
    monkeypatch.setattr(torch_gather, "_FEWEST_SHARED", 0)
    monkeypatch.setattr(torch_gather, "_LARGEST_TILE", 2)
    monkeypatch.setattr(torch_gather, "_TILE_ELEMENTS", 100)  # several blocks of tiles
    taken = []
    attend = torch_gather._attend_tiles
    monkeypatch.setattr(torch_gather, "_attend_tiles", lambda *args: taken.append(attend(*args)) or taken[-1])
    inputs, size = random_attention(**SHAPES[shape]), SHAPES[shape].get("chunk_size", 4)
    inputs = inputs._replace(q=inputs.q.to(dtype), k=inputs.k.to(dtype), v=inputs.v.to(dtype))
    close = EXACT if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    for expected, actual in zip(
        run(inputs, "reference", chunk_size=size), run(inputs, "torch_gather", chunk_size=size)
    ):
        torch.testing.assert_close(actual, expected, **close)
    assert taken == [shape != "all_empty"]


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_equals_a_loop_over_tokens_heads_and_chunks(shape):
    inputs, size = random_attention(**SHAPES[shape]), SHAPES[shape].get("chunk_size", 4)
    q, k, v, indices, weights, lengths = inputs
    expected = naive_hsa(q, k, v, indices, weights, chunk_size=size, chunk_lengths=lengths)
    actual = hsa_attention(q, k, v, indices, weights, chunk_size=size, chunk_lengths=lengths, impl="reference")
    torch.testing.assert_close(actual, expected, **EXACT)


@given(
    st.integers(1, 3), st.integers(1, 9), st.sampled_from([1, 2, 4]), st.integers(1, 2), st.booleans(),
    st.integers(1, 6), st.integers(1, 7), st.integers(1, 5), st.booleans(), st.booleans(), st.integers(0, 10**6),
)  # fmt: skip
def test_backends_equal_reference_for_any_shape(
    batch, tokens, group, kv, per_head, chunks, slots, size, shared, short, seed
):
    inputs = random_attention(
        batch=batch, num_tokens=tokens, group=group, kv_heads=kv, heads=kv if per_head else 1, num_chunks=chunks,
        slots=slots, chunk_size=size, kv_batch=1 if shared else None, is_short=short, seed=seed,
    )  # fmt: skip
    expected = run(inputs, "reference", chunk_size=size, scale=0.7)
    for impl in BACKENDS:
        for left, right in zip(expected, run(inputs, impl, chunk_size=size, scale=0.7)):
            torch.testing.assert_close(right, left, **EXACT)


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize(("kv_batch", "length_batch"), [(2, 1), (1, 2)])
def test_lengths_broadcast_over_the_batch_like_keys(impl, kv_batch, length_batch):
    inputs = random_attention(kv_batch=kv_batch, empty=0.0)
    lengths = torch.tensor([[1, 2, 3, 4, 2], [4, 1, 2, 3, 1]], dtype=torch.int32)[:length_batch]
    inputs = inputs._replace(chunk_lengths=lengths)
    for expected, actual in zip(run(inputs, "reference"), run(inputs, impl)):
        torch.testing.assert_close(actual, expected, **EXACT)


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("elements", [1, 300, 2000])
def test_result_does_not_depend_on_the_tile_size(monkeypatch, impl, elements):
    inputs = random_attention(num_tokens=37, group=4, heads=2, is_short=True)
    whole = run(inputs, impl)
    small_tiles(monkeypatch, elements)
    for expected, actual in zip(whole, run(inputs, impl)):
        torch.testing.assert_close(actual, expected, **EXACT)


def test_dense_path_splits_many_chunks_into_tiles():
    inputs = random_attention(batch=1, num_tokens=3, group=1, kv_heads=1, num_chunks=1100, slots=40, dim=2)
    assert 1100 * 4 > 4096
    for expected, actual in zip(run(inputs, "reference"), run(inputs, "torch_dense")):
        torch.testing.assert_close(actual, expected, **EXACT)


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("num_tokens", [3, 16, 37, 50])
def test_causal_promise_changes_nothing_for_a_causal_selection(monkeypatch, impl, num_tokens):
    small_tiles(monkeypatch, 256)
    chunks = num_tokens // 4 + 1
    inputs = random_attention(num_tokens=num_tokens, num_chunks=chunks, slots=3, empty=0.1)
    seen = ChunkVisibility.causal(2, num_tokens, chunks, 4).mask()[:, :, None]
    kept = seen.gather(-1, inputs.indices.long().clamp_min(0)) & (inputs.indices >= 0)
    inputs = inputs._replace(indices=torch.where(kept, inputs.indices, -1))
    for expected, actual in zip(run(inputs, "reference"), run(inputs, impl, causal=True)):
        torch.testing.assert_close(actual, expected, **EXACT)


@pytest.mark.parametrize("impl", ["reference", *BACKENDS])
def test_gradients_pass_gradcheck(impl):
    inputs = random_attention(batch=2, num_tokens=3, num_chunks=3, slots=2, chunk_size=2, dim=2, is_short=True)
    q, k, v, weights = (x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v, inputs.weights))

    def attention(q, k, v, weights):
        return hsa_attention(
            q, k, v, inputs.indices, weights, chunk_size=2, chunk_lengths=inputs.chunk_lengths, impl=impl
        )

    assert torch.autograd.gradcheck(attention, (q, k, v, weights))


@pytest.mark.parametrize("impl", ["reference", *BACKENDS])
def test_a_token_with_only_empty_slots_gets_exactly_zero(impl):
    inputs = random_attention(empty=0.0, num_tokens=20)
    indices = inputs.indices.clone()
    indices[:, ::2] = -1
    out, grad_q, *_, grad_weights = run(inputs._replace(indices=indices), impl)
    assert bool((out[:, ::2] == 0).all()) and bool((grad_q[:, ::2] == 0).all())
    assert bool((grad_weights[:, ::2] == 0).all())
    assert float(out[:, 1::2].abs().min()) > 0


@pytest.mark.parametrize("impl", ["reference", *BACKENDS])
def test_weights_of_empty_slots_are_ignored(impl):
    inputs = random_attention()
    loud = inputs.weights.masked_fill(inputs.indices < 0, 1e3)
    expected, *_ = run(inputs, impl)
    actual, *_ = run(inputs._replace(weights=loud), impl)
    torch.testing.assert_close(actual, expected, **EXACT)


@pytest.mark.parametrize("impl", ["reference", *BACKENDS])
def test_the_order_of_slots_does_not_matter(impl):
    inputs = random_attention(slots=4)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = inputs._replace(indices=inputs.indices[..., order], weights=inputs.weights[..., order])
    torch.testing.assert_close(run(shuffled, impl)[0], run(inputs, impl)[0], **EXACT)


@pytest.mark.parametrize("empty", [0.0, 0.5])
def test_gather_never_reads_a_chunk_that_nobody_selected(empty):
    inputs = random_attention(num_chunks=6, slots=3, empty=empty, num_tokens=11)
    # chunks 1 and 4 belong to nobody
    moved = torch.tensor([0, 2, 3, 5, 5, 5], dtype=torch.int32)
    indices = torch.where(inputs.indices < 0, -1, moved[inputs.indices.long().clamp_min(0)])
    inputs = inputs._replace(indices=indices)
    clean = run(inputs, "torch_gather")
    k, v = inputs.k.clone(), inputs.v.clone()
    for chunk in (1, 4):
        k[:, chunk * 4 : chunk * 4 + 4] = v[:, chunk * 4 : chunk * 4 + 4] = torch.nan
    for expected, actual in zip(clean, run(inputs._replace(k=k, v=v), "torch_gather")):
        assert not bool(actual.isnan().any())
        torch.testing.assert_close(actual, expected, **EXACT)


@pytest.mark.parametrize(
    "poison",
    [
        1e100,
        pytest.param(torch.nan, marks=pytest.mark.xfail(reason="empty slots gather chunk 0 with weight 0: 0 * NaN")),
    ],
)
def test_gather_never_lets_an_empty_slot_read_chunk_0(poison):
    inputs = random_attention(empty=0.5, num_tokens=11)
    inputs = inputs._replace(indices=torch.where(inputs.indices == 0, -1, inputs.indices))
    clean = run(inputs, "torch_gather")
    k, v = inputs.k.clone(), inputs.v.clone()
    k[:, :4] = v[:, :4] = poison
    for expected, actual in zip(clean, run(inputs._replace(k=k, v=v), "torch_gather")):
        torch.testing.assert_close(actual, expected, **EXACT)


@pytest.mark.parametrize("impl", ["reference", *BACKENDS])
def test_finite_numbers_in_absent_slots_of_short_chunks_reach_nothing(impl):
    inputs = random_attention(is_short=True, empty=0.0)
    expected = run(inputs, impl)
    absent = (torch.arange(4) >= inputs.chunk_lengths[..., None]).flatten(1)[:, :, None, None]
    assert bool(absent.any())
    noisy = inputs._replace(k=inputs.k.masked_fill(absent, 50.0), v=inputs.v.masked_fill(absent, -1e4))
    actual = run(noisy, impl)
    for left, right in zip(expected, actual):
        torch.testing.assert_close(right, left, **EXACT)
    for grad in actual[2:4]:
        assert bool((grad.masked_fill(~absent, 0.0) == 0).all())


@pytest.mark.parametrize("impl", ["reference", *BACKENDS])
def test_with_logsumexp_weights_over_all_visible_chunks_it_is_dense_attention(impl):
    q, k, v, *_ = random_attention(batch=2, num_tokens=23, group=1, kv_heads=3, num_chunks=5, slots=5)
    visible = ChunkVisibility.causal(2, 23, 5, 4).mask()
    scores = chunk_logsumexp(q, k, 4).masked_fill(~visible[:, :, None], -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    indices = torch.where(visible, torch.arange(5), -1)[:, :, None].expand(-1, -1, 3, -1).to(torch.int32)
    actual = hsa_attention(q, k, v, indices, weights, chunk_size=4, impl=impl)
    torch.testing.assert_close(actual, dense_chunk_attention(q, k, v, visible, 4), **EXACT)
    assert bool((actual[:, :4] == 0).all())


@pytest.mark.parametrize("impl", ["reference", *BACKENDS])
@pytest.mark.parametrize("group", [1, 4])
def test_for_any_weights_it_is_dense_attention_with_a_bias_per_chunk(impl, group):
    q, k, v, indices, weights, _ = random_attention(num_tokens=9, group=group, empty=0.0)
    total = weights.sum(-1, keepdim=True)
    spread = torch.zeros(2, 9, 1, 5, dtype=torch.float64).scatter(-1, indices.long(), weights / total)
    bias = spread.log() - chunk_logsumexp(q, k, 4)  # (B, T, Hq, C)
    expected = dense_chunk_attention(q, k, v, (spread > 0)[:, :, 0], 4, bias) * total
    actual = hsa_attention(q, k, v, indices, weights, chunk_size=4, impl=impl)
    torch.testing.assert_close(actual, expected, **EXACT)


@pytest.mark.parametrize("impl", ["reference", *BACKENDS])
def test_parts_of_a_memory_read_by_the_same_indices_add_up_to_the_whole(impl):
    inputs, size = random_attention(num_chunks=6, is_short=True), 4
    parts = []
    for first, last in ((0, 2), (2, 6)):
        k, v = (x[:, first * size : last * size] for x in (inputs.k, inputs.v))
        lengths = inputs.chunk_lengths[:, first:last]
        parts.append(
            hsa_attention(
                inputs.q, k, v, inputs.indices, inputs.weights, chunk_size=size, chunk_lengths=lengths,
                first_chunk=first, impl=impl,
            )
        )  # fmt: skip
    torch.testing.assert_close(sum(parts), run(inputs, impl)[0], **EXACT)


@pytest.mark.parametrize("impl", ["reference", *BACKENDS])
def test_permuting_chunks_with_their_indices_changes_nothing(impl):
    inputs = random_attention(num_chunks=6, is_short=True)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    place = order.argsort().to(torch.int32)
    k, v = (x.unflatten(1, (6, 4))[:, order].flatten(1, 2) for x in (inputs.k, inputs.v))
    indices = torch.where(inputs.indices < 0, -1, place[inputs.indices.long().clamp_min(0)])
    moved = inputs._replace(k=k, v=v, indices=indices, chunk_lengths=inputs.chunk_lengths[:, order])
    torch.testing.assert_close(run(moved, impl)[0], run(inputs, impl)[0], **EXACT)


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("heads", [1, 2])
def test_bf16_error_is_at_most_twice_that_of_the_reference_in_bf16(impl, heads):
    inputs = random_attention(
        num_tokens=64, group=4, heads=heads, num_chunks=8, slots=6, chunk_size=8, dim=16, dtype=torch.bfloat16
    )
    slope = random_tensor(*inputs.q.shape, seed=77).bfloat16()
    wide = inputs._replace(**{name: getattr(inputs, name).double() for name in ("q", "k", "v", "weights")})
    exact = run(wide, "reference", chunk_size=8, grad=slope.double())
    budget = [max_error(low, high) for low, high in zip(run(inputs, "reference", chunk_size=8, grad=slope), exact)]
    errors = [max_error(low, high) for low, high in zip(run(inputs, impl, chunk_size=8, grad=slope), exact)]
    # rounding the gradient of the weights costs nothing in the reference, whose products are all fp32
    floor = [0.0, 0.0, 0.0, 0.0, 2e-2]
    assert all(error <= max(2 * allowed, low) for error, allowed, low in zip(errors, budget, floor)), (errors, budget)


def test_auto_equals_reference_on_both_sides_of_the_choice():
    for slots, chunks in ((5, 5), (2, 30)):
        inputs = random_attention(num_tokens=20, slots=slots, num_chunks=chunks)
        for expected, actual in zip(run(inputs, "reference"), run(inputs, "auto")):
            torch.testing.assert_close(actual, expected, **EXACT)


@pytest.mark.parametrize("impl", ["reference", *BACKENDS, "auto"])
def test_no_chunks_or_no_slots_give_exactly_zero_and_zero_gradients(impl):
    q = random_tensor(2, 5, 4, 8).requires_grad_()
    empty = random_tensor(2, 0, 2, 8)
    indices, weights = random_selection(2, 5, 1, 3, 4)
    some = random_tensor(2, 16, 2, 8)
    for k, index, weight in ((empty, indices.fill_(-1), weights), (some, indices[..., :0], weights[..., :0])):
        out = hsa_attention(q, k, k, index, weight, chunk_size=4, impl=impl)
        out.sum().backward()
        assert bool((out == 0).all()) and bool((q.grad == 0).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 7, 8)}, "q must be"),
        ({"q": torch.zeros(2, 7, 3, 8)}, "required a multiple of the 2 heads"),
        ({"k": torch.zeros(2, 20, 2, 6)}, "k must have shape"),
        ({"v": torch.zeros(2, 16, 2, 8)}, "v must have shape"),
        ({"k": torch.zeros(3, 20, 2, 8), "v": torch.zeros(3, 20, 2, 8)}, "have batch 3"),
        ({"chunk_size": 3}, "required a multiple of chunk_size=3"),
        ({"chunk_size": 0}, "required a multiple of chunk_size=0"),
        ({"indices": torch.zeros(2, 6, 1, 3, dtype=torch.int32)}, "indices must have shape"),
        ({"indices": torch.zeros(2, 7, 3, 3, dtype=torch.int32)}, "3 retrieval heads"),
        ({"weights": torch.zeros(2, 7, 1, 2)}, "weights must have shape"),
        ({"chunk_lengths": torch.ones(2, 4, dtype=torch.int32)}, "chunk_lengths must have shape"),
        ({"chunk_lengths": torch.ones(3, 5, dtype=torch.int32)}, "chunk_lengths"),
        ({"impl": "flash"}, "impl='flash' is not available"),
    ],
)
def test_bad_arguments_raise_one_clear_error(change, message):
    arguments = {**random_attention()._asdict(), "chunk_size": 4, **change}
    with pytest.raises(ValueError, match=message):
        hsa_attention(**arguments)
