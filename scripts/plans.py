"""GPU work as one file: named plans of commands, shared out over cards, for scripts/queues.py.

    python scripts/plans.py list
    python scripts/plans.py nano --cards 4 --data SHARDS --file squad=xquad.en.json --text books > PLAN.json
    python scripts/queues.py start PLAN.json -o runs/q

What needs a file that was not named is left out, and said. Minutes are what a job took or should take on one H100; it
ends after half as many again and three. Begun again with another -o of queues.py, training and evaluation go on
where they stopped. tests/test_plans.py.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from findings import folder_of

from hsa_ultralong.recipes.findings import FINDINGS

CPU = "cpu"
# twin -> seeds
TWINS = {"hsa": 3, "full_rope": 3, "nsa": 3, "window": 1, "window_sinks": 1, "moba": 1, "linear_hybrid": 1}
_BY_KERNELS = ("nsa", "moba")
# finding -> minutes of a run and its measurements, alone on a card
_FINDINGS = {
    "effective_length": 6, "warmup": 5, "window": 5, "positions": 5, "fusion": 9, "fusion_taught": 9, "parity": 5,
    "heads": 5,
}  # fmt: skip
# each job beside another adds such a part of its time, an estimate: 22 runs of findings, seven beside each other, took
# 44 minutes of an H200, 37 planned, few by graphs
_PER_JOB_BESIDE = 0.1
_FACTS = (
    "niah_single_1,niah_single_2,niah_single_3,niah_multikey_1,niah_multikey_2,niah_multikey_3,niah_multivalue,"
    "niah_multiquery,vt"
)


class Job(NamedTuple):
    """A command: where {hsa} and {python} stand, how many minutes it takes, what must have ended well before.

    needs: names of files without which it is left out. is_on_card: False for what takes no card.
    """

    name: str
    minutes: float
    command: str
    after: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    is_on_card: bool = True


class Options(NamedTuple):
    """data: token shards. more_data: those of mini. files: NAME -> paths. out: where all goes. seed: of findings."""

    data: str
    more_data: str
    files: dict[str, list[str]]
    out: str
    seed: int
    cards: int
    is_large: bool


def _files(options: Options, *names: str) -> str:
    """--data NAME=PATH of those that are there."""
    return " ".join(f"--data {name}={shlex.quote(options.files[name][0])}" for name in names if name in options.files)


def _words(options: Options, option: str, name: str) -> str:
    """`option` before every path of a name."""
    return " ".join(f"{option} {shlex.quote(path)}" for path in options.files.get(name, ()))


def _recall(options: Options, name: str, model: str, after: str) -> Iterator[Job]:
    """What a model that recalls is measured by, at every length."""
    out, on = options.out, f"--shards {shlex.quote(options.data)} --device cuda"
    suite = f"{{hsa}} eval {model} {on}"
    needles = f"{{hsa}} eval needles --model {model} {on}"

    def job(what: str, minutes: float, command: str, *needs: str) -> Job:
        return Job(f"{what}-{name}", minutes, f"{command} -o {out}/{what}-{name}", (after,), needs)

    lengths = "4K,16K,64K,256K,1M"
    yield job("recall", 8, f"{suite} --suite recall --lengths {lengths} --samples 100 --scoring both")
    yield job("recall-16m", 6, f"{suite} --suite recall --lengths 16M --samples 100")
    yield job("paper", 4, f"{suite} --suite paper --lengths 4K,16K,64K,256K --samples 100")
    yield job("paper-16m", 7, f"{suite} --suite paper --lengths 1M,16M --samples 400")
    files = _files(options, "squad", "hotpot")
    yield job("ruler", 12, f"{suite} --suite ruler --lengths {lengths} --samples 100 {files}", "squad", "hotpot")
    yield job("ruler-16m", 6, f"{suite} --tasks {_FACTS} --lengths 16M --samples 100")
    asked = f"{suite} --tasks cwe,fwe,qa_1,qa_2 --lengths 16M --samples 10 {files}"
    yield job("ruler-words-16m", 6, asked, "squad", "hotpot")
    yield job("needles", 4, f"{needles} --lengths 4K,32K,256K --needles 100")
    yield job("needles-16m", 6, f"{needles} --lengths 1M,16M --needles 400")
    yield job("needles-128m", 4, f"{needles} --lengths 64M,128M --needles 100")
    yield job("needles-256m", 3, f"{needles} --lengths 256M --needles 100 --forms int8")
    if options.is_large:
        tiers = "--needles 40 --store tiered --forms int8 --piece 128K"
        yield job("needles-1g", 5, f"{needles} --lengths 1G {tiers}")
    yield job("together", 1, f"{needles} --lengths 64K --needles 100 --together")
    yield job("prompts", 1, f"{suite} --suite prompt --setting continue --lengths 48,64,96,128")


def nano(options: Options) -> Iterator[Job]:
    """Train nano_facts and measure it: recall, the authors' tests, RULER, needles to 256M, perplexity, questions."""
    model, out = f"{options.out}/models/nano", options.out
    on = f"--shards {shlex.quote(options.data)} --device cuda"
    train = f"{{hsa}} train nano_facts --data {shlex.quote(options.data)} -o {out}/run-nano --device cuda"
    yield Job("train-nano", 15, f"{train} --export {model}")
    yield from _recall(options, "nano", model, "train-nano")
    text = _words(options, "--text", "text")
    read = f"{{hsa}} eval {model} --device cuda"
    yield Job("ppl-nano", 6, f"{read} --suite ppl {text} --lengths 8K..1M --samples 20 -o {out}/ppl-nano",
              ("train-nano",), ("text",))  # fmt: skip
    edits = f"{{hsa}} eval {model} {on} --tasks recall_value_cities,niah_multikey_2 --lengths 1M --samples 10"
    yield Job("edited-nano", 1, f"{edits} -o {out}/edited-nano", ("train-nano",))
    yield Job("rebuilt-nano", 1, f"{edits} --setting rebuild -o {out}/rebuilt-nano", ("train-nano",))
    yield Job("compare-nano", 1, f"{{hsa}} compare {out}/edited-nano {out}/rebuilt-nano -o {out}/edit-rebuild-nano",
              ("edited-nano", "rebuilt-nano"), is_on_card=False)  # fmt: skip
    questions = _files(options, *_QUESTIONS)
    for setting in ("memory", "closed", "gold", "bm25", "dense"):
        lengths = "128K,1M" if setting == "memory" else "128K"
        asked = f"{read} --suite qa {questions} --shards {shlex.quote(options.data)} --lengths {lengths}"
        yield Job(f"qa-{setting}-nano", 4, f"{asked} --setting {setting} -o {out}/qa-{setting}-nano", ("train-nano",),
                  _QUESTIONS)  # fmt: skip
    stories = f"{read} --suite babilong {_files(options, 'babi')} {text} --lengths 4K,64K,1M"
    yield Job("babilong-nano", 4, f"{stories} -o {out}/babilong-nano", ("train-nano",), ("babi", "text"))


_QUESTIONS = ("xquad", "nq", "squadshifts", "hotpot", "2wiki", "wiki")


def mini(options: Options) -> Iterator[Job]:
    """Train mini, 30M parameters and more, on --more-data, and measure it as nano."""
    model, out = f"{options.out}/models/mini", options.out
    train = f"{{hsa}} train mini --data {shlex.quote(options.more_data)} -o {out}/run-mini --device cuda"
    yield Job("train-mini", 16, f"{train} --export {model}")
    yield from _recall(options, "mini", model, "train-mini")


def smol(options: Options) -> Iterator[Job]:
    """Give SmolLM2 a memory: convert, train convert_smol, compact, apply; the full-attention twin tuned on the same."""
    out, source = options.out, _source(options)
    tuned = f"{out}/models/smol-full-tuned"
    yield from _trained(options, "smol", "convert_smol", 26)
    asked = _words(options, "--questions", "questions")
    yield Job("tune-smol", 10, f"{{hsa}} tune {source} {asked} -o {tuned} --device cuda", (), ("gguf", "questions"))
    on = (
        f"--device cuda --tasks qa_xquad --samples 1190 {_files(options, 'xquad')} --shards {shlex.quote(options.data)}"
    )
    for setting in ("gold", "closed", "bm25"):
        asked = f"{{hsa}} eval {tuned} {on} --lengths 64K --setting {setting} -o {out}/qa-{setting}-tuned"
        yield Job(f"qa-{setting}-tuned", 4, asked, ("tune-smol",), ("xquad",))
    short = f"--suite ppl,short {_files(options, 'short')} {_words(options, '--text', 'text')} --lengths 2K..8K"
    yield Job("language-source", 8, f"{{hsa}} eval {source} --device cuda {short} -o {out}/language-source", (),
              ("short", "text", "gguf"))  # fmt: skip
    yield from _converted(options, "smol")


def questions(options: Options) -> Iterator[Job]:
    """SmolLM2 with the shipped memory (or --file difference=PATH) learns to answer from passages; then its card."""
    yield from _trained(options, "questions", "convert_questions", 22)
    yield from _converted(options, "questions")


def answers(options: Options) -> Iterator[Job]:
    """SmolLM2 with the shipped memory (or --file difference=PATH) goes on with convert_answers; then its card."""
    yield from _trained(options, "answers", "convert_answers", 8)
    yield from _converted(options, "answers")


def _source(options: Options) -> str:
    return shlex.quote(options.files.get("gguf", ["smol.gguf"])[0])


def _trained(options: Options, name: str, recipe: str, minutes: float) -> Iterator[Job]:
    """A difference trained by a recipe, small, and the model that it makes, `models/NAME-sft`."""
    out, source = options.out, _source(options)
    start, made = f"{out}/models/{name}", f"{out}/models/{name}-sft"
    shape = "--window 512 --lower-layers 16 --groups 7 --set num_memory_heads=3 --set chunk_topk=64"
    convert = f"{{hsa}} convert {source} -o {start} {shape} --set embedding_skip=4"
    yield Job(f"convert-{name}", 3, convert, (), ("gguf",), is_on_card=False)
    asked, chats = _words(options, "--questions", "questions"), _words(options, "--chat", "chat")
    train = f"{{hsa}} train {recipe} --data {shlex.quote(options.data)} {asked} {chats} --init-from {start}"
    needs: tuple[str, ...] = ("gguf", "questions", "chat")
    if recipe != "convert_smol":
        begun = options.files.get("difference", ["checkpoints/smol/difference.safetensors"])[0]
        train += f" --from-difference {shlex.quote(begun)}"
    if recipe == "convert_answers":
        train += f" {_words(options, '--sentences', 'sentences')}"
        needs = (*needs, "sentences")
    train += f" --teacher {source} --device cuda -o {out}/{name} --export-difference {out}/{name}.safetensors"
    yield Job(f"train-{name}", minutes, train, (f"convert-{name}",), needs)
    small = f"{{hsa}} compact {out}/{name}.safetensors -o {out}/{name}-7.safetensors --bits 7"
    yield Job(f"compact-{name}", 2, small, (f"train-{name}",), is_on_card=False)
    yield Job(f"apply-{name}", 2, f"{{hsa}} convert {source} --apply {out}/{name}-7.safetensors -o {made}",
              (f"compact-{name}",), is_on_card=False)  # fmt: skip


def _converted(options: Options, name: str) -> Iterator[Job]:
    """What the card of such a model is made of: questions, recall, needles, language, speed."""
    out, model, after = options.out, f"{options.out}/models/{name}-sft", (f"apply-{name}",)
    suite, on = f"{{hsa}} eval {model} --device cuda", f"--shards {shlex.quote(options.data)}"
    asked = f"{suite} --tasks qa_xquad --samples 1190 {_files(options, 'xquad')} {on}"
    for what, minutes, extra in (
        ("qa-64k", 3, "--lengths 64K"), ("qa-1m", 4, "--lengths 1M"), ("qa-16m", 8, "--lengths 16M"),
        ("qa-chat", 3, "--lengths 64K --chat"), ("qa-closed", 3, "--lengths 64K --setting closed"),
        ("qa-reread", 4, "--lengths 64K --reread 3"),
    ):  # fmt: skip
        yield Job(f"{what}-{name}", minutes, f"{asked} {extra} -o {out}/{what}-{name}", after, ("xquad",))
    chat = f"{suite} {on} --chat"
    for length in ("64K", "1M"):
        recall = f"{chat} --suite recall --samples 50 --lengths {length} -o {out}/recall-{length.lower()}-{name}"
        yield Job(f"recall-{length.lower()}-{name}", 7, recall, after)
    needles = f"{chat} --tasks niah_single_1,niah_single_2,niah_single_3 --lengths 64K,1M,16M --samples 100"
    yield Job(f"niah-{name}", 7, f"{needles} -o {out}/niah-{name}", after)
    short = f"{suite} --tasks lambada_openai,piqa,arc_easy,hellaswag {_files(options, 'short')} --samples 1500"
    yield Job(f"short-{name}", 6, f"{short} -o {out}/short-{name}", after, ("short",))
    books = f"{suite} --suite ppl {_words(options, '--text', 'text')} --lengths 2K..1M --samples 10"
    yield Job(f"ppl-{name}", 6, f"{books} -o {out}/ppl-{name}", after, ("text",))
    bench = f"{{hsa}} bench memory --model {model} --lengths 8K,16M --piece 128K --file-max 0 --tune --device cuda"
    yield Job(f"bench-{name}", 4, f"{bench} -o {out}/bench-{name}", after)


def twins(options: Options) -> Iterator[Job]:
    """Nano and rivals of its size, trained on the same rows, and what each recalls, reads and costs."""
    out, data, models = options.out, shlex.quote(options.data), []
    files, evals = _files(options, "squad", "hotpot"), []
    for twin, seeds in TWINS.items():
        for seed in range(seeds):
            name, model = f"{twin}-{seed}", f"{out}/models/{twin}-{seed}"
            kernels = ' --set \'twin_options={{"sparse_impl":"triton"}}\'' if twin in _BY_KERNELS else ""
            train = f"{{hsa}} train twins --set twin={twin} --set seed={seed}{kernels} --data {data} --device cuda"
            yield Job(f"run-{name}", 5, f"{train} -o {out}/run-{name} --export {model}")
            suites = f"{{hsa}} eval {model} --suite recall,ruler,ppl --setting prompt --lengths 2K..64K {files}"
            asked = f"{suites} --shards {data} --samples 50 --device cuda -o {out}/eval-{name}"
            yield Job(f"eval-{name}", 4, asked, (f"run-{name}",), ("squad", "hotpot"))
            models.append(model)
            evals.append(f"eval-{name}")
    first = [model for model in models if model.endswith("-0")]
    reading = f"{{hsa}} bench reading {' '.join(first)} --device cuda -o {out}/reading"
    yield Job("reading", 6, reading, tuple(f"run-{twin}-0" for twin in TWINS))
    report = f"{{python}} scripts/twins_report.py {out} -o {out}/report"
    yield Job("report", 1, report, (*evals, "reading"), is_on_card=False)


def findings(options: Options) -> Iterator[Job]:
    """All findings of the paper for one seed (--seed), a job a run; runs beside each other share a card well."""
    script = "{python} scripts/findings.py"
    more = f"--data {shlex.quote(options.data)} --seed {options.seed} --device cuda --max-minutes 28"
    more += f" {_words(options, '--books', 'text')}".rstrip()
    short = f" --short {shlex.quote(options.files['short'][0])}" if "short" in options.files else ""
    runs = f"--runs {options.out}/runs"
    jobs: dict[str, list[tuple[str, str]]] = {}
    for name, finding in FINDINGS.items():
        for variant in finding.variants:
            jobs.setdefault(folder_of(Path(), name, variant, options.seed).name, []).append((name, variant))
    for job, own in jobs.items():
        commands = [
            f"{script} run {name} --only {variant} {more} {runs}" + short * ("short" in FINDINGS[name].measures)
            for name, variant in own
        ]
        yield Job(job, _FINDINGS[own[0][0]] + len(own) - 1, " && ".join(commands))
    for name in FINDINGS:
        after = tuple(job for job, own in jobs.items() if name in dict(own))
        yield Job(f"collect-{name}", 1, f"{script} collect {name} {runs}", after, is_on_card=False)


def kernels(options: Options) -> Iterator[Job]:
    """Tests on a GPU, then the speed of operators, memory, training and serving; one card alone times best."""
    out = options.out
    yield Job(
        "tests",
        6,
        "{python} -m pytest -q -m gpu tests/ops tests/bench tests/inference tests/memory tests/models tests/train",
    )
    yield Job("ops", 12, f"{{hsa}} bench ops --max --ops decode,chunk_topk,window,hsa,full_attention -o {out}")
    ours = "hsa:triton,chunk_topk:triton,full_attention:cudnn,full_attention:flash"
    rivals = f"{ours},nsa:fla,moba:fla,selected:fla,selected:flex,window:triton,window:flex"
    few = "--lengths 4K,8K,16K,32K,64K --topk 32 --max-minutes 5.5"
    yield Job("rivals", 6, f"{{hsa}} bench ops --ops {rivals} {few} -o {out}/rivals")
    yield Job("first", 2, f"{{hsa}} bench first -o {out}/first")
    wide = f"{{hsa}} bench memory --preset small_345m --lengths 8K,1M,16M --batches 1,8 --tune -o {out}/small"
    yield Job("memory-small", 4, f"{wide} --piece 128K --file-max 0 --steps 200")
    narrow = f"{{hsa}} bench memory --lengths 8K,1M,16M,128M --batches 1,8 -o {out}/nano"
    yield Job("memory-nano", 3, f"{narrow} --piece 128K --file-max 0 --steps 200")
    yield Job("training", 8, f"{{hsa}} bench training --contexts 8K,32K,128K -o {out}/training")
    serve = f"{{hsa}} bench serve --preset small_345m --requests 0 --kills 0 --lengths 8K,1M -o {out}/serve"
    yield Job("serve", 8, serve)
    yield Job("serve-load", 6, f"{{hsa}} bench serve --requests 200 --kills 5 --device cuda -o {out}/serve-load")


def cards(options: Options) -> Iterator[Job]:
    """Speed of training, reading and experts over all cards together; every job takes all of them."""
    start = f"torchrun --standalone --nproc-per-node={options.cards} -m hsa_ultralong"
    out = options.out
    yield Job("shard", 4, f"{start} bench training --contexts 8K --micro-tokens 64K --spread shard -o {out}/shard")
    yield Job("context", 4, f"{start} bench training --contexts 128K --steps 2 --spread context -o {out}/context")
    memory = f"{start} bench memory --preset small_345m --lengths 8K,128M --batches 1,8 --piece 128K --steps 200"
    yield Job("memory", 5, f"{memory} --file-max 0 -o {out}/memory")
    train = f"{start} train moe_8b_a1b --data {shlex.quote(options.data)} --device cuda -o {out}/moe"
    spread = f"--set parallel.replicate=1 --set parallel.shard={options.cards} --set parallel.expert={options.cards}"
    size = "--set model.vocab_size=157184 --set warmup.micro_batch_rows=1 --set warmup.tokens=65536000"
    size += f" --set warmup.batch_tokens={16_384 * options.cards} --set warmup.warmup_steps=10"
    stop = "--until warmup --max-minutes 2.5 --set keep_checkpoints=0 --set compile=false --set log_every=1"
    yield Job("experts", 5, f"{train} {spread} {size} {stop}")


PLANS: dict[str, Callable[[Options], Iterable[Job]]] = {
    plan.__name__: plan for plan in (nano, mini, smol, questions, answers, twins, findings, kernels, cards)
}


def available(jobs: Iterable[Job], options: Options) -> tuple[list[Job], dict[str, str]]:
    """Jobs whose files are there, and of the others why they are left out."""
    kept: list[Job] = []
    left: dict[str, str] = {}
    for job in jobs:
        missing = [name for name in job.needs if name not in options.files]
        waits = [name for name in job.after if name in left]
        if missing or (waits and len(waits) == len(job.after)):
            left[job.name] = f"no --file {missing[0]}=" if missing else f"{waits[0]} is left out"
        else:
            kept.append(job._replace(after=tuple(name for name in job.after if name not in left)))
    return kept, left


def share_out(jobs: Sequence[Job], num_cards: int, beside: int = 1) -> tuple[dict[str, list[Job]], float]:
    """Queues of cards, `beside` a card, one of none, and the minutes that all take by plan.

    Each job goes where it can begin first. Of several that may begin, the one goes first whose followers take longest.
    """
    followers: dict[str, float] = {}
    for job in reversed(jobs):
        behind = [followers[other.name] for other in jobs if job.name in other.after]
        followers[job.name] = job.minutes + max(behind, default=0.0)
    queues: dict[str, list[Job]] = {
        f"{card}.{slot}" if slot else str(card): [] for slot in range(beside) for card in range(num_cards)
    }
    free, ends = dict.fromkeys([*queues, CPU], 0.0), dict[str, float]()
    queues[CPU] = []
    rest = list(jobs)
    while rest:
        ready = [job for job in rest if all(name in ends for name in job.after)]

        def begin(job: Job, queue: str) -> float:
            return max([free[queue], *(ends[name] for name in job.after)])

        places = [
            (begin(job, queue), -followers[job.name], number, queue)
            for number, job in enumerate(ready)
            for queue in (queues if job.is_on_card else [CPU])
            if (queue != CPU) == job.is_on_card
        ]
        start, _, number, queue = min(places)
        job = ready[number]
        queues[queue].append(job)
        free[queue] = ends[job.name] = start + job.minutes
        rest.remove(job)
    return {name: own for name, own in queues.items() if own}, max(ends.values(), default=0.0)


def as_plan(queues: dict[str, list[Job]], python: str, all_cards: str = "", beside: int = 1) -> dict[str, Any]:
    """In the form of scripts/queues.py; jobs beside others may take longer."""
    stretch = 1 + _PER_JOB_BESIDE * (beside - 1)
    words = {"python": python, "hsa": f"{python} -m hsa_ultralong"}
    return {
        "queues": {
            f"card-{name}" if name != CPU else CPU: {
                "card": "" if name == CPU else all_cards or name.partition(".")[0],
                "jobs": [
                    {"name": job.name, "minutes": math.ceil(1.5 * stretch * job.minutes + 3),
                     "command": " ".join(job.command.format(**words).split()), "after": list(job.after)}
                    for job in own
                ],
            }
            for name, own in queues.items()
        }
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", choices=["list", *PLANS])
    parser.add_argument("--cards", type=int, default=1, help="that jobs are shared out over")
    parser.add_argument("--beside", type=int, default=1, help="jobs at a time on a card; speeds are then worth little")
    parser.add_argument("--data", default="", help="token shards made by `hsa data`, in the tokens of the plan's model")
    parser.add_argument("--more-data", default="", help="those of mini; default: --data")
    parser.add_argument("--file", action="append", default=[], metavar="NAME=PATH",
                        help="squad, hotpot, xquad, nq, squadshifts, 2wiki, wiki, babi, short, gguf; several of "
                        "questions, sentences, chat and text")  # fmt: skip
    parser.add_argument("--text", action="append", default=[], help="books to measure perplexity on: --file text=")
    parser.add_argument("--seed", type=int, default=0, help="of findings")
    parser.add_argument("--large", action="store_true", help="the cards have 140 GiB: 1G tokens too")
    parser.add_argument("--python", default="python", help="interpreter of the commands")
    parser.add_argument("-o", "--output", default="", help="folder of what the jobs write; default runs/PLAN")
    given = parser.parse_args(arguments)
    if given.plan == "list":
        for name, plan in PLANS.items():
            print(f"{name}: {plan.__doc__}")
        return 0
    if given.cards < 1 or given.beside < 1:
        parser.error("--cards and --beside must be at least 1")
    if not given.data and given.plan != "kernels":
        parser.error(f"{given.plan} needs --data SHARDS")
    files: dict[str, list[str]] = {}
    for text in [*given.file, *(f"text={path}" for path in given.text)]:
        name, is_there, path = text.partition("=")
        if not is_there or not path:
            parser.error(f"--file takes NAME=PATH, got {text!r}")
        files.setdefault(name, []).append(path)
    out = given.output or f"runs/{given.plan}" + (f"-{given.seed}" if given.plan == "findings" else "")
    options = Options(given.data, given.more_data or given.data, files, shlex.quote(out), given.seed, given.cards,
                      given.large)  # fmt: skip
    jobs, left = available(PLANS[given.plan](options), options)
    is_together = given.plan == "cards"
    if is_together and given.beside > 1:
        parser.error("every job of cards takes all cards: leave out --beside")
    queues, minutes = share_out(jobs, 1 if is_together else given.cards, given.beside)
    all_cards = ",".join(map(str, range(given.cards))) if is_together else ""
    minutes *= 1 + _PER_JOB_BESIDE * (given.beside - 1)
    print(json.dumps(as_plan(queues, given.python, all_cards, given.beside), indent=1))
    for name, why in left.items():
        print(f"left out: {name}, {why}", file=sys.stderr)
    print(f"{given.plan}: {len(jobs)} jobs on {given.cards} cards, {minutes:.0f} minutes by plan", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
