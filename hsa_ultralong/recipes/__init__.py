"""Recipes: one flat Python function per training run; a preset is code, not a configuration file."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches

from hsa_ultralong.recipes.convert import (
    convert_align,
    convert_answers,
    convert_long,
    convert_memory,
    convert_questions,
    convert_sft,
    convert_smol,
)
from hsa_ultralong.recipes.debug import debug, debug_stages
from hsa_ultralong.recipes.dense_0_5b import dense_0_5b
from hsa_ultralong.recipes.findings import findings
from hsa_ultralong.recipes.mini import mini
from hsa_ultralong.recipes.moe_8b_a1b import moe_8b_a1b
from hsa_ultralong.recipes.nano import nano
from hsa_ultralong.recipes.nano_facts import nano_facts
from hsa_ultralong.recipes.nano_notes import nano_notes
from hsa_ultralong.recipes.nano_pool import nano_pool
from hsa_ultralong.recipes.nano_stages import nano_stages
from hsa_ultralong.recipes.small_345m import small_345m
from hsa_ultralong.recipes.twins import twins
from hsa_ultralong.train import TrainConfig

_ALL: tuple[Callable[[], TrainConfig], ...] = (
    nano,
    nano_facts,
    nano_notes,
    nano_pool,
    nano_stages,
    mini,
    twins,
    findings,
    small_345m,
    dense_0_5b,
    moe_8b_a1b,
    convert_align,
    convert_memory,
    convert_long,
    convert_sft,
    convert_smol,
    convert_questions,
    convert_answers,
    debug,
    debug_stages,
)
RECIPES = {function.__name__: function for function in _ALL}


def recipe(name: str) -> TrainConfig:
    """The TrainConfig called `name`.

    Raises:
        ValueError: for an unknown name, with the closest match.
    """
    if name not in RECIPES:
        close = get_close_matches(name, RECIPES, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"unknown recipe {name!r}{hint}. Recipes: {', '.join(RECIPES)}")
    return RECIPES[name]()


__all__ = ["RECIPES", "recipe"]
