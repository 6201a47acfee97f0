"""The Auto classes of transformers know our model as soon as `hsa_ultralong` is imported, at no cost before their use.

Registering needs classes, and those need torch. So the configuration is registered when transformers' Auto classes are
imported (at once if they already are), and the models when the first configuration is made: every way to a model leads
through one. Without `import hsa_ultralong`, a folder's `auto_map` and a module beside the weights lead here.
Called by hsa_ultralong/__init__.py and by HSAConfig; tests/models/test_registration.py.
"""

from __future__ import annotations

import importlib
import sys
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

AUTO_CLASSES = "transformers.models.auto.configuration_auto"
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


def register_with_transformers() -> None:
    """Make AutoConfig know our model type, now or when it is imported."""
    hook = _AfterAutoClasses()
    sys.meta_path.insert(0, hook)
    if AUTO_CLASSES in sys.modules:
        # waits if another thread is still importing it
        hook.finish(importlib.import_module(AUTO_CLASSES))


class _AfterAutoClasses:
    """A finder, and the loader that it finds, of one module: loads it as usual and registers afterwards."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != AUTO_CLASSES:
            return None
        for finder in sys.meta_path:
            if isinstance(finder, _AfterAutoClasses) or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                self._loader = spec.loader
                spec.loader = self  # type: ignore[assignment]
                return spec
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # what others read of a module (its source, say) they ask of its own loader
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self.finish(module)

    def finish(self, module: ModuleType) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        from hsa_ultralong.models.configuration_hsa import HSAConfig

        module.AutoConfig.register(HSAConfig.model_type, HSAConfig, exist_ok=True)


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
