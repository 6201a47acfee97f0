"""`hsa write`: the source of a converted model writes data for its training, in the forms that `hsa train` reads."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from hsa_ultralong.cli.numbers import MAX_COUNT, MAX_SEED, finite
from hsa_ultralong.cli.terminal import echo, echo_json, progress

# items that go through all rounds together
_PORTION = 1024
_BATCH_TOKENS = {"cuda": 262_144, "cpu": 4096}


class Kind(str, Enum):
    chat = "chat"
    sentences = "sentences"
    questions = "questions"


_SUFFIX = {Kind.chat: ".jsonl", Kind.sentences: ".jsonl", Kind.questions: ".json"}


def register(app: typer.Typer) -> None:
    app.command("write")(write)


def write(
    kind: Annotated[Kind, typer.Argument(help="chat, sentences or questions.")],
    source: Annotated[Path, typer.Argument(help="Folder or GGUF file of a chat model: the source of a conversion.")],
    files: Annotated[list[Path], typer.Argument(help="Conversations; files of questions; these or texts.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File: .jsonl, of questions .json.")],
    limit: Annotated[
        int | None, typer.Option(min=1, max=MAX_COUNT, help="At most so many items, drawn by --seed.")
    ] = None,
    turns: Annotated[int | None, typer.Option(min=1, max=64, help="Of a conversation.", show_default="3")] = None,
    tokens: Annotated[
        int | None, typer.Option(min=64, max=MAX_COUNT, help="Of a conversation at most.", show_default="1024")
    ] = None,
    answer_tokens: Annotated[
        int | None, typer.Option(min=8, max=MAX_COUNT, help="Of an answer in one at most.", show_default="192")
    ] = None,
    per_passage: Annotated[
        int | None, typer.Option(min=1, max=8, help="Questions tried about each passage.", show_default="3")
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0, max=2, callback=finite, help="Of the answers; 0: the likeliest words.")
    ] = 0.0,
    max_minutes: Annotated[
        float | None, typer.Option(min=0, max=1e9, callback=finite, help="Begin no further 1,024 items after so many.")
    ] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(min=64, max=MAX_COUNT, help="Of a batch.", show_default="262144; of a CPU 4096")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of what is drawn and sampled.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(help="bf16, fp32 or auto.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Let the source of a converted model write its training data: its own answers and questions.

    chat: its answers to the users of conversations, turn by turn, for `hsa train --chat`. sentences: an answer in one
    sentence to questions over passages, for --sentences. questions: questions about passages with short answers, for
    --questions. What does not pass is dropped and counted; passages that evaluation asks about are left out, and those
    of the validation split.

    Interrupt it at any time: the same command goes on where it stood.

    Examples:

      hsa write chat smol.gguf persona.csv dolly.jsonl -o own-chat.jsonl --device cuda

      hsa write questions smol.gguf squadshifts.json corpus.txt -o own-questions.json --limit 3000

      hsa write sentences smol.gguf squadshifts.json own-questions.json -o sentences.jsonl
    """
    from hsa_ultralong.cli.common import choose_device
    from hsa_ultralong.cli.places import require_file
    from hsa_ultralong.data.self_written import Bounds
    from hsa_ultralong.files.lock import FileLock

    given = {"turns": turns, "tokens": tokens, "answer_tokens": answer_tokens, "per_passage": per_passage}
    _check(kind, given)
    require_file(output, "--output", (_SUFFIX[kind],))
    if output.exists():
        raise ValueError(f"--output {output} exists already; remove it or choose another name")
    bounds = Bounds(turns or 3, tokens or 1024, answer_tokens or 192, per_passage or 3, seed)
    items = _drawn(_items(kind, files), limit, seed)
    place = choose_device(device)
    output.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock.acquire(_beside(output, ".lock"), f"{output} is being written")
    try:
        options = {**bounds.__dict__, "limit": limit, "temperature": temperature}
        with (
            _Bar(as_json) as bar,
            _writer(kind, source, files, output, options, place, dtype, batch_tokens or _BATCH_TOKENS[place], bar) as (
                scribe,
                header,
            ),
        ):
            result = _write(kind, scribe, items, bounds, max_minutes, bar)
        meta = _finish(kind, output, result, header, scribe, seed)
    finally:
        lock.release()
    if as_json:
        return echo_json(meta)
    reasons = "".join(f"\n  {why}: {count:,}" for why, count in meta["dropped"].items())
    echo(f"kept {meta['kept']:,} of {meta['asked']:,} in {meta['seconds']:.0f} s; dropped:{reasons or ' none'}")
    echo(f"written: {output}, and {_beside(output, '.meta.json')} about it")


def _check(kind: Kind, given: dict[str, int | None]) -> None:
    own = {Kind.chat: ("turns", "tokens", "answer_tokens"), Kind.questions: ("per_passage",)}.get(kind, ())
    for name, value in given.items():
        if value is not None and name not in own:
            goes = "questions" if name == "per_passage" else "chat"
            raise ValueError(f"--{name.replace('_', '-')} goes with hsa write {goes}")


def _beside(output: Path, suffix: str) -> Path:
    return output.with_name(output.name + suffix)


def _items(kind: Kind, files: Sequence[Path]) -> list[Any]:
    """Conversations, or passages with a question or without one, of the training split."""
    from hsa_ultralong.data.conversations import open_conversations
    from hsa_ultralong.data.written_items import passages_of, questions_of

    if kind is Kind.chat:
        return open_conversations(tuple(map(str, files)), "train")
    return (questions_of if kind is Kind.sentences else passages_of)(files)


def _drawn(items: list[Any], limit: int | None, seed: int) -> list[Any]:
    from hsa_ultralong.data.seeds import namespaced_rng

    order = namespaced_rng("write", seed).permutation(len(items)).tolist()
    return [items[i] for i in order[:limit]]


@contextmanager
def _writer(
    kind: Kind, source: Path, files: Sequence[Path], output: Path, options: dict[str, Any], place: str, dtype: str,
    batch_tokens: int, bar: _Bar,
) -> Iterator[tuple[Any, dict[str, Any]]]:  # fmt: skip
    """The source, ready to answer, and what is kept of the command."""
    import tempfile

    from hsa_ultralong.cli.common import choose_dtype, collect_as_usual, quiet_transformers
    from hsa_ultralong.cli.convert_source import complete_tokenizer, open_source
    from hsa_ultralong.data import load_tokenizer
    from hsa_ultralong.data.chat_form import ChatForm
    from hsa_ultralong.files.checksum import file_record
    from hsa_ultralong.inference.prompts import has_chat_template, prompt_ids
    from hsa_ultralong.models.convert import SOURCES
    from hsa_ultralong.train.writing import Partial, SourceWriter

    quiet_transformers()
    found = open_source(source)
    if found.config.model_type not in SOURCES:
        raise ValueError(f"{source} is of type {found.config.model_type}; hsa write takes {', '.join(SOURCES)}")
    with tempfile.TemporaryDirectory() as folder:
        found.save_tokenizer(Path(folder))
        complete_tokenizer(Path(folder))
        tokenizer = load_tokenizer(Path(folder))
    if not has_chat_template(tokenizer):
        raise ValueError(f"{source} has no chat template: only a chat model writes answers")
    header = {
        "kind": kind.value, "source": {file.name: file_record(file) for file in found.files},
        "files": {file.name: file_record(file) for file in files}, "options": options,
    }  # fmt: skip
    partial = Partial(_beside(output, ".partial"), header)
    model = found.load().to(choose_dtype(dtype, place)).to(place).eval()
    collect_as_usual()
    ends = {tokenizer.eos_token_id, *ChatForm.of(tokenizer).after[:1]}
    own = model.generation_config.eos_token_id
    ends |= set(own if isinstance(own, list) else [] if own is None else [own])
    yield SourceWriter(
        model, tokenizer, prompt_ids, sorted(ends), partial, batch_tokens=batch_tokens,
        temperature=options["temperature"], seed=options["seed"], on_answers=bar.show,
    ), header  # fmt: skip


def _write(
    kind: Kind, scribe: Any, items: list[Any], bounds: Any, max_minutes: float | None, bar: _Bar
) -> dict[str, Any]:
    """Portion for portion, so that a bound of time leaves whole ones."""
    from hsa_ultralong.data import self_written

    begun, kept, dropped, asked = time.monotonic(), list[Any](), Counter[str](), 0
    for start in range(0, len(items), _PORTION):
        if start and max_minutes is not None and time.monotonic() - begun > 60 * max_minutes:
            break
        part = items[start : start + _PORTION]
        scribe.portion = start // _PORTION
        bar.begin(start, len(items))
        if kind is Kind.chat:
            made, why = self_written.write_conversations(scribe, part, bounds)
        elif kind is Kind.sentences:
            made, why = self_written.write_sentences(scribe, part)
        else:
            made, why = self_written.write_questions(scribe, part, bounds)
        kept += made
        dropped += why
        asked += len(part) * (bounds.per_passage if kind is Kind.questions else 1)
    bar.begin(len(items), len(items))
    return {"kept": kept, "asked": asked, "dropped": dropped, "seconds": time.monotonic() - begun, "items": len(items)}


def _finish(
    kind: Kind, output: Path, result: dict[str, Any], header: dict[str, Any], scribe: Any, seed: int
) -> dict[str, Any]:
    """Write what was kept and the notes about it, each whole, and forget the answers on the way."""
    import json

    from hsa_ultralong.data.self_written import as_squad
    from hsa_ultralong.eval.metadata import command_line, run_metadata, write_json
    from hsa_ultralong.files.durable import write_whole

    kept, dropped = result["kept"], result["dropped"].most_common()
    if not kept:
        why = ", ".join(f"{name}: {count}" for name, count in dropped)
        raise ValueError(f"nothing of {result['asked']} passed ({why}); what was said is in {scribe.path}")
    if kind is Kind.questions:
        text = json.dumps(as_squad(kept, "self-written"), ensure_ascii=False, indent=1)
    else:
        text = "\n".join(json.dumps(one, ensure_ascii=False) for one in kept)
    meta = {
        **header, "items": result["items"], "asked": result["asked"], "kept": len(kept), "dropped": dict(dropped),
        "seconds": result["seconds"], "prompts": scribe.num_prompts, "tokens_read": scribe.num_read,
        "tokens_written": scribe.num_written, "metadata": run_metadata(command_line(), seed),
    }  # fmt: skip
    if kind is Kind.sentences:
        meta["with_answer"] = sum(one["with_answer"] for one in kept)
    write_whole(output, text + "\n")
    write_json(_beside(output, ".meta.json"), meta)
    scribe.path.unlink()
    return meta


class _Bar:
    """Items done with the time left, and the round of now."""

    def __init__(self, is_quiet: bool) -> None:
        self._is_quiet = is_quiet

    def __enter__(self) -> _Bar:
        from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn

        self._progress = progress(
            "writing", BarColumn(), MofNCompleteColumn(), "{task.fields[note]}", TimeRemainingColumn(),
            disable=self._is_quiet,
        )  # fmt: skip
        self._progress.start()
        self._task = self._progress.add_task("", total=None, note="loading")
        self._shown = ""
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def begin(self, done: int, total: int) -> None:
        self._progress.update(self._task, completed=done, total=total, note="")

    def show(self, name: str, done: int, total: int) -> None:
        self._progress.update(self._task, note=f"{name}: {done:,}/{total:,}")
