"""`hsa train`: run a recipe on one device, or on many under torchrun, resumable; `hsa data` makes its input."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from hsa_ultralong.cli.common import Encoding, TextField, collect_as_usual
from hsa_ultralong.cli.numbers import finite
from hsa_ultralong.cli.terminal import echo
from hsa_ultralong.cli.train_plan import show_plan
from hsa_ultralong.cli.train_start import (
    Start,
    check_differences,
    check_start,
    keep_conversion,
    load_teacher,
    start_from,
    take_shape,
    write_change,
)

if TYPE_CHECKING:
    import torch

    from hsa_ultralong.train import TrainConfig, Trainer
    from hsa_ultralong.train.run_folder import RunFolder

Questions = Annotated[
    list[Path] | None,
    typer.Option("--questions", help="Questions over passages, for recipes that ask them; SQuAD's form, or NQ's."),
]

Sentences = Annotated[
    list[Path] | None,
    typer.Option("--sentences", help="Their answers in a sentence, of `hsa write sentences`; with p_sentence."),
]

Chats = Annotated[
    list[str] | None,
    typer.Option(
        "--chat",
        help="Conversations, for recipes with rows chat; with --text also for others, in place of instructions.",
    ),
]


def register(app: typer.Typer) -> None:
    app.command("train")(train)


def train(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe, such as nano, nano_stages, debug.")],
    data: Annotated[Path | None, typer.Option("--data", help="Folder of token shards made by `hsa data`.")] = None,
    text: Annotated[
        list[str] | None, typer.Option("--text", help="Instead: what `hsa data` reads, tokenised into RUN/shards.")
    ] = None,
    chat: Chats = None,
    text_field: TextField = "text",
    encoding: Encoding = "auto",
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer folder.", show_default="that of the shards")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the run.", show_default="runs/RECIPE")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Override: seed=3, warmup.tokens=1000000, model.chunk_topk=16, parallel.replicate=4; may be repeated.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    until: Annotated[str | None, typer.Option(help="Stop after this stage.")] = None,
    max_minutes: Annotated[
        float | None,
        typer.Option(min=0, max=1e9, callback=finite, help="Save and stop after so many minutes; run again to go on."),
    ] = None,
    init_from: Annotated[
        Path | None, typer.Option(help="Start from this model folder: its shape and weights, whatever the recipe's.")
    ] = None,
    teacher: Annotated[
        Path | None, typer.Option(help="The source that --init-from was converted from: a folder or GGUF file.")
    ] = None,
    from_difference: Annotated[
        Path | None, typer.Option(help="With --init-from: go on from this file of an earlier run.")
    ] = None,
    export_difference: Annotated[
        Path | None, typer.Option(help="At the end, also of --max-minutes: write what was learnt, at most 32 MiB.")
    ] = None,
    questions: Questions = None,
    sentences: Sentences = None,
    freeze_memory: Annotated[
        bool,
        typer.Option(
            "--freeze-memory", help="With --init-from: train the upper half only; memories of that model stay valid."
        ),
    ] = False,
    export: Annotated[Path | None, typer.Option(help="When done, write a bf16 Hugging Face model folder here.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved run and its plan, and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: everything as one JSON object.")] = False,
) -> None:
    """Train a model by a recipe. Interrupt it at any time: running the same command again goes on where it stood.

    Examples:

      hsa data corpus.txt -o .data/shards

      hsa train debug --data .data/shards -o runs/debug

      hsa train nano --data .data/shards -o runs/nano --device cuda --export checkpoints/nano

      hsa train nano_stages --text corpus.txt --chat chats.jsonl --device cuda --export models/mine

      hsa train nano_notes --data .data/shards --init-from checkpoints/nano --freeze-memory --export models/mine

      hsa train convert_memory --data SHARDS --init-from models/smol --teacher smol.gguf --export models/smol-read

      hsa train dense_0_5b --set gpus=64 --dry-run
    """
    from hsa_ultralong.recipes import recipe as find_recipe
    from hsa_ultralong.train import apply_overrides

    config = find_recipe(recipe)
    if chat:
        _use_conversations(config)
    config = apply_overrides(config, assignments or [])
    config.freeze_memory |= freeze_memory
    config.questions += [str(path) for path in questions or []]
    config.sentences += [str(path) for path in sentences or []]
    if any("chat" in stage.mixture for stage in config.stages):
        config.chats, chat = [*config.chats, *(chat or [])], None
    run = output or Path("runs") / "-".join(filter(None, (recipe, config.twin)))
    if init_from is not None:
        take_shape(config, init_from, run)
    _check_words(config, until, as_json and not dry_run)
    start = Start(init_from, teacher, from_difference, export_difference)
    if dry_run:
        check_differences(start)
        return show_plan(config, as_json)
    texts, reading = (text or [], chat or []), {"text_field": text_field, "encoding": encoding}
    _execute(TrainRequest(config, run, data, *texts, reading, tokenizer, until, max_minutes, export, start), device)


def _check_words(config: TrainConfig, until: str | None, is_json_of_a_run: bool) -> None:
    if until is not None:
        config.stage(until)
    if is_json_of_a_run:
        raise ValueError("--json goes with --dry-run; what a run measures is in its log.jsonl and summary.json")


class TrainRequest(NamedTuple):
    """What a command asks for, resolved."""

    config: TrainConfig
    run: Path
    data: Path | None
    text: list[str]
    chat: list[str]
    reading: dict[str, str]
    tokenizer: Path | None
    until: str | None
    max_minutes: float | None
    export: Path | None
    start: Start


def _execute(request: TrainRequest, device: str) -> None:
    import torch.distributed as dist

    from hsa_ultralong.cli.common import choose_device
    from hsa_ultralong.distributed.mesh import init_distributed
    from hsa_ultralong.train.graphs import require_graphs
    from hsa_ultralong.train.run_folder import RunFolder
    from hsa_ultralong.train.stages import require_experts

    _check_options(request)
    _check_folders(request)
    check_start(request.config, request.start)
    first = request.start.init_from
    own = None if first is None else first / "tokenizer.json"
    if own is not None and own.is_file() and request.tokenizer is None and request.data is None:
        # tokens must mean to the new rows what they mean to the weights
        request = request._replace(tokenizer=first)
    place = init_distributed(choose_device(device))
    processes = dist.get_world_size() if dist.is_initialized() else 1
    shape = request.config.shape()
    require_experts(request.config, shape)
    require_graphs(request.config, shape, place, processes)
    folder = RunFolder(request.run)
    folder.take()
    try:
        shards = request.data or _prepare_shards(request)
        _run(request, folder, shards, request.tokenizer or shards / "tokenizer", place)
    finally:
        folder.release()


def _check_options(request: TrainRequest) -> None:
    if not request.text and tuple(request.reading.values()) != ("text", "auto"):
        raise ValueError("--text-field and --encoding go with --text FILE")
    if request.config.freeze_memory and request.start.init_from is None:
        raise ValueError("--freeze-memory keeps the memories of a trained model: name it with --init-from FOLDER")
    from hsa_ultralong.train.twins import rival_of

    rival_of(request.config, request.config.shape())
    if request.chat and not request.text:
        raise ValueError(
            "--chat goes with --text, or with recipes that have rows chat (convert_sft); shards get conversations from "
            "`hsa data corpus.txt --chat FILE`"
        )
    if (request.data is None) == (not request.text):
        raise ValueError(
            "training needs --data SHARDS, made with `hsa data corpus.txt -o SHARDS`, or --text corpus.txt"
        )


def _check_folders(request: TrainRequest) -> None:
    """Everything named by the command can be read or written, before any work; nothing is written."""
    from hsa_ultralong.eval.plots import read_log
    from hsa_ultralong.train.export import check_export
    from hsa_ultralong.train.run_folder import check_run_folder

    run, data = request.run, request.data
    check_run_folder(run)
    read_log(run / "log.jsonl")
    if request.export is not None:
        others = [run, run / "shards", *([data] if data else [])]
        check_export(request.export, others, is_twin=request.config.has_twin)


def _run(request: TrainRequest, held: RunFolder, folder: Path, tokenizer: Path, place: torch.device) -> None:
    """Train on the shards in `folder` in this process, or in it and its peers."""
    import logging
    import math

    import torch.distributed as dist

    from hsa_ultralong.cli.train_display import Display
    from hsa_ultralong.data import TokenShards, load_tokenizer
    from hsa_ultralong.distributed.mesh import on_first, patient_group
    from hsa_ultralong.train import Trainer

    config, run, export = request.config, held.path, request.export
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    if not is_first:
        # warnings are the same on all processes
        logging.getLogger("hsa_ultralong").setLevel(logging.ERROR)
    tokens = load_tokenizer(tokenizer)
    # files are hashed by one process, and known to the others
    on_first(lambda: bool(TokenShards.open(folder, tokens)), patient_group())
    shards = TokenShards.open(folder, tokens)
    with Display(config, is_first, request.until) as display:
        probe = _probe(shards, tokens, config, place)
        trainer = Trainer(
            config, run, shards, tokens, device=place, probe=probe, listener=display.show, folder=held,
            teacher=load_teacher(request.start),
        )  # fmt: skip
        kept = start_from(trainer, request.start, tokens)
        display.start(trainer)
        _stop_on_signals(trainer)
        collect_as_usual()
        minutes = math.inf if request.max_minutes is None else request.max_minutes
        done = trainer.train(max_minutes=minutes, last_stage=request.until)
    if export is not None and done:
        _export(trainer, export)
        keep_conversion(request.start, export)
    write_change(trainer, request.start, kept)
    gpus = dist.get_world_size() if dist.is_initialized() else 1
    if dist.is_initialized():
        dist.destroy_process_group()
    if is_first:
        _summarise(run, config.seed, gpus)
        state = "finished" if done else "stopped"
        is_kept = config.keep_checkpoints > 0
        advice = "" if done else "; run the same command again to go on" if is_kept else "; no checkpoint was kept"
        echo(f"{state} at step {trainer.global_step}, {trainer.tokens_seen:,} tokens; run folder: {run}{advice}")
        _draw(run)
        if export is not None and done:
            echo(f"model written to {export}")


def _export(trainer: Trainer, folder: Path) -> None:
    from hsa_ultralong.cli.common import quiet_transformers
    from hsa_ultralong.train.export import export_model

    quiet_transformers()
    export_model(trainer.model, trainer.tokenizer, folder, topk=trainer.topk)


def _use_conversations(config: TrainConfig) -> None:
    """Rows of real conversations in every stage that has rows of instructions made from text."""
    for stage in config.stages:
        stage.mixture = {"sft" if kind == "instructions" else kind: share for kind, share in stage.mixture.items()}


def _prepare_shards(request: TrainRequest) -> Path:
    """Token shards in the run's folder, made by the first process unless they are there already."""
    from hsa_ultralong.distributed.mesh import on_first, patient_group

    folder, text, chat = request.run / "shards", request.text, request.chat

    def prepare() -> None:
        if folder.exists():
            echo(f"training on {folder}, made before; remove it to read {', '.join([*text, *chat])} again")
            return
        from hsa_ultralong.cli.data import data as tokenise

        folder.parent.mkdir(parents=True, exist_ok=True)
        vocab_size = request.config.shape().vocab_size
        tokenise(text, folder, tokenizer=request.tokenizer, vocab_size=vocab_size, chat=chat, **request.reading)  # type: ignore[arg-type]

    on_first(prepare, patient_group())
    return folder


def _probe(shards: Any, tokens: Any, config: TrainConfig, place: Any) -> Any:
    """Needle accuracy on held-out documents; None, with a warning, if they give no rows of needles."""
    import logging

    from hsa_ultralong.eval.probes import needle_probe

    logger = logging.getLogger(__name__)
    if not len(shards.documents("validation")):
        logger.warning("no document is held out: needle accuracy is not measured in training")
        return None
    lengths = sorted({stage.seq_len for stage in config.stages} | set(config.probe_lengths))
    size = config.shape().chunk_size
    try:
        return needle_probe(
            shards,
            tokens,
            rows=config.probe_rows,
            device=place,
            lengths=lengths,
            chunk_size=size,
            kind=config.probe_kind,
            questions=config.questions,
            says_short=any(stage.data_options.get("p_sentence") for stage in config.stages),
            families=config.probe_families,
        )
    except ValueError as error:
        logger.warning("needle accuracy is not measured in training: %s", error)
        return None


def _stop_on_signals(trainer: Trainer) -> None:
    """SIGTERM and Ctrl-C save and stop; a second Ctrl-C stops at once."""
    import signal

    def stop(*_: object) -> None:
        trainer.should_stop = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, stop)


def _summarise(run: Path, seed: int, gpus: int) -> None:
    """What was measured, with command, commit and hardware, as summary.json in the run folder (docs/results.md)."""
    from hsa_ultralong.eval.metadata import command_line, run_metadata, write_json
    from hsa_ultralong.eval.plots import read_log
    from hsa_ultralong.eval.run_summary import run_summary
    from hsa_ultralong.files.strict_json import read_json

    log = read_log(run / "log.jsonl")
    config = read_json(run / "config.json")
    write_json(run / "summary.json", run_summary(log, config, run_metadata(command_line(), seed), gpus=gpus))


def _draw(run: Path) -> None:
    """All curves so far as loss.png in the run folder."""
    from hsa_ultralong.eval.plots import plot_training, read_log

    log = read_log(run / "log.jsonl")
    if any("loss" in record for record in log):
        plot_training(log, run / "loss.png", f"{run.resolve().name}: training")
        echo(f"curves drawn to {run / 'loss.png'}")
