"""Room on disk: what memories take is known before, nobody passes a budget, and who makes room does so in order."""

import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from hsa_ultralong.serve.disk_budget import file_bytes
from hsa_ultralong.serve.last_asked import LastAsked
from hsa_ultralong.serve.limits import ServeError
from hsa_ultralong.serve.memory_folders import bytes_of, marker_of, partial_of
from hsa_ultralong.testing.processes import HANG_SECONDS
from tests.serve.conftest import FERRY, FILLER, LANTERN, memories_of

SMALL, LARGE = [("a", FERRY)], [(f"d{number}", FILLER) for number in range(5)]


@pytest.fixture(scope="module")
def size(nano, tmp_path_factory):
    """Bytes of a memory of FILLER."""
    memories = memories_of(nano, tmp_path_factory.mktemp("one"))
    memories.create("default", "m", [("a", FILLER)])
    return memories.bytes_used()


def make(memories, id, namespace="default"):
    memories.create(namespace, id, [("a", FILLER)])
    return memories.ids(namespace)


@pytest.mark.parametrize(
    "forms", [("bf16", "bf16"), ("fp32", "fp32"), ("fp16", "fp16"), ("int8", "int8"), ("fp8", "bf16"), ("fp32", "int8")]
)
@pytest.mark.parametrize("documents", [SMALL, LARGE], ids=["small", "large"])
def test_what_a_memory_takes_is_known_before(nano, tmp_path, forms, documents):
    memories = memories_of(nano, tmp_path, *forms)
    memories.create("default", "m", documents)
    sizes = [(name, len(nano[1](text)["input_ids"])) for name, text in documents]
    expected, actual = file_bytes(memories.spec, sizes), bytes_of(tmp_path / "default" / "m.hsa")
    assert actual <= expected <= 1.2 * actual
    memories.append("default", "m", documents)
    growth = bytes_of(tmp_path / "default" / "m.hsa") - actual
    assert growth <= expected <= 1.2 * growth
    assert memories.bytes_used() == actual + growth


def test_two_that_begin_together_do_not_pass_the_budget_together(nano, tmp_path, size):
    memories = memories_of(nano, tmp_path, disk_bytes=int(1.5 * size))
    is_reading, goes_on = threading.Event(), threading.Event()

    def wait(*_):
        is_reading.set()
        assert goes_on.wait(HANG_SECONDS)

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(memories.create, "default", "first", [("a", FILLER)], wait)
        assert is_reading.wait(HANG_SECONDS)
        try:
            with pytest.raises(ServeError, match="for all memories"):
                make(memories, "second")
        finally:
            goes_on.set()
        assert first.result()["status"] == "ready"
    assert memories.ids("default") == ["first"] and memories.bytes_used() <= 1.5 * size
    # what was promised is given back
    memories.delete("default", "first")
    assert make(memories, "second") == ["second"]


def test_a_change_that_does_not_fit_leaves_the_memory_as_it_was(nano, tmp_path, size):
    memories = memories_of(nano, tmp_path, disk_bytes=int(1.5 * size))
    make(memories, "m")
    document = memories.documents("default", "m")[0]["id"]
    for change in (
        lambda: memories.append("default", "m", [("b", FILLER)]),
        lambda: memories.replace("default", "m", document, LANTERN + FILLER, None),
        lambda: memories.replace("default", "m", document, LANTERN, (0, 0)),
    ):
        with pytest.raises(ServeError, match="passes the budget") as refused:
            change()
        assert (refused.value.status, refused.value.code) == (507, "disk_budget")
    assert memories.info("default", "m")["generation"] == 1 and memories.bytes_used() <= size
    # a document can always be taken out
    memories.disk.limits = replace(memories.limits, disk_bytes=1)
    memories.remove("default", "m", document)
    assert memories.info("default", "m")["documents"] == 0 and memories.bytes_used() < size / 2


def test_memories_of_others_make_no_room(nano, tmp_path, size):
    memories = memories_of(nano, tmp_path, disk_bytes=int(3.5 * size), evict=True)
    make(memories, "m", "anna"), make(memories, "n", "anna")
    assert make(memories, "m", "bob") == ["m"] and make(memories, "n", "bob") == ["n"]
    assert memories.ids("anna") == ["m", "n"]
    # nothing goes where that is not enough
    with pytest.raises(ServeError, match="for all memories"):
        memories.create("bob", "large", [("a", FILLER * 3)])
    assert memories.ids("bob") == ["n"]


def test_a_namespace_has_a_budget_of_its_own(nano, tmp_path, size):
    memories = memories_of(nano, tmp_path, namespace_bytes=int(1.5 * size))
    assert make(memories, "m", "anna") == make(memories, "m", "bob") == ["m"]
    with pytest.raises(ServeError, match="for memories of a namespace"):
        make(memories, "n", "anna")
    memories.disk.limits = replace(memories.limits, evict=True)
    assert make(memories, "n", "anna") == ["n"] and memories.ids("bob") == ["m"]


def test_what_was_not_asked_for_longest_goes_first_also_after_a_restart(nano, tmp_path, size):
    memories = memories_of(nano, tmp_path)
    for number, id in enumerate("abc"):
        make(memories, id)
        os.utime(tmp_path / "default" / f"{id}.hsa" / "manifest.json", (number, number))
    memories.open("default", ["a"])
    memories = memories_of(nano, tmp_path, disk_bytes=int(3.5 * size), evict=True)
    assert make(memories, "d") == ["a", "c", "d"] and make(memories, "e") == ["a", "d", "e"]
    assert {path.name for path in (tmp_path / "default").iterdir()} == {"a.hsa", ".a.hsa.asked", "d.hsa", "e.hsa"}


def test_the_time_of_a_question_is_written_now_and_then(tmp_path):
    place, asked = tmp_path / "m.hsa", LastAsked(seconds=3600)
    asked.note(place)
    first = asked.last(place)
    os.utime(marker_of(place), (5, 5))
    asked.note(place)
    assert marker_of(place).stat().st_mtime == 5 and asked.last(place) > first
    LastAsked().note(place)
    assert marker_of(place).stat().st_mtime > 5
    asked.forget(place)
    assert list(tmp_path.iterdir()) == [] and asked.last(place) == 0


def test_what_killed_servers_left_is_removed_or_counted_and_goes_first(nano, tmp_path, size):
    memories = memories_of(nano, tmp_path)
    for id in ("whole", "deleted", "half", "late"):
        make(memories, id)
    folder = tmp_path / "default"
    (folder / "deleted.hsa").rename(folder / ".deleted.hsa.deleted")
    for id in ("half", "late"):
        (folder / f"{id}.hsa").rename(partial_of(folder / f"{id}.hsa"))
    memories = memories_of(nano, tmp_path, disk_bytes=int(3.5 * size))
    assert sorted(path.name for path in folder.iterdir()) == [".half.hsa.partial", ".late.hsa.partial", "whole.hsa"]
    assert memories.bytes_used() == 3 * size and memories.ids("default") == ["whole"]
    # one can be deleted by its name, the other makes room
    memories.delete("default", "half")
    assert make(memories, "m") == ["m", "whole"] and partial_of(folder / "late.hsa").exists()
    assert make(memories, "n") == ["m", "n", "whole"] and not partial_of(folder / "late.hsa").exists()
    with pytest.raises(ServeError, match="there is no memory"):
        memories.delete("default", "half")


def test_a_deletion_is_confirmed_once_nothing_is_left(nano, tmp_path, size, monkeypatch):
    memories = memories_of(nano, tmp_path)
    make(memories, "m")
    rmtree = shutil.rmtree

    def broken(place, **_):
        raise PermissionError(13, "not allowed", str(place))

    monkeypatch.setattr(shutil, "rmtree", broken)
    with pytest.raises(ServeError, match="the disk refused it"):
        memories.delete("default", "m")
    assert memories.ids("default") == [] and memories.bytes_used() == size
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    memories.delete("default", "m")
    assert list((tmp_path / "default").iterdir()) == [] and memories.bytes_used() == 0
