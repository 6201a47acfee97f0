"""How other sparse attention is called on the shapes of the operator benchmark; what each does stands in rivals.py.

Packages are imported when they are called. tests/bench/test_rivals.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from hsa_ultralong.baselines.attention import sdpa
from hsa_ultralong.baselines.moba import MeanTopK
from hsa_ultralong.baselines.selected import choose_by_compressed, selected_attention
from hsa_ultralong.baselines.state import block_means
from hsa_ultralong.bench import flash_stand_in
from hsa_ultralong.bench.points import Settings

# rows and columns of a block of flex_attention's masks
_FLEX_BLOCK = 128
# chunks that NSA reads unasked: the first, the token's own and the one before it
_NSA_FIXED = 3

Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def implementations(op: str, settings: Settings) -> tuple[str, ...]:
    """What an operator is measured with, ours first; for "window" and "full_attention" the other packages."""
    ours = "triton" if settings.device == "cuda" else "torch"
    return {
        "selected": (ours, "fla", "flex"), "nsa": (ours, "fla"), "moba": (ours, "fla"),
        "window": ("flex", "flash_attn"), "full_attention": ("flash_attn",),
    }[op]  # fmt: skip


def is_left_out(impl: str, settings: Settings) -> bool:
    """Whether it runs on a GPU only, and there is none: it is measured where it is asked for by name, which says so."""
    return impl in ("fla", "flex", "flash_attn") and settings.device != "cuda"


def missing(op: str, impl: str, settings: Settings) -> str | None:
    """Why an implementation cannot run here, in one line; None if it can."""
    if impl in ("triton", "torch"):
        return None
    if is_left_out(impl, settings):
        return f"{impl} is measured on a GPU only"
    if impl == "flex":
        return None
    needed = {"fla": ("flash-linear-attention", "fla"), "flash_attn": ("flash-attn", "flash_attn")}
    packages = [needed[impl]]
    if (op, impl) == ("moba", "fla") and not flash_stand_in.is_possible():
        packages.append(needed["flash_attn"])
    absent = [name for name, module in packages if find_spec(module) is None]
    if absent:
        return f"not installed: pip install {' '.join(absent)}"
    group = settings.Hq // settings.Hkv
    if impl == "fla" and op in ("nsa", "selected") and (group < 16 or group & (group - 1)):
        return f"NSA of flash-linear-attention takes groups of 16, 32, ... heads, got {group}"
    return None


def reading_lists(lists: np.ndarray, chunk_size: int) -> np.ndarray:
    """Lists (T, K) of earlier chunks with the token's own in place of the last one: as many chunks are read."""
    own = (np.arange(len(lists)) // chunk_size)[:, None].astype(lists.dtype)
    return np.concatenate((own, lists[:, : lists.shape[1] - 1]), axis=1)


def forward_of(op: str, impl: str, settings: Settings, T: int, K: int, lists: np.ndarray | None = None) -> Forward:
    """q (1, T, Hq, D), k and v (1, T, Hkv, D) -> (1, T, Hq, D) of one implementation.

    Args:
        K: chunks that a token reads, its own included; ignored by "window" and "full_attention".
        lists: (T, K) of "selected", the token's own chunk among them, -1 for none.
    """
    if op == "full_attention":
        return partial(_flash_attn, window=(-1, -1))
    if op == "window":
        if impl == "flash_attn":
            return partial(_flash_attn, window=(settings.window - 1, 0))
        return _flex_window(settings, T)
    if op == "selected":
        assert lists is not None
        chosen = torch.from_numpy(lists).to(settings.device)[None, :, None]  # (1, T, 1, K)
        if impl == "flex":
            return _flex_selected(settings, chosen)
        if impl == "fla":
            return partial(_fla_selected, chosen=chosen.expand(-1, -1, settings.Hkv, -1).contiguous(), size=settings.S)
        return lambda q, k, v: selected_attention(q, k, v, chosen.long(), chunk_size=settings.S, impl=impl)
    if op == "nsa":
        whole = _fla_nsa if impl == "fla" else partial(_nsa, impl=impl)
        return partial(whole, size=settings.S, topk=max(K, _NSA_FIXED))
    if impl == "fla":
        # made once: the package keeps what it reckons from this tensor by its identity
        ends = torch.tensor([0, T], dtype=torch.int32, device=settings.device)
        return partial(_fla_moba, ends=ends, size=settings.S, topk=K)
    heads = {"num_attention_heads": settings.Hq, "num_key_value_heads": settings.Hkv, "head_dim": settings.D}
    layer = MeanTopK(
        chunk_size=settings.S, topk=K, impl=impl, hidden_size=1, use_qk_norm=False, rms_norm_eps=1e-6, **heads
    )
    return lambda q, k, v: layer.attend(q, k, v, None)


def _nsa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, size: int, topk: int, impl: str) -> torch.Tensor:
    means, values = block_means(k, size, size), block_means(v, size, size)
    chosen = choose_by_compressed(
        q.detach(), means.detach(), start=0, size=size, stride=size, chunk_size=size, topk=topk,
        num_initial=1, num_local=2, pool="sum",
    )  # fmt: skip
    out = selected_attention(q, k, v, chosen, chunk_size=size, impl=impl)
    if impl == "triton":
        from hsa_ultralong.baselines.triton_selected import block_attention_triton  # imports triton

        return out + block_attention_triton(q, means, values, size=size, stride=size, start=0)
    blind = min(size - 1, q.shape[1])  # tokens before the end of the first chunk
    if blind == q.shape[1]:
        return out
    ends = (torch.arange(means.shape[1], device=q.device) + 1) * size
    places = torch.arange(blind, q.shape[1], device=q.device)[:, None]
    read = sdpa(q[:, blind:], means, values, (ends <= places + 1)[None, None])
    return out + torch.cat((torch.zeros_like(q[:, :blind]), read), 1)


def _fla_selected(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, chosen: torch.Tensor, size: int
) -> torch.Tensor:
    from fla.ops.nsa import parallel_nsa

    return parallel_nsa(q, k, v, block_indices=chosen, block_counts=chosen.shape[-1], block_size=size)


def _fla_nsa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, size: int, topk: int) -> torch.Tensor:
    from fla.ops.nsa import parallel_nsa

    gates = torch.ones(q.shape[:3], dtype=q.dtype, device=q.device)
    return parallel_nsa(q, k, v, g_cmp=gates, g_slc=gates, block_counts=topk, block_size=size)


def _fla_moba(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, ends: torch.Tensor, size: int, topk: int
) -> torch.Tensor:
    from fla.ops.moba import parallel

    if flash_stand_in.is_needed():
        flash_stand_in.lend_to(parallel)
    # takes as many key heads as query heads
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    return parallel.parallel_moba(q, k, v, ends, q.shape[1], size, topk)


def _flash_attn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, window: tuple[int, int]) -> torch.Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v, causal=True, window_size=window)


def _flex_kernel(device: str) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    if device != "cuda":
        return flex_attention
    # every point has a mask of its own; after eight forms of one function torch would run it unfused without an error
    torch._dynamo.reset()
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _flex(settings: Settings, T: int, is_met: torch.Tensor, reads: Callable[..., torch.Tensor]) -> Forward:
    """Blocks of keys that a block of queries meets, (queries / 128, keys / 128) bool, and which pairs are read."""
    from torch.nn.attention.flex_attention import BlockMask

    order = is_met.int().argsort(dim=-1, descending=True, stable=True).int()
    counts = is_met.sum(-1, dtype=torch.int32)
    mask = BlockMask.from_kv_blocks(
        counts[None, None], order[None, None], BLOCK_SIZE=_FLEX_BLOCK, mask_mod=reads, seq_lengths=(T, T)
    )
    kernel = _flex_kernel(settings.device)

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return kernel(q, k, v, block_mask=mask, enable_gqa=settings.Hq > settings.Hkv).transpose(1, 2)

    return forward


def _flex_window(settings: Settings, T: int) -> Forward:
    block = torch.arange(-(-T // _FLEX_BLOCK), device=settings.device)
    first = (block * _FLEX_BLOCK - settings.window + 1).clamp_min(0) // _FLEX_BLOCK
    is_met = (block[None] >= first[:, None]) & (block[None] <= block[:, None])
    window = settings.window
    return _flex(settings, T, is_met, lambda b, h, query, key: (key <= query) & (query - key < window))


def _flex_selected(settings: Settings, chosen: torch.Tensor) -> Forward:
    T, size = chosen.shape[1], settings.S
    index = torch.where(chosen < 0, -(-T // size), chosen)[0, :, 0].long()  # (T, K)
    is_chosen = torch.zeros(T, -(-T // size) + 1, dtype=torch.bool, device=chosen.device).scatter_(1, index, True)
    padded = torch.nn.functional.pad(is_chosen[:, :-1], (0, 0, 0, -T % _FLEX_BLOCK))
    by_rows = padded.unflatten(0, (-1, _FLEX_BLOCK)).any(1)  # (queries / 128, C)
    first = torch.arange(by_rows.shape[1], device=chosen.device) * size // _FLEX_BLOCK
    last = (torch.arange(by_rows.shape[1], device=chosen.device) * size + size - 1) // _FLEX_BLOCK
    blocks = torch.arange(len(by_rows), device=chosen.device)
    inside = (first[:, None] <= blocks) & (blocks <= last[:, None])  # (C, keys / 128)
    is_met = by_rows.float() @ inside.float() > 0
    return _flex(settings, T, is_met, lambda b, h, query, key: (key <= query) & is_chosen[query, key // size])
