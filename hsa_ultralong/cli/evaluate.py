"""`hsa eval`: accuracy of a model's memory at any length, form and place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from hsa_ultralong.cli import evaluate_suite
from hsa_ultralong.cli.common import Encoding, TextField, haystack
from hsa_ultralong.cli.evaluate_suite import WithDefault
from hsa_ultralong.cli.numbers import MAX_COUNT, MAX_SEED, MAX_TOPK, parse_size, parse_sizes
from hsa_ultralong.cli.plan import format_bytes
from hsa_ultralong.cli.terminal import console, echo, ends_by_term, progress

evaluate = typer.Typer(cls=WithDefault, help="Measure what a model remembers.", no_args_is_help=True)


_FORMS = ("own", "bf16", "int8", "fp8", "fp16", "fp32", "merged")
_STORES = ("device", "host", "tiered")


def register(app: typer.Typer) -> None:
    evaluate_suite.register(evaluate)
    app.add_typer(evaluate, name="eval")


@evaluate.command("needles")
def needles(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the study: summary.json, needles.png ...")],
    lengths: Annotated[str, typer.Option(help="Tokens to memorise: 64K,1M,1G.")] = "64K",
    samples: Annotated[
        int, typer.Option("--needles", min=1, max=MAX_COUNT, help="Sentences hidden at uniform depths.")
    ] = 20,
    text: Annotated[
        list[Path] | None, typer.Option(help="Haystack: file, folder or - for stdin.", show_default="Opticks")
    ] = None,
    text_field: TextField = "text",
    encoding: Encoding = "auto",
    shards: Annotated[Path | None, typer.Option(help="Haystack: token shards made by `hsa data`.")] = None,
    forms: Annotated[str, typer.Option(help="Forms of the memory, compared: own,int8,fp8,bf16,merged.")] = "own",
    store: Annotated[str, typer.Option(help="Where the memory lies: device, host or tiered.")] = "device",
    together: Annotated[
        bool, typer.Option("--together", help="All sentences at once: distractors of each other.")
    ] = False,
    notes: Annotated[
        bool,
        typer.Option(
            "--notes",
            help="Every sentence is a document of its own, appended behind the text, all at once; asked for by its "
            "beginning ('The secret code of the calm ferry is'), not by a question.",
        ),
    ] = False,
    wording: Annotated[
        str, typer.Option(help="Sentences: own, or authors, those of the authors' S-NIAH, answered without forcing.")
    ] = "own",
    piece: Annotated[
        str | None,
        typer.Option("--piece", "--segment", help="Tokens per forward of reading; 128K and its multiples compile."),
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Model folder, or its name in models/.", show_default="checkpoints/nano")
    ] = None,
    topk: Annotated[
        int | None, typer.Option(min=1, max=MAX_TOPK, help="Chunks read per token.", show_default="the model's")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(help="bf16, fp32 or auto.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of needles and haystack.")] = 0,
) -> None:
    """Hide sentences in a text of any length, one at a time, and ask for each; every form memorises the text once.

    A text that is shorter than a length goes on with its lines in new random orders; the number of different chunks is
    reported. The form merged is the text in eight memories, read apart and merged. Every answer is written to
    records.jsonl at once; the same command goes on with a run that was cut off, and lengths can be added to it.
    summary.json and needles.png follow after every length and form. --together and --notes: all sentences at once.

    Examples:

      hsa eval needles --lengths 64K --needles 20 -o results/mine

      hsa eval needles --lengths 1M --needles 100 --forms own,int8 --shards .data/shards -o results/needles-forms

      hsa eval needles --lengths 256K --needles 40 --notes -o results/needles-notes

      hsa eval needles --lengths 1G --wording authors --store tiered --forms int8 --shards .data/shards -o results/mine

      torchrun --standalone --nproc-per-node=4 --no-python hsa eval needles --lengths 4G --store tiered --forms int8
      --shards .data/shards -o results/needles-4g

    Started by torchrun every process memorises a part of the text, a document of its own, and all answer together.
    """
    import torch.distributed as dist

    from hsa_ultralong.cli.common import choose_device, load_model
    from hsa_ultralong.cli.places import require_folder
    from hsa_ultralong.distributed.mesh import init_distributed

    task = _task(wording, notes=notes, together=together)
    require_folder(output)
    wanted, kinds = [*dict.fromkeys(parse_sizes(lengths, "--lengths"))], _forms(forms, store)
    piece_tokens = None if piece is None else parse_size(piece, "--piece")
    init_distributed(choose_device(device))
    if dist.is_initialized():
        _check_shared(kinds, text, has_one_at_a_time=not (notes or together))
    network, tokenizer = load_model(model, device, dtype)
    if topk is not None:
        network.config.chunk_topk = topk
    source = haystack(tokenizer, text, text_field, encoding, shards, max(wanted)).to(network.device)
    name = "nano" if model is None else model.name
    settings: dict[str, Any] = {"samples": samples, "seed": seed}
    how: dict[str, Any] = {"store": store, "wording": wording, "piece_tokens": piece_tokens}
    if dist.is_initialized():
        _over_processes(network, tokenizer, source, name, output, wanted, kinds[0], task, how, settings)
        dist.destroy_process_group()
        return
    how |= {"together": together, "notes": notes}
    _alone(network, tokenizer, source, name, output, wanted, kinds, task, how, settings)


def _task(wording: str, *, notes: bool, together: bool) -> str:
    """What records call the task; words and options that do not go together are refused."""
    from hsa_ultralong.eval.needles import WORDINGS, task_of

    if notes and together:
        raise ValueError("give --notes or --together, not both: notes lie behind the text, not in it")
    if wording not in WORDINGS:
        raise ValueError(f"--wording must be one of {', '.join(WORDINGS)}, got {wording!r}")
    if wording != "own" and (notes or together):
        raise ValueError("--wording authors asks for one key: leave --notes and --together out")
    return "notes" if notes else "mk_niah" if together else task_of(wording)


def _check_shared(kinds: list[str], text: list[Path] | None, *, has_one_at_a_time: bool) -> None:
    """Refuse what several processes cannot do together."""
    if not has_one_at_a_time or len(kinds) > 1 or kinds == ["merged"]:
        raise ValueError(
            "processes share one form of a text whose sentences are hidden one at a time: leave --notes, --together "
            "and merged out, and give --forms one name; or start it without torchrun"
        )
    if any(str(name) == "-" for name in text or ()):
        raise ValueError("several processes cannot read one stdin: give --text FILE")


def _alone(
    network: Any, tokenizer: Any, source: Any, name: str, output: Path, lengths: list[int], kinds: list[str], task: str,
    how: dict[str, Any], settings: dict[str, Any],
) -> None:  # fmt: skip
    """Every text in every form; `how`: of run_forms."""
    from hsa_ultralong.eval.haystack import recombined
    from hsa_ultralong.eval.needle_run import NeedleRun
    from hsa_ultralong.eval.needles import run_forms

    with NeedleRun(
        output, network, name, forms=kinds, store=how["store"], task=task, **settings
    ) as run, ends_by_term(), _written(run, len(source)) as keep:  # fmt: skip
        for length in lengths:
            echo(f"{length:,} tokens from a text of {len(source):,}", err=True)
            passage = recombined(source, length, tokenizer, settings["seed"])
            known = run.known(passage)
            with _Bars(length, settings["samples"]) as bars:
                run_forms(
                    network, tokenizer, passage, forms=kinds, progress=bars.show, known=known, keep=keep,
                    **how, **settings,
                )  # fmt: skip
    _print(run.study(), output)


def _over_processes(
    network: Any, tokenizer: Any, source: Any, name: str, output: Path, lengths: list[int], form: str, task: str,
    how: dict[str, Any], settings: dict[str, Any],
) -> None:  # fmt: skip
    """A part of every text for every process; the first writes the study and tells the others what it holds."""
    import torch.distributed as dist

    from hsa_ultralong.distributed.mesh import everywhere, on_first, patient_group
    from hsa_ultralong.eval.haystack import recombined
    from hsa_ultralong.eval.needle_run import NeedleRun
    from hsa_ultralong.eval.needles_over_ranks import part_of_text, run_over_ranks, store_label
    from hsa_ultralong.eval.recorded_run import tokens_digest

    rank, world, group = dist.get_rank(), dist.get_world_size(), patient_group()
    with ExitStack() as opened:
        run: Any = None
        keep: Any = None

        def begin() -> None:
            nonlocal run, keep
            place = store_label(how["store"], world)
            run = opened.enter_context(
                NeedleRun(output, network, name, forms=[form], store=place, task=task, **settings)
            )
            opened.enter_context(ends_by_term())
            keep = opened.enter_context(_written(run, len(source)))

        if len(set(everywhere(partial(tokens_digest, source), group))) > 1:
            raise ValueError("the processes have read different texts: give all the same --text FILE or --shards")
        on_first(begin, group)
        for length in lengths:
            first, stop = part_of_text(length, rank, world)
            part = recombined(source, stop - first, tokenizer, settings["seed"], first=first)
            parts = everywhere(partial(tokens_digest, part), group)
            known = on_first(partial(_known, run, length, _together(parts)), group)
            with ExitStack() as shown:
                progress = None
                if run is not None:
                    echo(f"{length:,} tokens from a text of {len(source):,}, read by {world} processes", err=True)
                    progress = shown.enter_context(_Bars(length, settings["samples"])).show
                run_over_ranks(
                    network, tokenizer, part, length=length, form=form, progress=progress, known=known, keep=keep,
                    **how, **settings,
                )  # fmt: skip
        if run is not None:
            _print(run.study(), output)


def _known(run: Any, length: int, digest: str) -> Any:
    return run.known_of(length, digest)


def _together(parts: list[str]) -> str:
    """What tells a text in parts, a digest each, from another; of one part its own."""
    import hashlib

    return parts[0] if len(parts) == 1 else hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


@contextmanager
def _written(run: Any, source_tokens: int) -> Iterator[Callable[[Any], None]]:
    """Gives what keeps an answer; summary and figure follow after every length and form, and at any end."""
    if run.records:
        echo(f"{run.folder} holds {len(run.records):,} sentences; going on", err=True)
    meta = {"dtype": run.settings["dtype"], "source_tokens": source_tokens, "settings": run.settings}
    written = -1

    def keep(result: Any) -> None:
        nonlocal written
        run.keep(result)
        if len(result.samples) == run.settings["samples"]:
            _write(run, meta)
            written = len(run.records)

    try:
        yield keep
    except BaseException:
        if run.records:
            echo(f"cut off; the {len(run.records):,} sentences asked for so far are in {run.folder}", err=True)
        raise
    finally:
        if run.records and len(run.records) != written:
            _write(run, meta)


def _forms(forms: str, store: str) -> list[str]:
    """The forms to compare, "" for the model's own; refused before the first is read."""
    kinds = [part.strip() for part in forms.split(",")]
    if unknown := [kind for kind in kinds if kind not in _FORMS]:
        raise ValueError(f"--forms must be of {', '.join(_FORMS)}, got {unknown[0]!r}")
    if store not in _STORES:
        raise ValueError(f"--store must be one of {', '.join(_STORES)}, got {store!r}")
    return ["" if kind == "own" else kind for kind in dict.fromkeys(kinds)]


class _Bars:
    """Progress of reading and asking, once for every form."""

    def __init__(self, length: int, samples: int) -> None:
        from rich.progress import BarColumn, TimeElapsedColumn, TimeRemainingColumn

        self.bar = progress("{task.description}", BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.task = self.bar.add_task("memorise", total=length)
        self.is_terminal = self.bar.console.is_terminal
        self.length, self.samples = length, samples

    def __enter__(self) -> _Bars:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def show(self, length: int, done: int, total: int, tokens: int) -> None:
        if done:
            self.bar.update(self.task, description=f"ask {done}/{total}", total=total, completed=done)
            if not self.is_terminal and done * 10 // total > (done - 1) * 10 // total:
                self.bar.console.print(f"asked {done} of {total}")
        else:
            self.bar.update(self.task, description=f"memorise {tokens:,}", total=length, completed=tokens)


def _write(run: Any, meta: dict[str, Any]) -> None:
    from hsa_ultralong.cli.figures import draw
    from hsa_ultralong.eval.metadata import command_line, run_metadata, write_json
    from hsa_ultralong.eval.report import study_records

    study = run.study()
    summary = {"meta": run_metadata(command_line(), study.seed, **meta), "records": study_records(study, run.name)}
    write_json(run.folder / "summary.json", summary)
    title = f"Hidden sentences, {run.name}, K={study.topk}"
    draw(run.folder / "records.jsonl", run.folder / "needles.png", "needles", title)


def _print(study: Any, output: Path) -> None:
    from statistics import median

    from rich import box
    from rich.table import Table

    from hsa_ultralong.cli.plan import format_count
    from hsa_ultralong.eval.intervals import wilson_interval
    from hsa_ultralong.eval.plots import human_tokens

    where = "behind" if study.results[0].task == "notes" else "in"
    caption = "margin: median, nats; logits: distance from the first; chunks: different ones"
    table = Table(
        title=f"Sentences hidden {where} a text, asked for after memorising it",
        caption=caption,
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    for name in ("tokens", "memory", "exact", "95%", "margin", "logits", "tok/s", "size", "chunks"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in study.results:
        right = sum(sample.correct for sample in result.samples)
        low, high = wilson_interval(right, len(result.samples))
        place = "" if result.store == "device" else f"{result.store} "
        table.add_row(
            human_tokens(result.length), f"{place}{result.form or 'own'}", f"{right}/{len(result.samples)}",
            f"{100 * low:.0f}-{high:.0%}", f"{median(sample.margin for sample in result.samples):+.2f}",
            "-" if result is study.results[0] else f"{result.logits_error:.2%}",
            format_count(result.length / result.read_seconds), format_bytes(result.memory_bytes),
            format_count(result.distinct_chunks),
        )  # fmt: skip
    console().print(table)
    echo(f"Written: {output}/summary.json, records.jsonl, needles.png")
