"""Saved memories give the same answers from every store; caches never mix up chunks; damage never reaches an answer."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hsa_ultralong.inference import Library, append, close_document, edit, last_logits, memory_fingerprint
from hsa_ultralong.memory import (
    LandmarkLists,
    MemoryFile,
    MemoryFileError,
    landmark_index,
    landmark_lists,
    verify_memory,
)
from hsa_ultralong.memory.chunk_memory import ChunkMemory
from hsa_ultralong.memory.opening import _load_tiers, open_memory
from hsa_ultralong.memory.quantization import decode, encode, row_bytes
from hsa_ultralong.memory.stored_memory import StoredMemory
from hsa_ultralong.memory.stores import CachedStore, FileStore
from hsa_ultralong.models import HSACache
from hsa_ultralong.models.reading import DocumentReader
from hsa_ultralong.nn.views import LandmarkKeeper
from hsa_ultralong.ops.hsa import api as hsa_api
from hsa_ultralong.testing.factories import MODEL_OPTIONS, random_tokens, tiny_model

EXACT = {"rtol": 1e-11, "atol": 1e-12}


def document(length, seed=0):
    return random_tokens(1, length, seed=seed)[0]


def logits(model, memory, ids):
    with torch.no_grad():
        return model(ids, past_key_values=HSACache(model.config, memory=memory)).logits


def distance(one, other):
    return (one - other).norm() / other.norm()


def opened(path, store, **options):
    return open_memory(path, store=store, dtype=torch.float64, **options)


@pytest.mark.parametrize("tokens", [1, 5, 64, 200])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("chunks", [2, 40])
def test_logits_are_the_same_from_every_store(tmp_path, monkeypatch, chunks, batch, tokens):
    model = tiny_model()
    memory = model.memorize([document(4 * chunks - 3), document(9, seed=1)])
    memory.save(tmp_path / "a.hsa")
    ids, spread = random_tokens(batch, tokens, seed=7), torch.full((batch, tokens), 5)
    caches = [("file", {"cache_bytes": room}) for room in (1, 2000, 2**20)]
    opens = [("device", {}), ("host", {}), ("tiered", {"device_bytes": 2000}), *caches]
    memories = [opened(tmp_path / "a.hsa", store, **room) for store, room in opens]
    for prompt in (ids, spread):
        # a store sees the chunks of 128 tokens only and may take the dense path where a whole memory gathers
        expected = logits(model, memory, prompt)
        found = [logits(model, each, prompt) for each in memories]
        for each in found:
            torch.testing.assert_close(each, expected, **EXACT)
        assert torch.equal(found[0], expected)
        # among stores, and while decoding (fewer than 16 tokens), not even the last bit differs
        assert all(torch.equal(each, found[1]) for each in found[2:])
        assert tokens >= 16 or torch.equal(found[1], expected)
        # nor where both take one path; with more tokens a tile holds other ones of those that read a chunk
        with monkeypatch.context() as patch:
            patch.setattr(hsa_api, "_automatic", lambda *_: "torch_gather")
            alike = logits(model, memories[-1], prompt), logits(model, memory, prompt)
            torch.testing.assert_close(*alike, **EXACT)
            assert batch * tokens > 128 or torch.equal(*alike)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_low_precision_decoding_gives_the_same_bits_from_every_store(tmp_path, dtype):
    model = tiny_model(dtype=dtype)
    memory = model.memorize([document(150), document(9, seed=1)])
    memory.save(tmp_path / "a.hsa")
    ids = random_tokens(3, 5, seed=7)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    more = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False, "output_logits": True}
    expected = model.generate(ids, memory=memory, return_dict_in_generate=True, **more)
    for store in ("device", "host", "tiered", "file"):
        loaded = open_memory(tmp_path / "a.hsa", store=store, **({"cache_bytes": 600} if store == "file" else {}))
        found = model.generate(ids, memory=loaded, return_dict_in_generate=True, **more)
        assert torch.equal(found.sequences, expected.sequences)
        assert all(torch.equal(a, b) for a, b in zip(found.logits, expected.logits, strict=True))


@pytest.mark.parametrize("options", ["default", "mixture_of_experts", "hsa_only_layer"])
def test_generation_reads_a_file_as_it_reads_the_memory(tmp_path, options):
    model = tiny_model(**MODEL_OPTIONS[options])
    memory = model.memorize([document(50), document(30, seed=1)])
    memory.save(tmp_path / "a.hsa")
    ids = random_tokens(2, 6, seed=3)
    more = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    expected = model.generate(ids, memory=memory, **more)
    assert torch.equal(model.generate(ids, memory=opened(tmp_path / "a.hsa", "file"), **more), expected)
    beams = {**more, "num_beams": 3, "num_return_sequences": 2}
    expected = model.generate(ids, memory=memory, **beams)
    assert torch.equal(model.generate(ids, memory=opened(tmp_path / "a.hsa", "host"), **beams), expected)


@torch.no_grad()
def test_an_open_document_goes_on_after_loading(tmp_path):
    model = tiny_model()
    memory = model.memorize([document(21), document(34, seed=1)], close=False)
    memory.save(tmp_path / "a.hsa")
    prompt = random_tokens(1, 3, seed=5)
    more = {"continue_document": True, "max_new_tokens": 9, "do_sample": False}
    expected = model.generate(prompt, memory=memory, **more)
    for store in ("device", "file"):
        loaded = opened(tmp_path / "a.hsa", store)
        torch.testing.assert_close(last_logits(model, loaded, 3), last_logits(model, memory, 3), **EXACT)
        assert torch.equal(model.generate(prompt, memory=loaded, **more), expected)
    loaded = opened(tmp_path / "a.hsa", "device")
    for each in (memory, loaded):
        append(model, each, document(6, seed=8), document=1, close=True)
    torch.testing.assert_close(loaded.k[:, : 4 * 15], memory.k[:, : 4 * 15], **EXACT)


def test_memorising_to_a_path_equals_memorising_and_saving(tmp_path):
    model, texts = tiny_model(), [document(21), document(34, seed=1)]
    memory = model.memorize(texts, names=["a", "b"], store=tmp_path / "a.hsa", piece_tokens=8)
    assert isinstance(memory, StoredMemory) and [d.name for d in memory.documents] == ["a", "b"]
    ids = random_tokens(1, 9, seed=7)
    torch.testing.assert_close(logits(model, memory, ids), logits(model, model.memorize(texts), ids), **EXACT)


def test_names_tokens_and_documents_come_back(tmp_path):
    model = tiny_model()
    memory = model.memorize([document(21), document(5, seed=1)], names=["a", "b"])
    memory.save(tmp_path / "a.hsa", tokenizer="t", metadata={"x": 1})
    for store in ("device", "host", "file"):
        loaded = ChunkMemory.load(tmp_path / "a.hsa", store=store)
        assert [(d.name, d.num_tokens, d.first_chunk, d.num_chunks, d.tokens.tolist()) for d in loaded.documents] == [
            (d.name, d.num_tokens, d.first_chunk, d.num_chunks, d.tokens.tolist()) for d in memory.documents
        ]
        assert loaded.num_tokens == 26 and loaded.fingerprint == memory.fingerprint
    with MemoryFile.open(tmp_path / "a.hsa") as file:
        assert file.spec.tokenizer == "t" and file.spec.metadata["x"] == 1
    with pytest.raises(MemoryFileError):
        memory.save(tmp_path / "a.hsa")


def test_a_loaded_memory_can_be_joined_and_moved_like_any_other(tmp_path):
    model = tiny_model()
    memory = model.memorize([document(21), document(5, seed=1)])
    memory.save(tmp_path / "a.hsa")
    loaded = opened(tmp_path / "a.hsa", "device")
    joined = ChunkMemory.concat([loaded, model.memorize(document(9, seed=2))]).to(dtype=torch.float32)
    assert joined.num_chunks == memory.num_chunks + 3 and len(joined.select([2, 0]).documents) == 2


def test_a_memory_left_in_a_file_refuses_changes_and_says_how_to_take_a_copy(tmp_path):
    model = tiny_model()
    model.memorize(document(21)).save(tmp_path / "a.hsa")
    memory = opened(tmp_path / "a.hsa", "file")
    with pytest.raises(ValueError, match=r"opened from a file or on several tiers.*memory\.loaded\(\)"):
        append(model, memory, document(9))
    copy = memory.loaded()
    append(model, copy, document(9))
    assert copy.num_tokens == 30 and memory.num_tokens == 21


def test_a_change_of_a_memory_for_reading_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    model = tiny_model()
    model.memorize(document(21), close=False).save(tmp_path / "a.hsa")
    memory = opened(tmp_path / "a.hsa", "file")
    monkeypatch.setattr(DocumentReader, "read", lambda *_: pytest.fail("was read"))
    for change in (
        # too short for a chunk, which nothing else would refuse
        lambda: append(model, memory, document(2), close=False),
        lambda: append(model, memory, document(2), document=0, close=False),
        lambda: edit(model, memory, 3, 4, [1]),
        lambda: close_document(model, memory),
    ):
        with pytest.raises(ValueError, match="opened from a file or on several tiers"):
            change()
    assert [(d.num_tokens, d.is_open) for d in memory.documents] == [(21, True)]


def test_a_memory_left_in_a_file_is_merged_selected_copied_and_saved_again(tmp_path):
    model = tiny_model()
    plain = model.memorize([document(21), document(9, seed=1)])
    plain.save(tmp_path / "a.hsa")
    memory = opened(tmp_path / "a.hsa", "file")
    merged, wanted = ChunkMemory.concat([memory, memory]), ChunkMemory.concat([plain, plain])
    for found, expected in (
        (merged, wanted),
        (memory.select([1]), plain.select([1])),
        (memory.to("cpu"), plain),
    ):
        assert isinstance(found, ChunkMemory) and len(found.documents) == len(expected.documents)
        assert all(torch.equal(a, b) for a, b in zip(found.tensors, expected.tensors, strict=True))
    memory.save(tmp_path / "b.hsa")
    again = opened(tmp_path / "b.hsa", "device")
    assert all(torch.equal(a, b) for a, b in zip(again.tensors, plain.tensors, strict=True))


@pytest.mark.parametrize("format", ["int8", "fp8", "bf16"])
def test_eight_bits_read_the_same_from_every_store(tmp_path, format):
    model = tiny_model()
    memory = model.memorize(document(90))
    memory.save(tmp_path / "a.hsa", key_values=format, landmarks="bf16" if format == "bf16" else "int8")
    ids = random_tokens(1, 30, seed=7)
    found = [logits(model, opened(tmp_path / "a.hsa", store), ids) for store in ("device", "host", "file")]
    torch.testing.assert_close(found[0], found[1], **EXACT)
    assert torch.equal(found[1], found[2])
    assert distance(found[0], logits(model, memory, ids)) < {"int8": 0.02, "fp8": 0.06, "bf16": 0.01}[format]


def test_a_bf16_checkpoint_loaded_wider_has_the_same_fingerprint_and_reads_the_same_memory(tmp_path):
    narrow = tiny_model().to(torch.bfloat16)
    wide = tiny_model()
    wide.load_state_dict({name: tensor.double() for name, tensor in narrow.state_dict().items()})
    assert memory_fingerprint(narrow) == memory_fingerprint(wide) == memory_fingerprint(wide.float())
    narrow.memorize(document(40)).save(tmp_path / "a.hsa")
    memory = open_memory(tmp_path / "a.hsa", dtype=torch.float32, fingerprint=memory_fingerprint(wide))
    assert logits(wide, memory, random_tokens(1, 9)).dtype == torch.float32
    with pytest.raises(MemoryFileError, match="another model"):
        open_memory(tmp_path / "a.hsa", fingerprint="other")


def model_of_few_directions():
    """A model whose landmarks lie in few directions, as training leaves them."""
    model = tiny_model(retrieval_dim=64)
    with torch.no_grad():
        weight = model.model.chunk_encoder.landmark_proj.weight
        weight[4:] = torch.randn(60, 4, dtype=weight.dtype) @ weight[:4] * 0.3
    return model


@pytest.mark.parametrize("lookup", ["sketch", "lists"])
def test_a_faster_lookup_gives_the_same_answers(tmp_path, monkeypatch, lookup):
    monkeypatch.setattr(landmark_index, "_FIT_CHUNKS", 64)
    monkeypatch.setattr(landmark_lists, "_LEAST_CHUNKS", 64)
    monkeypatch.setattr(landmark_lists, "_READ", 100)
    model = model_of_few_directions()
    model.memorize(document(1200)).save(tmp_path / "a.hsa")
    memories = [opened(tmp_path / "a.hsa", "file", lookup=lookup) for lookup in ("exact", lookup)]
    ids = random_tokens(2, 9, seed=5)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    found = []
    for memory in memories:
        cache = HSACache(model.config, memory=memory)
        with torch.no_grad():
            found.append(model(ids, attention_mask=mask, past_key_values=cache).logits)
    assert memories[1].lookup.basis is not None and memories[0].lookup is None
    assert isinstance(memories[1].lookup, LandmarkLists) == (lookup == "lists")
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1][1, 4:], found[0][1, 4:], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="lookup must be one of exact, sketch, lists"):
        opened(tmp_path / "a.hsa", "file", lookup="tree")


def test_a_change_takes_the_lists_away_and_what_is_appended_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(landmark_index, "_FIT_CHUNKS", 64)
    monkeypatch.setattr(landmark_lists, "_LEAST_CHUNKS", 64)
    model = model_of_few_directions()
    first, second = document(1200), random_tokens(1, 64, seed=9)[0]
    model.memorize(first).save(tmp_path / "a.hsa")
    memory = opened(tmp_path / "a.hsa", "device", lookup="lists")
    assert isinstance(memory.lookup, LandmarkLists)
    append(model, memory, second)
    assert memory.lookup is None
    ids = random_tokens(1, 9, seed=5)
    assert torch.equal(logits(model, memory, ids), logits(model, model.memorize([first, second]), ids))


@pytest.fixture(scope="module", params=["int8", "fp8", "bf16", "fp64"])
def saved(request, tmp_path_factory):
    """k and v (C, 2, S, Hkv, D) as a format keeps them, its bytes, and the open file."""
    memory, path = tiny_model().memorize(document(90)), tmp_path_factory.mktemp("saved") / "a.hsa"
    memory.save(path, key_values=request.param)
    pairs = torch.stack([part[0].unflatten(0, (-1, 4)) for part in (memory.k, memory.v)], 1)
    num_bytes = pairs[..., 0].numel() * row_bytes(request.param, pairs.shape[-1])
    with MemoryFile.open(path) as file:
        yield decode(*encode(pairs, request.param), torch.float64), num_bytes, file


@torch.no_grad()
def test_a_part_of_a_file_is_that_part_of_the_memory(tmp_path):
    model = tiny_model()
    memory = model.memorize([document(61), document(34, seed=1)])
    memory.save(tmp_path / "a.hsa")
    for store in ("device", "host", "tiered", "file"):
        loaded = opened(tmp_path / "a.hsa", store, part=(7, 20))
        assert loaded.num_chunks == 13 and len(loaded.documents) == 2
        for name in ("landmarks", "lengths", "segments", "ends"):
            assert torch.equal(getattr(loaded, name), getattr(memory, name)[:, 7:20])
        part = loaded.part(0, 13)
        assert torch.equal(part.k, memory.k[:, 7 * 4 : 20 * 4]) and torch.equal(part.v, memory.v[:, 7 * 4 : 20 * 4])


@given(chunks=st.lists(st.integers(0, 22), max_size=30), capacity=st.integers(1, 30))
def test_every_store_gives_the_rows_that_were_encoded(saved, chunks, capacity):
    expected, num_bytes, file = saved
    chosen = torch.tensor(chunks, dtype=torch.int64)
    part = (0, file.num_chunks)
    stores = [FileStore(file, "cpu", torch.float64), _load_tiers(file, part, "cpu", torch.float64, 9 * num_bytes // 23)]
    for store in (*stores, CachedStore(stores[0], capacity)):
        assert store.num_bytes == num_bytes
        # the second time from the cache
        for _ in range(2):
            k, v = store.fetch(chosen)
            assert torch.equal(k, expected[chosen][:, 0]) and torch.equal(v, expected[chosen][:, 1])


class Numbers:
    """A store whose chunk i holds i."""

    num_bytes = 0

    def __init__(self, is_failing=lambda: False):
        self.is_failing, self.fetched = is_failing, []

    def fetch(self, chunks):
        if self.is_failing():
            raise OSError("the disk is gone")
        self.fetched += chunks.tolist()
        values = chunks.double()[:, None, None, None].expand(-1, 2, 1, 3)
        return values.clone(), -values


FETCHES = st.lists(st.lists(st.integers(0, 12), max_size=9), max_size=12)


@given(st.integers(1, 14), FETCHES, st.booleans())
def test_a_cache_of_any_size_is_the_least_recently_used_one_and_gives_what_lies_below(capacity, fetches, is_sorted):
    below = Numbers()
    cache, kept, hits, misses = CachedStore(below, capacity), [], 0, 0
    for chunks in fetches:
        chunks = sorted(set(chunks)) if is_sorted else chunks
        below.fetched.clear()
        k, v = cache.fetch(torch.tensor(chunks, dtype=torch.int64))
        assert k[:, 0, 0, 0].tolist() == chunks and torch.equal(v, -k)
        missing = [chunk for chunk in dict.fromkeys(chunks) if chunk not in kept]
        hits, misses = hits + len(chunks) - len(missing), misses + len(missing)
        assert (cache.num_hits, cache.num_misses) == (hits, misses)
        if len(set(chunks)) > capacity:
            # too much to keep: what was kept stays
            assert below.fetched == chunks
            continue
        assert below.fetched == missing
        present = [chunk for chunk in dict.fromkeys(reversed(chunks)) if chunk in kept]
        kept = [*(chunk for chunk in kept if chunk not in present), *reversed(present), *missing][-capacity:]


def test_the_least_recently_used_chunk_makes_room():
    cache = CachedStore(Numbers(), 2)
    for chunk in (1, 2, 1, 3, 1, 2):
        cache.fetch(torch.tensor([chunk]))
    assert (cache.num_hits, cache.num_misses) == (2, 4)


@pytest.mark.parametrize(("capacity", "hits"), [(1, 0), (3, 0), (4, 8), (5, 8)])
def test_a_cache_keeps_a_fetch_that_it_has_room_for(capacity, hits):
    cache = CachedStore(Numbers(), capacity)
    for _ in range(3):
        cache.fetch(torch.tensor([2, 3, 5, 7]))
    assert (cache.num_hits, cache.num_misses) == (hits, 12 - hits)


def test_a_failed_fetch_leaves_no_trace_in_the_cache():
    is_failing = []
    cache = CachedStore(Numbers(lambda: bool(is_failing)), 3)
    cache.fetch(torch.tensor([0, 1]))
    is_failing.append(1)
    for chunks in ([1, 2], [3, 4, 5], [2, 3, 4, 5]):
        with pytest.raises(OSError):
            cache.fetch(torch.tensor(chunks))
    is_failing.clear()
    for chunks in ([0, 1], [1, 2], [0, 2], [3, 4, 5], [0, 3]):
        k, v = cache.fetch(torch.tensor(chunks))
        assert k[:, 0, 0, 0].tolist() == chunks and torch.equal(v, -k)


def test_a_flipped_bit_anywhere_is_found_and_never_reaches_an_answer(tmp_path):
    model, path = tiny_model(), tmp_path / "a.hsa"
    with Library.create(model, path, key_values="fp64", landmarks="fp64") as library:
        library.add(document(600), name="long")
        library.add(document(50, seed=1), name="short")
    ids = random_tokens(1, 8, seed=2)
    more = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False, "output_logits": True}

    def answer(store):
        result = model.generate(ids, memory=opened(path, store), return_dict_in_generate=True, **more)
        return result.sequences.tolist(), torch.stack(result.logits)

    expected = {store: answer(store) for store in ("file", "host", "device")}
    rng = random.Random(0)
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and file.stat().st_size]
    sizes = [file.stat().st_size for file in files]
    stopped = dict.fromkeys(expected, 0)
    for number in range(120):
        store = list(expected)[number % 3]
        file = rng.choices(files, weights=sizes)[0] if rng.random() < 0.7 else rng.choice(files)
        data = file.read_bytes()
        place, bit = rng.randrange(len(data)), rng.randrange(8)
        file.write_bytes(data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :])
        damages = [] if file.name == "writer.lock" else verify_memory(path)
        assert damages or file.name == "writer.lock", file
        try:
            sequences, found = answer(store)
            assert sequences == expected[store][0] and torch.equal(found, expected[store][1])
        except MemoryFileError as error:
            stopped[store] += 1
            assert str(path) in str(error) and "\n" not in str(error)
            if file.suffix == ".safetensors":
                assert file.name in str(error) and ("'long'" in str(error) or "'short'" in str(error))
        file.write_bytes(data)
    assert min(stopped.values()) > 25 and not verify_memory(path)


GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def gpu_model():
    return tiny_model(head_dim=32, hidden_size=64, chunk_size=16, retrieval_dim=32).cuda().to(torch.bfloat16)


@pytest.mark.parametrize("tokens", [1, 40, 200])
@pytest.mark.parametrize("format", [pytest.param(name, marks=GPU) for name in ("bf16", "int8", "fp8")])
def test_stores_agree_on_a_gpu(tmp_path, format, tokens):
    model = gpu_model()
    model.memorize([document(3000), document(40, seed=1)]).save(tmp_path / "a.hsa", key_values=format)
    ids = random_tokens(2, tokens, seed=7).cuda()

    def found(store, **room):
        options = {"store": store, "device": "cuda", "dtype": torch.bfloat16, **room}
        return logits(model, open_memory(tmp_path / "a.hsa", **options), ids)

    host = found("host")
    for other in (found("file"), found("tiered", device_bytes=20_000), found("file", cache_bytes=20_000)):
        assert torch.equal(other, host)
    assert distance(found("device"), host) < 0.02


@pytest.mark.parametrize("store", [pytest.param(name, marks=GPU) for name in ("device", "host", "file")])
@torch.no_grad()
def test_a_memory_built_on_a_gpu_is_generated_from_and_continued_after_loading(tmp_path, store):
    model = gpu_model()
    memory = model.memorize([document(900), document(100, seed=1)], close=False)
    memory.save(tmp_path / "a.hsa")
    loaded = open_memory(tmp_path / "a.hsa", store=store, device="cuda")
    assert loaded.landmarks.is_cuda and loaded.landmarks.dtype == torch.bfloat16
    assert distance(last_logits(model, loaded, 3), last_logits(model, memory, 3)) < 0.02
    ids = random_tokens(1, 3, seed=5).cuda()
    more = {"max_new_tokens": 9, "do_sample": False}
    assert model.generate(ids, memory=loaded, continue_document=True, **more).is_cuda
    if store == "device":
        assert torch.equal(model.generate(ids, memory=loaded, **more), model.generate(ids, memory=memory, **more))
    elif store == "host":
        blocks = loaded.store.blocks
        assert all(part.is_pinned() for part in blocks.payloads + blocks.scales)


@pytest.mark.parametrize("form", [pytest.param(form, marks=GPU) for form in ("bf16", "int8")])
@torch.no_grad()
def test_a_text_read_into_a_file_on_a_gpu_is_that_of_one_saved_from_its_memory(tmp_path, form):
    """Copies that nobody waited for would be of other chunks, or of none."""
    model, text = gpu_model(), document(20_000)
    saved, read = tmp_path / "saved.hsa", tmp_path / "read.hsa"
    model.memorize(text, piece_tokens=512).save(saved, key_values=form, landmarks=form)
    with Library.create(model, read, key_values=form, landmarks=form) as library:
        library.add(text, piece_tokens=512, commit_tokens=3000)
    assert verify_memory(read) == []
    with MemoryFile.open(saved) as one, MemoryFile.open(read) as other:
        assert one.num_chunks == other.num_chunks
        for name in one.spec.columns:
            parts = (file.read(name, 0, file.num_chunks).contiguous().view(torch.uint8) for file in (one, other))
            assert torch.equal(*parts), name


@pytest.mark.parametrize("store", [pytest.param("device", marks=GPU)])
@torch.no_grad()
def test_a_memory_with_int8_landmarks_read_into_a_gpu_keeps_them_when_it_is_changed(tmp_path, store):
    model = gpu_model()
    memory = model.memorize(document(900))
    memory.save(tmp_path / "a.hsa", landmarks="int8")
    loaded = open_memory(tmp_path / "a.hsa", store=store, device="cuda")
    assert isinstance(loaded.lookup, LandmarkKeeper)
    append(model, loaded, document(100, seed=1))
    assert loaded.lookup is None
    size = memory.num_chunks
    assert distance(loaded.landmarks[:, :size], memory.landmarks) < 0.02 and loaded.num_chunks > size


def test_room_that_a_store_does_not_take_is_refused(tmp_path):
    model = tiny_model()
    memory = model.memorize(document(21))
    memory.save(tmp_path / "a.hsa")
    with pytest.raises(ValueError, match="cache_bytes goes with store='file', got store='host'"):
        open_memory(tmp_path / "a.hsa", store="host", cache_bytes=600)
    with pytest.raises(ValueError, match="device_bytes goes with store='tiered', got store='file'"):
        open_memory(tmp_path / "a.hsa", device_bytes=600)
    for store in ("device", "host", tmp_path / "b.hsa"):
        with pytest.raises(ValueError, match="device_bytes is room for store='tiered'"):
            model.memorize(document(21), store=store, device_bytes=600)
    assert not (tmp_path / "b.hsa").exists()
