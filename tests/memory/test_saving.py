"""ChunkMemory.save and ChunkMemory.load: what comes back is what was there, whatever the format; a save is whole."""

import os
import shutil

import pytest
import torch

from hsa_ultralong.inference import Library, append, close_document, edit, last_logits
from hsa_ultralong.memory import MemoryFileError, MemoryWriter, opening, saving, stored_memory, verify_memory
from hsa_ultralong.memory.chunk_memory import ChunkMemory
from hsa_ultralong.memory.opening import open_memory
from hsa_ultralong.testing.factories import MODEL_OPTIONS, random_tokens, tiny_model
from tests.memory.test_files_crash import die_at, in_child

STORES = ("device", "host", "file")


def document(length, seed=0):
    return random_tokens(1, length, seed=seed)[0]


def pairs(memory):
    """k and v (C*S, Hkv, D) of a memory in any store."""
    if isinstance(memory, ChunkMemory):
        return memory.k[0], memory.v[0]
    return tuple(part.flatten(0, 1) for part in memory.store.fetch(torch.arange(memory.num_chunks)))


def assert_same_bits(one, other):
    assert one.num_chunks == other.num_chunks and one.fingerprint == other.fingerprint
    for name in ("landmarks", "lengths", "segments", "ends"):
        a, b = getattr(one, name), getattr(other, name)
        assert a.dtype == b.dtype and torch.equal(a, b), name
    assert all(torch.equal(a, b) for a, b in zip(pairs(one), pairs(other), strict=True))
    for a, b in zip(one.documents, other.documents, strict=True):
        assert (a.name, a.num_tokens, a.first_chunk, a.num_chunks, a.is_open, a.tokens.tolist()) == (
            b.name, b.num_tokens, b.first_chunk, b.num_chunks, b.is_open, b.tokens.tolist()
        )  # fmt: skip
        assert (a.continuation is None) == (b.continuation is None)
        if a.continuation is not None and b.continuation is not None:
            assert torch.equal(a.continuation.lower, b.continuation.lower)
            for before, after in zip(a.continuation.windows, b.continuation.windows, strict=True):
                assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_memory_comes_back_bit_for_bit_in_its_own_dtype(tmp_path, dtype, store):
    model = tiny_model(dtype=dtype)
    memory = model.memorize(
        [document(30), document(3, seed=1), document(17, seed=2)], names=["a", "", "a"], close=False
    )
    memory.save(tmp_path / "a.hsa")
    assert_same_bits(ChunkMemory.load(tmp_path / "a.hsa", store=store), memory)


@pytest.mark.parametrize("options", ["default", "window_of_one", "hsa_only_layer", "all_at_once"])
@pytest.mark.parametrize("length", [1, 3, 4, 30])
def test_an_open_document_of_any_length_is_saved_with_what_it_needs_to_go_on(tmp_path, options, length):
    model, prompt = tiny_model(**MODEL_OPTIONS[options]), random_tokens(1, 2, seed=5)
    memory = model.memorize([document(9), document(length, seed=1)], close=False)
    memory.save(tmp_path / "a.hsa")
    assert verify_memory(tmp_path / "a.hsa") == []
    more = {"continue_document": True, "max_new_tokens": 4, "do_sample": False}
    expected = model.generate(prompt, memory=memory, **more)
    for store in STORES:
        loaded = ChunkMemory.load(tmp_path / "a.hsa", store=store)
        assert_same_bits(loaded, memory)
        assert torch.equal(last_logits(model, loaded, 1), last_logits(model, memory, 1))
        assert torch.equal(model.generate(prompt, memory=loaded, **more), expected)


@torch.no_grad()
def test_a_loaded_memory_is_appended_to_edited_and_closed_like_the_original(tmp_path):
    model = tiny_model()
    memory = model.memorize([document(30), document(11, seed=1)], close=False)
    memory.save(tmp_path / "a.hsa")
    loaded = ChunkMemory.load(tmp_path / "a.hsa", store="device")
    for each in (memory, loaded):
        append(model, each, document(6, seed=2), document=1, close=False)
        edit(model, each, 3, 9, [1, 2])
        edit(model, each, 12, 12, [1, 2, 3], document=1)
        close_document(model, each)
        append(model, each, document(5, seed=3))
    assert_same_bits(loaded, memory)
    # the file is as it was saved
    assert ChunkMemory.load(tmp_path / "a.hsa").num_tokens == 41


def test_a_library_goes_on_with_a_saved_memory(tmp_path):
    model, path = tiny_model(), tmp_path / "a.hsa"
    model.memorize([document(30), document(2, seed=1)], names=["a", "b"], close=False).save(path)
    with Library.open(model, path) as library:
        library.extend(document(9, seed=2), close=True)
        library.edit("a", 0, 1, [])
    expected = model.memorize([document(30)[1:], torch.cat((document(2, seed=1), document(9, seed=2)))])
    loaded = ChunkMemory.load(path, store="device")
    torch.testing.assert_close(loaded.landmarks, expected.landmarks, rtol=1e-10, atol=1e-11)
    assert loaded.ends.tolist() == expected.ends.tolist() and loaded.lengths.tolist() == expected.lengths.tolist()


@pytest.mark.parametrize("store", STORES)
def test_a_memory_of_no_documents_is_a_memory(tmp_path, store):
    model = tiny_model()
    memory = model.model.empty_memory(
        1, torch.float64, "cpu", 0, fingerprint=model.memorize(document(4)).fingerprint
    )  # fmt: skip
    memory.save(tmp_path / "a.hsa")
    loaded = ChunkMemory.load(tmp_path / "a.hsa", store=store)
    assert (loaded.num_chunks, loaded.num_tokens, loaded.documents) == (0, 0, [])
    ids = random_tokens(1, 5)
    more = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.generate(ids, memory=loaded, **more), model.generate(ids, **more))


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_eight_bits_stay_within_the_bounds_of_quantization(tmp_path, format, store):
    memory = tiny_model(num_memory_heads=2, num_retrieval_heads=2).memorize([document(50), document(6, seed=1)])
    memory.save(tmp_path / "a.hsa", key_values=format, landmarks=format)
    loaded = ChunkMemory.load(tmp_path / "a.hsa", store=store, dtype=torch.float64)
    # the default for 8 bits is bf16
    assert ChunkMemory.load(tmp_path / "a.hsa", store=store).landmarks.dtype == torch.bfloat16
    for exact, found in (*zip(pairs(memory), pairs(loaded), strict=True), (memory.landmarks, loaded.landmarks)):
        largest = exact.abs().amax(-1, keepdim=True)
        if format == "int8":
            bound = largest / 253
        else:
            # the scale is rounded to bf16
            bound = torch.maximum(exact.abs() / 16, 1.01 * largest / 448 / 1024)
        assert ((exact - found).abs() <= bound * (1 + 1e-6)).all()
        assert not torch.equal(exact, found)


def test_another_dtype_rounds_once(tmp_path):
    memory = tiny_model(dtype=torch.float32).memorize([document(30), document(6, seed=1)], close=False)
    memory.save(tmp_path / "a.hsa")
    memory.save(tmp_path / "b.hsa", key_values="bf16", landmarks="bf16")
    rounded = memory.to(dtype=torch.bfloat16)
    for store in STORES:
        for name in ("a.hsa", "b.hsa"):
            loaded = open_memory(tmp_path / name, store=store, dtype=torch.bfloat16)
            assert torch.equal(loaded.landmarks, rounded.landmarks)
            assert all(torch.equal(a, b) for a, b in zip(pairs(loaded), pairs(rounded), strict=True))
            assert loaded.open_document.continuation.lower.dtype == torch.bfloat16


def test_pieces_and_shards_change_no_bit(tmp_path, monkeypatch):
    memory = tiny_model().memorize([document(90), document(3, seed=1), document(21, seed=2)], close=False)
    for part in (opening, saving, stored_memory):
        monkeypatch.setattr(part, "_STEP", 3)
    memory.save(tmp_path / "a.hsa")
    for store in STORES:
        assert_same_bits(ChunkMemory.load(tmp_path / "a.hsa", store=store), memory)
    ChunkMemory.load(tmp_path / "a.hsa", store="device").save(tmp_path / "b.hsa")
    assert_same_bits(ChunkMemory.load(tmp_path / "b.hsa"), memory)


def test_an_opened_memory_does_not_see_what_a_writer_does_later(tmp_path):
    model, path = tiny_model(), tmp_path / "a.hsa"
    texts = [document(30), document(9, seed=1)]
    memory = model.memorize(texts)
    memory.save(path)
    opened = {store: ChunkMemory.load(path, store=store) for store in STORES if store != "file"}
    opened["file"] = ChunkMemory.load(path, cache_bytes=1)
    with Library.open(model, path) as library:
        library.edit(0, 0, 8, [5])
        library.delete(1)
        library.compact()
    for loaded in opened.values():
        assert_same_bits(loaded, memory)
    assert len(ChunkMemory.load(path).documents) == 1


@pytest.mark.parametrize("what", ["memory", "other files", "a file"])
def test_saving_never_overwrites(tmp_path, what):
    memory, path = tiny_model().memorize(document(9)), tmp_path / "a.hsa"
    if what == "memory":
        memory.save(path)
    elif what == "a file":
        path.write_text("x")
    else:
        path.mkdir()
        (path / "notes.txt").write_text("x")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(MemoryFileError, match="exists already; choose another name"):
        memory.save(path)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_a_failed_save_leaves_nothing_and_can_be_repeated(tmp_path, monkeypatch):
    memory, path = tiny_model().memorize(document(30)), tmp_path / "new" / "a.hsa"

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryWriter, "commit", full)
        with pytest.raises(MemoryFileError, match="no space left while saving"):
            memory.save(path)
    assert list(path.parent.iterdir()) == []
    memory.save(path)
    assert_same_bits(ChunkMemory.load(path), memory)
    for unknown in ({"key_values": "fp4"}, {"landmarks": "fp4"}):
        with pytest.raises(ValueError, match="unknown format 'fp4'"):
            memory.save(tmp_path / "b.hsa", **unknown)
    assert not (tmp_path / "b.hsa").exists()


def test_a_save_killed_at_any_step_is_complete_or_absent(tmp_path):
    memory, path = tiny_model().memorize([document(30), document(9, seed=1)], close=False), tmp_path / "a.hsa"
    step, is_killed = 0, True
    while is_killed:

        def action(step=step):
            die_at(step)
            memory.save(path)

        is_killed = os.WIFSIGNALED(in_child(action))
        if not path.exists():
            memory.save(path)
        assert_same_bits(ChunkMemory.load(path), memory)
        assert list(tmp_path.iterdir()) == [path]
        shutil.rmtree(path)
        step += 1
    assert step > 10


def test_what_is_no_memory_or_another_models_is_one_clear_error(tmp_path):
    memory = tiny_model().memorize(document(9))
    memory.save(tmp_path / "a.hsa")
    with pytest.raises(MemoryFileError, match=r"b\.hsa does not exist"):
        ChunkMemory.load(tmp_path / "b.hsa")
    with pytest.raises(ValueError, match="store must be one of device, host, tiered, file, got 'disk'"):
        ChunkMemory.load(tmp_path / "a.hsa", store="disk")
    other, ids = tiny_model(seed=1), random_tokens(1, 4)
    for store in STORES:
        with pytest.raises(ValueError, match="another model") as error:
            other.generate(ids, memory=ChunkMemory.load(tmp_path / "a.hsa", store=store), max_new_tokens=2)
        assert "\n" not in str(error.value)
