"""A memory file takes no number that is not finite, and says in which document one stands that got in."""

from __future__ import annotations

import pytest
import torch

from hsa_ultralong.memory.chunk_memory import ChunkMemory, Continuation, Document
from hsa_ultralong.memory.files import MemoryFile, MemoryFileError, MemoryWriter, finite, verify_memory
from hsa_ultralong.memory.files import continuation as continuation_module
from hsa_ultralong.memory.files import writer as writer_module
from hsa_ultralong.memory.opening import open_memory
from hsa_ultralong.memory.quantization import encode
from hsa_ultralong.memory.saving import save_memory
from hsa_ultralong.testing.factories import random_chunks

BAD = [float("nan"), float("inf"), float("-inf")]


def memory_of(*, part="landmarks", number=None, document=1):
    """Two documents of three chunks; `number` stands in chunk 1 of one of them."""
    chunks = random_chunks(1, 6)
    chunks.lengths[:], chunks.segments[0, 3:] = 4, 1
    if number is not None:
        tensor, chunk = getattr(chunks, part), 3 * document + 1
        tensor[0, chunk if part == "landmarks" else 4 * chunk + 2] = number
    tokens = torch.arange(12, dtype=torch.int32)
    documents = [Document(tokens, 0, 3, name="first"), Document(tokens, 3, 3, name="second")]
    chunks = type(chunks)(*(x.float() if x.is_floating_point() else x for x in chunks))
    return ChunkMemory(4, chunks, 6, documents)


@pytest.fixture
def careless(monkeypatch):
    """A writer that looks at nothing, as a damaged or hostile file would be made."""
    monkeypatch.setattr(writer_module, "require_finite_columns", lambda *_: None)
    monkeypatch.setattr(writer_module, "require_finite_state", lambda *_: None)
    return monkeypatch


@pytest.mark.parametrize("number", BAD)
@pytest.mark.parametrize("part", ["k", "v", "landmarks"])
@pytest.mark.parametrize("format", ["fp32", "bf16", "fp16", "int8", "fp8"])
def test_saving_refuses_and_names_the_document(tmp_path, format, part, number):
    memory = memory_of(part=part, number=number)
    with pytest.raises(MemoryFileError, match=r"'second' was not written: .* of its chunk 1 .*not finite"):
        save_memory(memory, tmp_path / "a.hsa", key_values=format, landmarks=format)
    assert not (tmp_path / "a.hsa").exists()


def test_a_number_that_the_form_cannot_hold_is_refused(tmp_path):
    memory = memory_of(part="v", number=1e6)
    with pytest.raises(MemoryFileError, match=r"float16 cannot hold its numbers \(use another form\)"):
        save_memory(memory, tmp_path / "a.hsa", key_values="fp16")
    save_memory(memory, tmp_path / "b.hsa", key_values="bf16")


def test_a_continuation_that_is_not_finite_is_refused_when_written_and_when_opened(tmp_path, monkeypatch):
    memory = memory_of()
    state = Continuation([(torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4))], torch.zeros(1, 5, 16))
    state.lower[0, 3, 2] = float("nan")
    memory.documents[1].is_open, memory.documents[1].continuation = True, state
    with pytest.raises(MemoryFileError, match=r"'second' was not written: lower holds"):
        save_memory(memory, tmp_path / "a.hsa")
    monkeypatch.setattr(writer_module, "require_finite_state", lambda *_: None)
    save_memory(memory, tmp_path / "b.hsa")
    with pytest.raises(MemoryFileError, match=r"lower holds numbers that are not finite.*'second'"):
        MemoryFile.open(tmp_path / "b.hsa")
    assert any("lower holds" in str(damage) for damage in verify_memory(tmp_path / "b.hsa"))
    assert continuation_module.is_finite is finite.is_finite


@pytest.mark.parametrize("number", BAD)
@pytest.mark.parametrize("format", ["fp32", "bf16", "int8", "fp8"])
@pytest.mark.parametrize("store", ["device", "host", "file"])
def test_opening_refuses_landmarks_and_names_the_document(tmp_path, careless, format, number, store):
    save_memory(memory_of(number=number), tmp_path / "a.hsa", landmarks=format)
    with pytest.raises(MemoryFileError, match=r"'second' cannot be read: landmarks.* of its chunk 1 holds"):
        open_memory(tmp_path / "a.hsa", store=store)


@pytest.mark.parametrize("format", ["fp32", "bf16", "int8", "fp8"])
@pytest.mark.parametrize("part", ["k", "v"])
def test_keys_and_values_are_refused_when_they_are_fetched(tmp_path, careless, format, part):
    save_memory(memory_of(part=part, number=float("nan"), document=0), tmp_path / "a.hsa", key_values=format)
    memory = open_memory(tmp_path / "a.hsa", store="file")
    assert memory.store.fetch(torch.tensor([0, 2, 5]))[0].isfinite().all()
    for _ in range(2):
        with pytest.raises(MemoryFileError, match=r"'first' cannot be read: keys_values.* of its chunk 1 holds"):
            memory.store.fetch(torch.tensor([0, 1]))
    with pytest.raises(MemoryFileError, match="'first' cannot be read"):
        open_memory(tmp_path / "a.hsa", store="device")


@pytest.mark.parametrize("part", ["k", "landmarks"])
def test_verify_names_the_column_and_the_document(tmp_path, careless, part):
    save_memory(memory_of(part=part, number=float("inf")), tmp_path / "a.hsa")
    found = verify_memory(tmp_path / "a.hsa")
    assert [damage.documents for damage in found] == [("'second'",)]
    assert "not finite" in found[0].what
    with pytest.raises(MemoryFileError, match="merging refused"), MemoryWriter.open(tmp_path / "a.hsa") as writer:
        writer.merge([MemoryFile.open_unverified(tmp_path / "a.hsa")])


def test_deleting_the_document_heals_the_memory(tmp_path, careless):
    save_memory(memory_of(number=float("nan")), tmp_path / "a.hsa")
    with MemoryWriter.open(tmp_path / "a.hsa") as writer:
        writer.delete_document(writer.documents[1].id)
        writer.commit()
    assert verify_memory(tmp_path / "a.hsa") == []
    assert open_memory(tmp_path / "a.hsa").num_chunks == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_one_bad_number_among_many_is_seen(dtype):
    rows = torch.linspace(-400, 400, 600).view(20, 3, 10).to(dtype)
    assert finite.is_finite(rows) and finite.first_bad_row(rows) is None
    wide = rows.float()
    wide[13, 2, 9] = float("nan")
    assert finite.first_bad_row(wide.to(dtype)) == 13
    assert finite.is_finite(rows[:0]) and finite.is_finite(encode(rows.float(), "int8").payload)
