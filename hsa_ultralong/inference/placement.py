"""Where a new memory's keys and values go: how many chunks fit on the device, and a refusal before anything is read.

Called by reader.memorize and `hsa serve`; tests/memory/test_tiers.py.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from hsa_ultralong.memory.quantization import FORMATS, format_of, row_bytes
from hsa_ultralong.memory.tiers import BLOCK_CHUNKS, TieredMemory
from hsa_ultralong.models import HSAForCausalLM
from hsa_ultralong.models.fingerprint import memory_fingerprint
from hsa_ultralong.models.wrapped import computing_dtype, device_of, unwrapped

TIERS = ("device", "host", "tiered")
# left free on the device for activations of a piece and for decoding
_DEVICE_RESERVE = 10 * 2**30
_GIB = 2**30


def available_host_bytes() -> int:
    """Host memory that can still be taken, by the kernel's own estimate where there is one."""
    try:
        with open("/proc/meminfo") as stream:
            for line in stream:
                if line.startswith("MemAvailable:"):
                    return 1024 * int(line.split()[1])
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def available_device_bytes(device: torch.device) -> int:
    """Device memory that can still be taken, less what activations need."""
    if device.type != "cuda":
        return available_host_bytes()
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) - _DEVICE_RESERVE


def tiered_memory(
    model: HSAForCausalLM,
    num_chunks: int,
    *,
    store: str,
    key_values: str | None = None,
    landmarks: str | None = None,
    device_bytes: int | None = None,
    block_chunks: int = BLOCK_CHUNKS,
) -> TieredMemory:
    """An empty memory for `num_chunks` chunks (0: unknown) on the tiers that `store` names.

    Args:
        store: "device", "host" (keys and values in host memory) or "tiered" (on the device as far as they fit, the
            rest in host memory).
        key_values, landmarks: their forms; default the model's dtype. device_bytes: for keys and values of "tiered";
            default what is free, less 10 GiB.

    Raises:
        ValueError: an unknown store or form, or a memory that fits nowhere, with the bytes that are missing.
    """
    if store not in TIERS:
        raise ValueError(f"store must be one of {', '.join(TIERS)} or the path of a new file, got {store!r}")
    model = unwrapped(model)
    config, device, dtype = model.config, device_of(model), computing_dtype(model)
    own = format_of(dtype)
    forms: list[Any] = [key_values or own, landmarks or own]
    for form in forms:
        if form not in FORMATS:
            raise ValueError(f"unknown form {form!r} of keys, values or landmarks; choose one of {', '.join(FORMATS)}")
    assert config.head_dim is not None
    chunk_bytes = 2 * config.chunk_size * config.num_memory_heads * row_bytes(forms[0], config.head_dim)
    per_head = config.retrieval_dim // config.num_retrieval_heads
    landmark_bytes = num_chunks * (config.num_retrieval_heads * row_bytes(forms[1], per_head) + 12)
    free = available_device_bytes(device)
    room = free - landmark_bytes if device_bytes is None or store == "device" else min(device_bytes, free)
    fitting = max(0, room // chunk_bytes)
    above = {"device": num_chunks, "host": 0, "tiered": fitting}[store]
    block = min(block_chunks, max(1, num_chunks)) if num_chunks else block_chunks
    above = above if store == "device" else above // block * block
    _refuse_what_does_not_fit(store, num_chunks, min(above, num_chunks), fitting, chunk_bytes, landmark_bytes)
    plain = model.model.empty_memory(1, dtype, device, fingerprint=memory_fingerprint(model))
    return TieredMemory.make(
        plain,
        key_values=forms[0],
        landmarks=forms[1],
        device_chunks=above if num_chunks or store != "device" else 2**62,
        capacity=num_chunks,
        block_chunks=block,
    )


def _refuse_what_does_not_fit(
    store: str, num_chunks: int, above: int, fitting: int, chunk_bytes: int, landmark_bytes: int
) -> None:
    below = (num_chunks - above) * chunk_bytes
    host = available_host_bytes()
    if above <= fitting and below <= host:
        return
    upper, room, lower = above * chunk_bytes / _GIB, fitting * chunk_bytes / _GIB, below / _GIB
    raise ValueError(
        f"this memory does not fit: keys and values are {upper:.1f} GiB on the device (room for {room:.1f} GiB, "
        f"beside {landmark_bytes / _GIB:.1f} of landmarks), {lower:.1f} GiB in host memory ({host / _GIB:.1f} free); "
        "use key_values='int8', landmarks='int8', store='tiered', or the path of a file"
    )
