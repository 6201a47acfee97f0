"""Samples answered from memories: one memory for a batch, of which every row sees all but the chunks that differ.

A context is read once. Of each further one only the chunks that a changed token can reach are read (fact 6 of
docs/architecture.md) and laid beside it (`RowMemories`), so that a row reads exactly the memory of its own context. A
chunk read before is not read again: it depends on its own tokens and those within `lower_reach` before it alone.

With `reread` the passages that the model itself retrieves for the bare question stand as text in its prompt as well, as
in `ask` (inference/passages.py). tests/eval/test_readers.py.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple
from weakref import ref

import numpy as np
import torch

from hsa_ultralong.eval.answers import Reply, StopRule, forced_answer, is_likeliest
from hsa_ultralong.eval.evidence import Seen
from hsa_ultralong.eval.tasks import Material, Sample
from hsa_ultralong.eval.tasks.sample import Tokens
from hsa_ultralong.inference import DecodingEngine, memorize
from hsa_ultralong.inference.ask import end_tokens
from hsa_ultralong.inference.passages import best_chunks, note_weights, place_texts
from hsa_ultralong.inference.prompts import passages_text
from hsa_ultralong.inference.stretches import Stretch, StretchReader
from hsa_ultralong.memory.chunk_memory import ChunkMemory, Memory
from hsa_ultralong.memory.row_memories import Chunk, RowMemories
from hsa_ultralong.models import HSACache, HSAForCausalLM
from hsa_ultralong.models.evaluation import evaluating

# chunks that are kept beside the memory, the latest used
_KEPT_CHUNKS = 4096
# comparisons of two documents that are kept
_KEPT_DIFFERENCES = 1024
# a sample of which more than this share of chunks differs, notes included, is read as a whole
_MOST_CHANGED = 0.5
# so many documents of at most so many tokens are read together: one by one, each would cost a GPU's launches
_MANY, _SHORT = 32, 2048
# tokens of a memory of several contexts; a longer context stands alone
_MOST_TOKENS = 1 << 24

Contents = tuple[Tokens, ...]  # the documents of one sample: its context, then its notes
ChunkPlace = tuple[int, int]  # document of a sample, chunk in it
_Key = tuple[int, bytes]  # what a chunk depends on: its number of tokens, and these with the ones before that reach it


class _Numbers(NamedTuple):
    """What the numbers of a row's chunks mean: the shared documents of its sample begin at `starts` and are moved by
    `shifts`, and from `first_own` on stand the chunks `own` of the sample, of `total`, all its documents in order."""

    starts: np.ndarray
    shifts: np.ndarray
    own: np.ndarray
    first_own: int
    total: int

    def of(self, chunks: torch.Tensor) -> torch.Tensor:
        """Numbers in the sample, -1 for those that are none of its."""
        given = chunks.numpy()
        document = np.maximum(np.searchsorted(self.starts, given, side="right") - 1, 0)
        # one more, for the question's own chunks and for no chunk
        own = np.append(self.own, -1)[np.clip(given - self.first_own, 0, len(self.own))]
        shared = np.where(given < 0, -1, given + self.shifts[document])
        return torch.from_numpy(np.where(given < self.first_own, shared, own))


class MemoryReader:
    """Answers from a memory of the context, asked by a question that is a new document.

    A batch shares one memory. batch: samples answered at once.
    """

    limit: int | None = None

    def __init__(
        self, model: HSAForCausalLM, material: Material, *, batch: int = 16, edits: bool = True, reread: int = 0
    ) -> None:
        """
        Args:
            edits: False reads every context as a whole, for comparison.
            reread: so many passages, the best by the model's own retrieval for the question, stand before it as text.

        Raises:
            ValueError: for a model whose memories cannot be laid together (fact 4).
        """
        if not model.config.is_composable:
            raise ValueError(
                "this model's chunks cannot be laid together (fact 4); use the setting rebuild or continue"
            )
        self.model, self.material, self.batch, self.edits, self.reread = model, material, batch, edits, reread
        self.setting = "memory" if edits else "rebuild"
        self.chunk_size, self._reach = model.config.chunk_size, model.config.lower_reach
        self._stretches = StretchReader(model)
        self._memory: Memory | None = None
        self._read: list[Contents] = []  # what the memory holds
        self._known: OrderedDict[_Key, Chunk] = OrderedDict()
        # what was found to differ, by the identities of two documents, none of which it keeps
        self._differences: dict[tuple[int, int], tuple[ref[Tokens], ref[Tokens], np.ndarray]] = {}

    def answer(self, samples: Sequence[Sample]) -> list[Reply]:
        replies: list[Reply] = []
        while rest := samples[len(replies) :]:
            count = self._hold(rest)
            replies += self._generate(rest[:count])
        return replies

    def forced(self, samples: Sequence[Sample]) -> list[bool | None]:
        found: list[bool | None] = []
        while rest := samples[len(found) :]:
            count = self._hold(rest)
            found += self._force(rest[:count])
        return found

    # the memory -------------------------------------------------------------------------------------------------------

    def _hold(self, samples: Sequence[Sample]) -> int:
        """Make a memory that is near to the contexts of the first samples; returns how many."""
        wanted = [_contents(sample) for sample in samples]
        if self.edits and all(self._nearest(self._read, one) is not None for one in wanted):
            return len(samples)
        read: list[Contents] = []
        count = tokens = 0
        for one in wanted:
            if not self.edits or self._nearest(read, one) is None:
                tokens += sum(map(len, one))
                if read and tokens > _MOST_TOKENS:
                    break
                read.append(one)
            count += 1
        self._memory = None  # before the next one takes its place
        self._memory = self._memorized([torch.from_numpy(text) for one in read for text in one])
        self._read = read
        return count

    def _memorized(self, documents: Sequence[torch.Tensor]) -> Memory:
        """A memory of documents (n,); where most of it are passages, these are read together."""
        short = [len(text) for text in documents if len(text) <= _SHORT]
        if len(short) < _MANY or 2 * sum(short) < sum(map(len, documents)):
            return memorize(self.model, documents)
        parts: list[Memory] = []
        for is_short, group in groupby(documents, lambda text: len(text) <= _SHORT):
            own = list(group)
            parts.append(self._stretches.memory(own) if is_short else memorize(self.model, own))
        return ChunkMemory.concat(parts)

    def _nearest(self, read: Sequence[Contents], wanted: Contents) -> tuple[int, dict[int, np.ndarray]] | None:
        """Which of the contents read has the fewest chunks to change, and these by document, without those that are the
        same; None if none is near."""
        best: tuple[int, int, dict[int, np.ndarray]] | None = None
        # of all documents: beside thousands of notes a context may be two chunks, of which the last always differs
        most = _MOST_CHANGED * sum(map(len, wanted)) / self.chunk_size
        for number, held in enumerate(read):
            if len(held) != len(wanted):
                continue
            changed = {
                document: self._changed(old, new)
                for document, (old, new) in enumerate(zip(held, wanted, strict=True))
                if old is not new  # the same array where samples share a document
            }
            total = sum(map(len, changed.values()))
            if total <= most and (best is None or total < best[0]):
                best = total, number, changed
        return None if best is None else best[1:]

    def _changed(self, old: Tokens, new: Tokens) -> np.ndarray:
        """`changed_chunks`, found once for a pair of documents: comparing long ones takes longer than answering."""
        known = self._differences.get((id(old), id(new)))
        if known is not None and known[0]() is old and known[1]() is new:
            return known[2]
        found = changed_chunks(old, new, self.chunk_size, self._reach)
        if len(self._differences) >= _KEPT_DIFFERENCES:
            self._differences.clear()
        self._differences[id(old), id(new)] = ref(old), ref(new), found
        return found

    def _rows(self, samples: Sequence[Sample]) -> tuple[RowMemories, list[_Numbers]]:
        """The memories of some samples, and which chunks of a sample their numbers mean."""
        assert self._memory is not None
        size, count = self.chunk_size, self._memory.num_chunks
        contents = [_contents(sample) for sample in samples]
        nearest = [self._nearest(self._read, one) for one in contents]
        keys = [self._keys(one, found) for one, found in zip(contents, nearest, strict=True)]
        self._read_missing(contents, keys)
        hidden = torch.ones((len(samples), count), dtype=torch.bool)
        numbers: list[_Numbers] = []
        for row, (one, found, own) in enumerate(zip(contents, nearest, keys, strict=True)):
            assert found is not None
            first = sum(len(held) for held in self._read[: found[0]])
            records = self._memory.documents[first : first + len(one)]
            chunks = [-(-len(text) // size) for text in one]
            hidden[row, records[0].first_chunk : records[-1].first_chunk + records[-1].num_chunks] = False
            for document, changed in found[1].items():
                record = records[document]
                start, shared = record.first_chunk, min(chunks[document], record.num_chunks)
                hidden[row, start + shared : start + record.num_chunks] = True
                hidden[row, torch.from_numpy(start + changed[changed < shared])] = True
            starts = np.array([record.first_chunk for record in records])
            begins = np.cumsum([0, *chunks])
            mine = np.array([begins[document] + chunk for document, chunk in own], dtype=np.int64)
            numbers.append(_Numbers(starts, begins[:-1] - starts, mine, count, int(begins[-1])))
        rows = RowMemories.laid(self._memory, hidden, [[self._known[key] for key in own.values()] for own in keys])
        while len(self._known) > _KEPT_CHUNKS:
            self._known.popitem(last=False)
        return rows, numbers

    def _keys(self, contents: Contents, found: tuple[int, dict[int, np.ndarray]] | None) -> dict[ChunkPlace, _Key]:
        """What the changed chunks of a sample depend on: their own tokens and those that reach them."""
        assert found is not None
        size, reach = self.chunk_size, self.model.config.lower_reach
        keys: dict[ChunkPlace, _Key] = {}
        for document, chunks in found[1].items():
            text = contents[document]
            for chunk in chunks.tolist():
                start, stop = chunk * size, min((chunk + 1) * size, len(text))
                # a shorter lead tells that the document begins there
                keys[document, chunk] = (stop - start, text[max(0, start - reach) : stop].tobytes())
        return keys

    def _read_missing(self, contents: Sequence[Contents], keys: Sequence[dict[ChunkPlace, _Key]]) -> None:
        """Read the chunks that are not known yet, neighbours together."""
        size, reach = self.chunk_size, self.model.config.lower_reach
        wanted: list[tuple[Stretch, list[_Key | None]]] = []
        asked: set[_Key] = set()
        for one, own in zip(contents, keys, strict=True):
            runs: list[list[ChunkPlace]] = []
            for place, key in own.items():
                if key in self._known:
                    self._known.move_to_end(key)
                elif key not in asked:
                    asked.add(key)
                    # what lies between two of them is shorter than what would be read before the second alone
                    if runs and runs[-1][-1][0] == place[0] and (place[1] - runs[-1][-1][1] - 1) * size <= reach:
                        runs[-1].append(place)
                    else:
                        runs.append([place])
            for run in runs:
                document, first, last = run[0][0], run[0][1], run[-1][1]
                start, text = first * size, torch.from_numpy(one[document])
                names = [own.get((document, chunk)) for chunk in range(first, last + 1)]
                stretch = Stretch(text[max(0, start - reach) : start], text[start : (last + 1) * size])
                wanted.append((stretch, names))
        if wanted:
            for chunks, (_, names) in zip(self._stretches.read([one for one, _ in wanted]), wanted, strict=True):
                self._known |= {key: chunk for key, chunk in zip(names, chunks, strict=True) if key is not None}

    # answers ----------------------------------------------------------------------------------------------------------

    def _generate(self, samples: Sequence[Sample]) -> list[Reply]:
        rows, numbers = self._rows(samples)
        seen = [Seen(sample, self.chunk_size, own.total) for sample, own in zip(samples, numbers, strict=True)]
        prompts = [torch.tensor(prompt) for prompt in self._prompts(samples, rows, numbers, seen)]
        most = max(sample.max_new_tokens for sample in samples)
        engine = DecodingEngine(self.model, rows, batch=len(samples), max_tokens=max(map(len, prompts)) + most)
        ends = end_tokens(self.model)
        stops = [StopRule(sample, self.material.tokenizer) for sample in samples]
        for number, step in enumerate(engine.stream(prompts, most, stop_tokens=ends)):
            for row, token in enumerate(step.tokens):
                if token is not None and not stops[row].is_done:
                    # with passages in the prompt, what the bare question retrieved is known already
                    _note(seen[row], step.retrieved, row, numbers[row], is_first=number == 0 and not self.reread)
                    stops[row].put(token, ends)
            if all(stop.is_done for stop in stops):
                break
        return [stop.reply(one) for stop, one in zip(stops, seen, strict=True)]

    def _prompts(
        self, samples: Sequence[Sample], rows: RowMemories, numbers: Sequence[_Numbers], seen: Sequence[Seen]
    ) -> list[list[int]]:
        """Tokens of each question as a document, behind the passages that it retrieves if they are read again."""
        first = self.material.first
        bare = [[*first, *sample.question] for sample in samples]
        if not self.reread:
            return bare
        outputs = self._forward(bare, rows, logits_to_keep=1, output_retrieval=True)
        found = [(own.indices[:, -1].cpu(), own.weights[:, -1].float().cpu()) for own in outputs.retrieval]
        prompts: list[list[int]] = []
        for row, (sample, own, one) in enumerate(zip(samples, numbers, seen, strict=True)):
            weights = dict[int, float]()
            for chunks, shares in _note(one, found, row, own, is_first=True):
                note_weights(weights, chunks, shares, own.total)
            places = [one.passage(chunk, weights[chunk]) for chunk in sorted(best_chunks(weights, self.reread))]
            spans, documents = ((place.document, place.start, place.stop) for place in places), _contents(sample)
            texts = place_texts(self.material.tokenizer, spans, documents.__getitem__)
            prompts.append([*first, *self.material.encode(passages_text(texts)), *sample.question])
        return prompts

    def _forward(self, texts: Sequence[Sequence[int]], rows: RowMemories, **options: Any) -> Any:
        """One pass over texts that end together, each over its own memory."""
        longest, device = max(map(len, texts)), self.model.device
        ids = torch.tensor([[0] * (longest - len(text)) + list(text) for text in texts], device=device)
        mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts], device=device)
        cache = HSACache(self.model.config, memory=rows)
        with evaluating(self.model):
            return self.model(ids, attention_mask=mask, past_key_values=cache, **options)

    def _force(self, samples: Sequence[Sample]) -> list[bool | None]:
        """One pass over all questions with their answers."""
        answers = [forced_answer(sample, self.material) for sample in samples]
        if all(answer is None for answer in answers):
            return [None] * len(samples)
        rows, numbers = self._rows(samples)
        seen = [Seen(sample, self.chunk_size, own.total) for sample, own in zip(samples, numbers, strict=True)]
        prompts = self._prompts(samples, rows, numbers, seen)
        texts = [[*prompt, *(answer or [])] for prompt, answer in zip(prompts, answers, strict=True)]
        kept = 1 + max(len(answer or []) for answer in answers)
        logits = self._forward(texts, rows, logits_to_keep=kept).logits
        return [None if a is None else is_likeliest(own, a) for own, a in zip(logits, answers, strict=True)]


def _note(
    seen: Seen, retrieved: Sequence[tuple[torch.Tensor, torch.Tensor]], row: int, own: _Numbers, *, is_first: bool
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Show what a row retrieved, per upper group indices and weights (B, Hr, K), to what keeps it; the same for the row
    alone, in the sample's numbers, (1, Hr, K)."""
    found = [(own.of(chunks[row : row + 1]), shares[row : row + 1]) for chunks, shares in retrieved]
    seen.note(found, 0, 0, is_first=is_first)
    return found


def _contents(sample: Sample) -> Contents:
    return (sample.context, *_arrays(sample.notes))


@lru_cache(maxsize=2)
def _arrays(notes: tuple[tuple[int, ...], ...]) -> Contents:
    return tuple(np.array(note, dtype=np.int32) for note in notes)


def changed_chunks(old: Tokens, new: Tokens, size: int, reach: int) -> np.ndarray:
    """Chunks of `new`, ascending, that cannot be taken from `old` as they are: a changed token stands in them or at
    most `reach` tokens before one of theirs."""
    common = min(len(old), len(new))
    differs = np.flatnonzero(old[:common] != new[:common])
    if len(old) != len(new):
        differs = np.concatenate([differs, np.arange(common, len(new) + 1)])
    count = -(-len(new) // size)
    # changes that begin and end at each chunk
    steps: np.ndarray = np.zeros(count + 1, dtype=np.int64)
    np.add.at(steps, np.minimum(differs // size, count), 1)
    np.add.at(steps, np.minimum((differs + reach) // size + 1, count), -1)
    return np.flatnonzero(np.cumsum(steps[:-1]) > 0)
