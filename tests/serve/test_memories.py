"""Memories on a server's disk: whose they are, what they take, what is left of a killed server."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from hsa_ultralong.inference import Library
from hsa_ultralong.inference.rebuilding import rebuild
from hsa_ultralong.memory.opening import open_memory
from hsa_ultralong.serve.limits import ServeError
from hsa_ultralong.serve.memories import Memories
from hsa_ultralong.testing.processes import HANG_SECONDS
from tests.serve.conftest import FERRY, LANTERN, LIMITS

DOCUMENTS = [("a", LANTERN), ("b", FERRY)]


def memories_of(nano, folder, *, key_values="bf16", **changes):
    """Memories in a folder; `changes` are of the limits."""
    return Memories(folder, *nano, replace(LIMITS, **changes), key_values=key_values)


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
