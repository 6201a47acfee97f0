"""A first answer before the weights are there: by a small model of the same forms, on a thread beside the loading.

Kernels that Triton has compiled before are loaded, new ones compiled, and whatever Python, torch and the driver do once
is done. Called by cli/common.py; engines wait for it (beside.py). tests/inference/test_rehearsal.py.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional

from hsa_ultralong.inference.beside import is_wanted, run_beside
from hsa_ultralong.inference.engine import DecodingEngine
from hsa_ultralong.inference.reader import memorize
from hsa_ultralong.inference.warming import small_texts
from hsa_ultralong.models import HSAConfig, HSAForCausalLM
from hsa_ultralong.models.presets import replace_options
from hsa_ultralong.models.weights import checksums
from hsa_ultralong.ops._triton import hash_triton_early

# of a small model; what is larger is not rehearsed
_MOST_BYTES = 2**30
_PROMPT_TOKENS = 16


def prepare_kernels(
    device: str | torch.device, folder: Path | None = None, dtype: torch.dtype = torch.bfloat16
) -> None:
    """To be called before weights are loaded: what the first answer of a process would wait for is done beside that, on
    a GPU. Returns at once; commands and engines wait for it (beside.py).

    Args:
        folder: of a model that is going to answer, in `dtype`: a small one of its forms answers first.
    """
    place = torch.device(device)
    if place.type == "cuda":
        hash_triton_early()
        if place.index is None:
            # the current one is a thread's own, and of a new thread the first
            is_set = torch.cuda.is_initialized() or (dist.is_available() and dist.is_initialized())
            place = torch.device("cuda", torch.cuda.current_device() if is_set else 0)
        small = None if folder is None else small_model(folder, dtype)

        def work() -> None:
            _meet(place)
            if small is not None and is_wanted():
                rehearse(small, place)

        run_beside(work)


def _meet(device: torch.device) -> None:
    """Use a device for the first time: its context, cuBLAS, and torch's own kernels, which the driver loads one by one
    when they are first called. Errors are left to who needs the device."""
    with suppress(Exception), torch.no_grad():
        place = torch.arange(64, device=device)
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.ones((64, 64), dtype=dtype, device=device)
            y = functional.linear(x, x) * functional.silu(x) + functional.rms_norm(x, (64,), x[0])
            y = y.view(1, 4, 16, 64)
            y = torch.einsum("bhtd,bhsd->bhts", y, y).masked_fill(y[..., :16] > 0, -torch.inf)
            torch.cat((y.softmax(-1), y), dim=-1).index_select(-1, place[:4]).float().logsumexp(-1)
            # a prompt and a step: few rows have matrix kernels of their own
            for rows in (1, 16):
                few = torch.ones((rows, 256), dtype=dtype, device=device)
                for width in (128, 256, 672, 8192):
                    functional.linear(few, torch.ones((width, 256), dtype=dtype, device=device))
            x[place[:4], place[:4]] = x[0, :4].clone()
            x.gather(1, place[None].expand(64, -1)).copy_(x.clone())
        _ = functional.embedding(place, x)[place % 2].argmax(-1).cumsum(0).max()
        for kind in (torch.int32, torch.int64):
            numbers = torch.where(place > 3, place, -1).to(kind)
            numbers.sort()
            _ = (numbers.clamp_min(0) + 1)[place] * (numbers >= 2) - numbers.flip(0)
            numbers[place[:2]] = numbers[2:4].clone()
        _ = torch.cat((place.double().cos(), place.double().sin())).float().unique()
        _ = torch.searchsorted(place, place), place.topk(4), (place > 9).any()
        checksums([x, place]).tolist()
        if device.type == "cuda":
            torch.cuda.synchronize(device)


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
    model = model.to_empty(device=device)
    for part in (*model.parameters(), *model.buffers()):
        part.fill_(0.01 if part.is_floating_point() else 0)
    prompt = torch.arange(_PROMPT_TOKENS) % model.config.vocab_size
    found = []
    for text in small_texts(model.config):
        if not is_wanted():
            break
        engine = DecodingEngine(model, memorize(model, text), max_tokens=_PROMPT_TOKENS + 2, use_graph=False)
        found += [step.tokens[0] for step in engine.stream([prompt], 2)]
    return [token for token in found if token is not None]
