"""Needles in a memorised text: memorise once per length, write a sentence in by an exact edit, ask for it, take it out.

The edit makes many needles per length cheap (fact 6). Or all at once: in the text, or as notes, documents of their own
behind it. Used by `hsa quickstart` and the needle studies; the form of the records is that of results/ (see
docs/results.md). tests/eval/test_needles.py, test_haystack.py, test_notes.py.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from hsa_ultralong.data import evaluation_needles
from hsa_ultralong.data.needles import Needle
from hsa_ultralong.eval.haystack import count_distinct
from hsa_ultralong.eval.metadata import peak_host_bytes
from hsa_ultralong.inference import ask, edit, memorize
from hsa_ultralong.inference.ask import RetrievedChunk
from hsa_ultralong.memory.chunk_memory import ChunkMemory, Memory
from hsa_ultralong.models import HSACache, HSAForCausalLM

# (length, needles done, needles wanted, tokens read)
NeedleProgress = Callable[[int, int, int, int], None]
# a form of the memory: the text in so many parts, memorised apart and merged
MERGED, NUM_PARTS = "merged", 8
# the project's own sentences, and those of the authors' S-NIAH
WORDINGS = ("own", "authors")
# after every question, with what there is so far of its length and form
Keep = Callable[["LengthResult"], None]


@dataclass(frozen=True)
class NeedleSample:
    """One needle: where it was written, what was asked and answered, and the retrieval weight on the best chunk.

    depth: 0..1 in the text; of a note among the notes. found: the best chunk is of the needle (of a note: its own).
    margin: after the question, by how much the needle's chunk scores above the best other one, in nats, in the upper
    group where that is most; of a chunk that was not retrieved at most this. index: number among those of its length.
    logits_error: relative distance of the logits after the question from those of the first form.
    """

    length: int
    depth: float
    prompt: str
    expected: str
    answered: str
    correct: bool
    weight: float
    found: bool
    form: str = ""
    margin: float | None = None
    index: int = 0
    logits_error: float | None = None


@dataclass(frozen=True)
class LengthResult:
    """All needles of one length, what reading it cost, and the retrieval weights of questions without an answer."""

    length: int
    samples: list[NeedleSample]
    read_seconds: float
    distinct_chunks: int
    memory_bytes: int
    control_weights: list[float] = field(default_factory=list)
    store: str = "device"
    form: str = ""
    task: str = "s_niah"

    @property
    def accuracy(self) -> float:
        return sum(sample.correct for sample in self.samples) / max(1, len(self.samples))

    @property
    def logits_error(self) -> float | None:
        """Mean over the samples for which it is known."""
        errors = [sample.logits_error for sample in self.samples if sample.logits_error is not None]
        return sum(errors) / len(errors) if errors else None


@dataclass(frozen=True)
class NeedleStudy:
    """Results of all lengths."""

    results: list[LengthResult]
    topk: int
    seed: int
    peak_host_bytes: int = 0
    options: dict[str, Any] = field(default_factory=dict)


def is_right(answered: str, expected: str) -> bool:
    """Exact match of the whole answer, white space and a final full stop aside."""
    return answered.strip().rstrip(".").strip() == expected.strip()


def run_needles(
    model: HSAForCausalLM,
    tokenizer: Any,
    haystack: torch.Tensor,
    *,
    lengths: Sequence[int],
    samples: int,
    controls: int = 0,
    seed: int = 0,
    progress: NeedleProgress | None = None,
    keep: Keep | None = None,
) -> NeedleStudy:
    """Needle accuracy at uniform depths for every length.

    Args:
        haystack: (n,) token ids, at least max(lengths), never repeated. samples: needles per length, depths
            (i + 1/2) / samples. controls: questions per length about sentences that were never hidden. seed: of the
            evaluation needles, whose key words no training needle has. keep: called after every question with what
            there is of its length.

    Raises:
        ValueError: if the haystack is shorter than a length or a length too short for its needle.
    """
    report, kept = progress or (lambda *_: None), keep or (lambda _: None)
    results = []
    # the first reading of a process pays for set-up that has nothing to do with the text
    memorize(model, haystack[:256])
    for length in lengths:
        if length > len(haystack):
            raise ValueError(f"the haystack has {len(haystack)} tokens, {length} wanted; add more text")
        results.append(_one_length(model, tokenizer, haystack[:length], samples, controls, seed, report, kept))
    return NeedleStudy(results, model.config.chunk_topk, seed, peak_host_bytes())


def _one_length(
    model: HSAForCausalLM, tokenizer: Any, text: torch.Tensor, samples: int, controls: int, seed: int,
    report: NeedleProgress, keep: Keep,
) -> LengthResult:  # fmt: skip
    length = len(text)
    started = time.monotonic()
    memory = memorize(model, text, progress=lambda done, _: report(length, 0, samples, done))
    if memory.k.is_cuda:
        torch.cuda.synchronize()
    read_seconds = time.monotonic() - started
    needles = evaluation_needles(seed + length, samples + controls)
    result = LengthResult(length, [], read_seconds, count_distinct(text, memory.chunk_size), memory.num_bytes)
    hidden = Hidden(tokenizer, text, needles[:samples])
    for number in range(samples):
        with hidden.written(model, memory, number):
            result.samples.append(hidden.answer(model, memory, number))
        keep(result)
        report(length, number + 1, samples, length)
    for needle in needles[samples:]:
        result.control_weights.append(ask(model, tokenizer, memory, needle.question, max_new_tokens=16).weight)
        keep(result)
    return result


def plant(text: torch.Tensor, statements: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Write statements over tokens (n,) at depths (i + 1/2) / number, in place; returns their places.

    Raises:
        ValueError: if the text is too short for them.
    """
    places = places_in(len(text), statements)
    if any(start < stop for (_, stop), (start, _) in pairwise(places)):
        raise ValueError(f"{len(text)} tokens are too few for {len(statements)} needles")
    for (start, stop), statement in zip(places, statements, strict=True):
        text[start:stop] = torch.tensor(statement, dtype=text.dtype)
    return places


def places_in(length: int, statements: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Where statements lie at depths (i + 1/2) / number of a text; they may overlap.

    Raises:
        ValueError: if the text is too short for one of them.
    """
    places: list[tuple[int, int]] = []
    for number, statement in enumerate(statements):
        start = 1 + round((number + 0.5) / len(statements) * (length - len(statement) - 1))
        if start + len(statement) > length:
            raise ValueError(f"{length} tokens are too few for a needle of {len(statement)}")
        places.append((start, start + len(statement)))
    return places


def part_borders(length: int, places: Sequence[tuple[int, int]]) -> list[int]:
    """Ends of NUM_PARTS parts of about equal length, the first 0; one that would cut a sentence lies at its start.

    Raises:
        ValueError: if the text is too short for them.
    """
    borders = [length * part // NUM_PARTS for part in range(NUM_PARTS + 1)]
    cut = {border: start for border in borders for start, stop in places if start < border < stop}
    borders = [cut.get(border, border) for border in borders]
    if any(start >= stop for start, stop in pairwise(borders)):
        raise ValueError(f"{length} tokens are too few for {NUM_PARTS} parts")
    return borders


class Place(NamedTuple):
    """Where a needle lies: number of the document, and tokens of it."""

    document: int
    start: int
    stop: int

    def chunks(self, memory: Memory) -> range:
        first, size = memory.documents[self.document].first_chunk, memory.chunk_size
        return range(first + self.start // size, first + (self.stop - 1) // size + 1)

    def overlaps(self, source: RetrievedChunk) -> bool:
        return source.document == self.document and source.start < self.stop and self.start < source.stop


def run_forms(
    model: HSAForCausalLM,
    tokenizer: Any,
    text: torch.Tensor,
    *,
    samples: int,
    forms: Sequence[str] = ("",),
    store: str = "device",
    together: bool = False,
    notes: bool = False,
    wording: str = "own",
    piece_tokens: int | None = None,
    seed: int = 0,
    progress: NeedleProgress | None = None,
    known: Sequence[LengthResult] = (),
    keep: Keep | None = None,
) -> NeedleStudy:
    """The same needles in memories of one text that differ in form, on any tier.

    Args:
        text: (n,) int32 on the host. samples: needles, at uniform depths.
        forms: of keys, values and landmarks ("" is the model's own; landmarks of fp8 keys are int8), one memory each.
            "merged" is the model's own in NUM_PARTS memories of consecutive parts, merged into one. The logits after
            every question are compared with those of the first form.
        store: "device", "host" or "tiered".
        together: all needles are in the text at once (written into `text`), each a distractor of the others; else one
            at a time, by exact edits.
        notes: all needles are documents of their own behind the text, as `hsa memory append` makes them, and are asked
            for by the beginning of their sentence instead of by a question. Depths are their places in this order.
        wording: one of WORDINGS; the authors' sentences are hidden one at a time.
        known: what an earlier run that was cut off found in this text; only the rest is asked.
        keep: called after every question with what there is of its form.

    Raises:
        ValueError: notes that are in the text together, the authors' sentences as either, a merged memory with notes or
            on another tier, a text too short, or a memory that does not fit.
    """
    if together and notes:
        raise ValueError("give notes or together, not both: notes lie behind the text, not in it")
    if wording != "own" and (together or notes):
        raise ValueError("the authors' sentences ask for one key: hide them one at a time, or take wording='own'")
    if MERGED in forms and (notes or store != "device"):
        raise ValueError("a merged memory is measured on the device and without notes")
    report, keep = progress or (lambda *_: None), keep or (lambda _: None)
    length, device = len(text), model.model.embed_tokens.weight.device
    hidden = Hidden(tokenizer, text, worded(wording, seed + length, samples), together=together, notes=notes)
    hidden.task = task_of(wording, hidden.task)
    if MERGED in forms:
        _ = hidden.borders  # a text too short is refused before work
    distinct = count_distinct(text, model.config.chunk_size, device)
    earlier = {result.form: result for result in known}
    missing = {
        form: {*range(samples)} - {sample.index for result in known if result.form == form for sample in result.samples}
        for form in forms
    }
    results: list[LengthResult] = []
    expected: dict[int, torch.Tensor] = {}
    for number, form in enumerate(forms):
        # what the others are compared with is not kept: the first form is asked again, without an answer
        wanted = missing[form] if number else set().union(*missing.values())
        if not wanted:
            results.append(earlier[form])
            continue
        started = time.monotonic()
        memory = hidden.memorized(
            model,
            form,
            store=store,
            piece_tokens=piece_tokens,
            progress=lambda done, _: report(length, 0, samples, done),
        )
        if device.type == "cuda":
            torch.cuda.synchronize()
        result = LengthResult(
            length, [*earlier[form].samples] if form in earlier else [], time.monotonic() - started, distinct,
            memory.num_bytes, store=store, form=form, task=hidden.task,
        )  # fmt: skip
        for index in sorted(wanted):
            sample = hidden.ask(model, memory, form, index, expected, only_logits=index not in missing[form])
            if sample is not None:
                result.samples.append(sample)
                keep(result)
                report(length, index + 1, samples, length)
        results.append(result)
        del memory
    return NeedleStudy(results, model.config.chunk_topk, seed, peak_host_bytes())


def worded(wording: str, seed: int, number: int) -> Sequence[Needle]:
    """Evaluation needles in one of WORDINGS.

    Raises:
        ValueError: for another.
    """
    if wording not in WORDINGS:
        raise ValueError(f"wording must be one of {', '.join(WORDINGS)}, got {wording!r}")
    if wording == "own":
        return evaluation_needles(seed, number)
    from hsa_ultralong.eval.tasks.paper import authors_needles

    return authors_needles(seed, number)


def task_of(wording: str, task: str = "s_niah") -> str:
    """What records call the task of a wording."""
    return task if wording == "own" else f"{task}_{wording}"


class Hidden:
    """The sentences of a text, where they lie, and how they are asked for: the same for every form."""

    def __init__(
        self, tokenizer: Any, text: torch.Tensor, needles: Sequence[Needle], *, together: bool = False,
        notes: bool = False,
    ) -> None:  # fmt: skip
        self.tokenizer, self.text, self.is_edited = tokenizer, text, not (together or notes)
        self.length = len(text)
        self.task = "notes" if notes else "mk_niah" if together else "s_niah"
        self.prompts = [needle.completion if notes else needle.question for needle in needles]
        self.values = [needle.value for needle in needles]
        if notes:
            self.statements = [tokenizer(needle.statement.strip())["input_ids"] for needle in needles]
            self.places = [Place(number, 0, len(statement)) for number, statement in enumerate(self.statements, 1)]
        else:
            self.statements = [tokenizer(needle.statement, add_special_tokens=False)["input_ids"] for needle in needles]
            found = plant(text, self.statements) if together else places_in(len(text), self.statements)
            self.places = [Place(0, *place) for place in found]

    @cached_property
    def borders(self) -> list[int]:
        """Of the parts of a merged memory."""
        return part_borders(len(self.text), [(place.start, place.stop) for place in self.places])

    def memorized(self, model: HSAForCausalLM, form: str, **how: Any) -> Memory:
        """The text in a memory of this form, with the notes behind it; `how`: of `memorize`."""
        if form == MERGED:
            # each part's progress begins at 0
            parts = [self.text[start:stop] for start, stop in pairwise(self.borders)]
            return ChunkMemory.concat([memorize(model, part, **how) for part in parts])
        texts = [self.text, *self.statements] if self.task == "notes" else [self.text]
        landmarks = "int8" if form == "fp8" else form
        return memorize(model, texts, key_values=form or None, landmarks=landmarks or None, **how)

    def place(self, index: int, form: str) -> Place:
        """Where sentence `index` lies in a memory of this form."""
        place = self.places[index]
        if form != MERGED:
            return place
        part = bisect_right(self.borders, place.start) - 1
        return Place(part, place.start - self.borders[part], place.stop - self.borders[part])

    def ask(
        self, model: HSAForCausalLM, memory: Memory, form: str, index: int, expected: dict[int, torch.Tensor],
        only_logits: bool,
    ) -> NeedleSample | None:  # fmt: skip
        """The answer about sentence `index`, whose logits are compared with `expected`, or become it."""
        with self.written(model, memory, index, form) as place:
            chunks = place.chunks(memory)
            logits, margin = _question_logits(model, self.tokenizer, memory, self.prompts[index], chunks)
            first = expected.setdefault(index, logits)
            if only_logits:
                return None
            sample = self.answer(model, memory, index, form)
        error = ((logits - first).norm() / first.norm()).item()
        return replace(sample, form=form, margin=margin, logits_error=error)

    def answer(self, model: HSAForCausalLM, memory: Memory, index: int, form: str = "") -> NeedleSample:
        """The answer about a sentence that is written."""
        prompt, value, place = self.prompts[index], self.values[index], self.place(index, form)
        answer = ask(model, self.tokenizer, memory, prompt, max_new_tokens=16)
        found = any(place.overlaps(source) for source in answer.sources[:1])
        depth, correct = (index + 0.5) / len(self.prompts), is_right(answer.text, value)
        told = (prompt, value, answer.text)
        return NeedleSample(self.length, depth, *told, correct, answer.weight, found, index=index)

    @contextmanager
    def written(self, model: HSAForCausalLM, memory: Memory, index: int, form: str = "") -> Iterator[Place]:
        """Sentence `index` is in the memory while this runs; gives its place."""
        place, old = self.place(index, form), self.places[index]
        if not self.is_edited:
            yield place
            return
        edit(model, memory, place.start, place.stop, self.statements[index], document=place.document)
        yield place
        edit(model, memory, place.start, place.stop, self.text[old.start : old.stop], document=place.document)


@torch.no_grad()
def _question_logits(
    model: HSAForCausalLM, tokenizer: Any, memory: Memory, question: str, chunks: range
) -> tuple[torch.Tensor, float]:
    """Logits (V,) after the question, in fp32 on the host, and the margin of these chunks."""
    ids = torch.tensor([tokenizer(question)["input_ids"]], device=model.model.embed_tokens.weight.device)
    cache = HSACache(model.config, memory=memory)
    outputs = model(ids, past_key_values=cache, logits_to_keep=1, output_retrieval=True)
    margins = [score_margin(found.indices[0, -1], found.scores[0, -1], chunks) for found in outputs.retrieval]
    return outputs.logits[0, -1].float().cpu(), max(margins)


def score_margin(indices: torch.Tensor, scores: torch.Tensor, chunks: range) -> float:
    """Best score of these chunks above the best other one, in nats, in the head where that is most; indices and scores
    (Hr, K) of a token, -1 = empty. Chunks that are not among the K count as the last of them; 0 where no other is."""
    kept, wanted = indices >= 0, (indices >= chunks.start) & (indices < chunks.stop)
    if not (kept & ~wanted).any():
        return 0.0
    others = scores.masked_fill(~kept | wanted, -torch.inf).amax(-1)  # (Hr,)
    worst = scores.masked_fill(~kept, torch.inf).amin(-1)
    best = torch.maximum(scores.masked_fill(~wanted, -torch.inf).amax(-1), worst)
    return float((best - others).max())
