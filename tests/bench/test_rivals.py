"""Other sparse attention in the operator benchmark: each equals dense attention, and what is not installed says so."""

import io
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

from hsa_ultralong import ops as operators
from hsa_ultralong.bench import flash_stand_in, rival_calls
from hsa_ultralong.bench.guard import Guard
from hsa_ultralong.bench.ops import measure, run_ops
from hsa_ultralong.bench.ops_report import _CURVES, plot_ops, read_benchmark, select, tables, with_retrieval
from hsa_ultralong.bench.points import Settings
from hsa_ultralong.bench.rival_calls import implementations, missing, reading_lists
from hsa_ultralong.bench.rival_checks import check_rival, reference_of
from hsa_ultralong.bench.rivals import RIVAL_OPS, pairs_read, rival_points
from hsa_ultralong.bench.selections import random_lists
from hsa_ultralong.eval.metadata import run_metadata

ROOT = Path(__file__).resolve().parents[2]
ALL = ("selected", "nsa", "moba", "window", "full_attention")


def tiny(**changes):
    fields = {
        "lengths": (16, 64), "topks": (3,), "decode_chunks": (8,), "device": "cpu", "dtype": torch.float32, "Hq": 4,
        "Hkv": 1, "D": 8, "S": 4, "R": 8, "window": 5, "budget_s": 0.0,
    }  # fmt: skip
    return Settings(**{**fields, **changes})


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize(("op", "impl"), [("selected", "torch"), ("selected", "flex"), ("nsa", "torch"),
                                          ("moba", "torch"), ("window", "flex")])  # fmt: skip
def test_what_runs_on_a_cpu_equals_dense_attention(op, impl, heads):
    assert check_rival(op, impl, tiny(Hkv=heads)) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(("op", "impl"), [(op, impl) for op in ALL for impl in implementations(op, Settings())])
def test_what_is_installed_equals_dense_attention_on_a_gpu(op, impl):
    settings = Settings(lengths=(1024,))
    reason = missing(op, impl, settings)
    if reason is not None:
        pytest.skip(reason)
    assert check_rival(op, impl, settings) is None


def dense(op, settings, q, lists):
    return reference_of(op, settings, torch.zeros(q.shape[1], 1) if lists is None else lists)


@pytest.fixture
def packages(monkeypatch):
    """Packages with the signatures of flash-linear-attention 0.6.0 and flash-attn 2.8, whose kernels are dense."""
    settings = tiny(Hq=16)

    def parallel_nsa(
        q, k, v, g_cmp=None, g_slc=None, g_swa=None, block_indices=None, block_counts=16, block_size=64,
        window_size=0, scale=None, cu_seqlens=None,
    ):  # fmt: skip
        assert q.shape[2] % (16 * k.shape[2]) == 0 and block_size == settings.S and window_size == 0
        if block_indices is None:
            assert g_cmp.shape == g_slc.shape == q.shape[:3] and (g_cmp == 1).all()
            return dense("nsa", settings, q, None)(q, k, v)
        assert block_indices.shape == (*q.shape[:2], k.shape[2], block_counts) and block_indices.is_contiguous()
        return dense("selected", settings, q, block_indices[0, :, 0])(q, k, v)

    def parallel_moba(q, k, v, cu_seqlens, max_seqlen, chunk_size, topk):
        assert q.shape == k.shape == v.shape and cu_seqlens.tolist() == [0, max_seqlen] and topk >= 1
        assert cu_seqlens.dtype == torch.int32 and chunk_size == settings.S
        return dense("moba", settings, q, None)(q, k, v)

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), **rest):
        assert causal and window_size in ((-1, -1), (settings.window - 1, 0))
        return dense("window" if window_size[1] == 0 else "full_attention", settings, q, None)(q, k, v)

    for name, functions in (
        ("fla", ()), ("fla.ops", ()), ("fla.ops.nsa", (parallel_nsa,)), ("fla.ops.moba", ()),
        ("fla.ops.moba.parallel", (parallel_moba,)), ("flash_attn", (flash_attn_func,)),
    ):  # fmt: skip
        module = ModuleType(name)
        for function in functions:
            setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)
    monkeypatch.setattr(flash_stand_in, "is_needed", lambda: True)
    return settings


@pytest.mark.parametrize(
    ("op", "impl"),
    [("selected", "fla"), ("nsa", "fla"), ("moba", "fla"), ("window", "flash_attn"), ("full_attention", "flash_attn")],
)
def test_other_packages_are_called_as_they_want_to_be(packages, op, impl):
    assert check_rival(op, impl, packages) is None


def test_moba_of_fla_gets_what_it_did_not_find_and_its_record_says_so(packages, monkeypatch):
    moba = sys.modules["fla.ops.moba.parallel"]
    assert check_rival("moba", "fla", packages) is None
    assert moba._flash_attn_varlen_forward is flash_stand_in.varlen_forward
    own = SimpleNamespace(flash_attn_varlen_func=1, _flash_attn_varlen_forward=2, _flash_attn_varlen_backward=3)
    flash_stand_in.lend_to(own)
    assert vars(own) == {
        "flash_attn_varlen_func": 1, "_flash_attn_varlen_forward": 2, "_flash_attn_varlen_backward": 3
    }  # fmt: skip
    monkeypatch.setattr(rival_calls, "find_spec", lambda name: name)
    (point, *_) = [one for one in rival_points("moba", Settings(lengths=(1024,))) if one.impl == "fla"]
    assert point.record(packages)["flash_attn"] == "torch"


PACKED = ([0, 64, 128, 150], [0, 64, 70, 128])


def packed(device, dtype=torch.bfloat16, ends=PACKED, heads=2, size=64):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, heads, size, generator=generator) for n in (ends[0][-1], ends[1][-1], ends[1][-1]))
    cu = [torch.tensor(one, dtype=torch.int32, device=device) for one in ends]
    return [x.to(device, dtype) for x in (q, k, v)], (*cu, 64, 64, 0.0, 0.125)


def dense_packed(q, k, v, ends, is_causal):
    """Output and logsumexp (H, queries) of attention inside each sequence."""
    outs, sums = [], []
    for a, b, c, d in zip(ends[0], ends[0][1:], ends[1], ends[1][1:]):
        scores = torch.einsum("thd,nhd->htn", q[a:b], k[c:d]) * 0.125
        if is_causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
        outs.append(torch.einsum("htn,nhd->thd", scores.softmax(-1), v[c:d]))
        sums.append(scores.logsumexp(-1))
    return torch.cat(outs), torch.cat(sums, 1)


def test_the_stand_in_calls_torchs_kernels_as_they_are_declared():
    (q, k, v), lengths = packed("meta")
    out, logsumexp, _, _ = flash_stand_in.varlen_forward(q, k, v, *lengths, causal=False)
    assert out.shape == q.shape and logsumexp.shape == (2, 150) and logsumexp.dtype == torch.float32
    grads = [torch.empty_like(x) for x in (q, k, v)]
    flash_stand_in.varlen_backward(
        out, q, k, v, out, logsumexp, *grads, *lengths, causal=False, window_size_left=-1, window_size_right=-1,
        softcap=0.0, alibi_slopes=None, deterministic=True,
    )  # fmt: skip
    assert [x.shape for x in grads] == [x.shape for x in (q, k, v)]
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(NotImplementedError, match="plain attention only"):
        flash_stand_in.varlen_backward(out, q, k, v, out, logsumexp, *grads, *lengths, causal=False, softcap=1.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_stand_in_equals_dense_attention_on_a_gpu(is_causal):
    ends = (PACKED[0], PACKED[0]) if is_causal else PACKED
    (q, k, v), lengths = packed("cuda", ends=ends)
    out, logsumexp, _, _ = flash_stand_in.varlen_forward(q, k, v, *lengths, causal=is_causal)
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    want, sums = dense_packed(*wide, ends, is_causal)
    upstream = torch.randn_like(out)
    exact = torch.autograd.grad(want, wide, upstream.double())
    found = [torch.empty_like(x) for x in (q, k, v)]
    flash_stand_in.varlen_backward(
        upstream, q, k, v, out, logsumexp, *found, *lengths, causal=is_causal, deterministic=True
    )  # fmt: skip
    assert (logsumexp.double() - sums).abs().max() < 1e-4
    for got, wanted in zip((out, *found), (want, *exact), strict=True):
        assert (got.double() - wanted).norm() < 1e-2 * wanted.norm()


@pytest.fixture
def dense_kernels(monkeypatch):
    """torch's two kernels of packed attention by autograd in fp64, for a CPU."""

    def forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout, is_causal, has_mask, *, scale):
        ends = (cu_q.tolist(), cu_k.tolist())
        assert scale is None or scale == q.shape[-1] ** -0.5
        out, sums = dense_packed(q.double() * 8 * q.shape[-1] ** -0.5, k.double(), v.double(), ends, is_causal)
        return out.to(q.dtype), sums.float(), None, None, None

    def backward(dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, is_causal, state, unused, *, scale):
        # the logsumexp may be that of more keys than these: weights are exp(score - lse), the rest is as usual
        grads = [torch.zeros_like(x) for x in (q, k, v)]
        for a, b, c, d in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:]):
            scores = torch.einsum("thd,nhd->htn", q[a:b], k[c:d]) * scale
            if is_causal:
                scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
            weights = (scores - lse[:, a:b, None]).exp()
            change = torch.einsum("thd,nhd->htn", dout[a:b], v[c:d]) - (dout[a:b] * out[a:b]).sum(-1).t()[..., None]
            grads[0][a:b] = torch.einsum("htn,nhd->thd", weights * change, k[c:d]) * scale
            grads[1][c:d] = torch.einsum("htn,thd->nhd", weights * change, q[a:b]) * scale
            grads[2][c:d] = torch.einsum("htn,thd->nhd", weights, dout[a:b])
        return grads

    kernels = {"_flash_attention_forward": forward, "_flash_attention_backward": backward}
    monkeypatch.setattr(flash_stand_in, "_kernel", kernels.__getitem__)


def test_moba_of_fla_with_the_stand_in_equals_dense_attention_and_our_own(dense_kernels):
    pytest.importorskip("fla", reason="flash-linear-attention is not installed")
    settings = tiny(Hkv=2)
    assert check_rival("moba", "fla", settings) is None
    inputs = [torch.randn(1, 64, count, 8, generator=torch.Generator().manual_seed(count)) for count in (4, 2, 2)]
    found, ours = (rival_calls.forward_of("moba", impl, settings, 64, 3)(*inputs) for impl in ("fla", "torch"))
    torch.testing.assert_close(found, ours, rtol=1e-5, atol=1e-5)


def test_every_mask_of_flex_attention_is_compiled_anew(monkeypatch):
    resets = []
    monkeypatch.setattr(torch._dynamo, "reset", lambda: resets.append(1))
    for _ in range(3):
        rival_calls._flex_kernel("cuda")
    assert len(resets) == 3


def test_a_missing_package_is_one_failure_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr(rival_calls, "find_spec", lambda name: None)
    monkeypatch.setattr(flash_stand_in, "is_possible", lambda: False)
    settings = Settings(lengths=(1024, 2048))
    for op, impl, words in (
        ("nsa", "fla", "pip install flash-linear-attention"),
        ("moba", "fla", "pip install flash-linear-attention flash-attn"),
        ("window", "flash_attn", "pip install flash-attn"),
    ):
        points = [one for one in rival_points(op, settings) if one.impl == impl]
        assert len(points) == 1 and points[0].check() is None
        assert measure(points[0], settings)["error"] == f"RuntimeError: not installed: {words}"
    monkeypatch.setattr(rival_calls, "find_spec", lambda name: name)
    assert missing("nsa", "fla", settings) is None and missing("moba", "fla", settings) is None
    assert "groups of 16, 32, ... heads, got 4" in missing("nsa", "fla", Settings(Hq=4))
    assert "GPU only" in missing("full_attention", "flash_attn", tiny())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("op", [*RIVAL_OPS, "window", "full_attention"])
def test_every_implementation_has_a_curve(op, device):
    drawn = {(fields["op"], fields["impl"]) for *_, fields in _CURVES}
    assert {(op, impl) for impl in implementations(op, tiny(device=device))} <= drawn


def test_a_rival_that_reads_other_chunks_is_not_timed(monkeypatch):
    monkeypatch.setattr(rival_calls, "selected_attention", lambda q, k, v, chosen, **options: q * k + v)
    (point, *_) = rival_points("selected", tiny(), lambda *_: random_lists(64, 3, 4))
    guard = Guard(operators, tiny())
    assert "not timed, its results are wrong: o is off" in guard.refusal(point)
    assert guard.verdicts.keys() == {("selected", "torch")}


def test_lists_have_the_tokens_own_chunk_first_and_as_many_in_all():
    lists = random_lists(64, 3, 4)
    read = reading_lists(lists, 4)
    assert read.shape == lists.shape and read.dtype == lists.dtype
    assert (read[:, 0] == np.arange(64) // 4).all() and (read[:, 1:] == lists[:, :2]).all()


@pytest.mark.parametrize("op", ALL)
def test_pairs_are_those_of_the_dense_mask(op):
    settings = tiny()
    lists = torch.from_numpy(reading_lists(random_lists(30, 3, 4), 4))
    chosen = lists.numpy() if op == "selected" else None
    eye = torch.eye(30).view(1, 30, 1, 30)
    weights = reference_of(op, settings, lists)(torch.zeros(1, 30, 1, 30), torch.zeros(1, 30, 1, 30), eye)
    count = (weights[0, :, 0] > 0).sum() if op != "nsa" else None
    topk = 8  # every chunk: what chooses reads all
    want = sum(t + 1 for t in range(30)) + sum((t + 1) // 4 for t in range(30)) if op == "nsa" else count
    assert pairs_read(op, settings, 30, topk, chosen) == want


def test_they_stand_in_the_records_the_table_and_the_figure(tmp_path):
    settings = tiny(lengths=(16,))
    wanted = ("hsa", "window", *RIVAL_OPS, "chunk_topk")
    result = run_ops(operators, settings, run_metadata("hsa bench ops", 0), ops=wanted)
    found = {(one["op"], one["impl"], one["direction"]) for one in result["records"]}
    assert {("selected", "torch", "fwd_bwd"), ("nsa", "torch", "fwd"), ("moba", "torch", "fwd_bwd")} <= found
    nsa = next(one for one in result["records"] if one["op"] == "nsa")
    assert (nsa["S"], nsa["K"], nsa["C"]) == (4, 3, 4)
    assert result["meta"]["failures"] == [] and len(result["meta"]["left_out"]) == 6
    # by name it is tried, and says why it cannot be
    asked = run_ops(operators, settings, run_metadata("hsa bench ops", 0), ops=("window:flex",))
    assert [one["error"] for one in asked["meta"]["failures"]] == ["RuntimeError: flex is measured on a GPU only"]
    result["records"] += [{**one, "impl": "fla"} for one in result["records"] if one["op"] in RIVAL_OPS]
    console = Console(width=100, record=True, file=io.StringIO())
    for table in tables(result):
        console.print(table)
    text = console.export_text()
    assert "Rivals" in text and "nsa fla" in text and "selected torch" in text and "…" not in text
    plot_ops(result, tmp_path / "ops.png")
    assert (tmp_path / "ops.png").read_bytes().startswith(b"\x89PNG")


def test_what_chooses_has_hsa_with_its_retrieval_beside_it():
    fields = {"impl": "triton", "T": 64, "K": 3, "direction": "fwd", "ms_low": 1.0, "ms_high": 3.0}
    hsa = {**fields, "op": "hsa", "ms": 2.0, "selection": "shared"}
    retrieval = {**fields, "op": "chunk_topk", "ms": 0.5, "selection": "none"}
    others = [{**retrieval, "impl": "torch"}, {**retrieval, "T": 128}, {**retrieval, "direction": "fwd_bwd"}]
    moba = {**fields, "op": "moba", "impl": "fla", "ms": 9.0, "selection": "none"}
    assert with_retrieval([hsa, retrieval]) == []
    (both,) = with_retrieval([hsa, retrieval, *others, moba])
    assert both == {**hsa, "op": "hsa + chunk_topk", "ms": 2.5, "ms_low": 2.0, "ms_high": 6.0}


def test_the_page_shows_the_times_of_the_published_run():
    """The rows of docs/kernels.md whose ratios are told: forward (forward and backward)."""
    records = read_benchmark(ROOT / "benchmarks" / "results" / "rivals" / "ops-h200.json")["records"]
    records += with_retrieval(records)
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8").split("## Rivals on the same card")[1]
    rows = {
        "HSA with retrieval, shared lists": {"op": "hsa + chunk_topk", "selection": "shared"},
        "the same, random lists": {"op": "hsa + chunk_topk", "selection": "random"},
        "full attention, cuDNN": {"op": "full_attention", "impl": "cudnn"},
        "NSA of flash-linear-attention": {"op": "nsa"},
        "MoBA of flash-linear-attention": {"op": "moba"},
        "window of 512, our kernels": {"op": "window", "impl": "triton"},
    }
    for name, fields in rows.items():
        line = next(line for line in page.splitlines() if line.startswith(f"| {name} |"))
        shown = [float(number) for number in re.findall(r"[\d.]+", line.removeprefix(f"| {name} |"))]
        found = [select(records, direction=one, **fields) for one in ("fwd", "fwd_bwd")]
        times = [one["ms"] for pair in zip(*found, strict=True) for one in pair]
        assert len(times) == 10 and shown == pytest.approx(times, rel=0.006, abs=0.006), name
