"""`hsa tune`: fine-tune a transformer with its full attention on questions over passages in its prompt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from hsa_ultralong.cli.numbers import MAX_COUNT, MAX_SEED, finite
from hsa_ultralong.cli.terminal import echo, progress


def register(app: typer.Typer) -> None:
    app.command("tune")(tune)


def tune(
    source: Annotated[Path, typer.Argument(help="Folder or GGUF file of a Llama, Mistral, Qwen2 or Qwen3 model.")],
    questions: Annotated[
        list[Path], typer.Option("--questions", help="Questions over passages; SQuAD's form, or NQ's.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="New model folder, with tuning.json.")],
    steps: Annotated[int, typer.Option(min=1, max=MAX_COUNT, help="Most optimiser steps.")] = 1500,
    seq_len: Annotated[int, typer.Option(min=64, max=MAX_COUNT, help="Tokens of a row.")] = 1024,
    rows: Annotated[int, typer.Option(min=1, max=MAX_COUNT, help="Rows of a step.")] = 16,
    learning_rate: Annotated[float, typer.Option(min=0, max=1, callback=finite, help="Peak.")] = 1e-4,
    every: Annotated[int, typer.Option(min=1, max=MAX_COUNT, help="Steps between two measurements.")] = 100,
    patience: Annotated[int, typer.Option(min=1, max=MAX_COUNT, help="Measurements without a better F1.")] = 4,
    held_out: Annotated[int, typer.Option(min=1, max=MAX_COUNT, help="Held-out questions of a measurement.")] = 256,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of the rows.")] = 0,
) -> None:
    """Train the source of a converted model on the questions of the converted one, the right passage in its prompt.

    Answering from memory is measured against it. It ends when the F1 of held-out questions no longer rises; the best
    weights are written. Passages that evaluation asks about are left out.

    Examples:

      hsa tune smol.gguf --questions squadshifts.json --questions nq.jsonl.gz -o models/smol-full-tuned --device cuda
    """
    import torch
    from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn
    from torch.utils.data import DataLoader

    from hsa_ultralong.cli.common import choose_device, collect_as_usual, quiet_transformers
    from hsa_ultralong.cli.convert_source import complete_tokenizer, open_source
    from hsa_ultralong.cli.places import removed_on_failure, require_folder
    from hsa_ultralong.data import StepSampler, collate, load_tokenizer
    from hsa_ultralong.data.questions import PassageChats, open_questions
    from hsa_ultralong.eval.metadata import command_line, run_metadata, write_json
    from hsa_ultralong.models.convert import SOURCES
    from hsa_ultralong.train.tuning import TuningConfig
    from hsa_ultralong.train.tuning import tune as train

    require_folder(output, is_new=True)
    place = choose_device(device)
    quiet_transformers()
    torch.manual_seed(seed)
    found = open_source(source)
    if found.config.model_type not in SOURCES:
        raise ValueError(f"{source} is of type {found.config.model_type}; hsa tune takes {', '.join(SOURCES)}")
    if seq_len > found.config.max_position_embeddings:
        raise ValueError(
            f"--seq-len {seq_len}: {source} reads at most {found.config.max_position_embeddings} tokens; use fewer"
        )
    with removed_on_failure(output):
        output.mkdir(parents=True, exist_ok=True)
        found.save_tokenizer(output)
        complete_tokenizer(output)
        tokens = load_tokenizer(output)
        paths = tuple(map(str, questions))
        dataset = PassageChats(paths, tokens, seq_len, steps * rows, seed)
        sampler = StepSampler(rows, num_steps=steps)
        loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=collate)
        bank = open_questions(paths, tokens, "validation")
        model = found.load().float().to(place)
        collect_as_usual()
        held_out = min(held_out, len(bank.questions))
        measure = held_out_f1(model, tokens, bank, held_out)
        config = TuningConfig(steps, learning_rate, every, patience)
        with progress("tuning", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), err=False) as bar:

            def report(record: dict[str, float]) -> None:
                bar.console.print(_line(record), highlight=False, soft_wrap=True)

            records = train(model, iter(bar.track(loader, total=steps)), measure, config, report)
        model.to(torch.bfloat16).save_pretrained(output)
        metadata = run_metadata(command_line(), seed)
        write_json(output / "tuning.json", {"source": found.name, "records": records, "metadata": metadata})
    echo(f"best F1 of {held_out} held-out questions: {max(one['f1'] for one in records):.3f}; written: {output}")


def _line(record: dict[str, float]) -> str:
    return (
        f"step {record['step']:.0f}: loss {record['loss']:.3f}, held-out F1 {record['f1']:.3f}, EM {record['em']:.3f}"
    )


def held_out_f1(model: Any, tokens: Any, bank: Any, count: int) -> Callable[[], dict[str, float]]:
    """F1 and EM of `count` questions spread over a bank, plainly asked behind their passage, answered greedily."""
    import torch

    from hsa_ultralong.eval.tasks.scoring import exact_match, f1

    step = max(1, len(bank.questions) // count)
    asked = bank.questions[::step][:count]
    prompts = [f"{bank.texts[one.passage]}\n\nQuestion: {one.text}\nAnswer:" for one in asked]
    order = sorted(range(len(asked)), key=lambda i: len(prompts[i]))

    def measure() -> dict[str, float]:
        scores = []
        for start in range(0, len(order), 32):
            part = order[start : start + 32]
            ids = [[tokens.bos_token_id, *tokens(prompts[i], add_special_tokens=False)["input_ids"]] for i in part]
            width = max(map(len, ids))
            rows = torch.tensor([[tokens.pad_token_id] * (width - len(row)) + row for row in ids])
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
            place = next(model.parameters()).device
            with torch.no_grad(), torch.autocast(place.type, torch.bfloat16, enabled=place.type == "cuda"):
                made = model.generate(
                    rows.to(place), attention_mask=mask.to(place), max_new_tokens=24, do_sample=False,
                    pad_token_id=tokens.pad_token_id, eos_token_id=tokens.eos_token_id,
                )  # fmt: skip
            for i, row in zip(part, made[:, width:].tolist(), strict=True):
                answer = tokens.decode(row, skip_special_tokens=True).strip().split("\n")[0]
                scores.append((f1(answer, asked[i].answers), exact_match(answer, asked[i].answers)))
        return {"f1": sum(one for one, _ in scores) / len(scores), "em": sum(one for _, one in scores) / len(scores)}

    return measure
