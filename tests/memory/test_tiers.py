"""Memories in blocks on several tiers: the numbers and the answers of an ordinary memory."""

import pytest
import torch

from hsa_ultralong.inference import append, edit, last_logits
from hsa_ultralong.inference.placement import tiered_memory
from hsa_ultralong.memory import ChunkMemory, MemoryFile
from hsa_ultralong.memory.quantization import decode, encode
from hsa_ultralong.memory.stored_memory import StoredMemory
from hsa_ultralong.memory.tiers import QuantizedLandmarks, TieredStore
from hsa_ultralong.models import HSACache
from hsa_ultralong.models.reading import DocumentReader
from hsa_ultralong.ops import ChunkVisibility, chunk_topk
from hsa_ultralong.testing.factories import MODEL_OPTIONS, random_tokens, tiny_model

ROOM = {"device": {}, "host": {}, "tiered": {"device_bytes": 2**20}}
FORMS = ["fp64", "bf16", "int8", "fp8"]


def document(length, seed=0):
    return random_tokens(1, length, seed=seed)[0]


@pytest.mark.parametrize("form", FORMS)
def test_a_store_gives_back_what_was_written_in_any_order(form):
    store = TieredStore((2, 4, 1, 8), format=form, device="cpu", dtype=torch.float64, device_chunks=6, block_chunks=3)
    pairs = torch.randn(11, 2, 4, 1, 8, dtype=torch.float64)
    store.write(0, pairs[:2])
    store.write(2, pairs[2:])
    expected = decode(*encode(pairs, form), torch.float64)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0)).int()
    k, v = store.gather(torch.cat((order, order[:1], torch.tensor([-1], dtype=torch.int32))))
    assert torch.equal(k[:11], expected[order.long(), 0]) and torch.equal(v[11], expected[order[0], 1])
    assert not k[12].any() and not v[12].any()
    store.write(1, pairs[:1])
    assert torch.equal(store.fetch(torch.tensor([0, 1]))[0], expected[[0, 0], 0])
    # blocks that exist never move
    places = [part.data_ptr() for part in store.blocks.payloads]
    store.write(11, pairs)
    assert [part.data_ptr() for part in store.blocks.payloads][: len(places)] == places


def test_quantised_landmarks_are_searched_as_they_decode():
    landmarks = torch.randn(1, 50, 2, 16)
    index = QuantizedLandmarks(2, 16, "cpu", capacity=10)
    index.write(0, landmarks[:, :10])
    index.reserve(50)
    index.write(10, landmarks[:, 10:])
    query = torch.randn(3, 2, 2, 16)
    segment = torch.zeros(3, 2, dtype=torch.int32)
    everyone = torch.full((1, 50), -1, dtype=torch.int32)
    visible = ChunkVisibility(segment, segment, everyone, torch.zeros_like(everyone))
    decoded = decode(*encode(landmarks, "int8"), torch.float32)
    scale = torch.tensor([0.7, 1.3])
    expected = chunk_topk(query, decoded, visible, topk=6, scale=scale, impl="reference")
    indices, scores = index.search(query, 6, visible=visible, scale=scale)
    assert torch.equal(indices, expected[0])
    torch.testing.assert_close(scores, expected[1], rtol=1e-4, atol=1e-4)


def logits_of(model, memory, ids):
    cache = HSACache(model.config, memory=memory)
    with torch.no_grad():
        first = model(ids, past_key_values=cache).logits
        return torch.cat((first, model(ids[:, :1], past_key_values=cache).logits), 1)


@pytest.mark.parametrize("options", ["default", "hsa_only_layer", "two_memory_heads"])
@pytest.mark.parametrize("store", ["device", "host", "tiered"])
def test_a_memory_on_tiers_answers_like_an_ordinary_one(store, options):
    model = tiny_model(**MODEL_OPTIONS[options])
    texts = [document(90), document(33, seed=1), document(5, seed=2)]
    plain = model.memorize(texts)
    tiered = model.memorize(texts, store=store, key_values="fp64", **ROOM[store])
    assert tiered.num_chunks == plain.num_chunks and isinstance(tiered, StoredMemory)
    # one token gathers, many tokens fetch
    for batch, tokens in ((1, 1), (2, 5), (1, 200)):
        ids = random_tokens(batch, tokens, seed=tokens)
        torch.testing.assert_close(logits_of(model, tiered, ids), logits_of(model, plain, ids), rtol=1e-11, atol=1e-12)


def test_eight_bits_are_close_and_take_half_the_room():
    model = tiny_model()
    plain = model.memorize(document(400))
    rounded = model.memorize(document(400), store="host", key_values="bf16", landmarks="bf16")
    assert rounded.landmarks.dtype == torch.bfloat16 and torch.equal(rounded.landmarks, plain.landmarks.bfloat16())
    small = model.memorize(document(400), store="host", key_values="int8", landmarks="int8")
    ids = random_tokens(1, 6, seed=3)
    error = (logits_of(model, small, ids) - logits_of(model, plain, ids)).abs().max()
    assert 0 < error < 0.05 * logits_of(model, plain, ids).std()
    assert small.num_bytes < plain.num_bytes / 4  # of fp64


def test_equal_edits_are_exact_and_others_refused_before_anything_is_read(monkeypatch):
    model, text = tiny_model(), document(200)
    memory = model.memorize(text, store="host", key_values="fp64")
    new = document(7, seed=9)
    edit(model, memory, 50, 57, new)
    rebuilt = model.memorize(torch.cat((text[:50], new, text[57:])))
    ids = random_tokens(1, 6, seed=3)
    torch.testing.assert_close(logits_of(model, memory, ids), logits_of(model, rebuilt, ids), rtol=1e-11, atol=1e-12)
    monkeypatch.setattr(DocumentReader, "read", lambda *_: pytest.fail("was read"))
    with pytest.raises(ValueError, match="number of chunks"):
        edit(model, memory, 50, 57, document(7 + 3 * model.config.chunk_size))


def test_appending_grows_without_a_capacity():
    model, text = tiny_model(), document(150)
    memory = model.memorize(iter([text[:70], text[70:]]), store="host", landmarks="int8")
    assert memory.num_chunks == -(-150 // model.config.chunk_size)
    ids = random_tokens(1, 3, seed=3)
    whole = model.memorize(text, store="host", landmarks="int8")
    torch.testing.assert_close(logits_of(model, memory, ids), logits_of(model, whole, ids), rtol=1e-11, atol=1e-12)


def test_what_does_not_fit_is_refused_before_anything_is_read():
    model = tiny_model()
    with pytest.raises(ValueError, match="does not fit"):
        tiered_memory(model, 2**40, store="tiered")
    with pytest.raises(ValueError, match="store must be one of"):
        model.memorize(document(9), store="attic")
    with pytest.raises(ValueError, match="unknown form"):
        model.memorize(document(9), key_values="int2")
    with pytest.raises(ValueError, match="landmarks of a tiered memory"):
        model.memorize(document(9), landmarks="fp8")


@pytest.mark.parametrize("forms", [{}, {"key_values": "int8", "landmarks": "int8"}, {"key_values": "fp8"}])
@pytest.mark.parametrize("store", ["host", "tiered"])
def test_a_memory_on_tiers_is_saved_selected_and_copied_like_any_other(tmp_path, store, forms):
    model = tiny_model()
    texts, ids = [document(90), document(33, seed=1), document(5, seed=2)], random_tokens(1, 9, seed=3)
    memory = model.memorize(texts, store=store, **ROOM[store], close=False, **forms)
    wanted = logits_of(model, memory, ids)
    # saved in the form that it is kept in, bit for bit
    memory.save(tmp_path / "first.hsa")
    opened = ChunkMemory.load(tmp_path / "first.hsa", store="host", dtype=torch.float64)
    torch.testing.assert_close(logits_of(model, opened, ids), wanted, rtol=1e-11, atol=1e-12)
    opened.save(tmp_path / "second.hsa")
    first, second = (MemoryFile.open(tmp_path / name).read("keys_values", 0, 5) for name in ("first.hsa", "second.hsa"))
    assert torch.equal(first.view(torch.uint8), second.view(torch.uint8))
    assert [document.num_tokens for document in opened.documents] == [90, 33, 5]
    # the open document goes on
    append(model, opened.loaded(), document(20, seed=5), document=2)
    # copied: an ordinary memory that answers the same and can be changed, the first one untouched
    copy = memory.to(dtype=torch.float64)
    assert isinstance(copy, ChunkMemory)
    torch.testing.assert_close(logits_of(model, copy, ids), wanted, rtol=1e-11, atol=1e-12)
    edit(model, copy, 3, 9, document(6, seed=8))
    torch.testing.assert_close(logits_of(model, memory, ids), wanted, rtol=0, atol=0)
    # selected
    closed = model.memorize(texts, store=store, **ROOM[store], **forms)
    few = closed.select([1, 0])
    whole = closed.to().select([1, 0])
    torch.testing.assert_close(logits_of(model, few, ids), logits_of(model, whole, ids), rtol=1e-11, atol=1e-12)


def test_keys_of_a_memory_on_tiers_are_read_by_part_and_asking_for_all_says_so():
    model = tiny_model()
    memory = model.memorize(document(90), store="host", key_values="fp64")
    with pytest.raises(ValueError, match=r"memory\.part\(first, stop\)"):
        _ = memory.k
    plain = model.memorize(document(90))
    part = memory.part(2, 5)
    size = memory.chunk_size
    assert torch.equal(part.k, plain.k[:, 2 * size : 5 * size]) and torch.equal(part.v, plain.v[:, 2 * size : 5 * size])
    assert torch.equal(part.landmarks, plain.landmarks[:, 2:5])


@pytest.mark.parametrize("store", ["device", "host", "tiered"])
def test_the_end_of_an_open_document_reads_landmarks_in_8_bits_as_they_are(store):
    model = tiny_model()
    texts = [random_tokens(1, 60, seed=1)[0], random_tokens(1, 61, seed=2)[0]]
    memory = model.memorize(texts, close=False, store=store, landmarks="int8")
    found, expected = last_logits(model, memory, 3), last_logits(model, memory.loaded(), 3)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, last_logits(model, model.memorize(texts[1], close=False), 3))
