"""The model; its classes are loaded on first use, so that the configuration can be had without them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hsa_ultralong.models.cache_hsa import HSACache
    from hsa_ultralong.models.causal_lm import HSAForCausalLM
    from hsa_ultralong.models.configuration_hsa import HSAConfig
    from hsa_ultralong.models.modeling_hsa import HSAModel

__all__ = ["HSACache", "HSAConfig", "HSAForCausalLM", "HSAModel"]

_MODULES = {
    "HSACache": "cache_hsa",
    "HSAConfig": "configuration_hsa",
    "HSAForCausalLM": "causal_lm",
    "HSAModel": "modeling_hsa",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
