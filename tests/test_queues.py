"""scripts/queues.py: queues go on by themselves, in order, on their cards; what fails is said and passed on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "queues.py"


def queues(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=600)


def plan_of(tmp_path, **queues_by_name):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"queues": queues_by_name}))
    return path


def job(name, command, minutes=1.0, **others):
    return {"name": name, "command": command, "minutes": minutes, **others}


def test_jobs_run_in_order_on_their_cards_and_wait_for_other_queues(tmp_path):
    done = tmp_path / "said"
    plan = plan_of(
        tmp_path,
        one={"card": "3", "jobs": [job("first", f"echo $CUDA_VISIBLE_DEVICES > {done}; echo over")]},
        two={"card": "", "jobs": [job("second", f"cat {done}", after=["first"]), job("third", "echo third")]},
    )
    out = tmp_path / "out"
    assert queues("start", plan, "-o", out).returncode == 0
    ended = queues("wait", "-o", out, "--seconds", 600)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert (out / "second.log").read_text() == "3\n" and "[3] first: exit 0" in ended.stdout
    assert "third" in queues("start", plan, "-o", out).stderr


def test_what_fails_is_shown_what_waits_for_it_is_passed_over_and_what_lasts_is_stopped(tmp_path):
    plan = plan_of(
        tmp_path,
        one={"card": "0", "jobs": [job("broken", "echo why it broke; exit 7"), job("next", "true", after=["broken"])]},
        two={"card": "0", "jobs": [job("long", "trap 'echo saved; exit 0' INT; sleep 60 & wait", minutes=0.02)]},
    )
    out = tmp_path / "out"
    queues("start", plan, "-o", out)
    for _ in range(4):
        ended = queues("wait", "-o", out, "--seconds", 600)
        if ended.returncode != 2:
            break
    assert ended.returncode == 1
    states = {name: json.loads((out / f"{name}.json").read_text()) for name in ("broken", "next", "long")}
    assert states["broken"]["code"] == 7 and "why it broke" in ended.stdout
    assert states["next"]["code"] is None and states["next"]["why"] == "broken failed"
    assert states["long"]["code"] == 124 and "saved" in (out / "long.log").read_text()


@pytest.mark.parametrize(
    ("jobs", "said"),
    [
        ([job("a", "true"), job("a", "true")], "same name"),
        ([job("a", "true", after=["b"])], "which is no job"),
        ([job("a", "true", minutes=0)], "minutes > 0"),
        ([job("a", "true", gpus=2)], "means nothing"),
    ],
)
def test_a_plan_that_cannot_run_is_refused_in_one_line(tmp_path, jobs, said):
    refused = queues("start", plan_of(tmp_path, one={"card": "0", "jobs": jobs}), "-o", tmp_path / "out")
    assert refused.returncode == 1 and said in refused.stderr and refused.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
