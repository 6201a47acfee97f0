"""Rows shared over processes: the losses and gradients of the slices sum up to those of one process (gloo, fp64)."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist

from hsa_ultralong.distributed import ContextRanks
from hsa_ultralong.testing.factories import MODEL_OPTIONS, random_tokens, tiny_model
from hsa_ultralong.testing.processes import assert_sums_equal, launch, run

EXACT = {"rtol": 1e-9, "atol": 1e-11}

# slices of 8 tokens: a window of 20 reaches three slices back
CASES = {
    "dense": {},
    "experts": MODEL_OPTIONS["mixture_of_experts"],
    "far_windows": {"sliding_window": 20, "hsa_sliding_window": 10, "chunk_topk": 100},
    "noise": {"gumbel_noise": True, "chunk_topk": 1},
    "no_hsa_window": {**MODEL_OPTIONS["all_at_once"], "sliding_window": 9},
    "window_of_one": MODEL_OPTIONS["window_of_one"],
}


def slices(rank, world, **inputs):
    """This rank's part of every (B, T) tensor."""
    return {
        name: value.chunk(world, 1)[rank] if isinstance(value, torch.Tensor) and value.dim() == 2 else value
        for name, value in inputs.items()
    }


def rows(world, documents):
    """Two rows of 8 tokens a rank: plain, or packed documents of which the first crosses the end of the first slice."""
    length = 8 * world
    tokens = random_tokens(2, length, seed=world)
    if not documents:
        return {"input_ids": tokens, "labels": tokens}
    segments = torch.zeros(2, length, dtype=torch.int32)
    segments[0, 12:], segments[1, 4:], segments[1, length - 4 :] = 1, 1, 2
    segments[0, 10:12] = segments[1, length - 5] = -1
    labels = tokens.masked_fill(segments < 0, -100)
    labels[0, 12] = labels[1, 4] = labels[1, length - 4] = -100
    return {"input_ids": tokens, "labels": labels, "segment_ids": segments}


def seeded(model, **inputs):
    torch.manual_seed(7)
    return run(model, **inputs)


MODES = ("eval", "train", "checkpointed")
ROWS = ((False, {}), (True, {}), (True, {"isolate_documents": torch.tensor([True, False])}))


def check_slices_sum_to_the_whole(rank, world, is_complete):
    """Dense and with experts, plain and packed, in evaluation and in training with and without checkpointing."""
    cases = itertools.product(enumerate(CASES.values()), enumerate(ROWS), enumerate(MODES))
    for (i, options), (j, (documents, keywords)), (m, mode) in cases:
        if not is_complete and (i + j + m) % 3:
            continue
        inputs = {**rows(world, documents), **keywords}
        whole, part = tiny_model(**options), tiny_model(**options)
        part.model.context_ranks = ContextRanks()
        for model in (whole, part):
            model.train(mode != "eval")
            if mode == "checkpointed":
                model.gradient_checkpointing_enable()
        # the same noise for slices as for the whole row
        found, expected = (
            seeded(model, **given) for model, given in ((part, slices(rank, world, **inputs)), (whole, inputs))
        )
        assert_sums_equal(found, expected)
        center, expected = (model.model.chunk_encoder.landmark_center for model in (part, whole))
        torch.testing.assert_close(center, expected, **EXACT)


def check_pools_of_shared_rows(rank, world, is_complete):
    """A pool of the slices' rows, with sources per row and per document."""
    plain, packed = rows(world, False), rows(world, True)
    kinds = (
        plain,
        {**plain, "source_ids": torch.tensor([4, 4])},
        packed,
        {**packed, "source_ids": packed["segment_ids"] % 2},
        {**packed, "isolate_documents": torch.tensor([False, True])},
    )
    for (i, pool), (j, inputs) in itertools.product(enumerate(("attended", "compete")), enumerate(kinds)):
        if not is_complete and (i + j) % 2:
            continue
        whole, part = tiny_model(), tiny_model()
        part.model.context_ranks = ContextRanks()
        given = {**inputs, "pool_memory": pool}
        assert_sums_equal(run(part, **slices(rank, world, **given)), run(whole, **given))


def check_logits_divisors_and_refusals(rank, world):
    inputs = rows(world, False)
    whole, part = tiny_model(), tiny_model()
    part.model.context_ranks = ContextRanks()
    with torch.no_grad():
        logits = part(**slices(rank, world, **inputs)).logits
        torch.testing.assert_close(logits, whole(**inputs).logits.chunk(world, 1)[rank], **EXACT)
    given = {**inputs, "num_items_in_batch": torch.tensor(7)}
    assert_sums_equal(run(part, **slices(rank, world, **given)), run(whole, **given))
    tokens = inputs["input_ids"]
    with pytest.raises(ValueError, match=r"multiple of chunk_size.*6 tokens a rank"):
        part(tokens[:, :6])
    with pytest.raises(ValueError, match="without attention_mask"):
        part(tokens[:, :8], attention_mask=torch.ones(2, 8))
    with pytest.raises(ValueError, match="cannot use a cache"):
        part(tokens[:, :8], past_key_values=whole(tokens[:, :8]).past_key_values)
    assert part(tokens[:, :8]).past_key_values is None


def check_before_and_next_labels(rank, world):
    """Against plain slicing of the row, for every reach."""
    ranks, row = ContextRanks(), torch.arange(2 * world * 3).view(2, -1)
    mine = row[:, 3 * rank : 3 * rank + 3]
    for reach in range(1, 3 * world + 2):
        expected = row[:, max(0, 3 * rank - reach) : 3 * rank]
        assert torch.equal(ranks.before(mine[:, -min(reach, 3) :], reach, 3), expected)
    following = torch.cat((row[:, 1:], torch.full((2, 1), -100)), 1)
    assert torch.equal(ranks.next_labels(mine), following[:, 3 * rank : 3 * rank + 3])


def check_all(rank, world, is_complete):
    check_before_and_next_labels(rank, world)
    check_logits_divisors_and_refusals(rank, world)
    check_pools_of_shared_rows(rank, world, is_complete)
    check_slices_sum_to_the_whole(rank, world, is_complete)
    dist.barrier()


def test_slices_on_two_processes_sum_to_one_process(tmp_path):
    launch(2, tmp_path / "meet", check_all, False)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_every_case_on_several_processes(tmp_path, world):
    launch(world, tmp_path / "meet", check_all, True)


def test_far_windows_reach_over_several_slices(tmp_path):
    launch(3, tmp_path / "meet", check_far_windows)


def check_far_windows(rank, world):
    check_before_and_next_labels(rank, world)
    whole, part = tiny_model(**CASES["far_windows"]), tiny_model(**CASES["far_windows"])
    part.model.context_ranks = ContextRanks()
    for documents in (False, True):
        inputs = rows(world, documents)
        assert_sums_equal(run(part, **slices(rank, world, **inputs)), run(whole, **inputs))
