"""`hsa eval MODEL... --suite ruler`: tasks at many lengths, resumable, with tables and a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hsa_ultralong.cli.common import Encoding, TextField, collect_as_usual, haystack, held_out, wait_asleep
from hsa_ultralong.cli.numbers import MAX_COUNT, MAX_SEED, MAX_TOPK, parse_size
from hsa_ultralong.cli.terminal import echo, ends_by_term, progress

_TEXT_TOKENS = 1 << 24
_QA = ("qa_xquad", "qa_squadshifts", "qa_nq", "qa_hotpot", "qa_2wiki")
# data by name, and the tasks that read it
_READER_OF = {
    "squad": ("qa_1",), "hotpot": ("qa_2", "qa_hotpot"), "xquad": ("qa_xquad",), "squadshifts": ("qa_squadshifts",),
    "nq": ("qa_nq",), "2wiki": ("qa_2wiki",), "wiki": _QA, "babi": tuple(f"babilong_qa{n}" for n in range(1, 6)),
    "short": ("lambada_openai", "hellaswag", "piqa", "arc_easy", "arc_challenge", "winogrande", "openbookqa",
              "wikitext2"),
}  # fmt: skip
# data that is a folder
_FOLDERS = ("babi", "short")
# scored on the text itself
_TEXT_TASKS = ("ppl_last_512", "ppl_last_4096", "ppl_position")
_MEMORIES = ("memory", "rebuild")
_CONTROLS = ("closed", "gold", "bm25", "dense")
_SETTINGS = ("auto", "memory", "rebuild", "continue", "prompt", *_CONTROLS)
_SEARCHED = ("bm25", "dense")
_SCORINGS = ("auto", "generate", "teacher", "both")


Data = Annotated[
    list[str] | None,
    typer.Option(
        help="NAME=PATH: files squad (qa_1), hotpot (qa_2, qa_hotpot), xquad, squadshifts, nq, 2wiki, wiki "
        "(distractors of qa); folders babi (its test stories), short."
    ),
]
Setting = Annotated[
    str,
    typer.Option(
        help="memory: the question is a new document; rebuild: the same, with every context read anew; continue: it "
        "goes on with the text; prompt: plain. Controls of qa: closed (no passage), gold, bm25 and dense (what a "
        "search finds)."
    ),
]
RereadPassages = Annotated[
    int,
    typer.Option(
        min=0, max=MAX_TOPK, help="Of the setting memory: so many passages, found by the model's own retrieval, stand "
        "in the prompt as text as well."
    ),
]  # fmt: skip
PassageTokens = Annotated[
    int | None,
    typer.Option(
        min=1, max=MAX_COUNT, help="Of bm25 and dense: the best passages fill a prompt of so many tokens.",
        show_default="five passages"
    ),
]  # fmt: skip
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", help="Of a rival (hsa_ultralong/baselines): decoding=pages, chunk_topk=8, rope_scaling=..."),
]
Models = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="MODEL...", help="Model folders, of this library or of transformers; GGUF files.", show_default="nano"
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(min=1, max=256, help="Samples at once, over one memory.", show_default="16; 32 on a CPU"),
]
Scoring = Annotated[
    str,
    typer.Option(
        help="generate, teacher (forced answers, faster; tasks with one right answer), both, or auto: both for the "
        "authors' tests, whose score the forced answer is, else generate."
    ),
]
Lengths = Annotated[
    str,
    typer.Option(
        help="Tokens of a whole sample: 4K,64K or 4K..1M (doubling); 0: facts alone (babilong). Beyond the text its "
        "lines come again in new orders, which ppl never reads."
    ),
]
Suites = Annotated[
    str,
    typer.Option("--suite", help="ruler, recall, paper, prompt, babilong, qa, ppl, short; several by commas."),
]


class WithDefault(TyperGroup):
    """A group whose arguments go to the command "suite" where they name no other one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help"):
            args = ["suite", *args]
        return super().parse_args(ctx, args)


def register(evaluate: typer.Typer) -> None:
    evaluate.command("suite")(suite)


def suite(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run; one below it for each model.")],
    models: Models = None,
    suites: Suites = "",
    tasks: Annotated[str, typer.Option(help="Tasks by name instead of, or besides, a suite.")] = "",
    lengths: Lengths = "4K..64K",
    samples: Annotated[int, typer.Option(min=1, max=MAX_COUNT, help="Samples of a task and length.")] = 100,
    setting: Setting = "auto",
    reread: RereadPassages = 0,
    passage_tokens: PassageTokens = None,
    scoring: Scoring = "auto",
    chat: Annotated[bool, typer.Option("--chat", help="Put tasks into the tokenizer's chat template.")] = False,
    answer_tokens: Annotated[
        int, typer.Option(min=0, max=MAX_COUNT, help="Least room for an answer; 0: each task's own, 5 to 128.")
    ] = 0,
    data: Data = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="Haystack: file, folder or - for stdin.", show_default="Opticks")
    ] = None,
    text_field: TextField = "text",
    encoding: Encoding = "auto",
    shards: Annotated[
        Path | None, typer.Option(help="Haystack: token shards made by `hsa data`; of ppl their validation documents.")
    ] = None,
    batch: BatchSize = None,
    topk: Annotated[
        int | None, typer.Option(min=1, max=MAX_TOPK, help="Chunks read per token.", show_default="the model's")
    ] = None,
    changes: Changes = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(help="bf16, fp32 or auto.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the samples.")] = 0,
) -> None:
    """Measure models on suites of tasks: RULER, recall in sentence forms that no training uses, the authors' tests.

    Every sample is written as soon as it is answered, with what was retrieved; the same command goes on with a run
    that was cut off, and more tasks or lengths can be added to it. Tables, figures and report.html, a page that
    needs no network, follow at the end. Models of this library read one memory, of which each sample replaces what
    differs; others get a plain prompt. What the tasks are: hsa_ultralong/eval/tasks/README.md.

    Examples:

      hsa eval --suite recall --lengths 64K --samples 20 -o results/mine

      hsa eval checkpoints/nano --suite ruler --lengths 4K..1M --data squad=a.json --data hotpot=b.jsonl -o runs/ruler

      torchrun --nproc-per-node=8 -m hsa_ultralong eval checkpoints/nano --suite recall --lengths 1M..16M -o runs/long

      hsa eval checkpoints/nano --tasks s_niah_authors --lengths 128M --shards .data/shards -o runs/128m

      hsa eval models/smol models/mine --tasks niah_single_2,vt --chat --lengths 2K..8K -o runs/beside

      hsa eval model.gguf --suite recall --chat --answer-tokens 48 --lengths 2K -o runs/sentences
    """
    wait_asleep()
    from hsa_ultralong.cli.places import require_folder
    from hsa_ultralong.eval.likelihood_suite import LIKELIHOOD_TASKS, check_likelihood
    from hsa_ultralong.eval.tasks import Material, check_tasks

    names, wanted = _tasks(suites, tasks), parse_lengths(lengths)
    _check_choices(names, setting, scoring)
    _check_asking(setting, reread, passage_tokens, answer_tokens, is_asked=not {*names} <= {*LIKELIHOOD_TASKS})
    require_folder(output)
    files = _files(data or [], names)
    folders: Sequence[Path | None] = models or [None]
    labels = own_names(folders)
    import torch.distributed as dist

    from hsa_ultralong.cli.common import choose_device
    from hsa_ultralong.distributed.mesh import init_distributed

    init_distributed(choose_device(device))
    for folder, label in zip(folders, labels, strict=True):
        model, tokenizer, is_ours = load_any(folder, device, dtype, changes or [])
        if topk is not None:
            if not is_ours:
                raise ValueError(f"--topk is of models of this library, {label} is none")
            model.config.chunk_topk = topk
        # the same text whatever the lengths, so that lengths can be added to a run
        source = haystack(tokenizer, text, text_field, encoding, shards, max(_TEXT_TOKENS, max(wanted)))
        material = Material(tokenizer, source, chat=chat, answer_tokens=answer_tokens, files=files)
        asked = [name for name in names if name not in LIKELIHOOD_TASKS]
        check_tasks(asked, material, samples)
        check_likelihood(names, files.get("short"), samples)
        reader = _reader(model, material, setting, batch, is_ours, reread, passage_tokens) if asked else None
        place = output if len(folders) == 1 else output / label
        kept = None if shards is None else held_out(tokenizer, shards, is_needed=any(n in _TEXT_TASKS for n in names))
        _measure(place, label, model, material, reader, names, wanted, samples, seed, scoring, changes or [], kept)
    if dist.is_initialized():
        dist.destroy_process_group()


def _check_choices(names: Sequence[str], setting: str, scoring: str) -> None:
    """Refuse words that mean nothing, and controls of questions where something else is asked."""
    if setting not in _SETTINGS:
        raise ValueError(f"--setting must be one of {', '.join(_SETTINGS)}, got {setting!r}")
    if scoring not in _SCORINGS:
        raise ValueError(f"--scoring must be one of {', '.join(_SCORINGS)}, got {scoring!r}")
    if setting in _CONTROLS and not {*names} <= {*_QA}:
        raise ValueError(f"--setting {setting} is of the suite qa; leave {next(n for n in names if n not in _QA)} out")


def _check_asking(setting: str, reread: int, passage_tokens: int | None, answer_tokens: int, *, is_asked: bool) -> None:
    """Refuse options of answers where nothing is asked, of passages in the prompt where there are none."""
    if answer_tokens and not is_asked:
        raise ValueError("the suites ppl and short ask nothing; leave --answer-tokens out")
    if (reread or passage_tokens) and not is_asked:
        raise ValueError("the suites ppl and short ask nothing; leave --reread and --passage-tokens out")
    if reread and setting not in ("auto", *_MEMORIES):
        raise ValueError(f"--reread is of the settings memory and rebuild; leave it out of {setting}")
    if passage_tokens and setting not in _SEARCHED:
        raise ValueError(
            f"--passage-tokens is of the settings bm25 and dense, not of {setting}; --reread N puts passages of a "
            "memory into the prompt"
        )


def own_names(folders: Sequence[Path | None]) -> list[str]:
    """What records call the models; refused where two have one name."""
    labels = ["nano" if folder is None else folder.resolve().name for folder in folders]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"two models are called {label!r}; give them different folder names")
    return labels


def _tasks(suites: str, tasks: str) -> list[str]:
    """Names of the tasks, each once."""
    from hsa_ultralong.eval.likelihood_suite import LIKELIHOOD_SUITES, LIKELIHOOD_TASKS
    from hsa_ultralong.eval.tasks import SUITES, TASKS

    known = {**{name: tuple(task.name for task in own) for name, own in SUITES.items()}, **LIKELIHOOD_SUITES}
    names: list[str] = []
    for suite_name in filter(None, (part.strip() for part in suites.split(","))):
        if suite_name not in known:
            raise ValueError(f"--suite must be of {', '.join(known)}, got {suite_name!r}")
        names += known[suite_name]
    for task in filter(None, (part.strip() for part in tasks.split(","))):
        if task not in TASKS and task not in LIKELIHOOD_TASKS:
            raise ValueError(f"--tasks has no {task!r}; there are {', '.join((*TASKS, *LIKELIHOOD_TASKS))}")
        names.append(task)
    if not names:
        raise ValueError(f"give --suite ({', '.join(known)}) or --tasks")
    return list(dict.fromkeys(names))


def parse_lengths(text: str) -> list[int]:
    """Lengths of "4K,64K" or "4K..1M", which doubles; ascending, each once. "0": facts alone, of babilong."""
    found: set[int] = set()
    for part in text.split(","):
        if part.strip().upper() in ("0", "0K"):
            found.add(0)
            continue
        first, dots, last = part.partition("..")
        low = parse_size(first, "--lengths")
        high = parse_size(last, "--lengths") if dots else low
        if high < low:
            raise ValueError(f"--lengths must rise, got {part!r}")
        while low <= high:
            found.add(low)
            low *= 2
    return sorted(found)


def _files(data: Sequence[str], tasks: Sequence[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for entry in data:
        name, sign, path = entry.partition("=")
        if not sign or name not in _READER_OF:
            names = ", ".join(f"{name}=PATH" for name in _READER_OF)
            raise ValueError(f"--data must be one of {names}, got {entry!r}")
        if not {*_READER_OF[name]} & {*tasks}:
            raise ValueError(f"--data {name} is read by {', '.join(_READER_OF[name])}, none of which is to be measured")
        kind, is_there = ("folder", Path(path).is_dir()) if name in _FOLDERS else ("file", Path(path).is_file())
        if not is_there:
            raise ValueError(f"--data {name}: there is no {kind} {path}")
        found[name] = Path(path)
    return found


def load_any(folder: Path | None, device: str, dtype: str, changes: Sequence[str]) -> tuple[Any, Any, bool]:
    """Model, tokenizer, and whether the model is one with a memory; changes: of a rival's configuration.

    folder: or a GGUF file of a pretrained transformer, which is decoded.
    """
    from hsa_ultralong.cli.common import choose_device, choose_dtype, load_model, quiet_transformers
    from hsa_ultralong.files.strict_json import read_json

    if folder is not None and folder.suffix == ".gguf" and not folder.is_file():
        raise ValueError(f"{folder} is no file: a model is a folder, or a GGUF file")
    if folder is not None and folder.is_file() and not changes:
        from hsa_ultralong.data.gguf_tokenizer import gguf_tokenizer
        from hsa_ultralong.files.gguf import read_gguf
        from hsa_ultralong.models.gguf import load_gguf

        place, own = choose_device(device), gguf_tokenizer(read_gguf(folder).fields)
        return load_gguf(folder).to(place, choose_dtype(dtype, place)).eval(), own, False
    is_named = folder is not None and (folder / "config.json").is_file()
    kind = read_json(folder / "config.json").get("model_type") if folder and is_named else "hsa_ultralong"
    if changes and kind != "hsa_rival":
        raise ValueError(f"--set is of rivals (hsa_ultralong/baselines/README.md), {folder or 'nano'} is none")
    if kind == "hsa_ultralong":
        return (*load_model(folder, device, dtype), True)
    assert folder is not None
    options = {"config": _changed(folder, changes)} if changes else {}
    from transformers import AutoTokenizer

    from hsa_ultralong.models.folder import load_pretrained

    place = choose_device(device)
    quiet_transformers()
    model = load_pretrained(folder, dtype=choose_dtype(dtype, place), **options)
    collect_as_usual()
    return model.to(place).eval(), AutoTokenizer.from_pretrained(folder), False


def _changed(folder: Path, changes: Sequence[str]) -> Any:
    """A rival's configuration with KEY=VALUE options that evaluation may set."""
    from ast import literal_eval

    from hsa_ultralong.baselines import RivalConfig
    from hsa_ultralong.baselines.configuration import AT_TEST_TIME

    found: dict[str, Any] = {}
    for change in changes:
        key, sign, text = change.partition("=")
        if not sign or key not in AT_TEST_TIME:
            raise ValueError(f"--set must be KEY=VALUE with one of {', '.join(AT_TEST_TIME)}, got {change!r}")
        try:
            found[key] = literal_eval(text)
        except (ValueError, SyntaxError):
            found[key] = text
        kind = dict if key == "rope_scaling" else type(getattr(RivalConfig, key))
        if type(found[key]) is not kind and not (kind is float and type(found[key]) is int):
            raise ValueError(f"--set {key} must be of type {kind.__name__}, got {text!r}")
    return RivalConfig.from_dict({**RivalConfig.from_pretrained(folder).to_diff_dict(), **found})


def _reader(
    model: Any, material: Any, setting: str, batch: int | None, is_ours: bool, reread: int, passage_tokens: int | None
) -> Any:
    from hsa_ultralong.eval.memory_reader import MemoryReader
    from hsa_ultralong.eval.passage_reader import PassageReader
    from hsa_ultralong.eval.readers import ContinuingReader, PromptReader, RebuildingReader

    if setting == "auto":
        setting = "memory" if is_ours else "prompt"
    if reread and setting == "prompt":
        raise ValueError("--reread needs a model with a memory; leave it out, or use --setting bm25 --passage-tokens N")
    if setting not in _MEMORIES and batch is not None and batch > 1:
        raise ValueError(f"--batch is of the setting memory; {setting} answers samples one by one: leave it out")
    if setting == "prompt":
        return PromptReader(model, material)
    if setting in _CONTROLS:
        return PassageReader(model, material, setting, passage_tokens=passage_tokens)
    if not is_ours:
        raise ValueError(f"--setting {setting} needs a model with a memory; leave it out, or say prompt")
    if setting == "continue":
        return ContinuingReader(model, material)
    if setting == "rebuild" and not model.config.is_composable:
        if reread or (batch is not None and batch > 1):
            raise ValueError("this model's chunks cannot be laid together: leave --reread and --batch out")
        return RebuildingReader(model, material)
    # a CPU shares a chunk out over all tokens that read it; contexts that are read anew all lie in memory
    many = 32 if setting == "memory" and model.device.type == "cpu" else 16
    return MemoryReader(model, material, batch=batch or many, edits=setting == "memory", reread=reread)


def _measure(
    place: Path, label: str, model: Any, material: Any, reader: Any, names: list[str], lengths: list[int], samples: int,
    seed: int, scoring: str, changes: Sequence[str], kept: Any,
) -> None:  # fmt: skip
    """kept: held-out text for ppl where that of the haystack may have been trained on."""
    from rich.progress import BarColumn, MofNCompleteColumn, TimeElapsedColumn, TimeRemainingColumn

    from hsa_ultralong.distributed.mesh import everywhere, on_first, patient_group
    from hsa_ultralong.eval.likelihood_suite import LIKELIHOOD_TASKS, check_lengths, run_likelihood
    from hsa_ultralong.eval.suite import FollowedRun, SampleRanks, SuiteRun, run_settings, run_suite, write_summary
    from hsa_ultralong.eval.tasks import reads_text

    text = material.text if kept is None else kept
    check_lengths(names, lengths, len(text))
    group = patient_group()
    ranks = SampleRanks(group.rank(), group.size(), lambda work: everywhere(work, group)) if group else SampleRanks()
    is_first = ranks.rank == 0
    settings = run_settings(model, material, reader, samples=samples, seed=seed, scoring=scoring)
    asked = [name for name in names if name not in LIKELIHOOD_TASKS]
    if changes:
        settings["set"] = sorted(changes)
    if kept is not None:
        settings["haystack_split"] = {"haystack": "train and validation", "ppl": "validation"}
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    bar = progress("{task.description}", *columns, disable=not is_first)
    total = len(names) * len(lengths) * samples
    own: list[SuiteRun] = []

    def known() -> list[dict[str, Any]]:
        own.append(SuiteRun(place, settings))
        return own[0].records

    records = on_first(known, group)
    with own[0] if is_first else FollowedRun(records) as run, ends_by_term(), bar:
        if run.records and is_first:
            echo(f"{place} holds {len(run.records):,} samples; going on", err=True)
        longer = [length for length in lengths if length > len(material.text)]
        for length in longer if is_first and any(map(reads_text, asked)) else ():
            echo(f"{length:,} tokens from a text of {len(material.text):,}, its lines again in new orders", err=True)
        task = bar.add_task(label, total=total)

        def show(name: str, length: int, done: int, wanted: int) -> None:
            before = (lengths.index(length) if length else 0) * len(names) + names.index(name)
            bar.update(task, description=f"{label} {name} {length:,}", completed=before * samples + done)
            if is_first and not bar.console.is_terminal and done == wanted:
                bar.console.print(f"{name} at {length:,}: {done} samples")

        try:
            if asked:
                run_suite(
                    reader, material, run, tasks=asked, lengths=lengths, samples=samples, seed=seed, model=label,
                    scoring=scoring, progress=show, ranks=ranks,
                )  # fmt: skip
            run_likelihood(
                model, material.tokenizer, text, run, tasks=names, lengths=lengths, samples=samples, label=label,
                folder=material.files.get("short"), progress=show, ranks=ranks,
            )  # fmt: skip
        except BaseException:
            if run.records and is_first:
                echo(f"cut off; the {len(run.records):,} samples so far are in {place}", err=True)
            raise
        finally:
            if run.records and is_first:
                write_summary(run, seed=seed, label=label)
        if not run.records:
            raise ValueError(f"nothing can be measured: {next(iter(run.skipped.values()))}")
    if not is_first:
        return
    echo((place / "summary.md").read_text(encoding="utf-8"))
    echo(f"Written: {place}/summary.json, summary.md, summary.tex, report.html, figures (png, svg), records.jsonl(.xz)")
