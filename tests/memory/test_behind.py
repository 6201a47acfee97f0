"""Behind: calls run in order beside their caller, errors come back, nothing that was given is half done."""

import threading

import pytest

from hsa_ultralong.memory.files.behind import Behind
from hsa_ultralong.testing.processes import HANG_SECONDS


def waiting_for(event):
    def call():
        assert event.wait(HANG_SECONDS)

    return call


def test_the_caller_goes_on_while_a_call_runs_and_calls_keep_their_order():
    go, done = threading.Event(), []
    with Behind(room=100) as behind:
        behind.run(waiting_for(go), 10)
        for number in range(5):
            behind.run(lambda number=number: done.append(number), 10)
        assert done == []
        go.set()
        behind.finish()
        assert done == [0, 1, 2, 3, 4]
        behind.run(lambda: done.append(5), 10)
    assert done == [0, 1, 2, 3, 4, 5]


def test_the_caller_waits_while_there_is_no_room_and_one_call_of_any_size_may_wait():
    go, began = threading.Event(), threading.Event()
    with Behind(room=100) as behind:
        behind.run(waiting_for(go), 1000)

        def next_calls():
            behind.run(lambda: None, 60)
            began.set()
            behind.run(lambda: None, 40)

        caller = threading.Thread(target=next_calls)
        caller.start()
        assert not began.wait(0.2)
        go.set()
        assert began.wait(HANG_SECONDS)
        caller.join()


@pytest.mark.parametrize("where", ["run", "finish", "exit"])
def test_the_first_error_comes_back_and_nothing_after_it_runs(where):
    done, failed = [], threading.Event()

    def fail(number):
        failed.set()
        raise OSError(f"no space {number}")

    with pytest.raises(OSError, match="no space 0"), Behind(room=1000) as behind:
        behind.run(lambda: done.append(0), 1)
        behind.run(lambda: fail(0), 1)
        behind.run(lambda: fail(1), 1)
        assert failed.wait(HANG_SECONDS)
        if where == "finish":
            behind.finish()
        while where == "run":
            behind.run(lambda: done.append(1), 1)
    assert done == [0]


def test_a_block_that_is_interrupted_still_has_its_calls_run():
    go, done = threading.Event(), []
    with pytest.raises(KeyboardInterrupt), Behind(room=100) as behind:
        behind.run(waiting_for(go), 1)
        for number in range(3):
            behind.run(lambda number=number: done.append(number), 1)
        go.set()
        raise KeyboardInterrupt
    assert done == [0, 1, 2]


def test_an_error_behind_a_block_that_fails_itself_is_said_and_does_not_hide_the_first(caplog):
    with pytest.raises(KeyboardInterrupt), Behind(room=100) as behind:
        go = threading.Event()
        behind.run(waiting_for(go), 1)
        behind.run(lambda: 1 / 0, 1)
        go.set()
        raise KeyboardInterrupt
    assert "what was still to be written failed: division by zero" in caplog.text


@pytest.mark.parametrize("is_first", [True, False])
def test_an_interrupt_while_leaving_drops_what_has_not_begun_and_waits_for_what_runs(monkeypatch, is_first):
    go, done = threading.Event(), []
    with pytest.raises(KeyboardInterrupt if is_first else ValueError), Behind(room=100) as behind:
        behind.run(lambda: (waiting_for(go)(), done.append("ran")), 1)
        behind.run(lambda: done.append("dropped"), 1)
        shutdown, calls = behind._thread.shutdown, []

        def interrupted():
            calls.append(1)
            if len(calls) == 1:
                raise KeyboardInterrupt
            go.set()
            shutdown()

        monkeypatch.setattr(behind._thread, "shutdown", interrupted)
        if not is_first:
            raise ValueError
    assert done == ["ran"]
