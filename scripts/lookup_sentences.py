"""A memory that is read on and on and asked exactly, and hidden sentences as lookups would find them.

Called by lookup_recall.py, whose head says what is measured; tests/test_lookup_recall.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from hsa_ultralong.data import evaluation_needles
from hsa_ultralong.eval.intervals import wilson_interval
from hsa_ultralong.eval.needles import places_in
from hsa_ultralong.inference import append
from hsa_ultralong.inference.editor import plan_edit, recompute_chunks
from hsa_ultralong.memory.chunk_memory import Memory
from hsa_ultralong.memory.landmark_index import LandmarkIndex
from hsa_ultralong.memory.landmark_lists import LandmarkLists
from hsa_ultralong.models import HSACache
from hsa_ultralong.models.evaluation import evaluating
from hsa_ultralong.nn.views import ChunkTensors
from hsa_ultralong.ops import ChunkVisibility

PIECE = {"cuda": 1 << 17}  # tokens of a forward, for which layers are compiled


class Query(NamedTuple):
    """What a retrieval layer asked, (1, T, Hr, R), and the exact chunks, (1, T, Hr, K)."""

    query: torch.Tensor
    scale: torch.Tensor | None
    found: torch.Tensor


class Watched:
    """The exact lookup, whose searches are kept."""

    is_capturable = False

    def __init__(self, landmarks: torch.Tensor) -> None:
        nothing = landmarks.new_empty(0)
        self.exact = LandmarkIndex(landmarks, None, None, nothing, nothing)
        self.queries: list[Query] = []

    def search(
        self, query: torch.Tensor, topk: int, *, visible: ChunkVisibility, scale: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        found = self.exact.search(query, topk, visible=visible, scale=scale)
        self.queries.append(Query(query, scale, found[0]))
        return found


class Sentence(NamedTuple):
    """A hidden sentence: its question, its chunks, and chunks `first` and following with it in the text."""

    question: str
    chunks: range
    first: int
    edited: ChunkTensors


class Bench:
    """A model and a memory of one document of which so many chunks were read."""

    def __init__(self, model: Any, tokenizer: Any, memory: Memory, text: torch.Tensor, topk: int) -> None:
        self.model, self.tokenizer, self.memory, self.text, self.topk = model, tokenizer, memory, text, topk
        self.device = memory.storage.landmarks.device

    @property
    def landmarks(self) -> torch.Tensor:
        """(C, Hr, R), as they lie in the memory."""
        return self.memory.tensors.landmarks[0]

    def read_to(self, chunks: int) -> None:
        part = self.text[self.memory.num_chunks * self.memory.chunk_size : chunks * self.memory.chunk_size]
        document = 0 if self.memory.documents else None
        piece = PIECE.get(self.device.type)
        append(self.model, self.memory, part, document=document, close=False, piece_tokens=piece)

    @torch.no_grad()
    def ask(self, ids: Sequence[int]) -> list[Query]:
        """The queries of all retrieval layers for tokens that follow the memory, which is searched exactly."""
        watched = Watched(self.landmarks)
        cache = HSACache(self.model.config, memory=self.memory)
        self.memory.lookup = watched
        try:
            tokens = torch.tensor([list(ids)], device=self.device)
            self.model(tokens, past_key_values=cache, logits_to_keep=1)
        finally:
            self.memory.lookup = None
        assert watched.queries, "no layer searched the memory"
        return watched.queries

    def sentences(self, number: int, seed: int) -> list[Sentence]:
        """Sentences at even depths of what was read, and the chunks that writing each over the text changes."""
        size, length = self.memory.chunk_size, self.memory.num_chunks * self.memory.chunk_size
        needles = evaluation_needles(seed + length, number)
        statements = [self.tokenizer(one.statement, add_special_tokens=False)["input_ids"] for one in needles]
        config, found = self.model.config, []
        for needle, statement, (start, stop) in zip(needles, statements, places_in(length, statements), strict=True):
            plan = plan_edit(config, length, start, stop, len(statement), is_open=True)
            # enough before it for exact numbers
            begin = max(0, plan.first - -(-config.lower_reach // size))
            part = self.text[begin * size : plan.new_stop * size].clone()
            part[start - begin * size : stop - begin * size] = torch.tensor(statement, dtype=part.dtype)
            with evaluating(self.model):
                steps = list(recompute_chunks(self.model, part, plan.first - begin, plan.new_stop - begin, 0))
            edited = ChunkTensors(*(torch.cat(columns, 1) for columns in zip(*steps, strict=True)))
            edited = edited._replace(ends=edited.ends + begin * size)
            chunks = range(start // size, (stop - 1) // size + 1)
            found.append(Sentence(needle.question, chunks, plan.first, edited))
        return found

    @contextmanager
    def written(self, sentence: Sentence) -> Iterator[None]:
        """The sentence is in the memory while this runs."""
        first, stop = sentence.first, sentence.first + sentence.edited.landmarks.shape[1]
        old = ChunkTensors(*(part.clone() for part in self.memory.part(first, stop)))
        self.memory.write(first, sentence.edited)
        yield
        self.memory.write(first, old)


@contextmanager
def placed(index: LandmarkIndex, sentence: Sentence, is_odd: torch.Tensor) -> Iterator[None]:
    """A sketch, or lists, as if made with a sentence in the text: of its chunks those of is_odd (n, Hr) are odd ones.

    In the lists such a chunk changes places with one that was odd.
    """
    first, count = sentence.first, sentence.edited.landmarks.shape[1]
    saved: list[tuple[torch.Tensor, Any, torch.Tensor]] = []

    def put(tensor: torch.Tensor, place: Any, new: torch.Tensor) -> None:
        saved.append((tensor, place, tensor[place].clone()))
        tensor[place] = new

    for head in range(index.landmarks.shape[1]) if index.basis is not None else ():
        small = sentence.edited.landmarks[0, :, head].float() @ index.basis[head]  # (n, d)
        if not isinstance(index, LandmarkLists):
            put(index.sketches, (slice(first, first + count), head), small.to(index.sketches.dtype))
            continue
        members, sketches = index.members[head], index.sketches[head]
        own = torch.stack([(members == number).nonzero()[0, 0] for number in range(first, first + count)])  # (n,)
        put(sketches, own, small.to(sketches.dtype))
        moved = own[torch.tensor(sentence.chunks, device=own.device) - first][is_odd[:, head]]
        moved = moved[moved >= index.num_odd]
        others = torch.arange(index.num_odd, device=own.device)
        others = others[~torch.isin(others, own)][: len(moved)]
        there, here = torch.cat((moved, others)), torch.cat((others, moved))
        put(sketches, there, sketches[here])
        put(members, there, members[here])
    yield
    for tensor, place, old in reversed(saved):
        tensor[place] = old


class Hit(NamedTuple):
    """Of a sentence and a layer: is it among the exact K, and is it found by the others.

    lists: None if none of its chunks among the exact K is surely odd. built: by lists made anew; None: they were not.
    """

    exact: bool
    sketch: bool
    lists: bool | None
    built: bool | None


def sentence_recall(
    bench: Bench, indices: dict[str, LandmarkIndex], number: int, seed: int, builds: int, least: int
) -> dict[str, Any]:
    """How many hidden sentences each lookup finds of those that the exact one finds, by layer."""
    sentences, lists = bench.sentences(number, seed), indices.get("lists")
    sizes = [len(one.chunks) for one in sentences]
    none = [torch.zeros((size, bench.landmarks.shape[1]), dtype=torch.bool) for size in sizes]
    is_odd, nearness = [part.to(bench.device) for part in none], [math.nan] * number
    if isinstance(lists, LandmarkLists):
        own = torch.cat(
            [one.edited.landmarks[0, one.chunks.start - one.first : one.chunks.stop - one.first] for one in sentences]
        )
        group = torch.repeat_interleave(torch.arange(number), torch.tensor(sizes)).to(bench.device)
        far = lists.distances(own, group[:, None] == group) / lists.odd_from  # (n, Hr)
        is_odd = list((far > 1).split(sizes))
        nearness = [float(part.max()) for part in far.split(sizes)]
    rebuilt = set(sorted(range(number), key=lambda i: nearness[i])[:builds]) if lists is not None else set()
    hits: list[list[Hit]] = []
    for i, sentence in enumerate(sentences):
        ids = bench.tokenizer(sentence.question)["input_ids"]
        with bench.written(sentence):
            asked = [one._replace(query=one.query[:, -1:].contiguous(), found=one.found[:, -1:])
                     for one in bench.ask(ids)]  # fmt: skip
            found = {}
            for name, index in indices.items():
                with placed(index, sentence, is_odd[i]):
                    found[name] = [index.search(one.query, bench.topk, scale=one.scale)[0] for one in asked]
            if i in rebuilt:
                anew = LandmarkLists.build(bench.landmarks, least_chunks=least)
                found["built"] = [anew.search(one.query, bench.topk, scale=one.scale)[0] for one in asked]
                del anew
        hits.append([hit(sentence, is_odd[i], {"exact": one.found, **{name: of[layer] for name, of in found.items()}})
                     for layer, one in enumerate(asked)])  # fmt: skip
    return {
        "sentences": number,
        "times_the_limit": {"least": min(nearness), "median": sorted(nearness)[number // 2]} if lists else None,
        "surely_odd": sum(bool(part.all()) for part in is_odd) if lists else None,
        "layers": [summed(layer, [one[layer] for one in hits]) for layer in range(len(hits[0]))],
    }


def hit(sentence: Sentence, is_odd: torch.Tensor, found: dict[str, torch.Tensor]) -> Hit:
    """Of the chunks (1, 1, Hr, K) that each lookup found, where those of is_odd (n, Hr) are surely odd."""

    def holds(name: str) -> torch.Tensor:
        chunks = torch.tensor(sentence.chunks, device=is_odd.device)
        return (found[name][0, 0] == chunks[:, None, None]).any(-1)  # (n, Hr)

    exact = holds("exact")
    by = {name: bool((exact & holds(name)).any()) for name in ("sketch", "built") if name in found}
    sure = exact & is_odd
    lists = bool((sure & holds("lists")).any()) if "lists" in found and bool(sure.any()) else None
    return Hit(bool(exact.any()), by.get("sketch", False), lists, by.get("built"))


def summed(layer: int, hits: Sequence[Hit]) -> dict[str, Any]:
    counted = [one for one in hits if one.exact]
    built = [one for one in counted if one.built is not None]
    lists = sum(bool(one.lists if one.built is None else one.built) for one in counted)
    low, high = wilson_interval(lists, len(counted))
    return {"layer": layer, "exact": len(counted), "sketch": sum(one.sketch for one in counted), "lists": lists,
            "share": lists / max(1, len(counted)), "ci_low": low, "ci_high": high, "built_anew": len(built),
            "built_found": sum(bool(one.built) for one in built),
            "undecided": sum(one.lists is None and one.built is None for one in counted),
            "shortcut_differs": sum(one.built != one.lists for one in built if one.lists is not None)}  # fmt: skip
