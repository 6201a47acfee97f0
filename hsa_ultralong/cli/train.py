"""`hsa train`: run a recipe on one device, resumable; `hsa data` makes its input."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def register(app: typer.Typer) -> None:
    app.command("train")(train)


def train(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe: nano, debug.")],
    data: Annotated[Path | None, typer.Option("--data", help="Folder of token shards made by `hsa data`.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer folder [default: DATA/tokenizer].")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the run [default: runs/RECIPE].")
    ] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="Override: seed=3, warmup.tokens=1000000, model.chunk_topk=16.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    until: Annotated[str | None, typer.Option(help="Stop after this stage.")] = None,
    max_minutes: Annotated[float, typer.Option(help="Save and stop after so many minutes; run again to go on.")] = 1e9,
    init_from: Annotated[
        Path | None, typer.Option(help="Start from the weights of this exported model folder.")
    ] = None,
    export: Annotated[Path | None, typer.Option(help="When done, write a bf16 Hugging Face model folder here.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved run as JSON and stop.")] = False,
) -> None:
    """Train a model by a recipe. Interrupt it at any time: running the same command again goes on where it stood.

    Examples:

      hsa data corpus.txt -o .data/shards

      hsa train debug --data .data/shards -o runs/debug

      hsa train nano --data .data/shards -o runs/nano --device cuda --export checkpoints/nano

      hsa train nano --set warmup.tokens=1000000 --dry-run
    """
    import json

    from hsa_ultralong.recipes import recipe as find_recipe
    from hsa_ultralong.train import apply_overrides, as_dict

    config = apply_overrides(find_recipe(recipe), assignments or [])
    if until is not None:
        config.stage(until)
    if dry_run:
        typer.echo(json.dumps(as_dict(config), indent=1))
        return
    if data is None:
        raise ValueError("training needs --data SHARDS; make them with `hsa data corpus.txt -o SHARDS`")
    from hsa_ultralong.cli.common import choose_device
    from hsa_ultralong.data import TokenShards, load_tokenizer
    from hsa_ultralong.eval.probes import needle_probe
    from hsa_ultralong.train import Trainer

    tokens = load_tokenizer(tokenizer or data / "tokenizer")
    shards = TokenShards.open(data, tokens)
    place = choose_device(device)
    probe = needle_probe(shards, tokens, rows=config.probe_rows, device=place)
    run = output or Path("runs") / recipe
    with _Display(config) as display:
        trainer = Trainer(config, run, shards, tokens, device=place, probe=probe, listener=display.show)
        if init_from is not None:
            from hsa_ultralong.models import HSAForCausalLM

            trainer.initialize_from(HSAForCausalLM.from_pretrained(init_from).state_dict())
        display.start(trainer)
        done = trainer.train(max_minutes=max_minutes, last_stage=until)
    typer.echo(
        f"{'finished' if done else 'stopped'} at step {trainer.global_step}, {trainer.tokens_seen:,} tokens; "
        f"run folder: {run}"
    )
    _draw(run)
    if export is not None and done:
        from hsa_ultralong.train.export import export_model

        export_model(trainer.model, tokens, export, topk=trainer.topk)
        typer.echo(f"model written to {export}")


def _draw(run: Path) -> None:
    """Loss and needle accuracy so far as loss.png in the run folder."""
    from hsa_ultralong.eval.plots import plot_training, read_jsonl

    log = read_jsonl(run / "log.jsonl") if (run / "log.jsonl").is_file() else []
    if any("loss" in record for record in log):
        plot_training(log, run / "loss.png", f"{run.resolve().name}: training")
        typer.echo(f"curves drawn to {run / 'loss.png'}")


class _Display:
    """Progress bar over all stages with loss, tokens/s and needle accuracy; SIGTERM and Ctrl-C save and stop."""

    def __init__(self, config: Any) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.config = config
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self.progress = Progress(*columns)
        self.task = self.progress.add_task("training", total=sum(stage.num_steps for stage in config.stages), note="")
        self.needles = ""

    def __enter__(self) -> _Display:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def start(self, trainer: Any) -> None:
        import signal

        self.progress.update(self.task, completed=trainer.global_step)

        def stop(*_: object) -> None:
            trainer.should_stop = True

        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, stop)

    def show(self, record: dict[str, Any]) -> None:
        if "probe" in record:
            self.needles = f"needles@{record['probe']['length']} {record['probe']['needle_accuracy']:.2f}"
            self.progress.console.print(
                f"step {record['global_step']}: {self.needles}, answer loss {record['probe']['answer_loss']:.3f}"
            )
            return
        note = f"loss {record['loss']:.3f}  {record['tokens_per_s']:,.0f} tok/s  {self.needles}"
        self.progress.update(self.task, completed=record["global_step"], description=record["stage"], note=note)
        if not self.progress.console.is_terminal:
            self.progress.console.print(f"{record['stage']} step {record['global_step']}: {note}", highlight=False)
