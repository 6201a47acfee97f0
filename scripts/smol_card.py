"""The model card of the model that `make smol` makes: shares of rows and licences out of what trained it.

    python scripts/smol_card.py [--run runs/smol] [-o checkpoints/smol/README.md]

With --run the settings are those of the run's config.json; without it the recipe's, and the card says that nothing is
trained. tests/test_smol_card.py compares the committed draft with what this writes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CARD = ROOT / "checkpoints" / "smol" / "README.md"
RECIPE = "convert_smol"
# of files of questions and conversations, by name: what they are, and their licence
SOURCES = {
    "new_wiki_v1.0.json": ("SQuADShifts, new Wikipedia", "CC BY 4.0, text of Wikipedia CC BY-SA"),
    "nq-open-oracle.jsonl.gz": (
        "NQ-open with gold passages of Lost in the Middle",
        "MIT, NQ and Wikipedia CC BY-SA 3.0",
    ),
    "Synthetic-Persona-Chat_valid.csv": ("Synthetic-Persona-Chat, validation part", "CC BY 4.0"),
    "dolly_hhrlhf_train_small.jsonl": ("dolly-15k and hh-rlhf, 1,000 pairs", "CC BY-SA 3.0"),
    "seed_tasks.jsonl": ("seed tasks of self-instruct", "Apache-2.0"),
}
ROWS = {
    "text": "text of the shards, on which the source's words are followed",
    "span_copy": "spans of the same text that come twice (made)",
    "chat_facts": "made facts, asked as chat",
    "passage_questions": "questions that people asked about passages, from memory",
    "passage_chat": "the same with the passage in the prompt",
    "chat": "conversations, on which the source's words are followed",
}
DRAFT = (
    "**A draft: nothing is trained yet, and `difference.safetensors` is not here.** Settings are those of the recipe."
)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of the run that trained it")
    parser.add_argument("-o", "--output", type=Path, default=CARD)
    options = parser.parse_args(arguments)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(card(*settings_of(options.run)), encoding="utf-8")
    print(f"Written: {options.output}")


def settings_of(run: Path | None) -> tuple[dict[str, Any], bool]:
    """Settings of a run, or of the recipe, and whether they are a run's."""
    if run is not None:
        file = run / "config.json"
        if not file.is_file():
            sys.exit(f"error: {run} is no folder of a run: it has no config.json")
        return json.loads(file.read_text(encoding="utf-8")), True
    from hsa_ultralong.recipes import recipe
    from hsa_ultralong.train import as_dict

    return json.loads(json.dumps(as_dict(recipe(RECIPE)))), False


def card(settings: dict[str, Any], is_trained: bool) -> str:
    """The page as Markdown."""
    stages = settings["stages"]
    tokens = sum(stage["tokens"] for stage in stages)
    kinds = [kind for kind in ROWS if any(kind in stage["mixture"] for stage in stages)]
    kinds += sorted({kind for stage in stages for kind in stage["mixture"]} - {*ROWS})
    lines = [
        "---", "license: apache-2.0", "base_model: HuggingFaceTB/SmolLM2-135M-Instruct", "library_name: transformers",
        "tags: [hsa, long-context, memory]", "---",
        "# smol: SmolLM2-135M-Instruct with a memory", "",
        *([] if is_trained else [DRAFT, ""]),
        "The source (Apache-2.0) is fetched by pip; this folder holds what training changed of it. `make smol` puts "
        "both together ([guide](../../docs/own-memory.md)). Written by `python scripts/smol_card.py`.", "",
        f"**Training.** {tokens / 1e6:.0f}M tokens, low rank {settings['lora_rank']} for the source's layers, "
        f"everything of the memory; seed {settings['seed']}. By stage:", "",
        "| stage | tokens | row | " + " | ".join(f"`{kind}`" for kind in kinds) + " |",
        "|---|---|---|" + "---|" * len(kinds),
        *(_stage(stage, kinds) for stage in stages), "",
        "| rows | what |", "|---|---|",
        *(f"| `{kind}` | {ROWS.get(kind, 'see docs/data.md')} |" for kind in kinds), "",
        "**Data and licences.** Text: `corpus-permissive`, code and documentation under permissive licences. Passages "
        "that evaluation asks about are left out of the questions.", "",
        "| file | what | licence |", "|---|---|---|", *_sources(settings), "",
    ]  # fmt: skip
    return "\n".join(lines)


def _stage(stage: dict[str, Any], kinds: list[str]) -> str:
    total = sum(stage["mixture"].values())
    shares = (stage["mixture"].get(kind, 0) / total for kind in kinds)
    told = " | ".join(f"{share:.1%}".replace(".0%", "%") if share else "" for share in shares)
    return f"| {stage['name']} | {stage['tokens'] / 1e6:.0f}M | {stage['seq_len']:,} | {told} |"


def _sources(settings: dict[str, Any]) -> list[str]:
    """The files that the run read; of the recipe those that its card plans with."""
    files = [*settings["questions"], *settings["chats"]] or list(SOURCES)[:4]
    unknown = ("not described here", "state it before this is shared")
    return [f"| {name} | {' | '.join(SOURCES.get(name, unknown))} |" for name in (Path(file).name for file in files)]


if __name__ == "__main__":
    main()
