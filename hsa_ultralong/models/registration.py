"""The Auto classes of transformers know our models as soon as `hsa_ultralong` is imported, at no cost before their use.

Registering needs classes, and those need torch. So the configuration is registered when transformers' Auto classes are
imported (at once if they already are), and the models when the first configuration is made (auto_map.py).
Methods that users expect on a model, of what stands above the models, are told here as well (ABOVE).
Called by hsa_ultralong/__init__.py; tests/models/test_registration.py.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

AUTO_CLASSES = "transformers.models.auto.configuration_auto"
# method of HSAForCausalLM -> the function, of a part of the package that models know nothing of
ABOVE: dict[str, Callable[..., Any]] = {}


def register_with_transformers(*configurations: tuple[str, str]) -> None:
    """Make AutoConfig know our model types, each given by module and class, now or when it is imported."""
    hook = _AfterAutoClasses(configurations)
    sys.meta_path.insert(0, hook)
    if AUTO_CLASSES in sys.modules:
        # waits if another thread is still importing it
        hook.finish(importlib.import_module(AUTO_CLASSES))


class _AfterAutoClasses:
    """A finder, and the loader that it finds, of one module: loads it as usual and registers afterwards."""

    def __init__(self, configurations: tuple[tuple[str, str], ...]) -> None:
        self._configurations = configurations

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
        for place, name in self._configurations:
            kind = getattr(importlib.import_module(place), name)
            module.AutoConfig.register(kind.model_type, kind, exist_ok=True)
