"""The model of a run: ours, or a rival in its place. Called by loop.py and planning.py; tests/train/test_twins.py."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from hsa_ultralong.baselines import RivalConfig, RivalForCausalLM
from hsa_ultralong.baselines.twins import twin_config
from hsa_ultralong.files.strict_json import read_json
from hsa_ultralong.models import HSAConfig, HSAForCausalLM
from hsa_ultralong.train.config import TrainConfig

Trained = HSAForCausalLM | RivalForCausalLM
# kinds of rows whose documents must not read one another
_ISOLATED = ("documents", "instructions", "passage_chat", "prompts", "sft")


def rival_of(config: TrainConfig, preset: HSAConfig) -> RivalConfig | None:
    """Configuration of the run's twin, None if it trains the model itself.

    Raises:
        ValueError: there is no such twin, or it cannot do what a stage asks for.
    """
    if not config.has_twin:
        if config.twin_options:
            raise ValueError("twin_options go with a twin: set twin=NAME too")
        return None
    if config.freeze_memory:
        raise ValueError("freeze_memory keeps a memory valid, which a twin has not: leave it out")
    if config.freeze_source:
        raise ValueError("freeze_source is for a model that hsa convert made, which a twin is not: leave it out")
    for stage in config.stages:
        asked = {
            "pool_memory": stage.pool_memory, "piece_tokens": stage.piece_tokens,
            "isolate_documents": stage.isolate_documents, "gumbel_noise": stage.gumbel_noise,
        }  # fmt: skip
        if found := [name for name, value in asked.items() if value]:
            raise ValueError(f"stage {stage.name!r}: a twin knows no {found[0]}; leave it out, or train without twin=")
        if stage.sliding_window not in (0, preset.sliding_window):
            raise ValueError(
                f"stage {stage.name!r}: a twin keeps one window; set model.sliding_window={stage.sliding_window} "
                "instead"
            )
        if isolated := [kind for kind in _ISOLATED if stage.mixture.get(kind)]:
            raise ValueError(
                f"stage {stage.name!r}: rows of {isolated[0]!r} hold documents that must not read one another, and a "
                "twin reads a row as one text; give that share to other kinds of rows"
            )
    return twin_config(preset, config.twin, config.twin_options)


def build_model(config: TrainConfig, preset: HSAConfig) -> Trained:
    """The model that the run trains, with random weights."""
    rival = rival_of(config, preset)
    return HSAForCausalLM(copy.deepcopy(preset)) if rival is None else RivalForCausalLM(rival)


def require_same_twin(config: TrainConfig, run: Path) -> None:
    """The checkpoints of the run folder are those of the same twin: many have weights of the same shapes.

    Raises:
        ValueError: they are not.
    """
    try:
        before = read_json(run / "config.json")
    except (OSError, ValueError):
        # none yet, or damaged: it is written anew with a notice, and weights of other names are refused
        return
    kept: dict[str, Any] = {"twin": "hsa", "twin_options": {}}
    for name, none in kept.items():
        old, new = before.get(name) or none, getattr(config, name) or none
        if old != new:
            raise ValueError(f"{run} was begun with {name}={old}, not {new}: choose another run folder with -o")
