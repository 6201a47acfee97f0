"""A pool over processes: losses and gradients sum up to those of one process with all rows (gloo, fp64)."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist

from hsa_ultralong.distributed import ContextRanks, PoolRanks
from hsa_ultralong.testing.factories import MODEL_OPTIONS, random_tokens, tiny_model
from hsa_ultralong.testing.processes import assert_sums_equal, launch, run

EXACT = {"rtol": 1e-9, "atol": 1e-11}

OPTIONS = ["default", "mixture_of_experts", "two_retrieval_heads", "full_coverage"]


def pool_inputs(world):
    """Rows of all ranks, two each: plain, over the ranks, packed, packed by document."""
    tokens = random_tokens(2 * world, 16, seed=5)
    # the divisor of the whole pool
    plain = {"input_ids": tokens, "labels": tokens, "num_items_in_batch": 15 * 2 * world}
    segments = torch.zeros(2 * world, 16, dtype=torch.int32)
    segments[::2, 8:], segments[:, 14:] = 1, -1
    labels = tokens.masked_fill(segments < 0, -100)
    labels[::2, 8] = -100
    packed = {**plain, "labels": labels, "segment_ids": segments}
    of_row = torch.arange(2 * world) % 3
    return [
        plain,
        {**plain, "source_ids": of_row},
        {**packed, "isolate_documents": of_row == 1},
        {**packed, "source_ids": (of_row[:, None] + segments) % 3},
    ]


def part_of(rank, world, inputs):
    """This rank's rows."""
    return {
        name: value.chunk(world)[rank] if isinstance(value, torch.Tensor) else value for name, value in inputs.items()
    }


def check_rows(rank, world):
    """Both variants, all kinds of rows."""
    for i, options in enumerate(OPTIONS):
        for j, (pool, inputs) in enumerate(itertools.product(("attended", "compete"), pool_inputs(world))):
            if options != "default" and (i + j) % 3:
                continue
            whole, part = tiny_model(**MODEL_OPTIONS[options]), tiny_model(**MODEL_OPTIONS[options])
            part.model.pool_ranks = PoolRanks()
            for model in (whole, part):
                model.train((i + j) % 2 == 1)
            mine = run(part, **part_of(rank, world, inputs), pool_memory=pool)
            assert_sums_equal(mine, run(whole, **inputs, pool_memory=pool))
            center, expected = (model.model.chunk_encoder.landmark_center for model in (part, whole))
            torch.testing.assert_close(center, expected, **EXACT)
    check_what_travels(rank, world)


def check_what_travels(rank, world):
    """Keys and values stay at home where chunks only compete."""
    sent = []

    class Counting(PoolRanks):
        def gather(self, part):
            sent.append(tuple(part.shape))
            return super().gather(part)

    model = tiny_model()
    model.model.pool_ranks = Counting()
    with torch.no_grad():
        model(random_tokens(2, 16, seed=rank), pool_memory="compete")
    assert sorted(map(len, sent)) == [2, 2, 4] and all(shape[1] == 8 for shape in sent)


def check_pool_of_shared_rows(rank, world):
    """Four processes: two that share every row, times two that share the pool."""
    groups = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3], [0, 2], [1, 3])]
    for pool in ("attended", "compete"):
        for inputs in pool_inputs(2):
            whole, part = tiny_model(num_experts=3).train(), tiny_model(num_experts=3).train()
            part.model.context_ranks = ContextRanks(groups[rank // 2])
            part.model.pool_ranks = PoolRanks(groups[2 + rank % 2])
            mine = part_of(rank // 2, 2, inputs)
            mine = {
                name: value.chunk(2, 1)[rank % 2] if isinstance(value, torch.Tensor) and value.dim() == 2 else value
                for name, value in mine.items()
            }
            assert_sums_equal(run(part, **mine, pool_memory=pool), run(whole, **inputs, pool_memory=pool))


def test_rows_on_two_processes_make_one_pool(tmp_path):
    launch(2, tmp_path / "meet", check_rows)


@pytest.mark.slow
def test_a_pool_of_rows_that_are_shared_too(tmp_path):
    launch(4, tmp_path / "meet", check_pool_of_shared_rows)
