"""A first answer before the weights are there: by a small model of the same forms, on a thread beside the loading.

Kernels that Triton has compiled before are loaded, new ones compiled, and whatever Python, torch and the driver do once
is done. Called by warming.py; engines wait for it. tests/inference/test_rehearsal.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from hsa_ultralong.models import HSAConfig, HSAForCausalLM
from hsa_ultralong.models.presets import replace_options

# of a small model; what is larger is not rehearsed
_MOST_BYTES = 2**30
_PROMPT_TOKENS = 16
_beside: threading.Thread | None = None


def run_beside(work: Callable[[], None]) -> None:
    """Run `work` on a thread that `wait` waits for."""
    global _beside
    # no daemon: a process that ends meanwhile must not leave the driver half way
    _beside = threading.Thread(target=work, name="meet-device")
    _beside.start()


def wait() -> None:
    """Return when what runs beside is done: what it prepares is prepared once, not twice at the same time."""
    thread = _beside
    if thread is not None and thread is not threading.current_thread():
        thread.join()


def small_model(folder: Path, dtype: torch.dtype) -> HSAForCausalLM | None:
    """A model without weights, one lower layer and one group of at most two, of the configuration in `folder`; None if
    that is large, has experts, or cannot be read, which is left to who loads the real one.

    To be made where no other model is being made: transformers puts other functions in the place of torch's meanwhile.
    """
    with suppress(Exception):
        config = HSAConfig.from_pretrained(folder, local_files_only=True)
        fewer: dict[str, Any] = {
            "num_lower_layers": 1, "num_upper_groups": 1, "num_layers_per_group": min(2, config.num_layers_per_group),
            "num_encoder_layers": min(1, config.num_encoder_layers),
        }  # fmt: skip
        with torch.device("meta"):
            model = HSAForCausalLM(replace_options(config, fewer)).to(dtype).eval()
        is_small = sum(part.numel() * part.element_size() for part in model.parameters()) <= _MOST_BYTES
        return model if is_small and not config.num_experts else None
    return None


def rehearse(model: HSAForCausalLM, device: torch.device) -> None:
    """Ask a model of `small_model`; errors are left to who asks the real one."""
    with suppress(Exception):
        answer(model, device)


@torch.no_grad()
def answer(model: HSAForCausalLM, device: torch.device) -> list[int]:
    """The first tokens that it answers with weights that are all alike, from memories of few and of more chunks."""
    from hsa_ultralong.inference.engine import DecodingEngine
    from hsa_ultralong.inference.warming import small_memories

    model = model.to_empty(device=device)
    for part in (*model.parameters(), *model.buffers()):
        part.fill_(0.01 if part.is_floating_point() else 0)
    prompt = torch.arange(_PROMPT_TOKENS) % model.config.vocab_size
    found = []
    for memory in small_memories(model):
        # the main thread has ended: nobody will ask
        if not threading.main_thread().is_alive():
            break
        engine = DecodingEngine(model, memory, max_tokens=_PROMPT_TOKENS + 2, use_graph=False)
        found += [step.tokens[0] for step in engine.stream([prompt], 2)]
    return [token for token in found if token is not None]
