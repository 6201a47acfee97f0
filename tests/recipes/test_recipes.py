"""Every recipe can be resolved, printed and started: its stages fit its model, its data and each other."""

import json

import pytest

from hsa_ultralong.data import MixtureConfig
from hsa_ultralong.models.presets import preset
from hsa_ultralong.recipes import RECIPES, recipe
from hsa_ultralong.train import as_dict
from hsa_ultralong.train.schedule import learning_rate

pytestmark = pytest.mark.parametrize("name", RECIPES)


def test_its_model_is_a_preset_and_its_stages_have_their_own_names(name):
    config = recipe(name)
    assert preset(config.preset, **config.model).chunk_size >= 2
    names = [stage.name for stage in config.stages]
    assert names and len(set(names)) == len(names)
    # `--set stage.key=value` finds a stage by a plain word
    assert all(one.isidentifier() and one != "model" for one in names)
    assert [config.stage(one) for one in names] == list(range(len(names)))


def test_its_stages_fit_the_chunks_of_the_model_and_the_kinds_of_rows(name):
    config = recipe(name)
    size = preset(config.preset, **config.model).chunk_size
    for stage in config.stages:
        assert stage.seq_len % size == 0 and stage.batch_tokens == stage.rows * stage.seq_len
        assert stage.num_steps * stage.batch_tokens >= stage.tokens > (stage.num_steps - 1) * stage.batch_tokens
        assert sum(stage.mixture.values()) == pytest.approx(1.0)
        assert MixtureConfig(weights=stage.mixture, seq_len=stage.seq_len, chunk_size=size).seq_len == stage.seq_len
        assert stage.warmup_steps < stage.num_steps


def test_context_grows_and_the_learning_rate_ends_low(name):
    stages = recipe(name).stages
    assert [stage.seq_len for stage in stages] == sorted(stage.seq_len for stage in stages)
    assert [stage.learning_rate for stage in stages] == sorted((one.learning_rate for one in stages), reverse=True)
    last = stages[-1]
    assert learning_rate(last, last.num_steps - 1) < learning_rate(last, last.warmup_steps)
    assert learning_rate(last, last.num_steps) == 0


def test_what_a_dry_run_prints_is_json_of_every_field(name):
    plain = as_dict(recipe(name))
    back = json.loads(json.dumps(plain))
    assert back == {**plain, "betas": list(plain["betas"])}
    assert {"preset", "stages", "seed", "model"} <= set(back)
    assert all({"name", "seq_len", "tokens", "mixture", "learning_rate"} <= set(stage) for stage in back["stages"])


def test_every_call_gives_a_recipe_of_its_own(name):
    one = recipe(name)
    one.stages[0].tokens += 1
    one.stages[0].mixture["text"] = 9.0
    one.model["chunk_topk"] = 1
    other = recipe(name)
    assert other.stages[0].tokens != one.stages[0].tokens
    assert other.stages[0].mixture["text"] != 9.0 and other.model == {}


def test_its_docstring_says_how_to_run_it(name):
    assert f"hsa train {name}" in (RECIPES[name].__doc__ or "")


def test_a_misspelt_name_is_answered_with_the_nearest(name):
    with pytest.raises(ValueError, match=f"did you mean '{name}'.*Recipes: "):
        recipe(name + "x")
