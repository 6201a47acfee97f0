"""scripts/lm_eval_beside.py: lm-eval's own scoring of the same items gives the same verdicts."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "lm_eval_beside.py"


def beside(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("short")
    questions = [
        {"query": f"Question: Where is the {name}?\n", "choices": ["in the sea", "up a hill"], "gold": number % 2}
        for number, name in enumerate(["fish", "goat", "boat"])
    ]
    options = [
        {"context_options": ["The goat met him as he", "The fish met him as he"], "continuation": "sang.", "gold": 1}
    ]
    words = [
        {"context": "He saw the sea and the", "continuation": " goat"},
        {"context": "Up the", "continuation": "hill"},
    ]
    for name, rows in (("piqa", questions), ("winogrande", options), ("lambada_openai", words)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm_eval")
def test_both_give_the_same_verdicts_and_log_likelihoods(data, tmp_path):
    from hsa_ultralong import default_checkpoint

    out = tmp_path / "lm_eval.json"
    result = beside(default_checkpoint(), "--data", data, "--tasks", "piqa,winogrande,lambada_openai", "-o", out)
    assert result.returncode == 0, result.stderr[-3000:]
    tasks = {task["task"]: task for task in json.loads(out.read_text())["tasks"]}
    assert {name: task["items"] for name, task in tasks.items()} == {"lambada_openai": 2, "piqa": 3, "winogrande": 1}
    for task in tasks.values():
        assert task["same_items"] == task["items"] and task["acc"] == task["acc_lm_eval"]
        assert task["greatest_difference_of_log_likelihoods"] < 1e-4
    assert tasks["piqa"]["acc_norm"] == tasks["piqa"]["acc_norm_lm_eval"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--tasks", "piqa,mmlu"], "no task mmlu"), (["--items", "-1"], "0 for all")],
)
def test_bad_arguments_are_refused_before_a_model_is_loaded(data, tmp_path, arguments, said):
    refused = beside(tmp_path / "none", "--data", data, *arguments, "-o", tmp_path / "out.json")
    assert refused.returncode == 1 and said in refused.stderr and refused.stderr.count("\n") == 1
