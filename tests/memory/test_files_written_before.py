"""Memories and a model of commit be9bed8, before memories were split into kinds, open and go on as new ones do."""

import shutil
from pathlib import Path

import pytest
import torch

from hsa_ultralong import ChunkMemory, HSAForCausalLM, append
from hsa_ultralong.memory import verify_memory
from hsa_ultralong.models.fingerprint import memory_fingerprint

WRITTEN = Path(__file__).with_name("written_by_be9bed8")
CLOSED = torch.tensor([30, 6, 28, 14, 14, 6, 3, 1, 35, 34, 14])
OPEN = torch.tensor([33, 2, 8, 4, 16, 0, 1, 18, 10])
# of bf16, and of 8 bits with a scale a token
TOLERANCE = {"bf16": 1e-2, "int8": 3e-2}


@pytest.fixture(scope="module")
def model():
    return HSAForCausalLM.from_pretrained(WRITTEN / "model", dtype=torch.float32).eval()


@pytest.mark.parametrize("store", ["device", "host", "file"])
@pytest.mark.parametrize("form", TOLERANCE)
def test_an_old_memory_holds_what_the_model_reads_today(model, form, store):
    path = WRITTEN / f"{form}.hsa"
    assert not verify_memory(path)
    memory = ChunkMemory.load(path, store=store, dtype=torch.float32, fingerprint=memory_fingerprint(model))
    assert [(one.name, one.is_open) for one in memory.documents] == [("closed", False), ("open", True)]
    assert [one.tokens.tolist() for one in memory.documents] == [CLOSED.tolist(), OPEN.tolist()]
    again = model.memorize([CLOSED, OPEN], close=False)
    for found, wanted in zip(memory.part(0, memory.num_chunks), again.tensors, strict=True):
        torch.testing.assert_close(
            found, wanted, rtol=TOLERANCE[form], atol=TOLERANCE[form] * float(wanted.abs().max())
        )


def test_it_goes_on_where_it_was_left(model, tmp_path):
    path = shutil.copytree(WRITTEN / "bf16.hsa", tmp_path / "lib.hsa")
    memory, more = ChunkMemory.load(path, store="device", dtype=torch.float32), torch.tensor([5, 7, 9, 11, 2])
    append(model, memory, more, document=1)
    again = model.memorize([CLOSED, torch.cat((OPEN, more))])
    assert memory.num_chunks == again.num_chunks
    torch.testing.assert_close(memory.k, again.k, rtol=1e-2, atol=1e-2 * float(again.k.abs().max()))
