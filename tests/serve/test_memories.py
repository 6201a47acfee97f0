"""Memories on a server's disk: whose they are, what they take, what is left of a killed server."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from hsa_ultralong.inference import Library
from hsa_ultralong.inference.rebuilding import rebuild
from hsa_ultralong.memory.opening import open_memory
from hsa_ultralong.serve import repeated
from hsa_ultralong.serve.limits import ServeError
from hsa_ultralong.testing.processes import HANG_SECONDS
from tests.serve.conftest import FERRY, LANTERN, memories_of

DOCUMENTS = [("a", LANTERN), ("b", FERRY)]


@pytest.fixture
def memories(nano, tmp_path):
    return memories_of(nano, tmp_path)


def contents(folder):
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(("stamp", "way"), [("another", "makes it again"), ("", "takes it over")])
def test_a_memory_of_another_tokenizer_is_neither_read_nor_changed(nano, memories, tmp_path, stamp, way):
    model, tokenizer = nano
    place = tmp_path / "default" / "theirs.hsa"
    with Library.create(model, place, tokenizer=stamp) as library:
        document = library.add(torch.tensor(tokenizer(LANTERN)["input_ids"]), name="a")
    memories.create("default", "ours", DOCUMENTS)
    before = contents(place)
    assert memories.info("default", "theirs")["status"] == "foreign"
    for ask in (
        lambda: memories.append("default", "theirs", DOCUMENTS),
        lambda: memories.replace("default", "theirs", document, FERRY, None),
        lambda: memories.replace("default", "theirs", document, FERRY, (0, 1)),
        lambda: memories.remove("default", "theirs", document),
        lambda: memories.merge("default", "theirs", ["ours"]),
        lambda: memories.merge("default", "ours", ["theirs"]),
        lambda: memories.create("default", "theirs", [("a", LANTERN)]),
        lambda: memories.passage("default", "theirs", document, 0, 5),
        lambda: memories.open("default", ["theirs"]),
    ):
        with pytest.raises(ServeError, match=f"hsa memory rebuild MEMORY --model MODEL {way}") as refused:
            ask()
        assert (refused.value.status, refused.value.code) == (409, "foreign_memory")
    assert contents(place) == before
    assert memories.info("default", "ours")["documents"] == 2


def test_a_memory_without_a_stamp_is_taken_over_by_a_rebuild(nano, memories, tmp_path):
    model, tokenizer = nano
    place = tmp_path / "default" / "theirs.hsa"
    with Library.create(model, place) as library:
        library.add(torch.tensor(tokenizer(LANTERN)["input_ids"]), name="a")
    rebuild(model, place, tokenizer=memories.spec.tokenizer)
    assert memories.append("default", "theirs", DOCUMENTS)["documents"] == 3


@pytest.mark.parametrize("form", ["tokenizer", "key_values"])
def test_what_a_killed_call_left_in_another_form_is_not_gone_on_with(nano, memories, tmp_path, form):
    model, tokenizer = nano
    options = {"tokenizer": memories.spec.tokenizer, form: "fp32" if form == "key_values" else "another"}
    with Library.create(model, tmp_path / "default" / ".m.hsa.partial", **options) as library:
        library.add(torch.tensor(tokenizer(LANTERN)["input_ids"]), name="a")
    made = memories.create("default", "m", DOCUMENTS)
    assert (made["status"], made["formats"]["key_values"]) == ("ready", "bf16")


def test_one_opening_holds_up_neither_others_nor_changes(memories, monkeypatch):
    is_reading, goes_on = threading.Event(), threading.Event()
    for id in ("slow", "quick"):
        memories.create("default", id, DOCUMENTS)

    def late(place, **options):
        if place.stem == "slow":
            is_reading.set()
            assert goes_on.wait(HANG_SECONDS)
        return open_memory(place, **options)

    monkeypatch.setattr("hsa_ultralong.serve.memories.open_memory", late)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(memories.open, "default", ["slow"])
        try:
            assert is_reading.wait(HANG_SECONDS)
            assert memories.open("default", ["quick"]).ids == ("quick",)
            assert memories.append("default", "quick", DOCUMENTS)["documents"] == 4
            assert memories.append("default", "slow", DOCUMENTS)["documents"] == 4
        finally:
            goes_on.set()
        # what changed meanwhile is there
        assert len(slow.result().documents) == 4


def test_a_change_with_a_key_is_made_once_also_after_a_restart(nano, memories, tmp_path, monkeypatch):
    monkeypatch.setattr(repeated, "MOST_KEYS", 4)
    memories.create("default", "m", DOCUMENTS, key="make")
    memories.create("default", "other", DOCUMENTS[:1])
    memories.append("default", "m", DOCUMENTS, key="more")
    first = memories.documents("default", "m")[0]["id"]
    memories.replace("default", "m", first, LANTERN, (0, 0), key="change")
    done = memories.merge("default", "m", ["other"], key="merge")
    memories.merge("default", "new", ["other"], key="merge")
    assert done["documents"] == 5
    memories = memories_of(nano, tmp_path)
    assert memories.create("default", "m", DOCUMENTS, key="make") == done
    assert memories.append("default", "m", DOCUMENTS, key="more") == done
    assert memories.replace("default", "m", first, LANTERN, (0, 0), key="change") == {**done, "chunks_read": 0}
    assert memories.merge("default", "m", ["other"], key="merge") == done
    assert memories.merge("default", "new", ["other"], key="merge")["documents"] == 1
    for again in (
        lambda: memories.append("default", "m", DOCUMENTS[:1], key="more"),
        lambda: memories.replace("default", "m", first, LANTERN, None, key="change"),
    ):
        with pytest.raises(ServeError, match="was used for another request") as refused:
            again()
        assert refused.value.status == 422
    # the oldest is forgotten, and a key counts for one memory
    assert memories.append("default", "m", DOCUMENTS[:1], key="fifth")["documents"] == 6
    assert memories.append("default", "m", DOCUMENTS, key="make")["documents"] == 8
    assert memories.append("default", "other", DOCUMENTS, key="more")["documents"] == 3


def test_a_change_that_failed_is_not_taken_for_made(memories, monkeypatch):
    memories.create("default", "m", DOCUMENTS)
    commit = Library.commit

    def broken(library):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Library, "commit", broken)
    with pytest.raises(ServeError, match="the disk refused it"):
        memories.append("default", "m", DOCUMENTS, key="more")
    monkeypatch.setattr(Library, "commit", commit)
    assert memories.append("default", "m", DOCUMENTS, key="more")["documents"] == 4


def test_the_header_of_a_key_is_heard_by_every_change(client):
    key = {"Idempotency-Key": "one"}
    for _ in range(2):
        assert client.post("/v1/memories", json={"id": "m", "text": LANTERN}, headers=key).status_code == 201
    client.post("/v1/memories", json={"id": "n", "text": LANTERN})
    changes = {
        "documents": {"json": {"documents": [{"text": FERRY}]}},
        "files": {"files": [("files", ("a.txt", b"A line."))]},
        "merge": {"json": {"memories": ["n"]}},
    }
    for number, (place, body) in enumerate(changes.items()):
        for _ in range(2):
            made = client.post(f"/v1/memories/m/{place}", **body, headers={"Idempotency-Key": place})
            assert made.json()["documents"] == 2 + number
    put = {"text": "Again. ", "start": 0, "stop": 0}
    sizes = [
        client.put("/v1/memories/m/documents/0", json=put, headers={"Idempotency-Key": "put"}).json()["tokens"]
        for _ in range(2)
    ]
    assert sizes[0] == sizes[1]
    for wrong in ("", "x" * 256):
        refused = client.post("/v1/memories", json={"id": "z", "text": "a"}, headers={"Idempotency-Key": wrong})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_key")


def test_a_merge_names_a_memory_once(memories):
    memories.create("default", "ok", DOCUMENTS)
    with pytest.raises(ServeError, match="twice"):
        memories.merge("default", "new", ["ok", "ok"])
