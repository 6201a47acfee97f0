"""A speed counts only if the same build is right: each Triton operator, and each rival, against its reference before it
is timed.

Attention: error against the fp64 reference at most twice that of the reference in the benchmark's dtype, for the
output and every gradient. Retrieval: equal selection and scores on integer inputs, where sums are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from hsa_ultralong.bench.attention import hsa_inputs
from hsa_ultralong.bench.points import Point, Settings, noise, one_line
from hsa_ultralong.bench.selections import shared_lists

_TOKENS = 512
_SLACK = 1e-5  # of the norm, where the reference in low precision happens to be exact


def results_of(forward: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The output and the gradient of every input."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    out = forward(*leaves)
    upstream = torch.sin(torch.arange(out.numel(), device=out.device).float()).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def differences(
    names: Sequence[str], exact: Sequence[torch.Tensor], usual: Sequence[torch.Tensor], ours: Sequence[torch.Tensor]
) -> str | None:
    """None if every error is at most twice that of the reference in the benchmark's dtype, else which is not."""
    for name, want, plain, got in zip(names, exact, usual, ours, strict=True):
        norm = want.norm()
        error, allowed = (got.double() - want).norm(), 2 * (plain.double() - want).norm() + _SLACK * norm
        if not error <= allowed:
            return f"{name} is off by {error / norm:.2e} of its norm, allowed {allowed / norm:.2e}"
    return None


def check_attention(operators: Any, settings: Settings, impl: str = "triton") -> str | None:
    """None if hsa_attention is as exact as its reference, else what is wrong."""
    topk = min(4, settings.main_topk)
    lists = shared_lists(_TOKENS, topk, settings.S, settings.seed)
    indices, inputs = hsa_inputs(settings, lists, _TOKENS // settings.S * settings.S)

    def forward(name: str) -> Callable[..., torch.Tensor]:
        def run(q: Any, k: Any, v: Any, weights: Any) -> torch.Tensor:
            return operators.hsa_attention(q, k, v, indices, weights, chunk_size=settings.S, causal=True, impl=name)

        return run

    exact = results_of(forward("reference"), [tensor.double() for tensor in inputs])
    usual = results_of(forward("reference"), inputs)
    return differences(("o", "dq", "dk", "dv", "dweights"), exact, usual, results_of(forward(impl), inputs))


def check_retrieval(operators: Any, settings: Settings, impl: str = "triton") -> str | None:
    """None if chunk_topk selects and scores integer inputs exactly as its reference does, else what is wrong."""
    C = 2 * _TOKENS // settings.S
    visible = operators.ChunkVisibility.causal(1, _TOKENS, C, settings.S, device=settings.device)
    inputs = [
        noise(settings, 1, count, 1, settings.R, seed=number).mul(2).round().clamp(-3, 3)
        for number, count in enumerate((_TOKENS, C))
    ]
    topk = min(4, settings.main_topk)
    want, expected = operators.chunk_topk(*inputs, visible, topk=topk, scale=1.0, impl="reference")
    got, scores = operators.chunk_topk(*inputs, visible, topk=topk, scale=1.0, impl=impl)
    if not torch.equal(got, want):
        return f"{(got != want).any(-1).float().mean().item():.1%} of the tokens select other chunks than the reference"
    if not torch.equal(scores, expected):
        return "scores of integer inputs differ from the reference"

    def forward(name: str) -> Callable[..., torch.Tensor]:
        def run(query: Any, landmarks: Any) -> torch.Tensor:
            chosen = operators.chunk_topk(query, landmarks, visible, topk=topk, scale=1.0, impl=name)[1]
            return chosen.masked_fill(chosen == -torch.inf, 0.0)

        return run

    exact = results_of(forward("reference"), [tensor.double() for tensor in inputs])
    for name, wanted, found, source in zip(
        ("dquery", "dlandmarks"), exact[1:], results_of(forward(impl), inputs)[1:], inputs, strict=True
    ):
        # rounding of the upstream gradient and of the result to the inputs' dtype
        allowed = max(4 * torch.finfo(source.dtype).eps, _SLACK) * wanted.norm()
        if not (found.double() - wanted).norm() <= allowed:
            return f"{name} differs from the reference by more than rounding"
    return None


CHECKS: dict[str, Callable[[Any, Settings], str | None]] = {
    "hsa": check_attention,
    "decode_hsa": check_attention,
    "chunk_topk": check_retrieval,
    "decode_topk": check_retrieval,
}


class Guard:
    """Runs the check of each Triton operator, and of each point that brings one, once, when the first of them comes."""

    def __init__(self, operators: Any, settings: Settings) -> None:
        self.operators, self.settings = operators, settings
        self.verdicts: dict[tuple[str, str], str | None] = {}

    def refusal(self, point: Point) -> str | None:
        """Why this point may not be timed; None if it may."""
        check = point.check
        if check is None and point.impl == "triton" and point.op in CHECKS:
            check = partial(CHECKS[point.op], self.operators, self.settings)
        if check is None:
            return None
        key = (point.op, point.impl)
        if key not in self.verdicts:
            try:
                wrong = check()
                self.verdicts[key] = wrong and f"not timed, its results are wrong: {wrong}"
            except Exception as error:
                self.verdicts[key] = f"not timed, its check failed: {one_line(error)}"
        return self.verdicts[key]
