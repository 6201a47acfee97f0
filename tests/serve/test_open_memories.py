"""Open memories stay within their budgets, move between tiers as they are asked, and never while they are read."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import SimpleNamespace

import pytest

from hsa_ultralong.serve.limits import ServeError
from hsa_ultralong.serve.open_memories import OpenMemories
from hsa_ultralong.testing.processes import HANG_SECONDS

COSTS = {"device": {"device": 10, "host": 0}, "host": {"device": 1, "host": 8}, "file": {"device": 2, "host": 0}}


class Asked:
    """Memories that are asked, and where they were opened."""

    def __init__(self, device, host, most=8):
        self.opened, self.gone = OpenMemories({"device": device, "host": host}, most), []
        self.opened.let_go = self.gone.append

    def ask(self, id, stamps=0, costs=COSTS):
        def read(tier):
            return SimpleNamespace(memory=f"{id} {stamps} on {tier}")

        return self.opened.get(("anna", id), lambda: (stamps, costs), read).memory.split(" on ")[1]

    def used(self):
        return self.opened.bytes_on("device"), self.opened.bytes_on("host")


def test_a_new_memory_takes_the_best_tier_that_has_room():
    asked = Asked(device=15, host=8)
    assert [asked.ask(id) for id in "abc"] == ["device", "host", "file"] and asked.used() == (13, 8)


def test_a_memory_moves_up_once_it_was_asked_twice_since_those_that_make_room():
    asked = Asked(device=12, host=8)
    assert [asked.ask(id) for id in "abab"] == ["device", "host", "device", "host"]
    assert asked.ask("b") == "device" and asked.ask("a") == "host" and asked.used() == (11, 8)
    assert asked.gone == ["a 0 on device", "b 0 on host"]


def test_what_is_read_never_moves():
    asked = Asked(device=12, host=8)
    asked.ask("a")
    asked.opened.is_held = lambda memory: memory.startswith("a")
    assert [asked.ask("b") for _ in range(4)] == ["host"] * 4 and asked.gone == []


def test_the_least_recently_asked_is_closed_where_there_is_nowhere_else_to_go():
    asked = Asked(device=4, host=0)
    costs = {"file": COSTS["file"]}
    assert [asked.ask(id, costs=costs) for id in "abc"] == ["file"] * 3
    assert asked.gone == ["a 0 on file"] and asked.used() == (4, 0)
    asked.opened.is_held = lambda memory: True
    with pytest.raises(ServeError, match="needs 2 bytes of device memory"):
        asked.ask("d", costs=costs)
    assert asked.used() == (4, 0)


def test_no_more_are_open_than_may_be():
    asked = Asked(device=None, host=None, most=2)
    for id in "abcb":
        asked.ask(id)
    assert asked.gone == ["a 0 on device"]


def test_another_state_of_a_memory_is_opened_anew():
    asked = Asked(device=100, host=8)
    asked.ask("a", 1)
    assert asked.ask("a", 2) == "device" and asked.gone == ["a 1 on device"] and asked.used() == (10, 0)


def test_an_old_state_that_is_still_read_counts_until_it_is_let_go():
    asked, gone = Asked(device=15, host=8), threading.Event()
    asked.ask("a", 1)
    asked.opened.let_go = lambda memory: gone
    assert asked.ask("a", 2) == "host" and asked.used() == (11, 8)
    asked.opened.close(lambda key: True)
    assert asked.used() == (11, 8)
    gone.set()
    assert asked.used() == (0, 0) and asked.ask("a", 3) == "device" and asked.used() == (10, 0)


def test_budgets_hold_whatever_is_asked():
    chance = random.Random(0)
    asked = Asked(device=25, host=17, most=5)
    held = set()
    asked.opened.is_held = lambda memory: memory in held
    for _ in range(400):
        with suppress(ServeError):
            asked.ask(chance.choice("abcdefg"))
        device, host = asked.used()
        assert device <= 25 and host <= 17
        memories = [entry.memory for entry in asked.opened._entries.values()]
        assert len(memories) <= 5 and not held & set(asked.gone)
        held = set(chance.sample(memories, min(2, len(memories))))
        asked.gone.clear()


class Slow(Asked):
    """Reading stops until it is told to go on."""

    def __init__(self, *budgets, **options):
        super().__init__(*budgets, **options)
        self.is_reading, self.goes_on, self.reads = threading.Event(), threading.Event(), []

    def ask_slowly(self, id, result=None):
        def read(tier):
            self.reads.append(id)
            self.is_reading.set()
            assert self.goes_on.wait(HANG_SECONDS)
            if result is not None:
                raise result
            return SimpleNamespace(memory=f"{id} 0 on {tier}")

        return self.opened.get(("anna", id), lambda: (0, COSTS), read).memory


def test_openings_go_side_by_side_and_one_memory_is_read_once():
    asked = Slow(device=30, host=8)
    with ThreadPoolExecutor(2) as pool:
        slow = [pool.submit(asked.ask_slowly, "a") for _ in range(2)]
        assert asked.is_reading.wait(HANG_SECONDS)
        # its place counts from the beginning
        assert asked.used() == (10, 0) and [asked.ask(id) for id in "bc"] == ["device", "device"]
        asked.goes_on.set()
        assert [one.result() for one in slow] == ["a 0 on device"] * 2 and asked.reads == ["a"]
    assert asked.used()[0] <= 30


def test_a_memory_that_is_closed_while_it_is_opened_is_not_kept():
    asked = Slow(device=30, host=8)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(asked.ask_slowly, "a")
        assert asked.is_reading.wait(HANG_SECONDS)
        asked.opened.close(lambda key: True)
        asked.goes_on.set()
        assert slow.result() == "a 0 on device"
    assert asked.gone == ["a 0 on device"] and asked.used() == (0, 0) and not asked.opened.has("a 0 on device")


def test_an_opening_that_fails_gives_its_place_back():
    asked = Slow(device=30, host=8)
    asked.goes_on.set()
    with pytest.raises(OSError, match="broken"):
        asked.ask_slowly("a", OSError("broken"))
    assert asked.used() == (0, 0) and asked.ask("a") == "device"
