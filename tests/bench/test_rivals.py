"""Other sparse attention in the operator benchmark: each equals dense attention, and what is not installed says so."""

import io
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from rich.console import Console

from hsa_ultralong import ops as operators
from hsa_ultralong.bench import rival_calls
from hsa_ultralong.bench.guard import Guard
from hsa_ultralong.bench.ops import measure, run_ops
from hsa_ultralong.bench.ops_report import _CURVES, plot_ops, tables
from hsa_ultralong.bench.points import Settings
from hsa_ultralong.bench.rival_calls import implementations, missing, reading_lists
from hsa_ultralong.bench.rival_checks import check_rival, reference_of
from hsa_ultralong.bench.rivals import RIVAL_OPS, pairs_read, rival_points
from hsa_ultralong.bench.selections import random_lists
from hsa_ultralong.eval.metadata import run_metadata

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
        ("fla", ()), ("fla.ops", ()), ("fla.ops.nsa", (parallel_nsa,)), ("fla.ops.moba", (parallel_moba,)),
        ("flash_attn", (flash_attn_func,)),
    ):  # fmt: skip
        module = ModuleType(name)
        for function in functions:
            setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, name, module)
    return settings


@pytest.mark.parametrize(
    ("op", "impl"),
    [("selected", "fla"), ("nsa", "fla"), ("moba", "fla"), ("window", "flash_attn"), ("full_attention", "flash_attn")],
)
def test_other_packages_are_called_as_they_want_to_be(packages, op, impl):
    assert check_rival(op, impl, packages) is None


def test_a_missing_package_is_one_failure_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr(rival_calls, "find_spec", lambda name: None)
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
    assert {failure["error"] for failure in result["meta"]["failures"]} == {
        f"RuntimeError: {impl} is measured on a GPU only" for impl in ("fla", "flex", "flash_attn")
    }
    result["records"] += [{**one, "impl": "fla"} for one in result["records"] if one["op"] in RIVAL_OPS]
    console = Console(width=100, record=True, file=io.StringIO())
    for table in tables(result):
        console.print(table)
    text = console.export_text()
    assert "Rivals" in text and "nsa fla" in text and "selected torch" in text and "…" not in text
    plot_ops(result, tmp_path / "ops.png")
    assert (tmp_path / "ops.png").read_bytes().startswith(b"\x89PNG")
