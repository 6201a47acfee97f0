"""Short tasks scored by log-likelihood: prompts and normalisations are those of lm-eval, the files come by paths.

LAMBADA, HellaSwag, PIQA, ARC, WinoGrande, OpenBookQA in the form of llm-foundry's local data (a JSON object a line;
HellaSwag six lines an item, plain or .bz2), WikiText-2 as its text. tests/eval/test_short_tasks.py; where prompts
differ from lm-eval's own downloads: eval/tasks/README.md.
"""

from __future__ import annotations

import bz2
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hsa_ultralong.eval.likelihood import Scorable, encode_pair, first_token, rolling_pairs, score_continuations

# tokens of a row of WikiText where the model states no limit, as in lm-eval
_ROW_TOKENS = 2048


class ShortItem(NamedTuple):
    """Contexts with a continuation each, of which `gold` is right; sizes: characters that acc_norm divides by."""

    contexts: list[str]
    continuations: list[str]
    gold: int
    sizes: list[int]


def _lines(path: Path) -> list[Any]:
    # not splitlines(): strings may hold other line separators
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ValueError(f"{path} is not JSON with one object a line") from None


def _choices(end: str) -> Callable[[Path], list[ShortItem]]:
    """Reader of query, choices and gold; `end` is what lm-eval puts behind the query."""

    def read(path: Path) -> list[ShortItem]:
        found = []
        for row in _lines(path):
            query = row["query"].rstrip("\n") + end
            found.append(_item([query] * len(row["choices"]), row["choices"], row["gold"]))
        return found

    return read


def _item(contexts: list[str], choices: Sequence[str], gold: int) -> ShortItem:
    return ShortItem(contexts, [f" {choice}" for choice in choices], int(gold), [len(choice) for choice in choices])


def read_winogrande(path: Path) -> list[ShortItem]:
    """Partial evaluation: the same continuation behind each option."""
    return [
        _item(row["context_options"], [row["continuation"]] * len(row["context_options"]), row["gold"])
        for row in _lines(path)
    ]


def read_hellaswag(path: Path) -> list[ShortItem]:
    """Six lines an item: context, number of the right ending, four endings."""
    data = path.read_bytes()
    lines = (bz2.decompress(data) if path.suffix == ".bz2" else data).decode("utf-8").split("\n")
    lines = lines[: len(lines) // 6 * 6]
    return [_item([lines[i]] * 4, lines[i + 2 : i + 6], int(lines[i + 1])) for i in range(0, len(lines), 6)]


def read_lambada(path: Path) -> list[ShortItem]:
    """The last word behind its text."""
    return [_item([row["context"]], [row["continuation"].lstrip()], 0) for row in _lines(path)]


def read_wikitext(path: Path) -> list[str]:
    """Pages, in the form in which they are distributed."""
    text = path.read_text(encoding="utf-8")
    # a page begins at a heading of the first level, a line between empty ones
    starts = [match.start() for match in re.finditer(r"(?m)^ = [^=\n]+ = \n", text)]
    return [text[start:stop] for start, stop in zip([0, *starts[1:]], [*starts[1:], len(text)], strict=True)]


_PLAIN = (
    ("s '", "s'"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), (" : ", ": "), (" ; ", "; "), (" . ", ". "),
    (" ! ", "! "), (" ? ", "? "), (" , ", ", "),
)  # fmt: skip
_AROUND = (("(", ")"), ("[", "]"), ("{", "}"), ('"', '"'), ("'", "'"))
_LAST = (
    ("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" \u00b0 ", "\u00b0"), (" \n", "\n"), ("\n ", "\n"),
    (" N ", " 1 "), (" 's", "'s"),
)  # fmt: skip


def plain_page(page: str) -> str:
    """A page of WikiText without the blanks of its tokeniser, as lm-eval scores it."""
    for old, new in _PLAIN:
        page = page.replace(old, new)
    for left, right in _AROUND:
        inside = rf"[^{re.escape(right)}]*?"
        page = re.sub(rf"{re.escape(left)}\s*({inside})\s*{re.escape(right)}", rf"{left}\1{right}", page)
    for old, new in _LAST:
        page = page.replace(old, new)
    return page


class ShortTask(NamedTuple):
    """name; file in the folder of short tasks or in one below it; how it is read; metric of its records, and others."""

    name: str
    file: str
    read: Callable[[Path], list[Any]]
    metric: str = "acc"
    others: tuple[str, ...] = ("acc_norm",)

    def items(self, folder: Path, number: int | None = None) -> list[Any]:
        """The first items, all without a number.

        Raises:
            ValueError: without the file, or for one of another form.
        """
        places = [folder / self.file, *sorted(folder.glob(f"*/{self.file}"))]
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            raise ValueError(f"{self.name} reads {self.file}, which {folder} does not hold")
        try:
            found = self.read(path)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no file of {self.name}: {error}") from None
        if not found:
            raise ValueError(f"{path} holds no item of {self.name}")
        return found[:number]


SHORT: tuple[ShortTask, ...] = (
    ShortTask("lambada_openai", "lambada_openai.jsonl", read_lambada, others=("perplexity",)),
    ShortTask("hellaswag", "hellaswag_val_full.txt.bz2", read_hellaswag),
    ShortTask("piqa", "piqa.jsonl", _choices("\nAnswer:")),
    ShortTask("arc_easy", "arc_easy.jsonl", _choices("\nAnswer:")),
    ShortTask("arc_challenge", "arc_challenge.jsonl", _choices("\nAnswer:")),
    ShortTask("winogrande", "winogrande.jsonl", read_winogrande, others=()),
    ShortTask("openbookqa", "openbook_qa.jsonl", _choices("")),
    ShortTask("wikitext2", "wikitext2/test.txt", read_wikitext, "word_perplexity", ()),
)


def score_items(
    task: ShortTask, items: Sequence[Any], model: Any, tokenizer: Any, *, limit: int | None = None
) -> list[dict[str, Any]]:
    """Fields of a record for every item: score, scores, or nats and count of a perplexity."""
    if task.metric == "word_perplexity":
        return [_page(page, model, tokenizer, limit) for page in items]
    pairs = [
        encode_pair(tokenizer, context, continuation)
        for item in items
        for context, continuation in zip(item.contexts, item.continuations, strict=True)
    ]
    scored = score_continuations(model, pairs, limit=limit)
    found: list[dict[str, Any]] = []
    start = 0
    for item in items:
        own = scored[start : start + len(item.contexts)]
        start += len(own)
        logs = [each.log for each in own]
        if task.others == ("perplexity",):
            found.append({"score": float(own[0].is_greedy), "nats": -logs[0], "count": 1})
            continue
        best = max(range(len(logs)), key=lambda i: logs[i])
        norm = max(range(len(logs)), key=lambda i: logs[i] / max(1, item.sizes[i]))
        scores = {"acc_norm": float(norm == item.gold)} if "acc_norm" in task.others else {}
        fields = {"score": float(best == item.gold), "scores": scores, "log_likelihoods": logs, "chosen": best}
        found.append(fields)
    return found


def _page(page: str, model: Any, tokenizer: Any, limit: int | None) -> dict[str, Any]:
    tokens = list(tokenizer(plain_page(page), add_special_tokens=False).input_ids)
    pairs: list[Scorable] = rolling_pairs(tokens, first_token(tokenizer), limit or _ROW_TOKENS)
    nats = -sum(each.log for each in score_continuations(model, pairs))
    # words of the page as it is distributed
    return {"score": None, "nats": nats, "count": len(re.split(r"\s+", page))}
