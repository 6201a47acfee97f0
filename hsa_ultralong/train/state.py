"""state.json of a checkpoint: where a run stands, and the size and SHA-256 of the checkpoint's other files.

It is sealed (files/strict_json.py), and every field is checked, so that neither a flipped bit nor a made-up number
moves a run to another place. Called by checkpoint.py and loop.py; tests/train/test_state.py.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hsa_ultralong.files.fields import (
    NUMBER,
    RECORD,
    Check,
    is_plain_name,
    is_whole,
    mapping,
    one_of,
    require,
    rows,
    table,
    text,
    that,
    whole,
)
from hsa_ultralong.files.regular import read_regular
from hsa_ultralong.files.strict_json import sealed, unsealed
from hsa_ultralong.train.config import OPTIMIZERS

logger = logging.getLogger(__name__)

STATE_FILE = "state.json"
# 2 had no seal
FORMAT_VERSIONS = (2, 3)
_SUFFIX = ".safetensors"


FIELDS: Mapping[str, Check] = {
    "format": whole(*FORMAT_VERSIONS),
    "files": mapping(
        that(lambda name: is_plain_name(name) and name.endswith(_SUFFIX), "the name of a safetensors file"), RECORD, 1
    ),
    "stage_index": whole(),
    "step": whole(),
    "global_step": whole(),
    "tokens_seen": whole(),
    "stages": rows(that(lambda name: isinstance(name, str) and name != "" and name.isprintable(), "a stage's name")),
    "optimizer": one_of(OPTIMIZERS),
    "meter": mapping(text(), rows(NUMBER)),
    "guard": table({"recent": rows(NUMBER, 0, 1000), "high": whole()}),
}


def folder_name(global_step: int) -> str:
    """Name of the checkpoint after so many steps of the run."""
    return f"step-{global_step:08d}"


def list_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    folder = run / "checkpoints"
    return sorted(path for path in folder.glob("step-*") if (path / STATE_FILE).exists()) if folder.is_dir() else []


def encode_state(state: Mapping[str, Any]) -> bytes:
    """The bytes of state.json."""
    return sealed({"format": FORMAT_VERSIONS[-1], **state})


def read_state(path: Path) -> dict[str, Any]:
    """state.json of the checkpoint in folder `path`, whose files are the ones it names.

    Raises:
        ValueError: it is damaged, of another format, contradicts itself, or the folder holds other files.
    """
    try:
        if path.is_symlink():
            raise ValueError(f"{path} is a symbolic link, which is not followed here")
        state, is_sealed = unsealed(read_regular(path / STATE_FILE, follow=False), path / STATE_FILE)
        version = state.get("format")
        if version in FORMAT_VERSIONS or not is_whole(version):
            require(table(FIELDS, may_lack=("stages",) if version == 2 else ()), state, f"{path / STATE_FILE}:")
            _check_sense(path, state, is_sealed)
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint {path.name} cannot be read: {error}; {advice(path)}") from error
    if version not in FORMAT_VERSIONS:
        raise ValueError(
            f"checkpoint {path} has format {version}, this version reads {' and '.join(map(str, FORMAT_VERSIONS))}: "
            "finish the run with the version that began it, or start a new one from its exported model with --init-from"
        )
    if not is_sealed:
        logger.warning(
            "checkpoint %s is of an earlier version, whose state.json has no checksum; the next has one", path
        )
    return state


def _check_sense(path: Path, state: Mapping[str, Any], is_sealed: bool) -> None:
    """What the fields say together.

    Raises:
        ValueError: naming the contradiction.
    """
    index, step, done = state["stage_index"], state["step"], state["global_step"]
    if is_sealed != (state["format"] > 2):
        raise ValueError(f"its format {state['format']} does not go with {'a' if is_sealed else 'no'} checksum")
    if path.name != folder_name(done):
        raise ValueError(f"it holds step {done:,}, which is not what the folder's name says")
    if step > done or state["tokens_seen"] < done:
        raise ValueError(
            f"step {step:,} of a stage and {state['tokens_seen']:,} tokens contradict {done:,} steps in all"
        )
    # when all stages are over, the last one is the last that was entered
    if (begun := state.get("stages")) is not None and len(begun) != index + 1 and (len(begun), step) != (index, 0):
        raise ValueError(f"stage {index} and step {step:,} contradict the {len(begun)} stages that were entered")
    others = sorted(file.name for file in path.glob(f"*{_SUFFIX}") if file.name not in state["files"])
    if others:
        raise ValueError(f"{others[0]} is no part of it")


def advice(path: Path) -> str:
    """What to do about a checkpoint that cannot be used: the one before it, by name."""
    before = [one.name for one in list_checkpoints(path.parent.parent) if one.name < path.name]
    if before:
        return f"delete {path} to go on from {before[-1]}"
    return f"it is the oldest one kept: delete {path} to begin again"
