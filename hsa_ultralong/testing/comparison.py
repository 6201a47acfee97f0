"""Loss and every gradient of a model, and its backends: what two formulations of one thing are compared by."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch

from hsa_ultralong.nn import views
from hsa_ultralong.ops import chunk_topk, hsa_attention


def loss_and_gradients(
    model: torch.nn.Module, losses: Iterable[torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The sum of the losses and its gradient for every parameter that has one, by name."""
    model.zero_grad()
    total = torch.stack(list(losses)).sum()
    total.backward()
    return total.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def force_backends(monkeypatch: Any, topk: str, attention: str) -> None:
    """Every model of this test runs chunk_topk and hsa_attention with these `impl`."""
    monkeypatch.setattr(views, "chunk_topk", partial(chunk_topk, impl=topk))
    monkeypatch.setattr(views, "hsa_attention", partial(hsa_attention, impl=attention))
