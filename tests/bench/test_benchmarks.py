"""The operator benchmark: selections by their definition, records, refusal of wrong kernels, tables and figure."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

from hsa_ultralong import ops as operators
from hsa_ultralong.bench.guard import Guard, check_attention, check_retrieval
from hsa_ultralong.bench.ops import OPS, measure, run_ops
from hsa_ultralong.bench.ops_report import plot_ops, read_benchmark, short_hardware, tables
from hsa_ultralong.bench.points import Point, Settings, directed, visible_chunks, visible_keys
from hsa_ultralong.bench.retrieval import unfused_topk
from hsa_ultralong.bench.selections import (
    KEEP,
    RESTART,
    mean_union,
    random_lists,
    recorded_lists,
    shared_lists,
)
from hsa_ultralong.bench.timing import num_repeats, quantile, time_call
from hsa_ultralong.cli import figures
from hsa_ultralong.eval.metadata import run_metadata
from hsa_ultralong.testing.factories import random_tokens, tiny_model
from hsa_ultralong.testing.graphs import EagerCapture
from hsa_ultralong.train.graphs import CudaCapture

FIELDS = {
    "op", "impl", "direction", "selection", "T", "K", "C", "Hq", "Hkv", "D", "S", "R", "dtype", "ms", "ms_low",
    "ms_high", "peak_bytes", "flops", "bytes",
}  # fmt: skip


def tiny_settings(**changes):
    fields = {
        "lengths": (16, 64), "topks": (2, 3), "decode_chunks": (8,), "device": "cpu", "dtype": torch.float32, "Hq": 4,
        "Hkv": 1, "D": 8, "S": 4, "R": 8, "window": 5, "budget_s": 0.0,
    }  # fmt: skip
    return Settings(**{**fields, **changes})


@pytest.fixture(scope="module")
def shared():
    return shared_lists(32_768, 32, 64)


@pytest.fixture(scope="module")
def result():
    meta = run_metadata("hsa bench ops", 0, hardware_name="h200")
    return run_ops(operators, tiny_settings(), meta)


def assert_lists_are_sound(lists, chunk_size):
    visible = np.arange(len(lists)) // chunk_size
    assert lists.dtype == np.int32
    assert ((lists >= 0).sum(-1) == np.minimum(visible, lists.shape[1])).all()
    assert (lists < np.maximum(visible, 1)[:, None]).all()
    falling = np.diff(lists, axis=-1) < 0
    assert (falling | (lists[:, 1:] == -1)).all()


@pytest.mark.parametrize("draw", [random_lists, shared_lists])
@pytest.mark.parametrize(("tokens", "topk", "size"), [(700, 5, 4), (513, 32, 64), (3, 2, 4), (100, 40, 4)])
def test_lists_hold_distinct_visible_chunks_newest_first(draw, tokens, topk, size):
    assert_lists_are_sound(draw(tokens, topk, size), size)


@pytest.mark.parametrize("draw", [random_lists, shared_lists])
def test_lists_do_not_depend_on_the_length_and_depend_on_the_seed(draw):
    assert np.array_equal(draw(600, 4, 4), draw(6000, 4, 4)[:600])
    assert not np.array_equal(draw(600, 4, 4), draw(600, 4, 4, seed=1))


def kept_share(lists, tokens):
    """Mean share of the lists of `tokens` that the token before also has."""
    return np.mean([np.isin(lists[t], lists[t - 1]).mean() for t in tokens])


def test_shared_lists_keep_nine_of_ten_chunks_and_restart_at_multiples_of_512(shared):
    assert_lists_are_sound(shared, 64)
    restarts = np.arange(16_384, 32_768, RESTART)
    inner = np.setdiff1d(np.arange(20_000, 24_000), restarts)
    # what is dropped may be drawn again, rarely: 3.2 of 400 chunks
    assert kept_share(shared, inner) == pytest.approx(KEEP, abs=0.01)
    assert kept_share(shared, restarts) < 0.2


def test_shared_unions_are_those_of_the_definition(shared):
    late = shared[16_384:]
    assert [mean_union(late, count) for count in (4, 8, 16)] == pytest.approx([41, 53, 78], abs=1.5)


def test_random_lists_are_uniform_over_the_visible_chunks():
    lists = random_lists(8192, 4, 4)[4096:]
    assert (lists[:, 0] - lists[:, -1]).mean() == pytest.approx(0.6 * 1536, rel=0.05)
    counts = np.bincount(lists.ravel() // 64, minlength=16)[:16]
    assert counts.std() < 0.1 * counts.mean()


def test_recorded_lists_are_what_the_model_selects_and_leave_it_as_it_was():
    model = tiny_model()
    tokens = random_tokens(1, 30)[0]
    lists = recorded_lists(model, tokens, 2)
    assert_lists_are_sound(lists, model.config.chunk_size)
    assert model.config.chunk_topk == 3 and not model.training
    assert not np.array_equal(lists, recorded_lists(tiny_model(seed=1), tokens, 2))
    with pytest.raises(ValueError, match="no retrieval"):
        recorded_lists(torch.nn.Linear(2, 2), tokens, 2)


def test_recorded_lists_are_measured_like_the_others():
    from hsa_ultralong.bench.ops import ListStore

    store = ListStore(tiny_settings(), lambda topk: random_lists(20, topk, 4))
    assert store("recorded", 16, 2).shape == (16, 2)
    assert store("recorded", 64, 2) is None
    broken = ListStore(tiny_settings(), lambda topk: 1 // 0)
    assert broken("recorded", 16, 2) is None and "ZeroDivisionError" in broken.failures[0]["error"]


def test_counts_of_visible_keys_and_chunks_equal_their_sums():
    assert visible_keys(50) == sum(t + 1 for t in range(50))
    assert visible_keys(50, 7) == sum(min(7, t + 1) for t in range(50))
    assert visible_chunks(50, 4) == sum(t // 4 for t in range(50))


def test_quantiles_and_repeats():
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([1.0, 2.0], 0.2) == pytest.approx(1.2)
    assert num_repeats(1000.0, 0.25) == 3 and num_repeats(1.0, 0.1) == 100 and num_repeats(0.0, 1.0) == 200


def test_a_call_is_warmed_up_and_repeated_at_least_three_times():
    calls = []
    timing = time_call(lambda: calls.append(1), "cpu", budget_s=0.0)
    assert timing.repeats == 3 and len(calls) == 5
    assert 0 <= timing.ms_low <= timing.ms <= timing.ms_high


def test_forward_and_backward_gives_the_gradient_of_every_input():
    a, b = torch.randn(3, 4), torch.randn(4, 2)
    first, second = directed(torch.matmul, [a, b], "fwd_bwd")()
    assert first.shape == a.shape and second.shape == b.shape
    assert torch.equal(directed(torch.matmul, [a, b], "fwd")(), a @ b)


def test_the_unfused_baseline_selects_what_chunk_topk_selects():
    query, landmarks = torch.randn(32, 8), torch.randn(8, 8)
    visible = operators.ChunkVisibility.causal(1, 32, 8, 4)
    _, want = operators.chunk_topk(query[None, :, None], landmarks[None, :, None], visible, topk=3, impl="reference")
    got = unfused_topk(query, landmarks, ~visible.mask()[0], 3)
    full = slice(12, None)  # tokens that see three chunks and more
    assert torch.allclose(got[full].sort(-1).values, want[0, full, 0].sort(-1).values, atol=1e-5)


def test_every_record_has_the_fields_of_the_results_page(result):
    records = result["records"]
    assert result["meta"]["failures"] == []
    assert {"full_attention:flash_attn", "nsa:fla", "window:flex"} <= set(result["meta"]["left_out"])
    for record in records:
        assert set(record) >= FIELDS
        assert record["ms"] > 0 and record["ms_low"] <= record["ms"] <= record["ms_high"]
    assert {record["op"] for record in records} == {
        "hsa", "full_attention", "window", "selected", "nsa", "moba", "chunk_topk", "decode_topk", "decode_hsa", "copy",
        "read",
    }  # fmt: skip
    (hsa,) = [r for r in records if (r["op"], r["impl"], r["direction"], r["T"]) == ("hsa", "torch_gather", "fwd", 16)]
    # K = 2, S = 4: tokens 4..7 see one chunk, 8..15 two
    assert hsa["flops"] == 4 * 4 * 8 * 4 * (4 * 1 + 8 * 2)
    assert (hsa["K"], hsa["C"], hsa["selection"], hsa["dtype"]) == (2, 4, "shared", "fp32")


def test_a_failing_operator_is_noted_and_the_run_goes_on(tmp_path):
    def fail(*arguments, **options):
        raise RuntimeError("out of\nmemory")

    broken = SimpleNamespace(**{**vars(operators), "hsa_attention": fail})
    path = tmp_path / "ops-test.json"
    result = run_ops(broken, tiny_settings(lengths=(16,)), run_metadata("test", 0), ops=("hsa", "window"), path=path)
    assert {failure["op"] for failure in result["meta"]["failures"]} == {"hsa"}
    assert result["meta"]["failures"][0]["error"] == "RuntimeError: out of memory"
    assert {(record["op"], record["impl"]) for record in result["records"]} == {("window", "torch")}
    assert json.loads(path.read_text()) == result


def test_the_file_is_written_after_every_operator(tmp_path):
    path, seen = tmp_path / "ops-test.json", []

    def stop(found):
        seen.append(found["op"])
        if found["op"] == "window":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        settings = tiny_settings(lengths=(16,))
        run_ops(
            operators, settings, run_metadata("test", 0), ops=("full_attention", "window"), path=path, progress=stop
        )
    assert [record["op"] for record in read_benchmark(path)["records"]] == ["full_attention"] * 2 + ["window"]


def test_one_implementation_alone_in_the_order_given_until_the_time_is_over(tmp_path):
    path, settings = tmp_path / "ops.json", tiny_settings(lengths=(16,))
    wanted = ("full_attention:sdpa", "hsa:torch_dense")
    result = run_ops(operators, settings, run_metadata("test", 0), ops=wanted, path=path)
    found = [(one["op"], one["impl"], one["direction"]) for one in result["records"]]
    assert found == [(*entry.split(":"), way) for entry in wanted for way in ("fwd", "fwd_bwd")]
    late = run_ops(operators, settings, run_metadata("test", 0), ops=wanted, path=path, minutes=-1)
    assert late["records"] == [] == read_benchmark(path)["records"]
    assert late["meta"]["stopped_before"].startswith("full_attention sdpa fwd T=16, after")
    other = run_ops(operators, settings, run_metadata("test", 0), ops=("hsa:cudnn", "hsa:torch_dense"), path=path)
    assert [one["impl"] for one in other["meta"]["failures"]] == ["cudnn"] and len(read_benchmark(path)["records"]) == 2
    with pytest.raises(ValueError, match="flash_attn alone; got none"):
        run_ops(operators, settings, {}, ops=("hsa:",))


def test_by_graphs_every_point_is_captured_after_a_few_calls_and_says_so():
    """On a CPU, where a stand-in runs what a graph would."""
    EagerCapture.reset()
    settings = tiny_settings(lengths=(16,), make_capture=EagerCapture)
    result = run_ops(operators, settings, run_metadata("test", 0), ops=("hsa", "full_attention", "decode"))
    records = result["records"]
    assert result["meta"]["graphs"] is True and all(record["graph"] is True for record in records)
    # grouped and expanded heads of full attention are tried by graphs too
    assert EagerCapture.captured == len(records) + 2 * len([one for one in records if one["op"] == "full_attention"])
    assert EagerCapture.waited == [True, True, False] * EagerCapture.captured
    assert EagerCapture.replayed >= 4 * EagerCapture.captured, "what is timed is replayed"
    assert {table.title.endswith(", CUDA graphs") for table in tables(result)} == {True}


def test_without_graphs_nothing_says_graphs(result):
    assert "graphs" not in result["meta"] and not any("graph" in record for record in result["records"])
    assert not any("graphs" in table.title for table in tables(result))


def test_what_no_graph_holds_is_a_failed_point_and_the_run_goes_on():
    capturing = []

    class Capture(EagerCapture):
        """Ends a failed capture by an error that hides the reason, as CUDA does."""

        def __call__(self, function):
            capturing.append(1)
            try:
                function()
            except RuntimeError:
                raise ValueError("the capture was spoiled") from None
            finally:
                capturing.clear()
            return super().__call__(function)

    def asks(*arguments, **options):
        if capturing:
            raise RuntimeError("not permitted\nwhen capturing")
        return operators.hsa_attention(*arguments, **options)

    asking = SimpleNamespace(**{**vars(operators), "hsa_attention": asks})
    settings = tiny_settings(lengths=(16,), make_capture=Capture)
    result = run_ops(asking, settings, run_metadata("test", 0), ops=("hsa", "window:torch"))
    errors = [failure["error"] for failure in result["meta"]["failures"]]
    assert len(errors) == 4 and set(errors) == {
        "RuntimeError: no CUDA graph holds it: RuntimeError: not permitted when capturing"
    }
    assert [record["op"] for record in result["records"]] == ["window", "window"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_points_are_replayed_and_a_spoiled_capture_harms_no_later_one():
    settings = Settings(
        lengths=(1024,), topks=(8,), decode_chunks=(64,), budget_s=0.01, make_capture=CudaCapture
    )  # fmt: skip
    values = torch.randn(1000, device="cuda")
    stream, mode = torch.cuda.current_stream(), torch.cuda.get_sync_debug_mode()

    def asks():
        return values.sum().item()

    def asks_in_capture():
        return asks() if torch.cuda.is_current_stream_capturing() else values.sum()

    def wanted():
        ops = ("hsa:triton", "chunk_topk:triton", "chunk_topk:unfused", "full_attention:cudnn", "decode:triton")
        return run_ops(operators, settings, run_metadata("test", 0), ops=ops)

    before = wanted()
    assert not before["meta"]["failures"] and all(record["graph"] and record["ms"] > 0 for record in before["records"])
    for call, words in ((asks, "synchronizing"), (asks_in_capture, "captur"), (asks_in_capture, "captur")):
        failed = measure(Point("hsa", "triton", "fwd", 1024, lambda call=call: call), settings)
        assert failed["error"].startswith("RuntimeError: no CUDA graph holds it: ") and words in failed["error"]
        # the stream, the mode, the allocator and the random numbers are as before
        assert torch.cuda.current_stream() == stream and torch.cuda.get_sync_debug_mode() == mode
        torch.cuda.empty_cache()
        torch.randn(10, device="cuda")
    again = wanted()
    assert not again["meta"]["failures"] and len(again["records"]) == len(before["records"])


def test_unknown_operators_and_lengths_below_a_chunk_are_refused():
    with pytest.raises(ValueError, match=f"{', '.join(OPS)}; got wrong"):
        run_ops(operators, tiny_settings(), {}, ops=("wrong",))
    with pytest.raises(ValueError, match="at least one chunk of 4"):
        run_ops(operators, tiny_settings(lengths=(3, 16)), {})


def test_right_operators_pass_their_check():
    settings = tiny_settings()
    assert check_attention(operators, settings, "torch_gather") is None
    assert check_attention(operators, settings, "torch_dense") is None
    assert check_retrieval(operators, settings, "torch") is None


def test_a_wrong_triton_operator_is_not_timed():
    calls = []

    def slightly_off(*arguments, impl, **options):
        calls.append(impl)
        out = operators.hsa_attention(*arguments, impl="reference", **options)
        return out * 1.001 if impl == "triton" else out

    point = Point("hsa", "triton", "fwd", 16, lambda: lambda: None)
    guard = Guard(SimpleNamespace(hsa_attention=slightly_off), tiny_settings())
    assert "results are wrong: o is off by 1.00e-03" in guard.refusal(point)
    count = len(calls)
    assert guard.refusal(point) and len(calls) == count, "the check runs once"
    missing = Guard(operators, tiny_settings())
    missing.operators = SimpleNamespace()
    assert "its check failed" in missing.refusal(point)
    assert guard.refusal(Point("full_attention", "cudnn", "fwd", 16, lambda: lambda: None)) is None


def test_a_retrieval_that_selects_other_chunks_is_not_timed():
    def wrong(*arguments, impl, **options):
        indices, scores = operators.chunk_topk(*arguments, impl="reference", **options)
        return (indices.flip(-1) if impl == "triton" else indices), scores

    fake = SimpleNamespace(chunk_topk=wrong, ChunkVisibility=operators.ChunkVisibility)
    assert "select other chunks" in check_retrieval(fake, tiny_settings())


def with_kernels(result):
    """The same results as if the torch path had been the kernels, on a card whose rates are known."""
    records = []
    for record in result["records"]:
        records.append(record)
        if record["op"] == "hsa":
            records += [{**record, "impl": "triton", "selection": name} for name in ("shared", "random", "recorded")]
        if record["op"] == "full_attention":
            records += [{**record, "impl": name} for name in ("cudnn", "flash")]
    return {"meta": {**result["meta"], "hardware": "NVIDIA H200"}, "records": records}


def test_tables_show_every_length_and_a_ratio(result):
    console = Console(width=80, record=True, file=io.StringIO())
    for table in tables(with_kernels(result)):
        console.print(table)
    text = console.export_text()
    assert "forward and backward" in text and "x shared" in text and "decode_topk torch" in text
    assert "…" not in text, "a column is cut off at 80 characters"


def test_the_figure_is_drawn_from_the_file_alone(result, tmp_path):
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    source = folder / "ops-h200.json"
    source.write_text(json.dumps(with_kernels(result)))
    assert figures.benchmark_figures(tmp_path) == [
        ("benchmarks/results/ops-h200.json", "benchmarks/results/ops-h200.png", "ops", "")
    ]
    figures.draw(source, source.with_suffix(".png"), "ops", "")
    assert source.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_ops({"meta": result["meta"], "records": []}, tmp_path / "empty.png")
    source.write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object"):
        read_benchmark(source)


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200 x2", "h200x2"),
        ("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz, 2 cores", "cpu2"),
    ],
)
def test_hardware_names_are_short(name, short):
    assert short_hardware(name) == short
