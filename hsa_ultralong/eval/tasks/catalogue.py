"""All tasks by name, and the suites that `hsa eval` runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hsa_ultralong.eval.tasks.babilong import BABILONG, Babilong
from hsa_ultralong.eval.tasks.material import Material, word_list
from hsa_ultralong.eval.tasks.paper import PAPER, KeyValues, Passkey
from hsa_ultralong.eval.tasks.questions import QUESTIONS, PassageQuestions
from hsa_ultralong.eval.tasks.recall import PROMPTS, RECALL
from hsa_ultralong.eval.tasks.ruler_needles import RULER_NEEDLES, Needles
from hsa_ultralong.eval.tasks.ruler_questions import DocumentQuestions
from hsa_ultralong.eval.tasks.ruler_words import CommonWords, FrequentWords, VariableTracking
from hsa_ultralong.eval.tasks.sample import Sample, Task, TooShort

RULER: tuple[Task, ...] = (
    *RULER_NEEDLES,
    VariableTracking(),
    CommonWords(),
    FrequentWords(),
    DocumentQuestions("qa_1", "squad"),
    DocumentQuestions("qa_2", "hotpot"),
)
SUITES: dict[str, tuple[Task, ...]] = {"ruler": RULER, "paper": PAPER, "recall": RECALL, "prompt": PROMPTS,
                                        "babilong": BABILONG, "qa": QUESTIONS}  # fmt: skip
TASKS: dict[str, Task] = {task.name: task for tasks in SUITES.values() for task in tasks}


def check_tasks(names: Sequence[str], material: Material, number: int) -> None:
    """Refuse what no length could change, before any work.

    Raises:
        ValueError: for a task that is none, no samples, a missing or wrong file, more samples than it has, a missing
            chat template, or missing words.
    """
    if number < 1:
        raise ValueError(f"at least one sample is needed, got {number}")
    for name in names:
        if name not in TASKS:
            raise ValueError(f"unknown task {name!r}; there are {', '.join(TASKS)}")
        task = TASKS[name]
        if isinstance(task, DocumentQuestions):
            task.passages(material, number)
        if isinstance(task, Babilong | PassageQuestions):
            task.require(material, number)
        if isinstance(task, Needles | CommonWords):
            word_list("noun")
    if material.chat:
        _ = material.turn


def reads_text(name: str) -> bool:
    """Whether contexts of a task are made of the haystack, whose lines come again where it is shorter than a length;
    the others bring what fills them."""
    task = TASKS[name]
    if isinstance(task, Needles):
        return task.haystack == "essay"
    own = Passkey | KeyValues | VariableTracking | CommonWords | FrequentWords | DocumentQuestions
    return not isinstance(task, own)


def make_samples(name: str, material: Material, length: int, number: int, seed: int = 0) -> Iterator[Sample]:
    """Samples of the task of this name.

    Raises:
        TooShort: for a length too short for the task; 0 is of babilong alone. ValueError: for a task that is none, or
            no samples.
    """
    check_tasks([name], material, number)
    if length == 0 and not isinstance(TASKS[name], Babilong):
        raise TooShort(f"{name} has no form of facts alone; length 0 is of the suite babilong")
    yield from TASKS[name].samples(material, length, number, seed)
