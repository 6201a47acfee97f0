"""Which layers an adapter goes on: names for peft's `target_modules`, and our entry in its tables of defaults.

peft is never imported from here. tests/inference/test_adapters.py.
"""

from __future__ import annotations

import sys

# peft's default: queries and values everywhere, memories have to be built again
LORA_TARGETS = ["q_proj", "v_proj"]
# above the memory only (a regular expression of peft): memories built before stay valid
UPPER_LORA_TARGETS = r".*\bgroups\..*\.(q_proj|v_proj|query_proj)"
_PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def offer_adapter_targets() -> None:
    """Enter this model into the defaults of every kind of adapter, if peft is loaded: those of Llama, whose projections
    have the same names."""
    constants = sys.modules.get("peft.utils.constants")
    for name, table in vars(constants).items() if constants is not None else ():
        targets = table.get("llama") if name.endswith("_MODULES_MAPPING") and isinstance(table, dict) else None
        if isinstance(targets, list) and set(targets) <= _PROJECTIONS:
            table.setdefault("hsa_ultralong", targets)
