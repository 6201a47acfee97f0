"""Needles in a memorised text: memorise once per length, write a sentence in by an exact edit, ask for it, take it out.

The edit makes many needles per length cheap (fact 6). Used by `hsa quickstart` and the needle studies; the form of the
records is that of results/ (see docs/results.md). tests/eval/test_needles.py.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hsa_ultralong.data import evaluation_needles
from hsa_ultralong.inference import ask, edit, memorize
from hsa_ultralong.models import HSAForCausalLM

# (length, needles done, needles wanted, tokens read)
Progress = Callable[[int, int, int, int], None]


@dataclass(frozen=True)
class NeedleSample:
    """One needle: where it was written, what was asked and answered, and the retrieval weight on the best chunk."""

    length: int
    depth: float
    prompt: str
    expected: str
    answered: str
    correct: bool
    weight: float
    found: bool


@dataclass(frozen=True)
class LengthResult:
    """All needles of one length, what reading it cost, and the retrieval weights of questions without an answer."""

    length: int
    samples: list[NeedleSample]
    read_seconds: float
    ask_seconds: float
    distinct_chunks: int
    memory_bytes: int
    control_weights: list[float] = field(default_factory=list)

    @property
    def accuracy(self) -> float:
        return sum(sample.correct for sample in self.samples) / max(1, len(self.samples))


@dataclass(frozen=True)
class NeedleStudy:
    """Results of all lengths."""

    results: list[LengthResult]
    topk: int
    seed: int
    peak_host_bytes: int = 0
    options: dict[str, Any] = field(default_factory=dict)


def wilson_interval(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """95% Wilson score interval of a proportion."""
    if total == 0:
        return 0.0, 1.0
    share = right / total
    center = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return max(0.0, center - half), min(1.0, center + half)


def peak_host_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


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
    progress: Progress | None = None,
) -> NeedleStudy:
    """Needle accuracy at uniform depths for every length.

    Args:
        haystack: (n,) token ids, at least max(lengths), never repeated. samples: needles per length, depths
            (i + 1/2) / samples. controls: questions per length about sentences that were never hidden. seed: of the
            evaluation needles, whose key words no training needle has.

    Raises:
        ValueError: if the haystack is shorter than a length or a length too short for its needle.
    """
    report = progress or (lambda *_: None)
    results = []
    # the first reading of a process pays for set-up that has nothing to do with the text
    memorize(model, haystack[:256])
    for length in lengths:
        if length > len(haystack):
            raise ValueError(f"the haystack has {len(haystack)} tokens, {length} wanted; add more text")
        results.append(_one_length(model, tokenizer, haystack[:length], samples, controls, seed, report))
    return NeedleStudy(results, model.config.chunk_topk, seed, peak_host_bytes())


def _one_length(
    model: HSAForCausalLM, tokenizer: Any, text: torch.Tensor, samples: int, controls: int, seed: int, report: Progress
) -> LengthResult:
    length = len(text)
    started = time.monotonic()
    memory = memorize(model, text, progress=lambda done, _: report(length, 0, samples, done))
    if memory.k.is_cuda:
        torch.cuda.synchronize()
    read_seconds = time.monotonic() - started
    done = []
    started = time.monotonic()
    needles = evaluation_needles(seed + length, samples + controls)
    for number, needle in enumerate(needles[:samples]):
        statement = tokenizer(needle.statement, add_special_tokens=False)["input_ids"]
        depth = (number + 0.5) / samples
        start = 1 + round(depth * (length - len(statement) - 1))
        stop = start + len(statement)
        if stop > length:
            raise ValueError(f"{length} tokens are too few for a needle of {len(statement)}")
        edit(model, memory, start, stop, statement)
        answer = ask(model, tokenizer, memory, needle.question, max_new_tokens=16)
        edit(model, memory, start, stop, text[start:stop])
        found = any(source.start < stop and start < source.stop for source in answer.sources[:1])
        expected = needle.value
        correct = is_right(answer.text, expected)
        done.append(NeedleSample(length, depth, needle.question, expected, answer.text, correct, answer.weight, found))
        report(length, number + 1, samples, length)
    ask_seconds = time.monotonic() - started
    absent = [ask(model, tokenizer, memory, needle.question, max_new_tokens=16).weight for needle in needles[samples:]]
    distinct = len(_distinct(text, memory.chunk_size))
    return LengthResult(length, done, read_seconds, ask_seconds, distinct, memory.num_bytes, absent)


def _distinct(text: torch.Tensor, chunk_size: int) -> set[bytes]:
    """The different chunks of a text."""
    return {part.numpy().tobytes() for part in text.cpu().split(chunk_size)}
