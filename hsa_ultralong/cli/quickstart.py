"""`hsa quickstart`: memorise a real book on this machine, hide sentences anywhere in it, ask for them, draw the map."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hsa_ultralong.cli.numbers import MAX_COUNT, MAX_SEED, MAX_TOPK, parse_sizes
from hsa_ultralong.cli.terminal import console, echo, progress


def register(app: typer.Typer) -> None:
    app.command("quickstart")(quickstart)


def quickstart(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for report.json and needles.png.")] = Path(
        "quickstart-report"
    ),
    model: Annotated[
        Path | None, typer.Option(help="Model folder, or its name in models/.", show_default="checkpoints/nano")
    ] = None,
    lengths: Annotated[str, typer.Option(help="Lengths in tokens, e.g. 4K,32K,256K (K = 1,024).")] = "4K,32K,256K",
    needles: Annotated[int, typer.Option(min=1, max=MAX_COUNT, help="Hidden sentences per length.")] = 30,
    controls: Annotated[
        int, typer.Option(min=0, max=MAX_COUNT, help="Questions per length about sentences never hidden.")
    ] = 10,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the hidden sentences.")] = 0,
    topk: Annotated[
        int | None, typer.Option(min=1, max=MAX_TOPK, help="Chunks kept per token.", show_default="the model's")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(help="bf16, fp32 or auto.")] = "auto",
) -> None:
    """Memorise Newton's Opticks and recall sentences hidden anywhere in it: a table, report.json and needles.png.

    Each length is memorised once; every sentence is written in by an exact edit, asked for, and taken out again.

    Examples:

      hsa quickstart

      hsa quickstart -o report --lengths 4K,64K --needles 50
    """
    wanted = parse_sizes(lengths, "--lengths")
    from hsa_ultralong.cli.common import load_model
    from hsa_ultralong.cli.places import require_folder
    from hsa_ultralong.eval.haystack import opticks

    require_folder(output)
    echo("Loading the model and the book (Isaac Newton, Opticks, 1730) ...")
    network, tokenizer = load_model(model, device, dtype)
    if topk is not None:
        network.config.chunk_topk = topk
    import torch

    text = torch.tensor(tokenizer(opticks())["input_ids"], dtype=torch.int32)
    if max(wanted) > len(text):
        raise ValueError(f"the book has {len(text):,} tokens, {max(wanted):,} wanted; choose smaller --lengths")
    kept: dict[int, Any] = {}
    try:
        study = _run(network, tokenizer, text, wanted, needles, controls, seed, kept)
    except BaseException:
        if kept:
            from hsa_ultralong.eval.needles import NeedleStudy

            _write(NeedleStudy([*kept.values()], network.config.chunk_topk, seed), output, network)
            echo(f"cut off; what was measured so far is in {output}", err=True)
        raise
    _finish(study, output, network)


def _run(
    network: Any, tokenizer: Any, text: Any, lengths: list[int], needles: int, controls: int, seed: int,
    kept: dict[int, Any],
) -> Any:  # fmt: skip
    from rich.progress import BarColumn, TimeElapsedColumn

    from hsa_ultralong.eval.needles import run_needles
    from hsa_ultralong.eval.plots import human_tokens

    columns = ("{task.description}", BarColumn(), "{task.fields[note]}", TimeElapsedColumn())
    with progress(*columns, err=False) as bar:
        reading = {n: bar.add_task(f"memorise {human_tokens(n):>5}", total=n, start=False, note="") for n in lengths}
        asking = {
            n: bar.add_task(f"ask at   {human_tokens(n):>5}", total=needles, start=False, note="") for n in lengths
        }

        def report(length: int, done: int, total: int, tokens: int) -> None:
            if done == 0:
                bar.start_task(reading[length])
                bar.update(reading[length], completed=tokens, note=f"{tokens:,} tokens")
                if tokens == length:
                    bar.stop_task(reading[length])
                    bar.start_task(asking[length])
            else:
                bar.update(asking[length], completed=done, note=f"{done}/{total} sentences")
                if done == total:
                    bar.stop_task(asking[length])

        return run_needles(
            network,
            tokenizer,
            text,
            lengths=lengths,
            samples=needles,
            controls=controls,
            seed=seed,
            progress=report,
            keep=lambda result: kept.update({result.length: result}),
        )


def _write(study: Any, output: Path, network: Any) -> None:
    import dataclasses

    from hsa_ultralong.eval.metadata import command_line, run_metadata
    from hsa_ultralong.eval.plots import plot_needles
    from hsa_ultralong.eval.report import write_study

    meta = run_metadata(command_line(), study.seed, dtype=str(network.dtype).removeprefix("torch."))
    write_study(output, study, "nano", meta)
    samples = [dataclasses.asdict(sample) for result in study.results for sample in result.samples]
    plot_needles(samples, output / "needles.png", f"Sentences hidden in Opticks, nano, K={study.topk}")


def _finish(study: Any, output: Path, network: Any) -> None:
    from rich.table import Table

    from hsa_ultralong.eval.intervals import wilson_interval
    from hsa_ultralong.eval.plots import human_tokens
    from hsa_ultralong.inference.ask import unsure_weight

    _write(study, output, network)
    table = Table(title="Sentences hidden in a book, asked for after memorising it")
    for name in ("tokens", "hidden", "exact", "95% interval", "memorised", "tokens/s", "memory"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in study.results:
        right = sum(sample.correct for sample in result.samples)
        low, high = wilson_interval(right, len(result.samples))
        table.add_row(
            human_tokens(result.length),
            str(len(result.samples)),
            f"{result.accuracy:.1%}",
            f"{low:.0%}-{high:.0%}",
            f"{result.read_seconds:.1f} s",
            f"{result.length / result.read_seconds:,.0f}",
            f"{result.memory_bytes / 2**20:.1f} MiB",
        )
    console().print(table)
    controls = [
        weight < threshold
        for result in study.results
        for threshold in [unsure_weight(network.config, -(-result.length // network.config.chunk_size))]
        for weight in result.control_weights
        if threshold is not None
    ]
    if controls:
        echo(f"Asked about sentences never hidden, it said it was unsure {sum(controls)} of {len(controls)} times.")
    example = study.results[-1].samples[0]
    asked, told = example.prompt.splitlines()[0], example.answered.strip()
    echo(f'For example, asked "{asked}" it answered "{told}" (hidden: {example.expected}).')
    echo(
        f"Peak memory {study.peak_host_bytes / 2**30:.2f} GiB. "
        f"Written: {output}/report.json, records.jsonl, needles.png"
    )
    echo("\nThe same with your own text and your own sentence:\n")
    echo(
        '  hsa ask --text YOUR.txt --hide "The secret code of the silver lantern is 4821937." '
        '"What is the secret code of the silver lantern?"\n'
    )
    echo("This model has 9 million parameters: it recalls stated facts of this kind, and does not converse or reason.")
