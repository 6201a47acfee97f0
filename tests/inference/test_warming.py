"""No question meets a form of a kernel that warming up did not: forms are counted without a GPU, by what Triton would
compile."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from hsa_ultralong.inference.batching import BatchEngine
from hsa_ultralong.inference.warming import small_memories, warm
from hsa_ultralong.testing.factories import tiny_model

ROOT = Path(__file__).resolve().parents[2]
# conftest.py makes this process interpret kernels, so another one asks what would be compiled
PROGRAM = """
import sys
from contextlib import ExitStack
from dataclasses import replace
from unittest import mock
import torch
from hsa_ultralong.inference import batching, engine as engine_module
from hsa_ultralong.inference.warming import small_memories, warm
from hsa_ultralong.models import HSAForCausalLM
from hsa_ultralong.nn.views import ChunkTensors
from hsa_ultralong.ops import _triton
from hsa_ultralong.testing.aot import record_launches
from hsa_ultralong.testing.factories import random_tokens, tiny_model

torch.set_num_threads(1)
model = tiny_model(
    dtype=torch.bfloat16, head_dim=16, chunk_size=16, chunk_topk=4, hidden_size=32, sliding_window=24,
    num_lower_layers=1, num_layers_per_group=1,
)
small = small_memories(model)
first = small[1].tensors


def of_size(count):
    numbers = torch.arange(count) % first.landmarks.shape[1]
    k, v, *rest = first
    slots = (numbers[:, None] * 16 + torch.arange(16)).flatten()
    parts = ChunkTensors(k[:, slots], v[:, slots], *(part[:, numbers] for part in rest))
    return replace(small[1], storage=parts, num_chunks=count, documents=[])


class Eager:
    def __init__(self, parts):
        self.parts = parts
        for part in parts:
            part()

    def replay(self, number):
        self.parts[number]()


def on_card():
    stack = ExitStack()
    launches = stack.enter_context(record_launches())
    for name, module in list(sys.modules.items()):
        if name.startswith("hsa_ultralong.") and hasattr(module, "triton_runs_on"):
            stack.enter_context(mock.patch.object(module, "triton_runs_on", lambda tensor: True))
    return stack, launches


def document(size, seed):
    return random_tokens(1, size, seed=seed)[0]


engine_module.StepGraphs = Eager
engine = batching.BatchEngine(model, batch=8, max_tokens=400, use_graph=True)
lines = []
stack, launches = on_card()
with stack:
    warm(engine, small, piece=100, tell=lines.append)
warmed = {one.key for one in launches}
assert any("tokens and beyond" in line for line in lines) and any("rows" in line for line in lines), lines

stack, launches = on_card()
with stack:
    for seed, count in enumerate(map(int, sys.argv[1:])):
        memory, other = of_size(count), of_size(count + 1)
        # sizes of a prompt, one memory or several, whole or in pieces
        for sizes, kinds, most in (
            ([1 + seed], [memory], 100), ([40 + 7 * seed] * 3, [memory, memory, None], 64),
            ([7, 200 + seed, 16, 130], [memory, other, memory, None], 100), ([17 * seed + 33], [None], 50),
        ):
            readings = [
                engine.begin(document(size, size), one, max_new_tokens=20)
                for size, one in zip(sizes, kinds, strict=True)
            ]
            rows = []
            while readings:
                for pieces in engine.plan(readings, most):
                    rows += [row for row in engine.read_together(pieces) if row is not None]
                readings = [one for one in readings[1:] + readings[:1] if one.logits is None]
            for _ in range(5):
                engine.step()
            for row in rows:
                engine.leave(row)
        engine.forget(memory)
        engine.forget(other)
new = [one for one in launches if one.key not in warmed]
for one in new:
    print(one.name, one.signature, one.constexprs, one.attrs)
print(len(warmed), "forms warmed,", len(new), "new ones of", len(launches))
assert len(launches) > 10
sys.exit(bool(new))
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="needs the triton package")
@pytest.mark.parametrize(
    "chunks",
    [
        pytest.param([1, 5, 129], id="few"),
        pytest.param([1, 3, 4, 5, 6, 7, 12, 64, 65, 129, 1000, 1025, 5000, 40_000], id="many", marks=pytest.mark.slow),
    ],
)
def test_questions_meet_no_kernel_that_was_not_compiled_at_start(tmp_path, chunks):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    result = subprocess.run(
        [sys.executable, str(script), *map(str, chunks)],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-3000:]


@pytest.mark.parametrize("room", [60, 30, 9, 2])
def test_it_fits_into_any_room_and_leaves_rows_and_pages_free(room):
    model = tiny_model()
    engine, lines = BatchEngine(model, batch=2, max_tokens=room), []
    warm(engine, small_memories(model), piece=10, tell=lines.append)
    assert engine.num_free == 2 and len(engine.own.free) == engine.own.num_pages and engine.known == []
    assert "alone and together" in lines[0]
