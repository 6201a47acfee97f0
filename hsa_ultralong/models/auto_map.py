"""What configurations say and do so that transformers finds our classes: every way to a model leads through one.

The models are registered when the first configuration is made. Without `import hsa_ultralong`, a folder's `auto_map`
and a module beside the weights lead to the library. Called by HSAConfig, HSAModel; tests/models/test_registration.py.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

REMOTE_MODULE = "modeling_hsa_ultralong"
AUTO_MAP = {
    "AutoConfig": f"{REMOTE_MODULE}.HSAConfig",
    "AutoModel": f"{REMOTE_MODULE}.HSAModel",
    "AutoModelForCausalLM": f"{REMOTE_MODULE}.HSAForCausalLM",
}
_REMOTE_CODE = """\
try:
    from hsa_ultralong import HSAConfig, HSAForCausalLM, HSAModel  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "hsa_ultralong":
        raise
    raise ImportError("this model needs the library hsa_ultralong: pip install hsa-ultralong") from None
"""


@cache
def register_models() -> None:
    """Make AutoModel and AutoModelForCausalLM know our models."""
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from hsa_ultralong.models import HSAConfig, HSAForCausalLM, HSAModel

    AutoModel.register(HSAConfig, HSAModel, exist_ok=True)
    AutoModelForCausalLM.register(HSAConfig, HSAForCausalLM, exist_ok=True)
    # by name: Trainer shifts the labels of causal models only when it smooths them, lm-eval asks for the kind of model
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[HSAConfig.model_type] = HSAForCausalLM.__name__


def own_auto_map(given: dict[str, Any] | None) -> dict[str, Any]:
    """`auto_map` of a configuration: our classes, and what others registered for theirs."""
    # a hub adds "owner/name--" in front; what is saved again stands by itself
    kept = {name: value for name, value in (given or {}).items() if str(value).split("--")[-1] != AUTO_MAP.get(name)}
    return {**AUTO_MAP, **kept}


def is_own_auto_class(kind: type, auto_class: Any) -> bool:
    """True if every folder that we save says that this Auto class loads `kind`."""
    name = auto_class if isinstance(auto_class, str) else auto_class.__name__
    is_ours = kind.__module__.startswith("hsa_ultralong.")
    return is_ours and AUTO_MAP.get(name, "").endswith(f".{kind.__name__}")


def write_remote_module(folder: Path) -> None:
    """Write the module that AUTO_MAP names into a model folder."""
    (folder / f"{REMOTE_MODULE}.py").write_text(_REMOTE_CODE, encoding="utf-8")
