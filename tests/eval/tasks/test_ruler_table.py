"""The table of RULER's parameters in the tasks' README against the code, and the parameters against RULER's files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import hsa_ultralong.eval.tasks as tasks
from hsa_ultralong.eval.tasks.ruler_needles import NEEDLE, NOISE, Needles
from hsa_ultralong.eval.tasks.ruler_questions import DocumentQuestions
from hsa_ultralong.eval.tasks.ruler_words import (
    CWE_LONG,
    CWE_LONG_FROM,
    CWE_SHORT,
    CommonWords,
    FrequentWords,
    VariableTracking,
)

README = (Path(tasks.__file__).parent / "README.md").read_text(encoding="utf-8")
RULER = README.split("## RULER")[1].split("\n## ")[0]
ROWS = {
    cells[0]: cells[1:]
    for line in RULER.splitlines()
    if len(cells := [cell.strip() for cell in line.strip("|").split("|")]) == 7 and cells[0] in tasks.TASKS
}
# of scripts/synthetic.yaml and data/synthetic/constants.py at c3f5e3b: haystack, key, value, keys, values, asked
NIAH = {
    "niah_single_1": ("noise", "words", "numbers", 1, 1, 1), "niah_single_2": ("essay", "words", "numbers", 1, 1, 1),
    "niah_single_3": ("essay", "words", "uuids", 1, 1, 1), "niah_multikey_1": ("essay", "words", "numbers", 4, 1, 1),
    "niah_multikey_2": ("needle", "words", "numbers", 1, 1, 1),
    "niah_multikey_3": ("needle", "uuids", "uuids", 1, 1, 1),
    "niah_multivalue": ("essay", "words", "numbers", 1, 4, 1),
    "niah_multiquery": ("essay", "words", "numbers", 4, 1, 4),
}  # fmt: skip
TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}


def parameters(task):
    """The cells of a row between the name and the source, as the code has them."""
    if isinstance(task, Needles):
        keys = "every line" if task.haystack == "needle" else task.keys
        cells = [task.haystack, f"{task.key} / {task.value}", f"{keys}, {task.values}, {task.asked}"]
    elif isinstance(task, VariableTracking):
        cells = ["noise", "5 capitals", f"1 chain of {task.hops} hops, one example"]
    elif isinstance(task, CommonWords):
        often = f"{task.common} words {CWE_LONG[1]} times, others {CWE_LONG[2]}"
        cells = ["list", "words", f"{often} ({CWE_SHORT[1]} and {CWE_SHORT[2]} below {CWE_LONG_FROM:,})"]
    elif isinstance(task, FrequentWords):
        cells = ["coded words", "6 letters", f"zeta law, alpha {task.alpha:g}, ranks 2 to 4"]
    else:
        form = {"squad": "SQuAD form", "hotpot": "HotpotQA form"}[task.source]
        cells = ["documents", form, "first questions of the file"]
    return [*cells, str(task.max_new_tokens), task.metric]


@pytest.mark.parametrize("task", tasks.SUITES["ruler"], ids=lambda task: task.name)
def test_the_table_has_the_parameters_of_the_code_and_a_source_for_each(task):
    *cells, source = ROWS[task.name]
    assert cells == parameters(task)
    named = RULER.split("\n| task")[0]
    assert all(f"`{name}`" in named or f"/{name}`" in named for name in source.split(", ")), source


@pytest.mark.parametrize("task", tasks.SUITES["ruler"], ids=lambda task: task.name)
def test_the_parameters_of_the_code_are_those_of_ruler(task):
    kind = re.match(r"niah|vt|cwe|fwe|qa", task.name)[0]
    assert task.max_new_tokens == TOKENS[kind]
    assert task.metric == ("part" if kind == "qa" else "all")
    if isinstance(task, Needles):
        assert (task.haystack, task.key, task.value, task.keys, task.values, task.asked) == NIAH[task.name]
    if isinstance(task, DocumentQuestions):
        assert task.source == {"qa_1": "squad", "qa_2": "hotpot"}[task.name]


def test_lists_chains_and_noise_are_those_of_ruler():
    assert (CWE_LONG, CWE_SHORT, CWE_LONG_FROM) == (((40, 10, 3), 30, 3), ((20, 3, 1), 6, 1), 4096)
    assert (CommonWords().common, VariableTracking().hops, FrequentWords().alpha) == (10, 4, 2.0)
    assert NOISE == "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    assert NEEDLE == "One of the special magic {kind} for {key} is: {value}."
    assert [task.name for task in tasks.SUITES["ruler"]] == [*ROWS]
