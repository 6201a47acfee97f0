"""scripts/plans.py: every plan is one that queues.py takes, its commands parse, and no job waits for a later one."""

import importlib.util
import json
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
FILES = {
    **dict.fromkeys(("squad", "hotpot", "xquad", "nq", "squadshifts", "2wiki", "wiki"), "a.json"),
    "babi": "babi", "short": "short", "gguf": "smol.gguf", "text": "books",
    "questions": "q.json", "sentences": "s.jsonl", "chat": "c.jsonl",
}  # fmt: skip


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


plans, queues, findings = script("plans"), script("queues"), script("findings")


def made(capsys, *arguments):
    assert plans.main(list(map(str, arguments))) == 0
    shown = capsys.readouterr()
    return json.loads(shown.out), shown.err


def named():
    return [part for name, path in FILES.items() for part in ("--file", f"{name}={path}")]


@pytest.mark.parametrize("cards", [1, 2, 4])
@pytest.mark.parametrize("name", plans.PLANS)
def test_a_plan_is_taken_by_queues_and_every_job_can_begin(name, cards, capsys, tmp_path):
    plan, said = made(capsys, name, "--cards", cards, "--data", "S", "--large", *named())
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    taken = queues.read_plan(tmp_path / "plan.json")
    assert "left out" not in said and f"on {cards} cards" in said
    ended, waiting = set(), {queue: list(content["jobs"]) for queue, content in taken.items()}
    while any(waiting.values()):
        able = [queue for queue, jobs in waiting.items() if jobs and set(jobs[0]["after"]) <= ended]
        assert able, f"{waiting} wait for one another"
        ended |= {waiting[queue].pop(0)["name"] for queue in able}
    together = {",".join(map(str, range(cards)))} if name == "cards" else {str(card) for card in range(cards)}
    assert {content["card"] for content in taken.values()} - {""} <= together


@pytest.mark.parametrize("name", plans.PLANS)
def test_every_command_of_a_plan_parses(name, capsys, parse_command):
    plan, _ = made(capsys, name, "--cards", 2, "--data", "S", "--large", *named())
    for job in (job for queue in plan["queues"].values() for job in queue["jobs"]):
        command = job["command"]
        if "-m hsa_ultralong " in command:
            parse_command("hsa " + command.partition("-m hsa_ultralong ")[2])
        elif "scripts/findings.py " in command:
            for part in command.split(" && "):
                words = shlex.split(part.partition("findings.py ")[2])
                is_run = words[0] == "run"
                findings.main([*words, "--dry-run"]) if is_run else findings.parser().parse_args(words)
                assert (": hsa " in capsys.readouterr().out) == is_run
        else:
            words = shlex.split(command)
            paths = [word for word in words if word.startswith(("scripts/", "tests/"))]
            assert paths and all((ROOT / path).exists() for path in paths), command


def test_cards_share_the_work_and_the_longest_chain_begins_first(capsys):
    took = []
    for cards in (1, 2, 4):
        _, said = made(capsys, "nano", "--cards", cards, "--data", "S", *named())
        took.append(float(said.rpartition(" cards, ")[2].split()[0]))
    assert took[0] > 1.5 * took[1] > 1.5 * took[2]
    jobs = [plans.Job("short", 1, ""), plans.Job("long", 1, ""), plans.Job("then", 9, "", ("long",))]
    shared, minutes = plans.share_out(jobs, 1)
    assert shared["0"][0].name == "long" and minutes == 11


def test_what_needs_a_file_that_is_not_there_is_left_out_and_said(capsys):
    plan, said = made(capsys, "smol", "--data", "S")
    names = [job["name"] for queue in plan["queues"].values() for job in queue["jobs"]]
    assert not names and "left out: train-smol, no --file gguf=" in said and "left out: apply-smol" in said
    plan, said = made(capsys, "nano", "--data", "S")
    names = [job["name"] for queue in plan["queues"].values() for job in queue["jobs"]]
    assert "train-nano" in names and "ruler-nano" not in names and "left out: ruler-nano, no --file squad=" in said


def test_bad_input_is_refused_before_anything_is_printed(capsys):
    for arguments in (["nano"], ["nano", "--data", "S", "--cards", "0"], ["nano", "--data", "S", "--file", "squad"]):
        with pytest.raises(SystemExit):
            plans.main(arguments)
        assert not capsys.readouterr().out


def test_every_finding_has_its_minutes_and_takes_less_than_half_an_hour():
    assert set(plans._FINDINGS) == set(findings.FINDINGS)
    assert max(plans._FINDINGS[name] * len(one.variants) for name, one in findings.FINDINGS.items()) < 30


def test_a_run_that_findings_share_is_one_job_and_several_jobs_share_a_card(capsys):
    plan, said = made(capsys, "findings", "--cards", 2, "--beside", 3, "--data", "S")
    jobs = [job for queue in plan["queues"].values() for job in queue["jobs"]]
    assert "--only rows_32k" in next(job["command"] for job in jobs if job["name"] == "base-0")
    assert sum("--only nope" in job["command"] for job in jobs) == 1 and said.count("left out") == 0
    assert [content["card"] for content in plan["queues"].values()] == ["0", "1", "0", "1", "0", "1", ""]
    for collect in (job for job in jobs if job["name"].startswith("collect-")):
        assert len(collect["after"]) == len(findings.FINDINGS[collect["name"].partition("-")[2]].variants)
