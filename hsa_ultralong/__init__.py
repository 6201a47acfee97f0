"""HSA-UltraLong: language models that remember (arXiv 2511.23319). See README.md and docs/architecture.md."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hsa_ultralong.models.registration import register_with_transformers

if TYPE_CHECKING:
    from hsa_ultralong.models import HSACache, HSAConfig, HSAForCausalLM, HSAModel

_MODELS = ("HSACache", "HSAConfig", "HSAForCausalLM", "HSAModel")
__all__ = ["HSACache", "HSAConfig", "HSAForCausalLM", "HSAModel", "default_checkpoint"]


def default_checkpoint() -> Path:
    """The model that is used where none is named: checkpoints/nano of the current folder, else the installed one.

    Raises:
        ValueError: there is neither.
    """
    here = Path(__file__).resolve().parent
    # in an installed package, in a checkout
    for place in (Path(), here, here.parent):
        if (place / "checkpoints" / "nano" / "config.json").is_file():
            return place / "checkpoints" / "nano"
    raise ValueError("no model at checkpoints/nano, and none was installed; give --model FOLDER")


def __getattr__(name: str) -> Any:
    """Load the models on first use, so that importing the package stays instant."""
    if name in _MODELS:
        from hsa_ultralong import models

        return getattr(models, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register_with_transformers()
