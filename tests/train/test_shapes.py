"""Steps of several shapes in one stage, and weights averaged along it: resumed alike, refused where they cannot be."""

import pytest
import torch

from hsa_ultralong.train import StageConfig
from hsa_ultralong.train.batches import stage_mixture, step_batches
from hsa_ultralong.train.checkpoint import model_tensors

SHAPES = ((64, 4), (128, 1), (256, 2))


def shaped(tiny_runs, **options):
    fields = {"seq_len": 256, "batch_tokens": 512, "tokens": 3072, "shapes": SHAPES, "pool_memory": "compete"}
    return tiny_runs.stage(**{**fields, "chunk_topk": 4, **options})


def shapes_of(tiny_runs, stage, **options):
    mixture = stage_mixture(tiny_runs.config(stage), 0, 16)
    options = {"first_step": 0, "rank": 0, "world": 1, "num_workers": 0, "pin_memory": False, **options}
    steps = step_batches(tiny_runs.shards, tiny_runs.tokenizer, stage, mixture, **options)
    return [[batch["input_ids"] for batch in step] for step in steps]


def test_steps_take_their_shapes_in_turn_and_have_the_same_tokens(tiny_runs):
    steps = shapes_of(tiny_runs, shaped(tiny_runs))
    assert [[tuple(part.shape) for part in step] for step in steps[:3]] == [
        [(4, 64)] * 2, [(1, 128)] * 4, [(2, 256)],
    ]  # fmt: skip
    assert len(steps) == 6 and not torch.equal(steps[0][0], steps[3][0])


def test_a_resumed_stage_and_two_ranks_have_the_rows_of_one(tiny_runs):
    stage = shaped(tiny_runs, shapes=((64, 2), (256, 1)))
    whole = shapes_of(tiny_runs, stage)
    later = shapes_of(tiny_runs, stage, first_step=3)
    assert all(
        torch.equal(a, b)
        for step, again in zip(whole[3:], later, strict=True)
        for a, b in zip(step, again, strict=True)
    )
    halves = [shapes_of(tiny_runs, stage, rank=rank, world=2) for rank in (0, 1)]
    for step, first, second in zip(whole, *halves, strict=True):
        assert torch.equal(
            torch.cat(step), torch.cat([part for pair in zip(first, second, strict=True) for part in pair])
        )


def test_impossible_shapes_are_refused_by_their_numbers(tiny_runs):
    with pytest.raises(ValueError, match=r"got \(128, 3\)"):
        shaped(tiny_runs, shapes=((128, 3), (256, 1)))
    with pytest.raises(ValueError, match="longest rows"):
        shaped(tiny_runs, seq_len=128)
    with pytest.raises(ValueError, match="micro_batch_rows=2 is for shapes of 0 rows"):
        shaped(tiny_runs, micro_batch_rows=2)
    with pytest.raises(ValueError, match="pairs of whole numbers"):
        shaped(tiny_runs, shapes=((64.0, 4), (256, 1)))
    with pytest.raises(ValueError, match="average_decay"):
        StageConfig("one", 64, 64, 64, 1e-3, {"text": 1.0}, average_decay=1.0)


def test_steps_take_rows_of_several_lengths_in_turn_whatever_the_processes(tiny_runs):
    """Without rows a forward, which then has the tokens of one of the longest rows."""
    shapes = ((32, 0), (128, 0), (64, 0))
    stage = tiny_runs.stage(seq_len=128, shapes=shapes, tokens=256 * 6, micro_batch_rows=1)

    def steps(**place):
        return [[row for part in step for row in part.tolist()] for step in shapes_of(tiny_runs, stage, **place)]

    alone = steps()
    assert [(len(rows), len(rows[0])) for rows in alone] == [(8, 32), (2, 128), (4, 64)] * 2
    assert len({tuple(row[:30]) for rows in alone for row in rows}) == 28
    assert steps(first_step=4) == alone[4:]
    shared = zip(steps(rank=0, world=2), steps(rank=1, world=2), strict=True)
    assert [one + two for one, two in shared] == alone


def test_no_two_forwards_of_a_stage_begin_with_the_same_row(tiny_runs):
    stage = shaped(tiny_runs)
    firsts = [
        stage.first_row(step, part, 0, 1)
        for step in range(stage.num_steps)
        for part in range(stage.num_forwards(1, step))
    ]
    assert len(set(firsts)) == len(firsts) == 2 * (2 + 4 + 1)


@pytest.mark.parametrize(
    ("lengths", "message"), [((32, 64), "must be seq_len=128"), ((48, 128), "must divide the 128 tokens of a forward")]
)
def test_lengths_that_do_not_fit_a_step_are_refused(tiny_runs, lengths, message):
    with pytest.raises(ValueError, match=message):
        tiny_runs.stage(seq_len=128, shapes=tuple((length, 0) for length in lengths))


def test_an_averaged_stage_ends_with_the_mean_of_its_steps_and_resumes_exactly(tiny_runs, tmp_path):
    stage = shaped(tiny_runs, average_decay=0.5, tokens=1536)
    kept = []
    trainer = tiny_runs.trainer(tmp_path / "a", tiny_runs.config(stage))
    mean = {name: part.clone() for name, part in model_tensors(trainer.model).items()}
    step = trainer._optimizer_step

    def recorded(*args):
        result = step(*args)
        kept.append({name: part.clone() for name, part in model_tensors(trainer.model).items()})
        return result

    trainer._optimizer_step = recorded
    assert trainer.train()
    for weights in kept:
        mean = {name: torch.lerp(part, weights[name], 0.5) for name, part in mean.items()}
    ended = model_tensors(trainer.model)
    assert all(torch.allclose(ended[name], part, atol=1e-6) for name, part in mean.items())

    cut = tiny_runs.trainer(tmp_path / "b", tiny_runs.config(stage))
    cut.listener = lambda record: setattr(cut, "should_stop", True)
    assert not cut.train()
    resumed = tiny_runs.trainer(tmp_path / "b", tiny_runs.config(stage))
    assert resumed.train()
    assert all(torch.equal(part, ended[name]) for name, part in model_tensors(resumed.model).items())
