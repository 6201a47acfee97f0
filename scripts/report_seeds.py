"""What the seeds of a finding say together, beside their means: two passages of a block of docs/report.md.

Called by report.py; tests/test_report.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from hsa_ultralong.eval.plots import human_tokens

Records = list[dict[str, Any]]
# seeds that both runs have, of which a difference is claimed
LEAST_SEEDS = 3


def is_share(record: dict[str, Any]) -> bool:
    """Whether a value is a share of samples, shown in percent."""
    return record["metric"] != "loss" and not record["metric"].endswith("perplexity")


def begun(records: Records, variants: Sequence[str]) -> str:
    """When recall began, by run and seed: probes tell it to some tokens. "-" where a seed was not measured."""
    known = {(r["variant"], r["seed"]): r["value"] for r in records if r["metric"] == "half_answered_tokens"}
    if not known:
        return ""
    trained = {(r["variant"], r["seed"]) for r in records if r["task"] == "training"}
    seeds = sorted({r["seed"] for r in records})
    said = []
    for one in variants:
        own = [(one, seed) for seed in seeds]
        if any(key in known for key in own):
            cells = [f"{known[key] / 1e6:.0f}M" if key in known else "none" if key in trained else "-" for key in own]
            said.append(f"`{one}` {', '.join(cells)}")
    return f"The first probe that answers half of the held-out questions, in tokens of training: {'; '.join(said)}."


def same_sign(tasks: dict[str, Records], variants: Sequence[str], titles: dict[str, str]) -> str:
    """Differences from the first run of the same seed that have one sign in all seeds, at least three: what a claim
    needs too, but is none. "" where no two runs have as many seeds."""
    first, compared, signed, agreeing = variants[0], 0, 0, 0
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for task, records in tasks.items():
        known = {(record["variant"], record["length"]): record for record in records}
        for variant in variants[1:]:
            for length in sorted({record["length"] for record in records}):
                one, two = known.get((first, length)), known.get((variant, length))
                if one is None or two is None:
                    continue
                pairs = zip(one["seeds"], two["seeds"], strict=True)
                gaps = [b - a for a, b in pairs if a is not None and b is not None]
                if len(gaps) < LEAST_SEEDS or not any(gaps):
                    continue
                compared += 1
                signed += all(gaps)
                if min(gaps) > 0 or max(gaps) < 0:
                    agreeing += 1
                    scale, form = (100, "+.1f") if is_share(one) else (1, "+.2f")
                    mean, *ends = (
                        f"{scale * value:{form}}" for value in (sum(gaps) / len(gaps), *sorted((min(gaps), max(gaps))))
                    )
                    found[task, variant].append(f"{human_tokens(length)}: {mean} ({' to '.join(ends)})")
    if not compared:
        return ""
    count = (
        f"Of {compared} differences from `{first}` of the same seed {signed} are 0 with no seed, and {agreeing} of "
        "these have one sign in every seed"
    )
    if not found:
        return f"{count}."
    rows = [
        f"| {titles.get(task, task)} | {variant} | {'; '.join(cells)} |" for (task, variant), cells in found.items()
    ]
    head = f"| measure | run | difference from `{first}`: mean (lowest to highest of a seed) |\n|---|---|---|"
    chance = "chance would give a quarter, if they did not share runs, weights and neighbouring lengths"
    return f"{count}; {chance}:\n\n" + "\n".join([head, *rows])
