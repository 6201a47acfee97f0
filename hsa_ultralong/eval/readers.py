"""How a model answers samples: as one plain prompt, or going on with a memory of the context.

`PromptReader` serves any causal language model of transformers, `ContinuingReader` HSA models; so does `MemoryReader`
(memory_reader.py), whose questions are documents of their own, and `RebuildingReader` for models whose memories cannot
be laid together. tests/eval/test_readers.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from hsa_ultralong.eval.answers import Reply, StopRule, forced_answer, is_likeliest
from hsa_ultralong.eval.evidence import Seen
from hsa_ultralong.eval.tasks import Material, Sample
from hsa_ultralong.eval.tasks.sample import Tokens
from hsa_ultralong.inference import DecodingEngine, edit, memorize
from hsa_ultralong.inference.ask import end_tokens
from hsa_ultralong.memory.chunk_memory import Memory
from hsa_ultralong.models import HSAForCausalLM
from hsa_ultralong.models.remembering import continuation_cache, question_cache

# spans of changed tokens that lie closer than this are edited as one
_NEAR = 512


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

    def forced(self, samples: Sequence[Sample]) -> list[bool | None]:
        """Whether each token of the one right answer is the likeliest, given those before it; None without one."""
        ...


class ContinuingReader:
    """Every context is an open document of a memory, made once and then edited into that of the next sample, exactly.

    The question goes on with it, which is what the model would compute for the whole prompt.
    """

    limit: int | None = None
    setting, batch, _continues = "continue", 1, True

    def __init__(self, model: HSAForCausalLM, material: Material) -> None:
        self.model, self.material, self.chunk_size = model, material, model.config.chunk_size
        self._memory: Memory | None = None
        self._context: Tokens = np.empty(0, dtype=np.int32)

    def answer(self, samples: Sequence[Sample]) -> list[Reply]:
        if any(sample.notes for sample in samples):
            raise ValueError(f"{samples[0].task} keeps facts in documents of their own; ask it with the setting memory")
        return [self._answer(sample) for sample in samples]

    def _hold(self, context: Tokens) -> Memory:
        """The memory of a context."""
        spans = changed_spans(self._context, context)
        if self._memory is None or sum(stop - start for start, stop, _ in spans) > len(context) // 4:
            self._memory = None  # before the next one takes its place
            self._memory = memorize(self.model, torch.from_numpy(context), close=False)
        else:
            for start, stop, size in spans:
                new = torch.from_numpy(context[start : start + size].copy())
                edit(self.model, self._memory, start, stop, new)
        self._context = context
        return self._memory

    def _answer(self, sample: Sample) -> Reply:
        memory, prompt = self._hold(sample.context), torch.tensor(self._question(sample))
        room = len(prompt) + sample.max_new_tokens + 2 * self.chunk_size  # the continued chunk counts too
        engine = DecodingEngine(self.model, memory, max_tokens=room)
        stop, ends = StopRule(sample, self.material.tokenizer), end_tokens(self.model)
        seen = Seen(sample, self.chunk_size, memory.num_chunks)
        stream = engine.stream([prompt], sample.max_new_tokens, stop_tokens=ends, continue_document=self._continues)
        for number, step in enumerate(stream):
            assert step.tokens[0] is not None
            seen.note(step.retrieved, 0, 0, is_first=number == 0)
            stop.put(step.tokens[0], ends)
            if stop.is_done:
                break
        return stop.reply(seen)

    def _question(self, sample: Sample) -> list[int]:
        return list(sample.question)

    def forced(self, samples: Sequence[Sample]) -> list[bool | None]:
        return _force_each(samples, self.material, self._logits)

    def _logits(self, sample: Sample, answer: list[int]) -> torch.Tensor:
        cache, _ = continuation_cache(self.model, self._hold(sample.context))
        ids = torch.tensor([*sample.question, *answer], device=self.model.device)
        return self.model(ids[None], past_key_values=cache, logits_to_keep=len(answer) + 1).logits[0]


class RebuildingReader(ContinuingReader):
    """Every context is read anew and asked by a question that is a document of its own, one by one: as MemoryReader,
    for models whose memories cannot be laid together."""

    setting, _continues = "rebuild", False

    def _hold(self, context: Tokens) -> Memory:
        if self._memory is None or not np.array_equal(self._context, context):
            self._memory = None  # before the next one takes its place
            self._memory, self._context = memorize(self.model, torch.from_numpy(context)), context
        return self._memory

    def _question(self, sample: Sample) -> list[int]:
        return [*self.material.first, *sample.question]

    def _logits(self, sample: Sample, answer: list[int]) -> torch.Tensor:
        cache = question_cache(self.model, self._hold(sample.context))
        ids = torch.tensor([*self._question(sample), *answer], device=self.model.device)
        return self.model(ids[None], past_key_values=cache, logits_to_keep=len(answer) + 1).logits[0]


@torch.no_grad()
def _force_each(
    samples: Sequence[Sample], material: Material, last_logits: Callable[[Sample, list[int]], torch.Tensor]
) -> list[bool | None]:
    """One by one; `last_logits`: those (n + 1, V) of the place before an answer of n tokens and of its own."""
    answers = [forced_answer(sample, material) for sample in samples]
    return [
        None if answer is None else is_likeliest(last_logits(sample, answer), answer)
        for sample, answer in zip(samples, answers, strict=True)
    ]


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
            wanted = len(sample.prompt()) + sample.max_new_tokens
            if self.limit is not None and wanted > self.limit:
                raise ValueError(f"this model has positions for {self.limit:,} tokens, {wanted:,} wanted")
        return [self._answer(sample) for sample in samples]

    def _answer(self, sample: Sample) -> Reply:
        from transformers import StoppingCriteria, StoppingCriteriaList

        prompt = sample.prompt()
        stop, length = StopRule(sample, self.material.tokenizer), len(prompt)

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

    def forced(self, samples: Sequence[Sample]) -> list[bool | None]:
        return _force_each(samples, self.material, self._logits)

    def _logits(self, sample: Sample, answer: list[int]) -> torch.Tensor:
        ids = torch.tensor([*sample.prompt().tolist(), *answer], device=self.model.device)
        return self.model(input_ids=ids[None], logits_to_keep=len(answer) + 1).logits[0]  # type: ignore[no-any-return]
