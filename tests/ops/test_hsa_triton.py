"""hsa_attention's Triton kernels against the reference; without a GPU they run under the interpreter, in fp32."""

from __future__ import annotations

import itertools
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hsa_ultralong.ops import ChunkVisibility, hsa_attention
from hsa_ultralong.testing.factories import AttentionInputs, random_attention, random_tensor

triton = pytest.importorskip("triton")
from hsa_ultralong.ops._overlap import overlap  # noqa: E402
from hsa_ultralong.ops.hsa import kernel_lists, plan, triton_attention  # noqa: E402
from hsa_ultralong.ops.hsa.kernel_lists import InverseListPlan, TileListPlan  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZE = 16
# sparse lists, then full coverage (K >= 0.6 C)
SHAPES = {
    "group_1": {"group": 1, "kv_heads": 1},
    "group_3": {"group": 3, "kv_heads": 1, "num_tokens": 9},
    "group_16": {"group": 16, "kv_heads": 1, "num_tokens": 5},
    "short_chunks": {"is_short": True, "group": 4, "kv_heads": 1},
    "two_memory_heads": {"kv_heads": 2, "group": 2, "num_tokens": 9},
    "retrieval_per_head": {"kv_heads": 2, "heads": 2, "group": 2, "num_tokens": 9},
    "shared_memory": {"kv_batch": 1, "kv_heads": 1, "is_short": True},
    "one_slot": {"slots": 1, "kv_heads": 1},
    "all_empty": {"empty": 1.1, "kv_heads": 1},
    "one_chunk": {"num_chunks": 1, "slots": 1, "kv_heads": 1},
    "coverage": {"num_chunks": 3, "slots": 3, "kv_heads": 1, "group": 4, "is_short": True},
    "coverage_per_head": {"num_chunks": 3, "slots": 2, "kv_heads": 2, "heads": 2, "num_tokens": 9},
    "coverage_shared_memory": {"num_chunks": 3, "slots": 5, "kv_batch": 1, "kv_heads": 2, "num_tokens": 9},
}
# what one pass for all gradients takes: lists, no lengths
PARTED = [name for name, x in SHAPES.items() if x.get("num_chunks", 7) > 3 and not x.get("is_short")]


@pytest.fixture(autouse=True)
def small_launches(monkeypatch):
    """Tiles of 16 rows, so that a few tokens make several tiles; no path for few tokens unless a test asks for it."""
    monkeypatch.setattr(plan, "launch_options", lambda *_: plan.HSALaunch(16, 4, 1))
    monkeypatch.setattr(triton_attention, "_DECODE_TOKENS", 0)
    monkeypatch.setattr(kernel_lists, "_COUNTED_KEYS", (32, 32))
    monkeypatch.setattr(kernel_lists, "_COUNTED_SHARE", 1000)
    # shapes that were seen with other sizes
    plan.plan_of.cache_clear()
    yield
    plan.plan_of.cache_clear()


def problem(**options) -> AttentionInputs:
    inputs = random_attention(**{"num_tokens": 20, "num_chunks": 7, "chunk_size": SIZE, "dim": 16, **options})
    return AttentionInputs(*(None if x is None else x.to(DEVICE) for x in inputs))


class HopperStandIn:
    """Does in torch, pair by pair, what kernel_hopper.listed_gradient_kernel does; that runs on a card alone
    (test_hopper.py)."""

    def __getitem__(self, grid):
        return lambda *operands, **constants: self.run(grid, operands, constants)

    def run(self, grid, operands, constants):
        q, k, v, weights, grad_out, pairs, pair_starts, unit_ends, unit_lists, partial, shares = operands[:11]
        grad_weights, part, first_token, part_tokens, tokens, chunks, lists, unit_pairs, none = operands[11:20]
        _, scale, kv_heads, heads = operands[20:]
        slots, groups, dim = constants["K"], constants["GROUPS"], q.shape[-1]
        q, grad_out = (x.view(-1, kv_heads, q.shape[2] // kv_heads, dim).float() for x in (q, grad_out))
        k, v = (x.view(-1, chunks, SIZE, kv_heads, dim).float() for x in (k, v))
        before = int(unit_ends[part * lists - 1]) if part else 0
        for unit in range(before, int(unit_ends[(part + 1) * lists - 1])):
            number = int(unit_lists[unit])
            first = int(pair_starts[number]) + (unit - (int(unit_ends[number - 1]) if number else 0)) * unit_pairs
            row, hr, chunk = np.unravel_index(number - part * lists, (lists // heads // chunks, heads, chunks))
            for share in range(grid[1]):
                kv_head, sums = hr + share * heads, partial[unit - before, share].zero_()
                keys, values = k[row, chunk, :, kv_head], v[row, chunk, :, kv_head]
                for place in range(first, min(first + unit_pairs, int(pair_starts[number + 1]))):
                    pair = int(pairs[place])
                    token, slot = pair // (slots * heads), pair % slots
                    query, upward = q[token, kv_head], grad_out[token, kv_head]
                    p, slope = (query @ keys.T * scale).softmax(-1), upward @ values.T
                    delta, w = (p * slope).sum(-1, keepdim=True), float(weights.flatten()[pair])
                    dz = w * p * (slope - delta)
                    group = (place - first) // 4 % groups
                    sums[group, 0] += dz.T @ query
                    sums[group, 1] += w * p.T @ upward
                    local = token // tokens * part_tokens + token % tokens - first_token
                    shares[(local * kv_heads + kv_head) * slots + slot] = dz @ keys * scale
                    grad_weights.view(-1)[(token * kv_heads + kv_head) * slots + slot] = delta.sum()
        assert none < shares.shape[0]


class HopperForwardStandIn(HopperStandIn):
    """The same for kernel_hopper_forward.py, chunk by chunk; every third tile is spoiled."""

    def run(self, grid, operands, constants):
        q, k, v, weights, chunks, counts, slots, spoiled, out, tokens, num_chunks, _, _, first = operands[:14]
        num_tiles, tiles, scale, kv_heads, heads = operands[14:]
        dim, group, size = q.shape[3], q.shape[2] // kv_heads, plan._HOPPER_TOKENS
        k, v = (x.view(-1, num_chunks, SIZE, kv_heads, dim).float() for x in (k, v))
        assert constants["KV_BATCH"] == (len(k) > 1) and 0 < grid[0] <= tiles == len(q) * kv_heads * num_tiles
        of_tile = spoiled.view(len(q), kv_heads, num_tiles, -1)
        of_tile.copy_((torch.arange(num_tiles) % 3 == 0)[:, None].expand_as(of_tile))
        for row, kv_head, local in itertools.product(range(len(q)), range(kv_heads), range(num_tiles)):
            first_token, hr, memory = (first + local) * size, kv_head % heads, row % len(k)
            for place in range(min(size, tokens - first_token)):
                sums, own = 0, range(kv_head * group, kv_head * group + group)
                for u in range(int(counts[row, hr, local])):
                    chunk, slot = int(chunks[row, hr, local, u]), int(slots[row, hr, local, u, place])
                    if slot >= 0:
                        query = q[row, first_token + place, own].float()
                        p = (query @ k[memory, chunk, :, kv_head].T * scale * np.log(2)).softmax(-1)
                        sums += float(weights[row, first_token + place, hr, slot]) * p @ v[memory, chunk, :, kv_head]
                out[row, first_token + place, own] = sums if local % 3 else float("nan")


def take_all_gradients_in_one_pass(monkeypatch, inputs, dtype, tokens):
    """As on Hopper, in parts of so many tokens."""
    token_bytes = inputs.q[:, 0].numel() * inputs.indices.shape[3] * dtype.itemsize
    sizes = {"_PARTED_PAIRS": 0, "_PARTS_PAIRS": 0, "_PART_STEP": 1, "_PARTS_BYTES": tokens * token_bytes}
    for name, value in sizes.items():
        monkeypatch.setattr(plan, name, value)
    kernels = SimpleNamespace(listed_gradient_kernel=HopperStandIn(), described=lambda tensor, width, box: tensor)
    monkeypatch.setitem(sys.modules, "hsa_ultralong.ops.hsa.kernel_hopper", kernels)
    monkeypatch.setattr(plan.HSAPlan, "takes_hopper", True)
    monkeypatch.setattr(plan, "HOPPER_FORWARD", False)
    # several units of a list
    monkeypatch.setattr(plan, "pairs_of_unit", lambda *_: 16)
    for name in ("_query_gradients", "_memory_gradients"):
        monkeypatch.setattr(triton_attention, name, None)
    plan.plan_of.cache_clear()


def run(inputs, impl, dtype, *, causal=False, chunk_size=SIZE):
    """Output and the gradients of q, k, v, weights."""
    leaves = [x.detach().clone().to(dtype).requires_grad_() for x in (inputs.q, inputs.k, inputs.v, inputs.weights)]
    q, k, v, weights = leaves
    out = hsa_attention(
        q, k, v, inputs.indices, weights,
        chunk_size=chunk_size, chunk_lengths=inputs.chunk_lengths, causal=causal, impl=impl,
    )  # fmt: skip
    out.backward(random_tensor(*out.shape, seed=77).to(out))
    return [out.detach(), *(x.grad for x in leaves)]


def assert_close(actual, expected):
    for left, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(left.double(), right.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_equal_reference_in_output_and_every_gradient(shape):
    inputs = problem(**SHAPES[shape])
    assert_close(run(inputs, "triton", torch.float32), run(inputs, "reference", torch.float64))


@pytest.mark.skipif(DEVICE != "cpu", reason="a stand-in for a kernel")
@pytest.mark.parametrize("tokens", [8, 100])
@pytest.mark.parametrize("shape", PARTED)
def test_one_pass_for_all_gradients_of_long_rows_equals_the_reference(monkeypatch, shape, tokens):
    inputs = problem(**SHAPES[shape])
    take_all_gradients_in_one_pass(monkeypatch, inputs, torch.float32, tokens)
    assert_close(run(inputs, "triton", torch.float32), run(inputs, "reference", torch.float64))


@pytest.mark.skipif(DEVICE != "cpu", reason="a stand-in for a kernel")
@pytest.mark.parametrize("shape", [name for name in PARTED if name != "group_3"])
def test_the_forward_by_a_kernel_of_its_own_equals_the_reference(monkeypatch, shape):
    # one a tile
    monkeypatch.setattr(plan, "_LAUNCH_BYTES", 1 if shape == "two_memory_heads" else 1 << 27)
    monkeypatch.setattr(plan, "_HOPPER_TOKENS", 8)
    memory = SimpleNamespace(described=lambda tensor, width, box: tensor)
    monkeypatch.setitem(sys.modules, "hsa_ultralong.ops.hsa.kernel_hopper", memory)
    kernel = SimpleNamespace(hopper_forward_kernel=HopperForwardStandIn())
    monkeypatch.setitem(sys.modules, "hsa_ultralong.ops.hsa.kernel_hopper_forward", kernel)
    monkeypatch.setattr(plan.HSAPlan, "takes_hopper_forward", True)
    inputs = problem(**SHAPES[shape])
    found, right = (
        hsa_attention(*(x.to(dtype) for x in inputs[:3]), inputs.indices, inputs.weights, chunk_size=SIZE, impl=impl)
        for dtype, impl in ((torch.float32, "triton"), (torch.float64, "reference"))
    )
    torch.testing.assert_close(found.double(), right.double(), rtol=1e-5, atol=1e-5)


def test_which_rows_have_a_forward_of_their_own(monkeypatch):
    def takes(tokens, slots, chunks=512, dim=64, lengths=None):
        q, k = torch.Size((1, tokens, 16, dim)), torch.Size((1, 64 * chunks, 1, dim))
        dtypes, indices = (torch.bfloat16, torch.int32, torch.float32, None), torch.Size((1, tokens, 1, slots))
        shapes = plan.HSAShapes(q, k, indices, lengths, dtypes, torch.device("cpu"), 64, 1.0, True, True)
        plan.plan_of.cache_clear()
        found = plan.plan_of(shapes)
        assert not (found.takes_hopper_forward and found.keeps_lists)
        return found.takes_hopper_forward

    monkeypatch.setattr(plan, "launch_options", lambda *_: plan.HSALaunch(64, 4, 2))
    monkeypatch.setattr(plan, "runs_hopper_kernels", lambda index: True)
    assert takes(32_768, 32) and takes(8192, 32) and takes(4096, 256)
    assert not takes(8191, 32) and not takes(4096, 257) and not takes(32_768, 32, chunks=53)
    assert not takes(32_768, 32, dim=128) and not takes(32_768, 32, lengths=torch.Size((1, 512)))


@pytest.mark.parametrize("is_parted", [False, True] if DEVICE == "cpu" else [False])
def test_the_error_in_16_bits_is_at_most_twice_that_of_the_reference(monkeypatch, is_parted):
    """What a slot adds to dq is rounded in between, where one pass takes all gradients."""
    exact = problem(group=4, kv_heads=1, num_chunks=40, slots=16, num_tokens=20)
    exact = exact._replace(**{name: getattr(exact, name).half().double() for name in ("q", "k", "v", "weights")})
    budget = run(exact, "reference", torch.float16)
    if is_parted:
        take_all_gradients_in_one_pass(monkeypatch, exact, torch.float16, 8)
    found, truth = run(exact, "triton", torch.float16), run(exact, "reference", torch.float64)
    for actual, allowed, right in zip(found, budget, truth, strict=True):
        error, limit = ((x.double() - right).norm() for x in (actual, allowed))
        assert error <= 2 * limit + 1e-6 * right.norm()


def test_which_rows_have_one_pass_for_all_gradients(monkeypatch):
    def part(tokens, chunks, dim=64, heads=16, batch=1, lengths=None, dtype=torch.bfloat16):
        q, k = torch.Size((batch, tokens, heads, dim)), torch.Size((batch, 64 * chunks, 1, dim))
        dtypes = (dtype, torch.int32, torch.float32, None)
        device = torch.device("cpu")
        shapes = plan.HSAShapes(q, k, torch.Size((batch, tokens, 1, 32)), lengths, dtypes, device, 64, 1.0, True, True)
        found = plan.plan_of(shapes)
        assert not found.part_tokens or found.part_lists.parts == -(-tokens // found.part_tokens)
        return found.part_tokens

    monkeypatch.setattr(plan, "launch_options", lambda *_: plan.HSALaunch(128, 4, 2))
    assert part(32_768, 512) == 0  # not on this machine
    plan.plan_of.cache_clear()
    monkeypatch.setattr(plan, "runs_hopper_kernels", lambda index: True)
    assert part(1024, 64) == 0 == part(32_768, 512, dim=128) == part(32_768, 40) == part(32_768, 512, heads=8)
    assert part(32_768, 512, lengths=torch.Size((1, 512))) == 0 == part(32_768, 512, dtype=torch.float32)
    assert part(2048, 64) == 2048 and part(16_385, 257) == 8256 and part(8192, 128, batch=4) == 4096
    assert part(32_768, 512) == 16_384 and part(32_768, 512, batch=4) == 4096
    # 1 GiB holds 128 pairs of every chunk, up to 4,096 chunks; of so wide a batch not one step of tokens
    assert part(262_144, 4096) == 16_384 and part(262_144, 4097) == 0 == part(4096, 64, batch=300)


@pytest.mark.parametrize("slots", [2, 4])
@pytest.mark.parametrize("num_tokens", [31, 70])
def test_the_causal_promise_changes_nothing_for_a_causal_selection(slots, num_tokens):
    chunks = 4
    inputs = problem(num_tokens=num_tokens, num_chunks=chunks, slots=slots, kv_heads=1, batch=1, empty=0.1)
    seen = ChunkVisibility.causal(1, num_tokens, chunks, SIZE, device=DEVICE).mask()[:, :, None]
    kept = seen.gather(-1, inputs.indices.long().clamp_min(0)) & (inputs.indices >= 0)
    inputs = inputs._replace(indices=torch.where(kept, inputs.indices, -1))
    assert_close(run(inputs, "triton", torch.float32, causal=True), run(inputs, "reference", torch.float64))


@pytest.mark.parametrize("shape", ["short_chunks", "retrieval_per_head", "shared_memory", "all_empty", "coverage"])
def test_few_tokens_without_gradient_take_the_decoding_kernel(monkeypatch, shape):
    monkeypatch.setattr(triton_attention, "_DECODE_TOKENS", 64)
    monkeypatch.setattr(triton_attention, "_forward", None)
    inputs = problem(**{**SHAPES[shape], "num_tokens": 3})
    operands = [x.float() for x in (inputs.q, inputs.k, inputs.v)]
    arguments = {"chunk_size": SIZE, "chunk_lengths": inputs.chunk_lengths}
    out = hsa_attention(*operands, inputs.indices, inputs.weights.float(), **arguments, impl="triton")
    exact = hsa_attention(*inputs[:3], inputs.indices, inputs.weights, **arguments, impl="reference")
    assert_close([out], [exact])


@pytest.mark.parametrize("most_decoded", [0, 64])
def test_parts_of_a_memory_read_by_the_same_indices_add_up_to_the_whole(monkeypatch, most_decoded):
    monkeypatch.setattr(triton_attention, "_DECODE_TOKENS", most_decoded)
    inputs = problem(num_tokens=3, is_short=True)
    operands = [x.float() for x in (inputs.q, inputs.k, inputs.v)]
    out = 0
    for first, last in ((0, 3), (3, 7)):
        k, v = (x[:, first * SIZE : last * SIZE] for x in operands[1:])
        lengths = inputs.chunk_lengths[:, first:last]
        out = out + hsa_attention(
            operands[0], k, v, inputs.indices, inputs.weights.float(), chunk_size=SIZE, chunk_lengths=lengths,
            first_chunk=first, impl="triton",
        )  # fmt: skip
    options = {"chunk_size": SIZE, "chunk_lengths": inputs.chunk_lengths, "impl": "reference"}
    exact = hsa_attention(*inputs[:3], inputs.indices, inputs.weights, **options)
    assert_close([out], [exact])


def test_segments_of_tokens_change_nothing(monkeypatch):
    inputs = problem(kv_heads=1, group=4)
    whole = run(inputs, "triton", torch.float32)
    monkeypatch.setattr(plan, "_LAUNCH_BYTES", 1)
    plan.plan_of.cache_clear()
    for left, right in zip(whole, run(inputs, "triton", torch.float32), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("shape", ["group_3", "coverage_per_head", "two_memory_heads"])
def test_a_backward_that_finds_no_lists_makes_the_same(monkeypatch, shape):
    inputs = problem(**SHAPES[shape])
    kept = run(inputs, "triton", torch.float32)
    monkeypatch.setattr(plan, "_KEPT_BYTES", 0)
    plan.plan_of.cache_clear()
    for left, right in zip(kept, run(inputs, "triton", torch.float32), strict=True):
        assert torch.equal(left, right)


def test_long_slot_lists_shrink_the_tile_to_what_one_program_can_sort(monkeypatch):
    inputs = problem(kv_heads=1, group=2, slots=3, batch=1)
    expected = run(inputs, "reference", torch.float64)
    monkeypatch.setattr(plan, "_SORT_LIMIT", 8)
    assert_close(run(inputs, "triton", torch.float32), expected)


@pytest.mark.parametrize("is_parted", [False, True])
def test_repeats_are_bit_identical_and_every_element_is_written(monkeypatch, is_parted):
    inputs = problem(kv_heads=1, group=4)
    if is_parted:
        take_all_gradients_in_one_pass(monkeypatch, inputs, torch.float32, 6)
    expected = run(inputs, "triton", torch.float32)
    empty, empty_like = torch.empty, torch.empty_like

    def poison(tensor):
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(12345)

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poison(empty_like(*args, **kwargs)))
    for left, right in zip(expected, run(inputs, "triton", torch.float32), strict=True):
        assert torch.equal(left, right)


def test_rows_that_share_a_memory_may_have_lengths_of_their_own():
    inputs = problem(kv_batch=1, kv_heads=1, group=4, num_tokens=9)
    lengths = torch.randint(1, SIZE + 1, (2, 7), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    inputs = inputs._replace(chunk_lengths=lengths.to(DEVICE))
    assert_close(run(inputs, "triton", torch.float32), run(inputs, "reference", torch.float64))


def test_second_derivatives_are_refused_and_another_way_is_named():
    inputs = problem(num_tokens=5, kv_heads=1)
    q = inputs.q.float().requires_grad_()
    operands = (q, inputs.k.float(), inputs.v.float(), inputs.indices, inputs.weights.float())
    out = hsa_attention(*operands, chunk_size=SIZE, chunk_lengths=inputs.chunk_lengths, impl="triton")
    with pytest.raises(RuntimeError, match=r'first derivatives only.* use impl="torch_gather"'):
        torch.autograd.grad(out.sum(), q, create_graph=True)
    out = hsa_attention(*operands, chunk_size=SIZE, chunk_lengths=inputs.chunk_lengths, impl="torch_gather")
    (slope,) = torch.autograd.grad(out.sin().sum(), q, create_graph=True)
    assert torch.autograd.grad(slope.square().sum(), q)[0].norm() > 0


def test_chunks_that_nobody_selected_are_never_read():
    inputs = problem(kv_heads=1, num_chunks=9)
    indices = torch.where(inputs.indices == 4, -1, inputs.indices)
    poisoned = [x.clone() for x in (inputs.k, inputs.v)]
    for tensor in poisoned:
        tensor[:, 4 * SIZE : 5 * SIZE] = torch.nan
    clean = run(inputs._replace(indices=indices), "triton", torch.float32)
    again = run(inputs._replace(indices=indices, k=poisoned[0], v=poisoned[1]), "triton", torch.float32)
    for left, right in zip(clean, again, strict=True):
        assert torch.equal(left, right)


def test_tile_lists_hold_the_union_of_their_tokens_and_every_slot():
    indices = problem(num_tokens=11, num_chunks=6, kv_heads=1, batch=2).indices
    lists = TileListPlan(indices.shape, 4, 6, 1, 2, overlap(None))(indices)
    for b in range(2):
        for tile in range(2):
            tokens = indices[b, 4 * (tile + 1) : 4 * (tile + 2), 0].tolist()
            count = int(lists.counts[b, 0, tile])
            chunks = lists.chunks[b, 0, tile, :count].tolist()
            assert chunks == sorted({chunk for row in tokens for chunk in row if chunk >= 0})
            for u, chunk in enumerate(chunks):
                expected = [row.index(chunk) if chunk in row else -1 for row in tokens]
                found = lists.slots[b, 0, tile, u, : len(tokens)].tolist()
                assert found == expected


@pytest.mark.parametrize("part_tokens", [None, 4, 8])
@pytest.mark.parametrize("by_counting", [True, False])
@pytest.mark.parametrize(("memory_batch", "heads"), [(1, 1), (2, 1), (2, 2)])
def test_inverse_lists_hold_every_pair_once_in_order(monkeypatch, memory_batch, heads, by_counting, part_tokens):
    # several steps of every loop over lists and blocks, blocks of four tokens
    monkeypatch.setattr(kernel_lists, "_OFFSET_LISTS", 2)
    monkeypatch.setattr(kernel_lists, "_OFFSET_BLOCKS", 2)
    monkeypatch.setattr(kernel_lists, "_UNIT_LISTS", 4)
    monkeypatch.setattr(kernel_lists, "_COUNTED_KEYS", (16, 16))
    monkeypatch.setattr(kernel_lists, "_COUNTED_SHARE", 1000 if by_counting else 0)
    tokens = 13
    indices = problem(kv_heads=heads, heads=heads, num_chunks=5, num_tokens=tokens).indices
    planned = InverseListPlan(indices.shape, memory_batch, 5, 4, overlap(None), part_tokens=part_tokens)
    assert planned.by_counting == by_counting
    lists = planned(indices)
    slots, flat = indices.shape[3], indices.flatten().tolist()
    number = ended = 0
    for first in range(0, tokens, part_tokens or tokens):
        for row, head, chunk in itertools.product(range(memory_batch), range(heads), range(5)):
            mine = [
                i for i, found in enumerate(flat)
                if found == chunk
                and (i // slots) % heads == head
                and first <= i // (slots * heads) % tokens < first + (part_tokens or tokens)
                and (memory_batch == 1 or i // indices[0].numel() == row)
            ]  # fmt: skip
            start, stop = lists.pair_starts[number : number + 2].tolist()
            assert lists.pairs[start:stop].tolist() == mine
            units = (lists.unit_lists == number).nonzero().flatten().tolist()
            assert units == list(range(ended, ended + -(-len(mine) // 4)))
            ended = int(lists.unit_ends[number])
            assert ended == (units[-1] + 1 if units else ended)
            number += 1
    assert (lists.unit_lists[ended:] == number).all() and number == planned.lists


def test_long_rows_are_sorted_and_short_ones_counted():
    found = {
        tokens: InverseListPlan((1, tokens, 1, 32), 1, tokens // 64, 1024, overlap(None))
        for tokens in (4096, 8192, 16_384)
    }
    assert [found[tokens].by_counting for tokens in found] == [True, True, False]


def test_unsupported_operands_are_named():
    inputs = problem(kv_heads=1, dim=4)
    with pytest.raises(ValueError, match="head dimension and chunk size in"):
        run(inputs, "triton", torch.float32)
    with pytest.raises(ValueError, match="bfloat16, float16, float32"):
        run(problem(kv_heads=1), "triton", torch.float64)


def test_without_a_gpu_one_error_says_so(monkeypatch):
    monkeypatch.setattr("hsa_ultralong.ops._triton.is_interpreted", lambda: False)
    x = torch.zeros(1, 16, 1, 16)
    with pytest.raises(RuntimeError, match="needs tensors on an NVIDIA GPU, got device 'cpu'"):
        hsa_attention(x, x, x, torch.zeros(1, 16, 1, 1).int(), torch.ones(1, 16, 1, 1), chunk_size=16, impl="triton")


def test_fp32_of_the_largest_tiles_is_refused_where_a_card_has_too_little_shared_memory(monkeypatch):
    q, k = torch.zeros(1, 2, 1, 128, device=DEVICE), torch.zeros(1, 128, 1, 128, device=DEVICE)
    indices, weights = torch.zeros(1, 2, 1, 1, dtype=torch.int32, device=DEVICE), torch.ones(1, 2, 1, 1, device=DEVICE)
    monkeypatch.setattr(triton_attention, "shared_memory", lambda index: 101_376)
    with pytest.raises(ValueError, match="this card has 101,376; use bf16"):
        hsa_attention(q, k, k, indices, weights, chunk_size=128, impl="triton")
