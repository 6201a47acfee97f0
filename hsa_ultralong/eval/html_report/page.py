"""The page as a whole: sections, style sheet and script in one file that loads nothing. tests/eval/test_html_report.py.

Two guards against text of models and haystacks: elements.py escapes all of it, and the page's own policy lets nothing
run but the script whose hash it names, and nothing load at all.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from hsa_ultralong.eval.html_report.elements import Markup, join, tag
from hsa_ultralong.eval.html_report.failures import failures
from hsa_ultralong.eval.html_report.sections import curves, depths, diagnosis, measured, scores
from hsa_ultralong.eval.stored_runs import StoredRun
from hsa_ultralong.files.durable import write_whole


def write_page(runs: Sequence[StoredRun], path: Path, *, first: Sequence[tuple[str, str, Markup]] = ()) -> None:
    """Write the report of the runs, beside one another where there are several.

    Args:
        first: further sections in front, (anchor, heading, content), such as a comparison.
    """
    sections = [
        *first,
        ("scores", "Scores by length", scores(runs)),
        ("curves", "Curves by length", curves(runs)),
        ("depths", "Where in the text the fact stands", depths(runs)),
        ("diagnosis", "Where misses come from", diagnosis(runs)),
        ("failures", "What was missed", failures(runs)),
        ("measured", "How this was measured", measured(runs)),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "<!doctype html>\n" + _page(", ".join(run.name for run in runs), sections) + "\n")


def _page(title: str, sections: Sequence[tuple[str, str, Markup]]) -> Markup:
    assets = files("hsa_ultralong.eval.html_report")
    style, script = ((assets / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; "
        "form-action 'none'"
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"Evaluation of {title}"),
        tag("style", Markup(style)),
    )
    nav = tag("nav", tag("ul", *(tag("li", tag("a", name, href=f"#{key}")) for key, name, _ in sections)),
              aria_label="Sections")  # fmt: skip
    parts = [tag("section", tag("h2", name), content, id_=key) for key, name, content in sections]
    header = tag("header", tag("h1", "Evaluation of ", tag("b", title)), nav)
    body = tag("body", header, tag("main", join(parts)), tag("script", Markup(script)))
    return tag("html", head, body, lang="en")
