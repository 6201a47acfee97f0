"""Recipes: one flat Python function per training run; a preset is code, not a configuration file."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches

from hsa_ultralong.recipes.debug import debug
from hsa_ultralong.recipes.nano import nano
from hsa_ultralong.train import TrainConfig

RECIPES: dict[str, Callable[[], TrainConfig]] = {"nano": nano, "debug": debug}


def recipe(name: str) -> TrainConfig:
    """The TrainConfig called `name`.

    Raises:
        ValueError: for an unknown name, with the closest match.
    """
    if name not in RECIPES:
        close = get_close_matches(name, RECIPES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown recipe {name!r}{hint} Recipes: {', '.join(RECIPES)}")
    return RECIPES[name]()


__all__ = ["RECIPES", "recipe"]
