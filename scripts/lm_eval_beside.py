"""Short tasks of one model by `hsa eval`'s own scoring and by lm-eval's tasks and scoring, item by item.

    python scripts/lm_eval_beside.py MODEL --data short-tasks --items 100 -o results/short-smollm2/lm_eval.json

MODEL is a model folder of transformers or a GGUF file, which is decoded. The items come from the same files, since
lm-eval's own downloads need a network; its prompts, requests, scores and normalisations are its own. A line a task, and
the JSON: both scores, verdicts that agree, and the greatest difference between log-likelihoods. Needs
`hsa-ultralong[eval]`. tests/test_lm_eval_beside.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hsa_ultralong.eval.metadata import run_metadata, write_json
from hsa_ultralong.eval.short_tasks import SHORT, ShortItem, ShortTask, score_items

TASKS = tuple(task.name for task in SHORT if task.metric == "acc")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model folder, or a GGUF file")
    parser.add_argument("--data", type=Path, required=True, help="folder of the short tasks")
    parser.add_argument("--tasks", default=",".join(TASKS), help=f"of {', '.join(TASKS)}")
    parser.add_argument("--items", type=int, default=100, help="the first items of each file; 0: all")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON")
    options = parser.parse_args(arguments)
    names = options.tasks.split(",")
    if unknown := [name for name in names if name not in TASKS]:
        sys.exit(f"error: no task {', '.join(unknown)}: there are {', '.join(TASKS)}")
    if options.items < 0:
        sys.exit("error: --items counts items, 0 for all")
    try:
        import lm_eval
    except ImportError:
        sys.exit("error: lm-eval is missing: pip install 'hsa-ultralong[eval]'")
    tasks = [task for task in SHORT if task.name in names]
    try:
        items = {task.name: task.items(options.data, options.items or None) for task in tasks}
        model, tokenizer = load(options.model)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    found = []
    for task in tasks:
        found.append(compare(task, items[task.name], model, tokenizer))
        print("  ".join(f"{key} {value}" for key, value in found[-1].items()), flush=True)
    items_said = f"--items {options.items} --tasks {options.tasks}"
    command = f"python scripts/lm_eval_beside.py {options.model.name} --data {options.data.name} {items_said}"
    meta = run_metadata(command, 0, model=options.model.name, dtype="float32")
    meta["versions"]["lm_eval"] = lm_eval.__version__
    write_json(options.output, {"meta": meta, "tasks": found})
    return 0


def load(path: Path) -> tuple[Any, Any]:
    """Model in fp32 on the CPU, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if path.suffix != ".gguf":
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        return model.eval(), AutoTokenizer.from_pretrained(path)
    from hsa_ultralong.data.gguf_tokenizer import gguf_tokenizer
    from hsa_ultralong.files.gguf import read_gguf
    from hsa_ultralong.models.gguf import load_gguf

    return load_gguf(path).float().eval(), gguf_tokenizer(read_gguf(path).fields)


def compare(task: ShortTask, items: Sequence[ShortItem], model: Any, tokenizer: Any) -> dict[str, Any]:
    """Both scores of the same items."""
    start = time.time()
    own = score_items(task, items, model, tokenizer)
    middle = time.time()
    theirs = lm_eval_samples(task, items, model, tokenizer)
    logs = [record["log_likelihoods"] if "log_likelihoods" in record else [-record["nats"]] for record in own]
    other_logs = [[float(response[0][0]) for response in sample["resps"]] for sample in theirs]
    differences = [abs(a - b) for mine, other in zip(logs, other_logs) for a, b in zip(mine, other)]
    found = {
        "task": task.name,
        "items": len(items),
        "acc": mean([record["score"] for record in own]),
        "acc_lm_eval": mean([sample["acc"] for sample in theirs]),
        "same_items": sum(record["score"] == float(sample["acc"]) for record, sample in zip(own, theirs)),
        "greatest_difference_of_log_likelihoods": max(differences),
    }
    if "acc_norm" in task.others:
        found["acc_norm"] = mean([record["scores"]["acc_norm"] for record in own])
        found["acc_norm_lm_eval"] = mean([sample["acc_norm"] for sample in theirs])
    return {**found, "seconds": round(middle - start, 1), "seconds_lm_eval": round(time.time() - middle, 1)}


def mean(values: Sequence[Any]) -> float:
    return round(sum(map(float, values)) / len(values), 4)


def lm_eval_samples(task: ShortTask, items: Sequence[ShortItem], model: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """lm-eval's records of the items, in their order."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    rows = [
        {"contexts": one.contexts, "endings": [text[1:] for text in one.continuations], "gold": one.gold}
        for one in items
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "items.json"
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        config = {
            "task": f"{task.name}_of_the_file",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": folder},
            "test_split": "test",
            "target_delimiter": " ",
            **_FORMS.get(task.name, _CHOICES),
        }
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, device="cpu")
        results = simple_evaluate(wrapped, tasks=[config], log_samples=True, bootstrap_iters=0, verbosity="ERROR")
    samples = results["samples"][config["task"]]
    return sorted(samples, key=lambda sample: sample["doc_id"])


def _metrics(*names: str) -> list[dict[str, Any]]:
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]


# as in lm-eval's own files of these tasks; queries of the files end as its prompts do
_CHOICES: dict[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_text": lambda row: row["contexts"][0],
    "doc_to_choice": lambda row: row["endings"],
    "doc_to_target": lambda row: row["gold"],
    "metric_list": _metrics("acc", "acc_norm"),
}
_FORMS: dict[str, dict[str, Any]] = {
    "winogrande": {
        "output_type": "multiple_choice",
        "doc_to_text": lambda row: row["gold"],
        "doc_to_choice": lambda row: row["contexts"],
        "doc_to_target": lambda row: row["endings"][0],
        "metric_list": _metrics("acc"),
    },
    "lambada_openai": {
        "output_type": "loglikelihood",
        "doc_to_text": lambda row: row["contexts"][0],
        "doc_to_target": lambda row: " " + row["endings"][0],
        "target_delimiter": "",
        "metric_list": _metrics("acc"),
    },
}

if __name__ == "__main__":
    sys.exit(main())
