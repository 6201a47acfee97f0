"""Many runs on several cards: queues of commands that go on when the shell that began them has ended.

    python scripts/queues.py start PLAN.json -o runs/queues
    python scripts/queues.py wait -o runs/queues --seconds 300
    python scripts/queues.py status -o runs/queues
    python scripts/queues.py stop NAME -o runs/queues

PLAN.json names queues, the card of each and its jobs, which run one after another; several queues may share a card:

    {"queues": {"base": {"card": "0", "jobs": [
        {"name": "train-base", "minutes": 15, "command": "hsa train nano --data SHARDS --device cuda -o runs/base"},
        {"name": "recall-base", "minutes": 5, "after": ["train-base"], "command": "hsa eval runs/base/model ..."}]}}}

A job waits for those in `after`, of any queue; if one of them failed it is passed over. After its minutes a job gets
SIGINT, upon which training and evaluation save what they have, and 30 s later SIGKILL. Below -o lie NAME.json (state,
exit code, seconds) and NAME.log. tests/test_queues.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

GRACE_SECONDS = 30
_KEYS = {"name", "minutes", "after", "command"}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("start", "run", "wait", "status", "stop"):
        own = verbs.add_parser(verb)
        own.add_argument("-o", "--output", type=Path, required=True, help="folder of states and logs")
        if verb in ("start", "run"):
            own.add_argument("plan", type=Path)
        if verb == "run":
            own.add_argument("queue")
        if verb == "wait":
            own.add_argument("--seconds", type=float, default=600.0)
        if verb == "stop":
            own.add_argument("name", help="job")
    options = parser.parse_args(arguments)
    try:
        return _VERBS[options.verb](options)
    except ValueError as error:
        sys.exit(f"error: {error}")


def read_plan(path: Path) -> dict[str, dict[str, Any]]:
    """Queues by name, checked.

    Raises:
        ValueError: naming what is wrong, before anything runs.
    """
    try:
        queues = json.loads(path.read_text(encoding="utf-8"))["queues"]
        jobs = [job for queue in queues.values() for job in queue["jobs"]]
        names = [job["name"] for job in jobs]
        cards = [queue["card"] for queue in queues.values()]
    except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no plan of queues with a card and jobs with names: {error}") from None
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: two jobs have the same name")
    if not all(isinstance(card, str) for card in cards):
        raise ValueError(f'{path}: a card is a string such as "0", or "" for none')
    for job in jobs:
        if unknown := set(job) - _KEYS:
            raise ValueError(f"{path}: job {job['name']!r} has {', '.join(sorted(unknown))}, which means nothing here")
        if not isinstance(job.get("command"), str) or not job.get("minutes", 0) > 0:
            raise ValueError(f"{path}: job {job['name']!r} needs a command and minutes > 0")
        if missing := set(job.get("after", [])) - set(names):
            raise ValueError(f"{path}: job {job['name']!r} waits for {', '.join(sorted(missing))}, which is no job")
    return queues


def _start(options: argparse.Namespace) -> int:
    queues = read_plan(options.plan)
    options.output.mkdir(parents=True, exist_ok=True)
    known = {path.stem for path in options.output.glob("*.json")}
    if again := known & {job["name"] for queue in queues.values() for job in queue["jobs"]}:
        raise ValueError(f"{options.output} has {', '.join(sorted(again))} already: name another folder with -o")
    for queue in queues.values():
        for job in queue["jobs"]:
            _put(options.output, job["name"], state="waiting", card=queue["card"], command=job["command"])
    for name in queues:
        command = [sys.executable, __file__, "run", str(options.plan.resolve()), name, "-o", str(options.output)]
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    print(f"{len(queues)} queues begun; python {sys.argv[0]} wait -o {options.output}")
    return 0


def _run(options: argparse.Namespace) -> int:
    """One queue, in the process that `start` left behind."""
    queue = read_plan(options.plan)[options.queue]
    for job in queue["jobs"]:
        others = job.get("after", [])
        while any(_get(options.output, other)["state"] in ("waiting", "running") for other in others):
            time.sleep(0.2)
        if failed := [other for other in others if _get(options.output, other).get("code") != 0]:
            _put(options.output, job["name"], state="ended", code=None, why=f"{failed[0]} failed")
            continue
        _run_job(options.output, job, queue["card"])
    return 0


def _run_job(output: Path, job: dict[str, Any], card: str) -> None:
    start, name = time.time(), job["name"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": card, "PYTHONUNBUFFERED": "1"}
    with (output / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            ["bash", "-c", job["command"]],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_hear,
        )
        _put(output, name, state="running", start=start, process=process.pid)
        why = ""
        try:
            process.wait(60 * job["minutes"])
        except subprocess.TimeoutExpired:
            why = f"stopped after {job['minutes']} minutes"
            _signal(process.pid, signal.SIGINT)
            try:
                process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                _signal(process.pid, signal.SIGKILL)
                process.wait()
    # what saves itself on SIGINT may end with 0, and is not whole all the same
    code = process.returncode if not why else process.returncode or 124
    _put(output, name, state="ended", code=code, seconds=round(time.time() - start, 1), why=why)


def _wait(options: argparse.Namespace) -> int:
    """Until a job has failed that had not before, all have ended, or the time is over."""
    end = time.time() + options.seconds
    before = _failed(options.output)
    while time.time() < end and _failed(options.output) <= before and _is_under_way(options.output):
        time.sleep(0.2)
    return _status(options)


def _status(options: argparse.Namespace) -> int:
    """A line a job; the last lines of those that failed. 0: all ended well, 1: one failed, 2: some are under way."""
    for path in sorted(options.output.glob("*.json")):
        state = _get(options.output, path.stem)
        said = state["state"] if state["state"] != "ended" else f"exit {state['code']}, {state.get('seconds', 0)} s"
        if state["state"] == "running":
            said = f"running {time.time() - state['start']:.0f} s"
        print(f"[{state['card']}] {path.stem}: {said} {state.get('why', '')}".rstrip())
        lines = _tail(options.output / f"{path.stem}.log")
        for line in lines[-12:] if state["state"] == "ended" and state["code"] else lines[-1:]:
            print(f"    {line[:160]}")
    if _is_under_way(options.output):
        return 2
    return 1 if _failed(options.output) else 0


def _stop(options: argparse.Namespace) -> int:
    state = _get(options.output, options.name)
    if state["state"] != "running":
        raise ValueError(f"{options.name} is not running: it is {state['state']}")
    _signal(state["process"], signal.SIGINT)
    return 0


def _hear() -> None:
    """A shell's `&` leaves SIGINT ignored, and a job would inherit that: it could not be asked to save itself."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _signal(process: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, number)


def _is_under_way(output: Path) -> bool:
    return any(_get(output, path.stem)["state"] != "ended" for path in output.glob("*.json"))


def _failed(output: Path) -> set[str]:
    states = {path.stem: _get(output, path.stem) for path in output.glob("*.json")}
    return {name for name, state in states.items() if state["state"] == "ended" and state["code"] != 0}


def _get(output: Path, name: str) -> dict[str, Any]:
    path = output / f"{name}.json"
    if not path.is_file():
        raise ValueError(f"{output} has no job {name}")
    return json.loads(path.read_text(encoding="utf-8"))


def _put(output: Path, name: str, **values: Any) -> None:
    path = output / f"{name}.json"
    state = _get(output, name) if path.is_file() else {}
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps({**state, **values}), encoding="utf-8")
    partial.replace(path)


def _tail(path: Path) -> list[str]:
    if not path.is_file():
        return []
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - 8000))
        text = stream.read().decode("utf-8", "replace")
    # progress lines begin again
    return [line.strip() for line in text.replace("\r", "\n").split("\n") if line.strip()]


_VERBS = {"start": _start, "run": _run, "wait": _wait, "status": _status, "stop": _stop}

if __name__ == "__main__":
    sys.exit(main())
