"""How a model answers a sample: through a memory that is edited from sample to sample, or as one plain prompt.

`MemoryReader` serves HSA models, `PromptReader` any causal language model of transformers. tests/eval/test_readers.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from hsa_ultralong.eval.evidence import Passage, Seen
from hsa_ultralong.eval.tasks import Material, Sample, score
from hsa_ultralong.eval.tasks.sample import Tokens
from hsa_ultralong.inference import DecodingEngine, edit, memorize
from hsa_ultralong.inference.ask import end_tokens
from hsa_ultralong.models import HSAForCausalLM

# metrics that no further text can lower, so an answer that has them may stop; the others read the first line only
_SUBSTRING = ("all", "part")
# spans of changed tokens that lie closer than this are edited as one
_NEAR = 512


@dataclass(frozen=True)
class Reply:
    """What a model said, and how it found it.

    certainty: the largest fusion weight on one chunk of the memory while answering. Of the sample's evidence, when the
    answer began: found, whether one of its chunks was retrieved anywhere; rank, weight and margin (nats above the best
    other chunk) of the best of them in the head where it stands best; retrieved, the chunks of the greatest weights.
    None where the reader cannot know.
    """

    text: str
    tokens: list[int]
    certainty: float | None = None
    found: bool | None = None
    rank: int | None = None
    weight: float | None = None
    margin: float | None = None
    retrieved: tuple[Passage, ...] | None = None


class Reader(Protocol):
    """batch: how many samples it answers at once. setting: how it reads, and chunk_size: tokens of the passages, both
    for records."""

    batch: int
    setting: str
    chunk_size: int
    # the most tokens of a sample that the model has positions for, None: any number
    limit: int | None

    def answer(self, samples: Sequence[Sample]) -> list[Reply]:
        """Greedy answers to at most `batch` samples of one length and task."""
        ...


class MemoryReader:
    """Every context is a memory, made once and then edited into that of the next sample, exactly.

    The question is a new document that reads it ("memory"), or goes on with the context itself ("continue"), which is
    what the model would compute for the whole prompt. A batch keeps as many memories.
    """

    limit: int | None = None

    def __init__(
        self, model: HSAForCausalLM, material: Material, *, batch: int = 1, setting: str = "memory", edits: bool = True
    ) -> None:
        """edits: False builds every memory from its tokens, for comparison.

        Raises:
            ValueError: for a setting that is none.
        """
        if setting not in ("memory", "continue"):
            raise ValueError(
                f"a memory is read by a question of its own or continued: memory, continue; got {setting!r}"
            )
        self.model, self.material, self.batch, self.setting, self.edits = model, material, batch, setting, edits
        self.chunk_size = model.config.chunk_size
        self._memories: list[Any] = []
        self._contents: list[tuple[Tokens, tuple[tuple[int, ...], ...]]] = []

    def _build(self, sample: Sample) -> Any:
        texts = [torch.from_numpy(sample.context), *(torch.tensor(note, dtype=torch.int32) for note in sample.notes)]
        return memorize(self.model, texts, close=self.setting == "memory")

    def _set(self, row: int, sample: Sample) -> None:
        """Make the memory of a row that of the sample."""
        wanted = (sample.context, sample.notes)
        if row == len(self._memories):
            self._memories.append(self._build(sample))
            self._contents.append(wanted)
            return
        spans = self._changes(self._contents[row], wanted)
        if spans is None:
            self._memories[row] = None  # before the next one takes its place
            self._memories[row] = self._build(sample)
        else:
            for document, start, stop, tokens in spans:
                edit(self.model, self._memories[row], start, stop, tokens, document=document)
        self._contents[row] = wanted

    def _changes(
        self, old: tuple[Tokens, tuple[tuple[int, ...], ...]], new: tuple[Tokens, tuple[tuple[int, ...], ...]]
    ) -> list[tuple[int, int, int, torch.Tensor]] | None:
        """Edits (document, start, stop, tokens) that turn one content into another; None where building is cheaper."""
        if not self.edits or len(old[1]) != len(new[1]):
            return None
        before, after = old[0], new[0]
        spans = changed_spans(before, after)
        if sum(stop - start for start, stop, _ in spans) > len(after) // 4:
            return None
        found = [(0, start, stop, torch.from_numpy(after[start : start + size].copy())) for start, stop, size in spans]
        for number, (note, other) in enumerate(zip(old[1], new[1], strict=True), 1):
            if note != other:
                found.append((number, 0, len(note), torch.tensor(other, dtype=torch.int32)))
        return found

    def answer(self, samples: Sequence[Sample]) -> list[Reply]:
        if self.setting == "continue" and any(sample.notes for sample in samples):
            raise ValueError(f"{samples[0].task} keeps facts in documents of their own; ask it with the setting memory")
        for row, sample in enumerate(samples):
            self._set(row, sample)
        memories = self._memories[: len(samples)]
        first = self.material.first if self.setting == "memory" else []
        prompts = [torch.tensor([*first, *sample.question]) for sample in samples]
        longest = max(len(prompt) for prompt in prompts) + max(sample.max_new_tokens for sample in samples)
        room = longest + 2 * self.model.config.chunk_size  # a continued chunk counts too
        engine = DecodingEngine(self.model, memories, batch=len(samples), max_tokens=room)
        stops = [_Stop(sample, self.material.tokenizer) for sample in samples]
        seen = [
            Seen(sample, self.chunk_size, memory.num_chunks) for sample, memory in zip(samples, memories, strict=True)
        ]
        offsets = np.cumsum([0, *(memory.num_chunks for memory in memories)]).tolist()
        ends = end_tokens(self.model)
        stream = engine.stream(
            prompts, samples[0].max_new_tokens, stop_tokens=ends, continue_document=self.setting == "continue"
        )
        for number, step in enumerate(stream):
            for row, token in enumerate(step.tokens):
                if token is not None and not stops[row].is_done:
                    # the prompt's own retrieval counts its memory alone, later ones count all memories
                    seen[row].note(step.retrieved, row, offsets[row] if number else 0, is_first=number == 0)
                    stops[row].put(token, ends)
            if all(stop.is_done for stop in stops):
                break
        return [self._reply(stop, one) for stop, one in zip(stops, seen, strict=True)]

    def _reply(self, stop: _Stop, seen: Seen) -> Reply:
        return Reply(
            stop.text, stop.tokens, seen.certainty, seen.found, seen.rank, seen.weight, seen.margin, seen.passages()
        )  # fmt: skip


def changed_spans(old: Tokens, new: Tokens) -> list[tuple[int, int, int]]:
    """(start, stop, size): replacing old[start:stop] by new[start:start + size], for each, gives `new`.

    All but the last replace as many tokens; where the lengths differ the last one reaches the end."""
    common = min(len(old), len(new))
    differs = np.flatnonzero(old[:common] != new[:common])
    spans: list[tuple[int, int, int]] = []
    if len(differs):
        breaks = np.flatnonzero(np.diff(differs) > _NEAR)
        starts = [int(differs[0]), *(int(differs[i + 1]) for i in breaks)]
        stops = [*(int(differs[i]) + 1 for i in breaks), int(differs[-1]) + 1]
        spans = [(start, stop, stop - start) for start, stop in zip(starts, stops, strict=True)]
    if len(old) != len(new):
        start = spans.pop()[0] if spans and common - spans[-1][1] < _NEAR else common
        spans.append((start, len(old), len(new) - start))
    return spans


class _Stop:
    """The answer as it grows, and whether more of it can change the score."""

    def __init__(self, sample: Sample, tokenizer: Any) -> None:
        self.sample, self.tokenizer = sample, tokenizer
        self.tokens: list[int] = []
        self.text, self.is_done = "", False

    def put(self, token: int, ends: Sequence[int]) -> None:
        self.tokens.append(token)
        self.text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        is_enough = (
            bool(self.sample.answers) and score(self.sample.metric, self.text, self.sample.answers) == 1.0
            if self.sample.metric in _SUBSTRING
            else "\n" in self.text.lstrip()
        )
        self.is_done = is_enough or token in ends or len(self.tokens) >= self.sample.max_new_tokens


class PromptReader:
    """Every sample is one prompt of a causal language model of transformers, answered by its own `generate`, one by
    one."""

    setting, batch, chunk_size = "prompt", 1, 64

    def __init__(self, model: Any, material: Material) -> None:
        self.model, self.material = model, material
        limit = getattr(model.config, "max_position_embeddings", None)
        self.limit: int | None = None if isinstance(model, HSAForCausalLM) else limit

    def answer(self, samples: Sequence[Sample]) -> list[Reply]:
        for sample in samples:
            if self.limit is not None and sample.length > self.limit:
                raise ValueError(f"this model has positions for {self.limit:,} tokens, {sample.length:,} wanted")
        return [self._answer(sample) for sample in samples]

    def _answer(self, sample: Sample) -> Reply:
        from transformers import StoppingCriteria, StoppingCriteriaList

        prompt = sample.prompt()
        stop, length = _Stop(sample, self.material.tokenizer), len(prompt)

        class Enough(StoppingCriteria):
            def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
                stop.put(int(input_ids[0, -1]), ())
                return torch.tensor([stop.is_done], device=input_ids.device)

        ids = torch.from_numpy(prompt).long()[None].to(self.model.device)
        with torch.no_grad():
            made = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=1,
                max_new_tokens=sample.max_new_tokens, stopping_criteria=StoppingCriteriaList([Enough()]),
                pad_token_id=self.material.tokenizer.pad_token_id or 0,
            )  # fmt: skip
        tokens = made[0, length:].tolist()
        return Reply(self.material.tokenizer.decode(tokens, skip_special_tokens=True), tokens)
