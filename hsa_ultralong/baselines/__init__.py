"""Models to compare with, made of the same parts: README.md names them. Loaded on first use, as `models` is."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hsa_ultralong.baselines.configuration import LAYERS, RivalConfig
    from hsa_ultralong.baselines.full_attention import FullAttentionLM
    from hsa_ultralong.baselines.modeling import RivalForCausalLM, RivalModel
    from hsa_ultralong.baselines.state import RivalCache

__all__ = ["LAYERS", "FullAttentionLM", "RivalCache", "RivalConfig", "RivalForCausalLM", "RivalModel"]

_MODULES = {
    "LAYERS": "configuration",
    "RivalConfig": "configuration",
    "FullAttentionLM": "full_attention",
    "RivalForCausalLM": "modeling",
    "RivalModel": "modeling",
    "RivalCache": "state",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
