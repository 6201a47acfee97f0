"""HSA-UltraLong: language models that remember (arXiv 2511.23319). See README.md and docs/architecture.md."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hsa_ultralong.models.registration import register_with_transformers

if TYPE_CHECKING:
    from hsa_ultralong.models import HSACache, HSAConfig, HSAForCausalLM, HSAModel

__all__ = ["HSACache", "HSAConfig", "HSAForCausalLM", "HSAModel"]


def __getattr__(name: str) -> Any:
    """Load the models on first use, so that importing the package stays instant."""
    if name in __all__:
        from hsa_ultralong import models

        return getattr(models, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register_with_transformers()
