"""A run folder has one trainer at a time, and a refused one leaves nothing behind."""

import json
import multiprocessing
import os
import signal

import pytest

from hsa_ultralong.files.lock import FileLock
from hsa_ultralong.train.run_folder import LOCK_FILE, RunFolder, RunLog


def in_child(work):
    """Run `work(send)` in a forked process; returns it and the end to receive from."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=work, args=(send,))
    child.start()
    return child, receive


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def hold(run):
    def work(send):
        RunFolder(run).take()
        send.send(os.getpid())
        signal.pause()

    return work


def test_a_second_trainer_is_refused_with_the_process_of_the_first_which_is_not_harmed(tiny_runs, tmp_path):
    def train(send):
        one = tiny_runs.trainer(tmp_path / "run")
        one.listener = lambda record: (send.send(record["global_step"]), signal.pause())
        one.train()

    child, receive = in_child(train)
    assert receive.recv() == 1
    before = tree(tmp_path)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"run is being trained by process {child.pid} on \S+; wait"):
            tiny_runs.trainer(tmp_path / "run")
    assert tree(tmp_path) == before
    child.kill()
    child.join()
    # its lock died with it
    assert tiny_runs.trainer(tmp_path / "run").train()
    tiny_runs.trainer(tmp_path / "whole").train()
    assert tiny_runs.losses(tmp_path / "run") == tiny_runs.losses(tmp_path / "whole")


def test_of_two_trainers_started_at_once_one_trains_and_the_run_is_whole(tiny_runs, tmp_path):
    def train(send):
        try:
            send.send(("done", tiny_runs.trainer(tmp_path / "run").train()))
        except ValueError as error:
            send.send(("refused", str(error)))

    for _ in range(3):
        children = [in_child(train) for _ in range(2)]
        answers = [receive.recv() for _, receive in children]
        for child, _ in children:
            child.join()
        assert ("done", True) in answers
        assert all(what == "done" or "is being trained by process" in said for what, said in answers)
    tiny_runs.trainer(tmp_path / "whole").train()
    assert tiny_runs.losses(tmp_path / "run") == tiny_runs.losses(tmp_path / "whole")


def test_the_lock_is_free_when_training_ends_and_a_stale_trainer_does_not_overwrite_what_came_after(
    tiny_runs, tmp_path
):
    config = tiny_runs.config(tiny_runs.stage(tokens=1024))
    one = tiny_runs.trainer(tmp_path, config)
    assert not one.train(max_minutes=0)
    assert not (tmp_path / LOCK_FILE).exists()

    def go_on(send):
        send.send(tiny_runs.trainer(tmp_path, config).train())

    child, receive = in_child(go_on)
    assert receive.recv()
    child.join()
    with pytest.raises(ValueError, match="another process went on with"):
        one.train()


def test_in_one_process_a_new_trainer_takes_over_from_an_old_one(tiny_runs, tmp_path):
    old = tiny_runs.trainer(tmp_path)
    new = tiny_runs.trainer(tmp_path)
    assert new.train()
    with pytest.raises(ValueError, match="went on with"):
        old.train()


def test_a_forked_child_does_not_hold_what_its_parent_holds(tmp_path):
    held = RunFolder(tmp_path)
    held.take()

    def child(send):
        try:
            RunFolder(tmp_path).take()
        except ValueError as error:
            send.send((held.is_held, str(error)))

    worker, receive = in_child(child)
    is_held, said = receive.recv()
    worker.join()
    assert not is_held and f"is being trained by process {os.getpid()}" in said and held.is_held


def test_a_forked_child_does_not_keep_the_lock_of_its_parent(tmp_path):
    def parent(send):
        RunFolder(tmp_path).take()
        worker, _ = in_child(lambda _: signal.pause())
        send.send(worker.pid)
        signal.pause()

    child, receive = in_child(parent)
    worker = receive.recv()
    try:
        child.kill()
        child.join()
        folder = RunFolder(tmp_path)
        folder.take()
        assert folder.is_held
        folder.release()
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_link_or_a_pipe_in_place_of_the_lock_is_refused_and_not_followed(tmp_path):
    (tmp_path / "run").mkdir()
    outside = tmp_path / "outside"
    outside.write_text("mine")
    lock = tmp_path / "run" / LOCK_FILE
    lock.symlink_to(outside)
    with pytest.raises(ValueError, match="symbolic link"):
        RunFolder(tmp_path / "run").take()
    assert outside.read_text() == "mine"
    lock.unlink()
    os.mkfifo(lock)
    with pytest.raises(ValueError, match="is a pipe, not a plain file"):
        RunFolder(tmp_path / "run").take()


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("hsa_ultralong.files.lock.fcntl.flock", no_locks)
    FileLock.acquire(tmp_path / "lock", "x").release()
    assert "has no locks" in caplog.text


def test_a_refused_run_leaves_no_folder(tiny_runs, tmp_path):
    too_long = tiny_runs.stage("long", seq_len=8192, batch_tokens=8192, long_documents=True)
    one = tiny_runs.trainer(tmp_path / "new" / "run", tiny_runs.config(too_long))
    with pytest.raises(ValueError, match="stage 'long'"):
        one.train()
    assert not list(tmp_path.iterdir())


def test_a_refused_run_leaves_the_settings_of_the_run_before(tiny_runs, tmp_path):
    tiny_runs.trainer(tmp_path).train()
    before = tree(tmp_path)
    too_long = tiny_runs.stage("long", seq_len=8192, batch_tokens=8192, long_documents=True)
    with pytest.raises(ValueError, match="stage 'long'"):
        tiny_runs.trainer(tmp_path, tiny_runs.config(tiny_runs.stage(), too_long)).train()
    assert tree(tmp_path) == before


@pytest.mark.parametrize("place", ["file", "below a file", "model", "link"])
def test_a_folder_that_cannot_hold_a_run_is_refused_and_left_as_it_is(tiny_runs, tmp_path, place):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "hsa_ultralong"}')
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "checkpoints").symlink_to(tmp_path / "model")
    before = tree(tmp_path)
    run = tmp_path / "file" / "run" if place == "below a file" else tmp_path / place
    words = {"model": "is not that of a run", "link": "is a symbolic link"}.get(place, "is no folder")
    with pytest.raises(ValueError, match=words):
        tiny_runs.trainer(run)
    assert tree(tmp_path) == before


def test_links_planted_where_a_run_writes_are_replaced_or_refused(tiny_runs, tmp_path):
    (tmp_path / "outside").mkdir()
    mine = tmp_path / "outside" / "mine"
    mine.write_text("mine")
    for name in ("config.json.tmp", "config.json"):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / name).symlink_to(mine)
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "run" / "checkpoints" / ".partial-step-00000003").symlink_to(tmp_path / "outside")
    assert tiny_runs.trainer(tmp_path / "run").train()
    assert tree(tmp_path / "outside") == {"mine": b"mine"}
    assert json.loads((tmp_path / "run" / "config.json").read_text())["preset"] == "debug"
    (tmp_path / "run" / "log.jsonl").unlink()
    (tmp_path / "run" / "log.jsonl").symlink_to(mine)
    with pytest.raises(ValueError, match="is a symbolic link"):
        tiny_runs.trainer(tmp_path / "run", tiny_runs.config(tiny_runs.stage(), tiny_runs.stage("more"))).train()
    assert tree(tmp_path / "outside") == {"mine": b"mine"}


@pytest.mark.parametrize(
    "line", ["x", "[]", "3", '{"step": 1}', '{"global_step": "1"}', '{"global_step": -1}', "[" * 9999]
)
def test_a_damaged_line_of_the_log_is_named(tmp_path, line):
    file = tmp_path / "log.jsonl"
    file.write_text(f'{{"global_step": 1}}\n{line}\n{{"global_step": 2}}\n')
    with pytest.raises(ValueError, match=r"log.jsonl:2 is no record .* remove that line"):
        RunLog(tmp_path, 2)
    file.write_text('{"global_step": 1}\n{"global_step": 9}\n{"glob')
    RunLog(tmp_path, 2)
    assert file.read_text() == '{"global_step": 1}\n'


@pytest.mark.parametrize("settings", ["[]", '{"stages": 3}', '{"stages": [1]}', "\x00", '{"stages": {"name": {}}}'])
def test_settings_that_cannot_be_read_are_written_anew_with_a_notice(tiny_runs, tmp_path, caplog, settings):
    tiny_runs.trainer(tmp_path).train(max_minutes=0)
    (tmp_path / "config.json").write_text(settings)
    assert tiny_runs.trainer(tmp_path).train()
    assert "is written anew" in caplog.text
    assert json.loads((tmp_path / "config.json").read_text())["preset"] == "debug"
