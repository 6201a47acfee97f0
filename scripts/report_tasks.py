"""The map of docs/report.md that shows every task of both protocols, the authors' and RULER's, by length.

Called by report_figures.py; tests/test_report.py.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from hsa_ultralong.eval.suite_plots import draw_table
from hsa_ultralong.files.strict_json import read_json

_STUDIES = ("paper-nano*", "ruler-nano*")
_RULER = (
    *(f"niah_{kind}_{number}" for kind in ("single", "multikey") for number in (1, 2, 3)),
    *("niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2"),
)
# how a row of the map is called -> its task and score; of RULER the task's own
_ROWS: dict[str, tuple[str, str]] = {
    "authors: S-NIAH, forced": ("s_niah_authors", "teacher"),
    "authors: MQ-NIAH, forced": ("mq_authors", "teacher"),
    "authors: MQ-NIAH, numbers mentioned": ("mq_authors", "mentions_all"),
    "authors: variable tracking, forced": ("vt_authors", "teacher"),
    "authors: variable tracking, names mentioned": ("vt_authors", "mentions_all"),
    "passkey": ("passkey", "exact"),
    "key-values": ("kv", "part"),
    **{f"RULER: {task}": (task, "part" if task.startswith("qa") else "all") for task in _RULER},
}


def task_scores(root: Path) -> list[dict[str, Any]]:
    """Shares of the shipped nano over all depths, with the name of their row as task, in the order of the rows."""
    paths = sorted(path for study in _STUDIES for path in (root / "results").glob(f"{study}/summary.json"))
    records = [record for path in paths for record in read_json(path)["records"]]
    whole = [record for record in records if record["model"] == "nano" and record["depth"] is None]
    return [
        {**record, "task": name}
        for name, wanted in _ROWS.items()
        for record in whole
        if (record["task"], record["metric"]) == wanted
    ]


def tasks_figure(root: Path) -> tuple[str, Any] | None:
    """What the map shows, in words, and what draws it to a path; None: nothing was measured."""
    scores, title = task_scores(root), "nano: score in percent, by task and length"
    if not scores:
        return None
    # halves go up, as in the tables of the report
    scores = [{**record, "value": record["value"] + 1e-9} for record in scores]
    words = "Tasks of the authors' protocol and of RULER answered by nano, by length, in percent"
    return words, partial(draw_table, scores, title=title)
