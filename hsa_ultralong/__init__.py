"""HSA-UltraLong: language models that remember (arXiv 2511.23319). See README.md and docs/architecture.md.

Everything of `__all__` is one import away and is loaded on first use, so that importing the package stays instant.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hsa_ultralong.models.registration import ABOVE, register_with_transformers

if TYPE_CHECKING:
    from hsa_ultralong.inference import (
        Answer,
        DecodingEngine,
        Library,
        append,
        ask,
        close_document,
        edit,
        last_logits,
        memorize,
        rebuild,
    )
    from hsa_ultralong.memory import ChunkMemory
    from hsa_ultralong.models import HSACache, HSAConfig, HSAForCausalLM, HSAModel

__version__ = "0.1.0"  # pyproject.toml reads it here

__all__ = [
    # the model
    "HSAConfig",
    "HSAModel",
    "HSAForCausalLM",
    "HSACache",
    "default_checkpoint",
    # its memory
    "ChunkMemory",
    "memorize",
    "append",
    "close_document",
    "edit",
    "last_logits",
    # answers
    "ask",
    "Answer",
    "DecodingEngine",
    # memories in files
    "Library",
    "rebuild",
    "__version__",
]

# name -> the part of the package that it is loaded from
_LAZY = {
    **dict.fromkeys(("HSACache", "HSAConfig", "HSAForCausalLM", "HSAModel"), "models"),
    "ChunkMemory": "memory",
    **dict.fromkeys(("Answer", "DecodingEngine", "Library", "append", "ask", "close_document"), "inference"),
    **dict.fromkeys(("edit", "last_logits", "memorize", "rebuild"), "inference"),
}


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
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_transformers(
    (f"{__name__}.models.configuration_hsa", "HSAConfig"), (f"{__name__}.baselines.configuration", "RivalConfig")
)
# the loop over texts, with tiers and files; loaded at its first use
ABOVE["memorize"] = lambda *args, **options: __getattr__("memorize")(*args, **options)
