"""A linear layer with a state of fixed size: the gated delta rule (Yang et al. 2024, Gated DeltaNet).

Per head S_t = a_t (I - b_t k_t k_t^T) S_(t-1) + b_t k_t v_t^T and o_t = S_t^T q_t / sqrt(D), with decay a_t in (0, 1),
strength b_t in (0, 1), q and k of length 1. tests/baselines/test_rivals.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hsa_ultralong.baselines.state import LayerState
from hsa_ultralong.nn.rotary import RotaryTable
from hsa_ultralong.ops._common import accumulation_dtype

# tokens whose updates are solved at once
_CHUNK = 64
_CONVOLUTION = 4
# chunks whose states are formed together
_SCANNED = 256


def gated_delta_rule(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor, strength: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Outputs (B, T, H, D) and the state after the last token.

    Chunks of c tokens: with g the decay since the chunk began, the updates u of S_t = a_t S_(t-1) + k_t u_t^T solve
    u_r + b_r sum over i < r of (g_r / g_i) (k_r k_i) u_i = b_r (v_r - g_r S_0^T k_r), a triangular system for all
    chunks at once but for S_0, which `_states` carries on. O(T (c D + D^2 + D^3 log(T / c) / c)) time a head.

    Args:
        q, k, v: (B, T, H, D) fp32 or fp64. log_decay (at most 0), strength: (B, T, H). state: (B, H, D, D), key first.
    """
    length, size = q.shape[1], min(_CHUNK, q.shape[1])
    right = -length % size

    def chunked(x: torch.Tensor) -> torch.Tensor:
        # padding has no strength and no decay: it changes nothing
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, right)).unflatten(1, (-1, size))
        return x.movedim(3, 1)  # (B, H, n, c, ...)

    q, k, v = (chunked(x) for x in (q * q.shape[-1] ** -0.5, k, v))
    decay, strength = chunked(log_decay).cumsum(-1), chunked(strength)[..., None]
    between = (decay[..., :, None] - decay[..., None, :]).tril().exp().tril()  # g_r / g_i for i <= r, (B, H, n, c, c)
    system = (strength * (k @ k.mT) * between).tril(-1)  # the diagonal of ones is implied
    since = decay.exp()[..., None]  # (B, H, n, c, 1)
    solved = torch.linalg.solve_triangular(
        system, torch.cat((strength * v, strength * since * k), -1), upper=False, unitriangular=True
    )
    updates, removed = solved.chunk(2, -1)  # u without S_0, and what S_0 takes from it
    until = (decay[..., -1:] - decay).exp()[..., None] * k  # keys as the end of the chunk sees them
    # S after a chunk is carried S before it + added
    eye = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    carried = since[..., -1:, :] * eye - until.mT @ removed
    starts, state = _states(carried, until.mT @ updates, state)
    made = updates - removed @ starts
    out = since * (q @ starts) + ((q @ k.mT) * between) @ made
    return out.movedim(1, 3).flatten(1, 2)[:, :length], state


def _states(carried: torch.Tensor, added: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """S before every chunk, (B, H, n, D, D), and after the last.

    S_(i+1) = carried_i S_i + added_i, by doubling: after round r an entry stands for 2^r chunks, so n chunks take
    log n rounds of a few calls in place of n. At most _SCANNED chunks at once, which bounds what is kept.
    """
    starts = []
    for c, a in zip(carried.split(_SCANNED, 2), added.split(_SCANNED, 2), strict=True):
        step = 1
        while step < c.shape[2]:
            a = torch.cat((a[:, :, :step], a[:, :, step:] + c[:, :, step:] @ a[:, :, :-step]), 2)
            c = torch.cat((c[:, :, :step], c[:, :, step:] @ c[:, :, :-step]), 2)
            step *= 2
        after = c @ state[:, :, None] + a
        starts.append(torch.cat((state[:, :, None], after[:, :, :-1]), 2))
        state = after[:, :, -1]
    return torch.cat(starts, 2), state


def _fla_delta_rule(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by the kernels of flash-linear-attention.

    Raises:
        ImportError: it is not installed.
    """
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except ImportError as error:
        raise ImportError('linear_impl="fla" needs a GPU and: pip install "hsa-ultralong[rivals]"') from error
    q, k, v, log_decay, strength, state = inputs
    q, k, v, strength = (x.bfloat16() for x in (q, k, v, strength))
    return chunk_gated_delta_rule(q, k, v, log_decay, strength, initial_state=state, output_final_state=True)


class DeltaState(LayerState):
    """S of every head, fp32, and the last inputs of the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix: torch.Tensor | None = None
        self.last: torch.Tensor | None = None


class GatedDelta(nn.Module):
    """Pre-normed input (B, T, M) -> (B, T, M): a short convolution, the gated delta rule, a gated norm.

    O(T) time; the cache holds D^2 numbers a head in fp32, whatever the length. impl: "torch" (anywhere), or "fla".
    """

    def __init__(
        self, *, hidden_size: int, num_attention_heads: int, head_dim: int, rms_norm_eps: float, impl: str, **_: Any
    ) -> None:
        super().__init__()
        width = num_attention_heads * head_dim
        self.head_dim, self.impl = head_dim, impl
        self.q_proj = nn.Linear(hidden_size, width, bias=False)
        self.k_proj = nn.Linear(hidden_size, width, bias=False)
        self.v_proj = nn.Linear(hidden_size, width, bias=False)
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.decay_proj = nn.Linear(hidden_size, num_attention_heads, bias=False)
        self.strength_proj = nn.Linear(hidden_size, num_attention_heads, bias=False)
        self.o_proj = nn.Linear(width, hidden_size, bias=False)
        self.o_norm = nn.RMSNorm(head_dim, eps=rms_norm_eps)
        self.convolution = nn.Parameter(torch.zeros(3 * width, _CONVOLUTION))
        self.log_rate = nn.Parameter(torch.zeros(num_attention_heads))
        self.step_bias = nn.Parameter(torch.zeros(num_attention_heads))

    def starting_decay(self) -> tuple[torch.Tensor, torch.Tensor]:
        """log_rate and step_bias of a new layer: rates 1 to 16, steps .001 to .1, heads from fast to slow."""
        count = len(self.log_rate)
        steps = torch.linspace(-2.3, -6.9, count).exp()
        return torch.linspace(16, 1, count).log(), steps + (-(-steps).expm1()).log()

    def forward(self, x: torch.Tensor, rotary: RotaryTable, segments: None = None, state: Any = None) -> torch.Tensor:
        """rotary is not read: order is in the state."""
        mixed = torch.cat((self.q_proj(x), self.k_proj(x), self.v_proj(x)), -1)  # (B, T, 3 H D)
        before = mixed.new_zeros(x.shape[0], _CONVOLUTION - 1, mixed.shape[-1])
        if state is not None and state.last is not None:
            before = state.last
        mixed = torch.cat((before, mixed), 1)
        if state is not None:
            state.last = mixed[:, -(_CONVOLUTION - 1) :].detach().clone()
        taps = self.convolution.to(mixed.dtype)
        shifted = torch.stack([mixed[:, i : i + x.shape[1]] for i in range(_CONVOLUTION)], -1)
        mixed = F.silu((shifted * taps).sum(-1))
        wide = accumulation_dtype(x.dtype)
        heads = (self.log_rate.shape[0], self.head_dim)
        q, k, v = (part.unflatten(-1, heads).to(wide) for part in mixed.chunk(3, -1))
        with torch.autocast(x.device.type, enabled=False):
            q, k = (F.normalize(part, dim=-1, eps=1e-6) for part in (q, k))
        rate, bias = self.log_rate.to(wide).exp(), self.step_bias.to(wide)
        log_decay = -rate * F.softplus(self.decay_proj(x).to(wide) + bias)  # (B, T, H)
        strength = self.strength_proj(x).to(wide).sigmoid()
        matrix = q.new_zeros(x.shape[0], heads[0], self.head_dim, self.head_dim)
        if state is not None and state.matrix is not None:
            matrix = state.matrix
        rule = _fla_delta_rule if self.impl == "fla" else gated_delta_rule
        with torch.autocast(x.device.type, enabled=False):
            out, matrix = rule(q, k, v, log_decay, strength, matrix)
        if state is not None:
            state.matrix, state.length = matrix.detach(), state.length + x.shape[1]
        gate = F.silu(self.gate_proj(x)).unflatten(-1, heads)
        return self.o_proj((self.o_norm(out.to(x.dtype)) * gate).flatten(-2))

    def new_state(self) -> DeltaState:
        return DeltaState()
