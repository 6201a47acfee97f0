"""Every rival is compared with dense attention under a mask before it is timed, as our own kernels are (guard.py).

What chooses by itself reads everything here (K = C): the result does not depend on the choice.
tests/bench/test_rivals.py.
"""

from __future__ import annotations

import torch

from hsa_ultralong.baselines.state import block_means
from hsa_ultralong.bench.guard import differences, results_of
from hsa_ultralong.bench.points import Settings, noise
from hsa_ultralong.bench.rival_calls import Forward, forward_of, reading_lists
from hsa_ultralong.bench.selections import shared_lists

_CHUNKS = 8


def _dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Softmax attention in the dtype of the inputs; mask (T, N); 0 for a token that reads nothing."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bthd,bnhd->bhtn", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).masked_fill(~mask, 0.0)
    return torch.einsum("bhtn,bnhd->bthd", weights, v)


def reference_of(op: str, settings: Settings, lists: torch.Tensor) -> Forward:
    """The dense form of an operator on len(lists) tokens; lists (T, K) of "selected"."""
    place = torch.arange(len(lists), device=settings.device)
    causal = place[None] <= place[:, None]  # (T, T)
    if op == "selected":
        causal = causal & (lists[:, :, None] == place // settings.S).any(1)
    elif op == "window":
        causal = causal & (place[:, None] - place[None] < settings.window)

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = _dense(q, k, v, causal)
        if op == "nsa":
            keys, values = (block_means(x, settings.S, settings.S) for x in (k, v))
            ends = (torch.arange(keys.shape[1], device=place.device) + 1) * settings.S
            out = out + _dense(q, keys, values, ends[None] <= place[:, None] + 1)
        return out

    return forward


def check_rival(op: str, impl: str, settings: Settings) -> str | None:
    """None if output and gradients are as exact as the dense form's in the benchmark's dtype, else what is wrong."""
    T = _CHUNKS * settings.S
    drawn = reading_lists(shared_lists(T, min(4, settings.main_topk), settings.S, settings.seed), settings.S)
    rival = forward_of(op, impl, settings, T, _CHUNKS, drawn)
    reference = reference_of(op, settings, torch.from_numpy(drawn).to(settings.device))
    heads = (settings.Hq, settings.Hkv, settings.Hkv)
    inputs = [noise(settings, 1, T, count, settings.D, seed=i + 1) for i, count in enumerate(heads)]
    if impl == "flex" and settings.device == "cpu":
        with torch.no_grad():
            wide = [x.double() for x in inputs]
            return differences(("o",), [reference(*wide)], [reference(*inputs)], [rival(*inputs)])
    exact = results_of(reference, [x.double() for x in inputs])
    return differences(("o", "dq", "dk", "dv"), exact, results_of(reference, inputs), results_of(rival, inputs))
