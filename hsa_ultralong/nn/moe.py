"""Mixture of experts with a shared expert and auxiliary-loss-free balancing (paper sec. 3.1; DeepSeek-V3, Ling-2.0).

Each token goes to the experts of highest sigmoid affinity + bias; the bias only steers the choice and is moved after
every optimiser step toward equal load (`update_router_bias`). While a run begins, choices may be spread (`spread`).
Routing is dropless, so a token's output never depends on the rest of the batch, which exact reading needs (fact 5).
Tested in tests/nn/test_moe.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from hsa_ultralong.nn.mlp import SwiGLU
from hsa_ultralong.nn.plain_linear import is_plain_linear
from hsa_ultralong.ops._permute import inverse, take_rows

# of spread choices: radians per unit of a router's normed logit; tokens that nearly agree still lie some turns apart
_WAVES = 40.0
# their numbers are sorted as 16-bit keys
_MOST_EXPERTS = 2**15 - 2


class ExpertExchange(Protocol):
    """Processes that share out the experts; distributed/experts.py has the class, given from outside."""

    def local(self, weight: torch.Tensor) -> torch.Tensor:
        """This process's experts of a weight (E, ...)."""
        ...

    def run(
        self,
        rows: torch.Tensor,
        load: torch.Tensor,
        experts: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        shared: nn.Module | None,
        x: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Apply `experts` to every row where its expert is, and `shared` to x while rows travel.

        rows and load as in MixtureOfExperts._experts; returns the rows in their order, and what `shared` gave.
        """
        ...


class MixtureOfExperts(nn.Module):
    """(..., M) -> (..., M): shared expert + sum over the chosen experts of affinity-weighted SwiGLU outputs.

    `expert_load` counts the tokens of each expert in training, twice where a block is recomputed in the backward: only
    ratios are used. `spread`, a scalar tensor set from outside (train/stages.py), spreads the choice in training.
    """

    router_bias: torch.Tensor
    expert_load: torch.Tensor

    def __init__(
        self,
        *,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        num_experts_per_token: int,
        num_shared_experts: int,
    ) -> None:
        super().__init__()
        if num_experts > _MOST_EXPERTS:
            raise ValueError(f"num_experts must be at most {_MOST_EXPERTS:,}, got {num_experts:,}")
        self.num_experts, self.num_experts_per_token = num_experts, num_experts_per_token
        self.router = nn.Linear(hidden_size, num_experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(num_experts, hidden_size, 2 * intermediate_size))
        self.down = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))
        self.shared = (
            SwiGLU(hidden_size=hidden_size, intermediate_size=intermediate_size * num_shared_experts)
            if num_shared_experts
            else None
        )
        self.expert_ranks: ExpertExchange | None = None
        self.spread: torch.Tensor | None = None
        self.register_buffer("router_bias", torch.zeros(num_experts, dtype=torch.float32))
        self.register_buffer("expert_load", torch.zeros(num_experts, dtype=torch.int64), persistent=False)
        for weight in (self.gate_up, self.down):
            nn.init.normal_(weight, std=0.02)

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Experts and their weights for tokens x (N, M): both (N, k); weights fp32 (fp64 kept), sum 1."""
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        logits = self._router_logits(x, wide)  # (N, E)
        affinity = logits.sigmoid()
        preference = affinity.detach() + self.router_bias
        if self.training and self.spread is not None:
            preference = preference + self.spread * self._waves(logits.detach())
        chosen = preference.topk(self.num_experts_per_token, dim=-1).indices  # (N, k)
        weights = affinity.gather(-1, chosen)
        return chosen, weights / weights.sum(-1, keepdim=True)

    def _waves(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (N, E) -> (N, E): for every expert a standard Gumbel number that follows from the token alone.

        Waves of the logit, so steep that tokens which nearly agree get unrelated numbers. Not drawn: pieces, ranks,
        recomputation and resumed runs choose alike.
        """
        norms = self.router.weight.detach().to(logits.dtype).norm(dim=-1)
        phase = _WAVES * logits / norms.clamp_min(1e-9)
        uniform = 0.5 + phase.sin().asin() / math.pi
        return -(-uniform.clamp(1e-6, 1 - 1e-6).log()).log()

    def _router_logits(self, x: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
        if not is_plain_linear(self.router):
            # an adapter, a hook or quantised weights: the module knows how
            return self.router(x).to(wide)
        with torch.autocast(device_type=x.device.type, enabled=False):
            return x.to(wide) @ self.router.weight.to(wide).T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(0, -2)  # (N, M)
        chosen, weights = self.route(tokens)
        # (N*k,) pairs grouped by expert; keys of 16 bits sort in a quarter of the passes
        experts, order = chosen.flatten().to(torch.int16).sort(stable=True)
        places = inverse(order)
        # bincount would wait for the device
        numbers = torch.arange(self.num_experts + 1, dtype=torch.int16, device=x.device)
        load = torch.searchsorted(experts, numbers).diff()  # (E,)
        if self.training:
            self.expert_load += load
        k = self.num_experts_per_token
        dtype = torch.bfloat16 if self._is_grouped(tokens) else tokens.dtype
        rows = take_rows(tokens, order // k, places, copies=k, dtype=dtype)  # (N*k, M)
        if self.expert_ranks is None:
            inner, beside = self._experts(rows, load), None if self.shared is None else self.shared(x)
        else:
            inner, beside = self.expert_ranks.run(rows, load, self._experts, self.shared, x)
        parts = take_rows(inner, places, order).unflatten(0, (-1, k))  # (N, k, M)
        out = (parts * weights[..., None].to(parts.dtype)).sum(1).view(x.shape)
        return out if beside is None else out + beside

    @staticmethod
    def _is_grouped(rows: torch.Tensor) -> bool:
        """True where one grouped product in bf16 takes the place of a loop over the experts."""
        return rows.is_cuda and (rows.dtype == torch.bfloat16 or torch.is_autocast_enabled("cuda"))

    def _experts(self, rows: torch.Tensor, load: torch.Tensor) -> torch.Tensor:
        """SwiGLU of every row by its expert, of those held here; rows (N, M) sorted by expert, `load` rows each."""
        held: tuple[torch.Tensor, torch.Tensor] = (self.gate_up, self.down)
        if self.expert_ranks is not None:
            held = (self.expert_ranks.local(self.gate_up), self.expert_ranks.local(self.down))
        gate_up, down = (weight.to(rows.dtype) for weight in held)
        # a rank may get no rows at all
        if self._is_grouped(rows) and len(rows):
            ends = load.cumsum(0).to(torch.int32)
            return F.grouped_mm(self.activate(F.grouped_mm(rows, gate_up, offs=ends)), down, offs=ends)
        parts = []
        # unbind, as the gradient of an index is as large as all experts together
        for part, into, back in zip(rows.split(load.tolist()), gate_up.unbind(), down.unbind(), strict=True):
            parts.append(self.activate(part @ into) @ back)
        return torch.cat(parts)

    @staticmethod
    def activate(gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up of rows (N, 2 * intermediate_size)."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    @torch.no_grad()
    def update_router_bias(self, rate: float) -> torch.Tensor:
        """Raise the bias of experts below the mean load of the last steps by `rate`, lower the others; reset the load.

        Returns the imbalance max / mean load (fp32 scalar), 1 when perfectly even.
        """
        load = self.expert_load.to(torch.float32)
        mean = load.mean()
        imbalance = load.max() / mean.clamp_min(1e-9)
        # without any load nothing moves
        self.router_bias += rate * torch.sign(mean - load)
        self.expert_load.zero_()
        return imbalance
