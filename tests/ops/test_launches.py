"""What a call asks of the host and the card is counted: kernels, torch's operations, arguments that are bound."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from hsa_ultralong.testing.processes import HANG_SECONDS

ROOT = Path(__file__).resolve().parents[2]
CASES = {
    "attention": "attention(320, 3)",
    "coverage": "attention(64, 4)",
    "retrieval": "retrieval(64, 24)",
    "retrieval of all": "retrieval(64, 4)",
    "noisy retrieval": "retrieval(80, 24, noise_seed=7)",
    "noise of a stored seed": "retrieval(96, 24, noise_seed=torch.tensor(7))",
    "another shape": "attention(336, 3)",
    "not aligned": "attention(320, 3, shift=1)",
}

# conftest.py makes this process interpret kernels, so another one counts launches
PROGRAM = """
import torch
from hsa_ultralong.ops import ChunkVisibility, chunk_topk, hsa_attention
from hsa_ultralong.testing.launches import host_work

# none of them starts anything on a card
ALLOCATIONS = {"empty.memory_format", "empty_like", "empty_strided", "detach", "view", "transpose.int", "alias"}

def attention(tokens, slots, shift=0):
    chunks = tokens // 16
    def noise(*shape, kind=torch.bfloat16):
        flat = torch.randn(torch.Size(shape).numel() + shift).to(kind)
        return flat[shift:].view(shape).requires_grad_()
    q, k, v = noise(1, tokens, 4, 16), noise(1, tokens, 1, 16), noise(1, tokens, 1, 16)
    indices = torch.rand(1, tokens, 1, chunks).argsort(-1)[..., :slots].int()
    weights = noise(*indices.shape, kind=torch.float32)
    def step():
        out = hsa_attention(q, k, v, indices, weights, chunk_size=16, impl="triton")
        return torch.autograd.grad(out, (q, k, v, weights), torch.ones_like(out))
    return step

def retrieval(tokens, chunks, **noise):
    query = torch.randn(1, tokens, 1, 32).bfloat16().requires_grad_()
    landmarks = torch.randn(1, chunks, 1, 32).bfloat16().requires_grad_()
    visible = ChunkVisibility.causal(1, tokens, chunks, 16)
    def step():
        indices, scores = chunk_topk(query, landmarks, visible, topk=4, impl="triton", **noise)
        return torch.autograd.grad(scores, (query, landmarks), torch.ones_like(scores))
    return step

def number(x):
    return not isinstance(x, torch.Tensor)

def counted(step):
    # the second call, and what the first one did otherwise
    with host_work() as work:
        step()
        first = (work.bindings, work.kernels[:], [tuple(filter(number, given)) for given in work.arguments])
        work.clear()
        step()
    again = (work.kernels, [tuple(filter(number, given)) for given in work.arguments])
    return {
        "kernels": work.kernels, "bound": [first[0], work.bindings], "repeats": first[1:] == again,
        "operations": [name for name in work.operations if name not in ALLOCATIONS],
    }

print(json.dumps({name: counted(eval(call)) for name, call in cases.items()}))
"""


@pytest.fixture(scope="module")
def counted():
    if find_spec("triton") is None:
        pytest.skip("needs the triton package")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    program = f"import json\ncases = {CASES!r}\n" + PROGRAM
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=HANG_SECONDS,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout)


def test_attention_takes_eleven_kernels_and_no_other_work_of_the_card(counted):
    tiles = ["_tile_lists_kernel", "forward_kernel", "spoiled_tiles_kernel"]
    inverse = ["_count_kernel", "_offsets_kernel", "_units_kernel", "_fill_kernel"]
    memory = ["listed_memory_gradient_kernel", "listed_sum_kernel"]
    expected = [*tiles, "query_gradient_kernel", "spoiled_tiles_kernel", *inverse, *memory]
    assert counted["attention"]["kernels"] == expected
    assert counted["attention"]["operations"] == ["ones_like"]


def test_attention_with_full_coverage_makes_its_slot_map_once(counted):
    kernels = counted["coverage"]["kernels"]
    assert kernels.count("_slot_map_kernel") == 1 and len(kernels) == 7
    assert counted["coverage"]["operations"] == ["full", "ones_like"]


def test_retrieval_takes_three_kernels_and_two_products(counted):
    assert counted["retrieval"]["kernels"] == ["merge_select_kernel", "spread_kernel", "total_kernel"]
    # on a card the second product takes bf16 as it is
    products = [name for name in counted["retrieval"]["operations"] if name != "_to_copy"]
    assert products == ["ones_like", "bmm.out", "bmm"]


def test_a_seed_on_the_device_is_no_more_work_than_its_number(counted):
    one, other = counted["noisy retrieval"], counted["noise of a stored seed"]
    assert one["kernels"] == ["merge_select_kernel", "kept_scores_kernel", "spread_kernel", "total_kernel"]
    assert (one["kernels"], one["operations"]) == (other["kernels"], other["operations"])


@pytest.mark.parametrize("case", [name for name in CASES if name != "not aligned"])
def test_a_shape_that_was_seen_before_binds_no_arguments(counted, case):
    found = counted[case]
    assert found["bound"] == [len(found["kernels"]), 0] and found["kernels"]
    assert found["repeats"]


def test_operands_that_are_not_aligned_are_bound_at_every_call(counted):
    found = counted["not aligned"]
    assert found["bound"] == [len(found["kernels"])] * 2 == [11, 11]
    assert found["repeats"]


def test_interpreted_kernels_are_refused():
    from hsa_ultralong.testing.launches import host_work

    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled here")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=0"), host_work():
        pass
