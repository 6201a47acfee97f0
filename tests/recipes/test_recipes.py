"""Every recipe can be resolved, printed and started: its stages fit its model, its data, its GPUs and each other."""

import json
import re
from pathlib import Path

import pytest

from hsa_ultralong.data import MixtureConfig
from hsa_ultralong.models.presets import preset
from hsa_ultralong.recipes import RECIPES, recipe
from hsa_ultralong.train import as_dict
from hsa_ultralong.train.planning import plan_run
from hsa_ultralong.train.schedule import learning_rate

ROOT = Path(__file__).resolve().parents[2]

FIVE = ("warmup", "pretrain", "long", "anneal", "sft")
OF_FIVE_STAGES = [
    name
    for name in RECIPES
    if not name.startswith("convert_")
    and name not in ("nano", "nano_facts", "mini", "nano_notes", "nano_pool", "twins", "findings", "debug")
]

every_recipe = pytest.mark.parametrize("name", RECIPES)


def plain(name):
    """What JSON makes of a recipe."""
    return json.loads(json.dumps(as_dict(recipe(name))))


@every_recipe
def test_its_model_is_a_preset_and_its_stages_have_their_own_names(name):
    config = recipe(name)
    assert preset(config.preset, **config.model).chunk_size >= 2
    names = [stage.name for stage in config.stages]
    assert names and len(set(names)) == len(names)
    # `--set stage.key=value` finds a stage by a plain word
    assert all(one.isidentifier() and one not in ("model", "parallel") for one in names)
    assert [config.stage(one) for one in names] == list(range(len(names)))


@every_recipe
def test_its_stages_fit_the_chunks_of_the_model_and_the_kinds_of_rows(name):
    config = recipe(name)
    size = preset(config.preset, **config.model).chunk_size
    for stage in config.stages:
        assert stage.seq_len % size == 0 and stage.batch_tokens == stage.rows * stage.seq_len
        assert stage.num_steps * stage.batch_tokens >= stage.tokens > (stage.num_steps - 1) * stage.batch_tokens
        assert sum(stage.mixture.values()) == pytest.approx(1.0)
        assert MixtureConfig(weights=stage.mixture, seq_len=stage.seq_len, chunk_size=size).seq_len == stage.seq_len
        assert stage.warmup_steps < stage.num_steps
    assert all(length % size == 0 for length in config.probe_lengths)


@every_recipe
def test_the_learning_rate_never_rises_between_stages_and_ends_at_zero(name):
    stages = recipe(name).stages
    assert [stage.learning_rate for stage in stages] == sorted((one.learning_rate for one in stages), reverse=True)
    last = stages[-1]
    assert learning_rate(last, last.num_steps - 1) < learning_rate(last, last.warmup_steps)
    assert learning_rate(last, last.num_steps) == 0


@every_recipe
def test_context_grows_until_fine_tuning(name):
    lengths = [stage.seq_len for stage in recipe(name).stages if stage.name != "sft"]
    assert lengths == sorted(lengths) and (len(lengths) == 1 or lengths[-1] > lengths[0])


@pytest.mark.parametrize("name", OF_FIVE_STAGES)
def test_five_stages_change_window_k_and_schedule_as_the_paper_does(name):
    config = recipe(name)
    warmup, pretrain, long, anneal, sft = config.stages
    assert tuple(stage.name for stage in config.stages) == FIVE
    model = preset(config.preset, **config.model)
    # dense, then sparse, then dense on long documents, then sparse
    assert [stage.chunk_topk for stage in config.stages] == [0, model.chunk_topk, 0, 0, model.chunk_topk]
    assert warmup.sliding_window and warmup.sliding_window <= (pretrain.sliding_window or model.sliding_window)
    assert long.seq_len > pretrain.seq_len >= warmup.seq_len and long.long_documents
    assert (anneal.schedule, anneal.final_learning_rate, sft.schedule) == ("linear", 0.0, "cosine")
    # short rows alone damage what was learnt at length
    assert sft.mixture["needles"] > 0


@every_recipe
def test_its_plan_fits_a_gpu_of_80_gigabytes_and_its_rows_the_gpus(name):
    assert all(plan.total_bytes < 72 * 2**30 for plan in plan_run(recipe(name)))


@every_recipe
def test_a_run_can_be_read_back_from_its_json(name):
    back = plain(name)
    assert {"preset", "stages", "seed", "model", "parallel"} <= set(back)
    assert all({"name", "seq_len", "tokens", "mixture", "learning_rate"} <= set(stage) for stage in back["stages"])
    assert back["parallel"]["context"] == 1


@every_recipe
def test_every_call_gives_a_recipe_of_its_own(name):
    one = recipe(name)
    one.stages[0].tokens += 1
    one.stages[0].mixture["text"] = 9.0
    one.model["chunk_topk"] = 1
    one.parallel.context = 7
    other = recipe(name)
    assert other.stages[0].tokens != one.stages[0].tokens
    assert other.stages[0].mixture["text"] != 9.0 and "chunk_topk" not in other.model and other.parallel.context == 1


@every_recipe
def test_its_docstring_says_how_to_run_it_on_what_and_for_how_long(name):
    text = RECIPES[name].__doc__ or ""
    assert f"hsa train {name}" in text
    if name in OF_FIVE_STAGES and not name.startswith("debug"):
        assert all(word in text for word in ("Hardware:", "Time:", "Numbers:"))
        named = re.findall(r"results/([\w-]+)", text)
        assert named or "not measured" in text
        assert all((ROOT / "results" / study).is_dir() for study in named)


@every_recipe
def test_a_misspelt_name_is_answered_with_the_nearest(name):
    with pytest.raises(ValueError, match=f"did you mean '{name}'.*Recipes: "):
        recipe(name + "x")


def test_the_recipe_of_the_shipped_model_is_what_it_was():
    stages = plain("nano")["stages"]
    kept = (
        "name",
        "seq_len",
        "tokens",
        "batch_tokens",
        "micro_batch_rows",
        "learning_rate",
        "schedule",
        "warmup_steps",
    )
    assert [tuple(stage[key] for key in kept) for stage in stages] == [
        ("warmup", 2048, 210_000_000, 65_536, 0, 2e-3, "constant", 100),
        ("long", 32_768, 60_000_000, 131_072, 2, 1e-3, "linear", 20),
        ("longer", 131_072, 13_000_000, 131_072, 0, 3e-4, "linear", 5),
    ]
    assert plain("nano")["optimizer"] == "adamw" and plain("nano")["weight_decay"] == 0.1


def test_twins_see_at_most_100_million_tokens_and_differ_by_the_twin_only():
    config = recipe("twins")
    assert sum(stage.num_steps * stage.batch_tokens for stage in config.stages) <= 100_000_000
    plans = {}
    for twin in ("hsa", "full_rope", "window", "window_sinks", "nsa", "moba", "linear_hybrid"):
        config.twin = twin
        plans[twin] = plan_run(config)
        assert twin in (RECIPES["twins"].__doc__ or "")
        assert all(plan.total_bytes < 72 * 2**30 for plan in plans[twin])
    assert (
        len({tuple((plan.steps, plan.tokens, plan.forward_tokens) for plan in plan_) for plan_ in plans.values()}) == 1
    )
