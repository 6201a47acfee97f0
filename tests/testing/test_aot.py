"""Triton kernels are compiled for Hopper without a GPU: launches are recorded, compiled, and their costs read."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from hsa_ultralong.testing import aot
from hsa_ultralong.testing.aot import Launch, Resources, excesses, parse_resource_usage
from hsa_ultralong.testing.aot_cases import SHAPES, all_shapes, operator_cases

ROOT = Path(__file__).resolve().parents[2]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs the triton package")

# a kernel of the test's own: conftest.py makes this process interpret kernels, so another one compiles it
PROGRAM = """
import torch, triton
import triton.language as tl
from hsa_ultralong.testing.aot import compile_launch, record_launches
from hsa_ultralong.ops import _triton
from hsa_ultralong.testing.cards import CARDS

@triton.jit
def _double_kernel(x_ptr, y_ptr, n, factor, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place, mask=place < n)
    tl.store(y_ptr + place, x * factor, mask=place < n)

def double(x, block):
    _triton.require_triton("double", x)
    y = torch.empty_like(x)
    _double_kernel[(triton.cdiv(x.numel(), block),)](x, y, x.numel(), 2.0, BLOCK=block, num_warps=8)
    return y

with record_launches() as launches:
    for block in (128, 256, 256):
        y = double(torch.ones(1024, dtype=torch.bfloat16), block)
    double(torch.ones(1023, dtype=torch.bfloat16), 256)
assert (y == 0).all()
assert len(launches) == 3, launches
first, second, odd = launches
assert second.constexprs != first.constexprs and odd.attrs != second.attrs
assert first.num_warps == 8 and "bf16" in first.describe() and "BLOCK=128" in first.describe()
resources = compile_launch(second)
assert resources.name == "_double_kernel" and 0 < resources.registers <= 255, resources
assert resources.spilled_bytes == 0 and resources.shared_bytes == 0, resources
try:
    double(torch.ones(8), 128)
except RuntimeError as error:
    assert "needs tensors on an NVIDIA GPU" in str(error)
else:
    raise AssertionError("require_triton was not put back")
assert torch.empty is not torch.zeros
with record_launches(CARDS[89]) as launches:
    double(torch.ones(1024, dtype=torch.bfloat16), 256)
assert launches[0].card is CARDS[89] and launches[0].key != second.key
"""


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0", **environment},
        capture_output=True,
        text=True,
    )


@needs_triton
def test_launches_on_cpu_tensors_are_recorded_once_each_and_compiled(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    result = run(str(script), PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stdout + result.stderr


@needs_triton
def test_interpreted_kernels_are_refused():
    code = "from hsa_ultralong.testing.aot import record_launches\nwith record_launches(): pass"
    result = run("-c", code, TRITON_INTERPRET="1")
    assert result.returncode == 1 and "TRITON_INTERPRET=0" in result.stderr


def test_resource_usage_is_read_from_cuobjdumps_text():
    text = "Function _k:\n  REG:168 STACK:16 SHARED:0 LOCAL:8 CONSTANT[0]:572 TEXTURE:0 SURFACE:0 SAMPLER:0"
    assert parse_resource_usage(text) == {"REG": 168, "STACK": 16, "SHARED": 0, "LOCAL": 8}
    with pytest.raises(ValueError, match="no resource usage"):
        parse_resource_usage("cuobjdump info: no device code")
    assert Resources("k", 168, 16, 8, 0).spilled_bytes == 24


@needs_triton
def test_every_kernel_compiles_for_hopper_without_heavy_spills():
    result = run("-m", "hsa_ultralong.testing.aot", PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(re.search(r"(\d+) kernels compiled for sm_90 .*, 0 failed", result.stdout)[1]) >= 20


@needs_triton
def test_decoding_fits_cards_of_less_shared_memory():
    result = run("-m", "hsa_ultralong.testing.aot", "--capability", "89", "--only", "decode", PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "scan_kernel" in result.stdout and "R=256" in result.stdout
    assert int(re.search(r"(\d+) kernels compiled for sm_89 .*, 0 failed", result.stdout)[1]) >= 5


def test_what_a_card_does_not_have_is_named_and_unknown_cards_are_refused(capsys):
    kernel = type("Kernel", (), {"__name__": "k"})()
    small = Launch(kernel, {"x": "*bf16"}, {}, {}, {"arch": "sm89"})
    assert excesses(small, Resources("k", 255, 0, 0, 101_376), 512) == ""
    assert "SHARED memory above 101376" in excesses(small, Resources("k", 255, 0, 0, 101_377), 512)
    assert "SPILLS" in excesses(small, Resources("k", 255, 600, 0, 0), 512)
    assert "TENSOR memory above 0" in excesses(small, Resources("k", 255, 0, 0, 0, tensor_columns=128), 512)
    with pytest.raises(SystemExit):
        aot.main(["--capability", "75"])
    assert "80, 86, 89, 90, 100, 120" in capsys.readouterr().err


def test_cases_cover_the_benchmark_shape_and_on_request_every_variant():
    benchmark = SHAPES[0]
    assert (benchmark.T, benchmark.Hq, benchmark.Hkv, benchmark.D, benchmark.S) == (32_768, 16, 1, 64, 64)
    assert (benchmark.K, benchmark.R, benchmark.dtype) == (32, 256, torch.bfloat16)
    variants = {(s.Hq // s.Hkv, s.D, s.S, s.dtype) for s in all_shapes()}
    assert len(variants) >= 5 * 3 * 3 * 3
    names = [name for name, _ in operator_cases()]
    assert len(names) == len(set(names))
    assert len(operator_cases(is_complete=True)) > len(names)
