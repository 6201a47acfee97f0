"""Loops of machine code are found by their backward branches and counted by kind."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest

from hsa_ultralong.testing.loops import loops

TEXT = """
	.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDGSTS.E.BYPASS.128 [R2], [R4.64], !P1 ;
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT, gsb0 ;
        /*0030*/              @P0  FMUL R3, R3, R4 ;
        /*0040*/                   MUFU.EX2 R5, R3 ;
        /*0050*/                   SHFL.BFLY PT, R6, R5, 0x1, 0x1f ;
        /*0060*/                   STL [R1], R6 ;
        /*0070*/             @!PT LDS RZ, [RZ] ;
        /*0080*/                   IADD3 R7, R7, 0x1, RZ ;
        /*0090*/              @P2  BRA `(.L_x_0) ;
.L_x_1:
        /*00a0*/                   FADD R8, R8, R9 ;
        /*00b0*/              @P3  BRA `(.L_x_1) ;
        /*00c0*/                   BRA `(.L_x_2) ;
.L_x_2:
        /*00d0*/                   EXIT ;
"""


def test_loops_with_products_are_counted_by_kind_and_others_left_out():
    (found,) = loops(TEXT)
    assert found == {
        "global": 1, "matrix": 1, "fp32": 1, "exp, 1/x": 1, "shuffle": 1, "spilled": 1, "shared": 1, "other": 2,
    }  # fmt: skip


@pytest.mark.skipif(find_spec("triton") is None, reason="needs the triton package")
def test_the_loop_of_the_forward_has_an_exponential_for_each_logit_and_spills_nothing():
    command = [sys.executable, "-m", "hsa_ultralong.testing.loops", "--kernel", "forward_kernel"]
    found = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env={**os.environ, "TRITON_INTERPRET": "0"}
    )
    assert found.returncode == 0, found.stdout + found.stderr
    line = next(line for line in found.stdout.splitlines() if "S=64 BT=4" in line)
    every, matrix, special, *_, spilled, _, _ = map(int, re.findall(r"[\d,]+", line.split("  bf16")[0]))
    # 64 x 64 logits by 128 threads, and a reciprocal for each of two rows
    assert (matrix, special, spilled) == (8, 34, 0) and every < 400


def test_a_case_that_there_is_not_is_one_clear_error():
    command = [sys.executable, "-m", "hsa_ultralong.testing.loops", "--only", "nothing like it"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert found.returncode == 2 and "no case has 'nothing like it' in its name: " in found.stderr
