"""The experts' two products with their activation (nn/moe.py) by several implementations: time, TFLOP/s and error.

    python scripts/grouped_products.py --tokens 32K,64K -o benchmarks/results/grouped-h200.json

Ways: `ours`, what the model runs (torch's grouped_mm on a GPU); `loop`, a product for every expert, its counts already
on the host; `padded`, one batched product with every expert padded to the largest load, padding and its removal timed,
their places known before; `triton`, the same as ours where torch's compiler puts its own Triton kernel for grouped_mm.
Experts are those of one card: with a quarter of them it gets as many rows, from four cards. Loads are equal, or fall
by a power so that the largest is three times the mean. Every way must agree with fp32 before it is timed; errors are
norms of differences over norms, of the output and of the worst of three gradients. Times are medians by CUDA events of
20 calls or more, the L2 cache cold, activations compiled on a GPU as in training; TFLOP/s counts rows without padding.
tests/bench/test_grouped_products.py.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from hsa_ultralong.bench.points import one_line
from hsa_ultralong.bench.timing import Timing, time_call
from hsa_ultralong.bench.training import PEAK_FLOPS
from hsa_ultralong.cli.numbers import parse_size, parse_sizes
from hsa_ultralong.eval.metadata import run_metadata, write_json
from hsa_ultralong.models.presets import preset
from hsa_ultralong.nn.moe import MixtureOfExperts

WAYS = ("ours", "loop", "padded", "triton")
LARGEST = {"balanced": 1.0, "skewed": 3.0}
_LEAST_REPEATS, _MOST_ERROR = 20, 0.02
Call = Callable[..., torch.Tensor]


def loads(rows: int, experts: int, largest: float) -> list[int]:
    """Rows of every expert, sum `rows`: shares (i + 1)^-a, the largest of them `largest` times the mean."""
    low, high = 0.0, 20.0
    for _ in range(60):
        power = (low + high) / 2
        shares = [(i + 1) ** -power for i in range(experts)]
        low, high = (power, high) if experts / sum(shares) < largest else (low, power)
    found = [int(rows * share / sum(shares)) for share in shares]
    for i in range(rows - sum(found)):
        found[-1 - i % experts] += 1
    return found


def looped(moe: MixtureOfExperts, counts: list[int]) -> Call:
    def call(rows: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        experts = zip(rows.split(counts), gate_up.unbind(), down.unbind(), strict=True)
        return torch.cat([moe.activate(part @ into) @ back for part, into, back in experts])

    return call


def padded(moe: MixtureOfExperts, counts: list[int], device: str) -> Call:
    size = max(counts)
    places = torch.cat([i * size + torch.arange(count) for i, count in enumerate(counts)]).to(device)

    def call(rows: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        batch = rows.new_zeros(len(counts) * size, rows.shape[1]).index_copy(0, places, rows)
        inner = moe.activate(batch.unflatten(0, (-1, size)) @ gate_up)  # (E, size, F)
        return (inner @ down).flatten(0, 1)[places]

    return call


def torch_triton(moe: MixtureOfExperts, counts: list[int], device: str) -> Call:
    ends = torch.tensor(counts, device=device).cumsum(0).to(torch.int32)

    def call(rows: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        inner = MixtureOfExperts.activate(functional.grouped_mm(rows, gate_up, offs=ends))
        return functional.grouped_mm(inner, down, offs=ends)

    options: dict[str, Any] = {"max_autotune": True, "max_autotune_gemm_backends": "TRITON"}
    return torch.compile(call, dynamic=False, options=options)


def call_of(way: str, moe: MixtureOfExperts, counts: list[int], device: str) -> Call:
    if way == "ours":
        load = torch.tensor(counts, device=device)
        return lambda rows, *_: moe._experts(rows, load)
    if way == "loop":
        return looped(moe, counts)
    return padded(moe, counts, device) if way == "padded" else torch_triton(moe, counts, device)


def results(call: Call, inputs: Sequence[torch.Tensor], upstream: torch.Tensor) -> list[torch.Tensor]:
    """The output and the gradients of rows and weights."""
    out = call(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream)]


def errors(found: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> list[float]:
    return [float((one.float() - other).norm() / other.norm()) for one, other in zip(found, exact, strict=True)]


def kernels_of(call: Callable[[], Any]) -> list[str]:
    """The three kernels of a call that take longest, by the beginnings of their names."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    events = sorted(seen.key_averages(), key=lambda event: -event.device_time_total)
    return [event.key[:90] for event in events[:3]]


def timed(call: Callable[[], Any], device: str, seconds: float) -> Timing:
    """At least 20 repeats."""
    found = time_call(call, device, budget_s=seconds)
    while found.repeats < _LEAST_REPEATS:
        seconds = max(2 * seconds, 1.5e-3 * _LEAST_REPEATS * found.ms)
        found = time_call(call, device, budget_s=seconds)
    return found


def measure(options: argparse.Namespace, tokens: int, experts: int, kind: str) -> Iterator[dict[str, Any]]:
    """A record for every way and pass, or one with "error" for a way that does not run or is wrong."""
    device, width, inner = options.device, options.width, options.inner
    generator = torch.Generator().manual_seed(options.seed)
    counts = loads(tokens * options.topk, experts, LARGEST[kind])
    counts = [counts[i] for i in torch.randperm(experts, generator=generator).tolist()]
    moe = MixtureOfExperts(
        hidden_size=width, intermediate_size=inner, num_experts=experts, num_experts_per_token=1, num_shared_experts=0
    ).to(device, torch.bfloat16)
    if device == "cuda":
        moe.activate = torch.compile(moe.activate, dynamic=True)  # type: ignore[method-assign]
    torch.manual_seed(options.seed)
    rows = torch.randn(sum(counts), width, device=device).bfloat16().requires_grad_()
    inputs = (rows, moe.gate_up, moe.down)
    upstream = torch.randn(sum(counts), width, device=device).bfloat16()
    exact_inputs = [tensor.detach().float().requires_grad_() for tensor in inputs]
    exact = results(looped(moe, counts), exact_inputs, upstream.float())
    del exact_inputs
    place = {"tokens": tokens, "rows": sum(counts), "experts": experts, "load": kind, "largest": max(counts)}
    for way in options.ways.split(","):
        try:
            call = call_of(way, moe, counts, device)
            off = errors(results(call, inputs, upstream), exact)
            if not max(off) <= _MOST_ERROR:
                raise ValueError(f"not timed, its results are wrong: {off}")
            forward = lambda call=call: call(*(tensor.detach() for tensor in inputs))  # noqa: E731
            both = lambda call=call: results(call, inputs, upstream)  # noqa: E731
            for name, run, passes in (("fwd", forward, 1), ("fwd_bwd", both, 3)):
                with torch.set_grad_enabled(name != "fwd"):
                    time = timed(run, device, options.seconds)
                    kernels = kernels_of(run) if device == "cuda" else []
                flops = passes * 6 * sum(counts) * width * inner
                speed = flops / time.ms * 1e3
                yield {
                    **place, "impl": way, "direction": name, "ms": time.ms, "ms_low": time.ms_low,
                    "ms_high": time.ms_high, "repeats": time.repeats, "tflops": speed / 1e12,
                    "peak_share": speed / PEAK_FLOPS, "peak_bytes": time.peak_bytes, "rel_error": off[0],
                    "rel_error_gradients": max(off[1:]), "kernels": kernels,
                }  # fmt: skip
        except Exception as error:
            yield {**place, "impl": way, "error": one_line(error)}


def line(record: dict[str, Any]) -> str:
    place = f"{record['tokens']:>7,} tokens {record['experts']:>3} experts {record['load']:<8} {record['impl']:<7}"
    if "error" in record:
        return f"{place} {record['error']}"
    return (
        f"{place} {record['direction']:<7} {record['ms']:8.3f} ms {record['tflops']:6.1f} TFLOP/s "
        f"{record['peak_share']:6.1%} error {record['rel_error']:.1e}, gradients {record['rel_error_gradients']:.1e}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    config = preset("moe_8b_a1b")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="32K,64K", help="of a card in a forward")
    parser.add_argument("--experts", default=f"{config.num_experts},{config.num_experts // 4}", help="of a card")
    parser.add_argument("--topk", type=int, default=config.num_experts_per_token, help="experts of a token")
    parser.add_argument("--width", type=int, default=config.hidden_size)
    parser.add_argument("--inner", type=int, default=config.moe_intermediate_size, help="width of an expert")
    parser.add_argument("--ways", default="ours,loop,padded", help=f"of {', '.join(WAYS)}")
    parser.add_argument("--loads", default="balanced,skewed")
    parser.add_argument("--seconds", type=float, default=1.0, help="for the repeats of a point")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, required=True, help="the JSON file")
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(given)
    if not set(options.ways.split(",")) <= set(WAYS) or not set(options.loads.split(",")) <= set(LARGEST):
        parser.error(f"--ways takes {', '.join(WAYS)}, --loads takes {', '.join(LARGEST)}")
    command = "python scripts/grouped_products.py " + shlex.join(given)
    sizes = {"width": options.width, "inner": options.inner, "topk": options.topk}
    meta = run_metadata(command, options.seed, device=options.device, dtype="bfloat16", cache="cold", **sizes)
    records: list[dict[str, Any]] = []
    for tokens in parse_sizes(options.tokens, "--tokens"):
        for experts in [parse_size(text, "--experts") for text in options.experts.split(",")]:
            for kind in options.loads.split(","):
                for record in measure(options, tokens, experts, kind):
                    records.append(record)
                    sys.stdout.write(line(record) + "\n")
                    sys.stdout.flush()
                    write_json(options.output, {"meta": meta, "records": records})
    return 0


if __name__ == "__main__":
    sys.exit(main())
