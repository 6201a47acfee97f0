"""The bar of `hsa train` counts the steps that will run."""

import pytest

from hsa_ultralong.cli.train_display import Display
from hsa_ultralong.train import StageConfig, TrainConfig


@pytest.mark.parametrize(("until", "stages"), [(None, 3), ("first", 1), ("second", 2), ("third", 3)])
def test_the_bar_counts_the_stages_up_to_the_last_one(until, stages):
    parts = [
        StageConfig(
            name=name, seq_len=64, tokens=64 * steps, batch_tokens=64, learning_rate=1e-3, mixture={"text": 1.0}
        )
        for name, steps in (("first", 1), ("second", 10), ("third", 2))
    ]
    display = Display(TrainConfig(preset="debug", stages=parts), False, until)
    assert display.progress.tasks[0].total == sum((1, 10, 2)[:stages])
