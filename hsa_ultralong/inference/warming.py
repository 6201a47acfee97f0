"""What answers will need is run, compiled and captured before the first question; none waits for a compiler then.

Kernels are compiled once for every form. Sizes that differ from call to call (tokens, chunks, slots) are no part of a
form; what is left are a few of them by the size of a memory, the number of lists that are ranked together, and
what a prompt has read so far. Called by serve/worker.py; tests/inference/test_warming.py counts what questions meet and
this did not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from hsa_ultralong.inference.prefixes import Prefixes
from hsa_ultralong.inference.reader import memorize
from hsa_ultralong.memory.chunk_memory import Memory
from hsa_ultralong.nn.views import ChunkTensors, GraphView, Search
from hsa_ultralong.ops import ChunkVisibility, ScoredChunks, combine_topk
from hsa_ultralong.ops._triton import next_power_of_two, shared_memory, triton_runs_on
from hsa_ultralong.ops.chunk_topk.lists import MOST_ENTRIES, MOST_LISTS
from hsa_ultralong.ops.chunk_topk.visibility import READABLE_BY_ALL

# a small piece is read by other kernels than a large one
_FEW_TOKENS = 3


def warm(
    engine: Any, memories: Sequence[Memory] = (), *, piece: int = 512, tell: Callable[[str], object] = lambda _: None
) -> None:
    """Run and capture what answers of a BatchEngine will need; all of its rows are free.

    Args:
        memories: small ones of the kinds that will be asked: one of fewer chunks than a token retrieves, and one of
            twice as many. They are forgotten afterwards.
        piece: most tokens of a prompt that are read at once. tell: takes lines that say what is being done.
    """
    kinds = [None, *memories]
    prefixes, engine.prefixes = engine.prefixes, Prefixes(0)
    try:
        pieces = list(_pieces(engine, piece))
        tell(f"warming up: prompts of up to {sum(pieces):,} tokens, {max(pieces):,} at once, alone and together")
        for memory in kinds:
            _read(engine, [memory], pieces)
        for pair in [[memory, memory] for memory in kinds] + ([kinds[-2:]] if len(kinds) > 2 else []):
            _read(engine, pair, pieces)
        sizes = _rank_sizes(engine)
        if sizes:
            tell(f"warming up: memories of up to {max(sizes) * engine.config.chunk_size:,} tokens and beyond")
            _combine(engine)
        for memory in memories:
            engine.forget(memory)  # a graph that knows it would go with it
        if engine.is_captured:
            tell(f"warming up: steps of {', '.join(map(str, engine.sizes))} rows")
            for count in engine.sizes:
                engine.capture(count)
    finally:
        engine.prefixes = prefixes


def _pieces(engine: Any, piece: int) -> Iterator[int]:
    """Sizes of the pieces of a prompt, large and small ones in turn, until its own chunks are more than twice as many
    as a token retrieves."""
    config = engine.config
    most = min(engine.max_tokens - 1, (2 * config.chunk_topk + 2) * config.chunk_size)
    most = min(most, engine.num_tokens // 2 - 1)
    left = max(0, most - 2 * _FEW_TOKENS)
    yield min(_FEW_TOKENS, most)
    # a prompt of one full chunk, then one of few
    for size in (config.chunk_size, 4 * config.chunk_size, *[piece, _FEW_TOKENS] * left):
        if left <= 0:
            break
        yield min(size, left, piece)
        left -= min(size, left, piece)
    if most > _FEW_TOKENS:
        yield min(_FEW_TOKENS, most - _FEW_TOKENS)


def _read(engine: Any, memories: Sequence[Memory | None], pieces: Sequence[int]) -> None:
    """Read prompts beside one another, one a memory, then decode a token of each."""
    total, room = sum(pieces), sum(pieces) + 1
    readings = []
    for memory in memories:
        if not engine.has_room(room):
            break
        prompt = torch.arange(total) % engine.config.vocab_size
        readings.append(engine.begin(prompt, memory, max_new_tokens=1))
    rows: list[int] = []
    for size in pieces:
        # unlike sizes, whose rows have masked tokens; the last piece evens them out
        sizes = [max(1, size - number) for number in range(len(readings))]
        waiting = [(one, min(count, one.num_left)) for one, count in zip(readings, sizes, strict=True) if one.num_left]
        rows += [row for row in engine.read_together(waiting) if row is not None]
    for reading in readings:
        if reading.logits is None:
            rows.append(engine.read_on(reading))
    if rows:
        engine.step()
    for row in rows:
        engine.leave(row)


def _rank_sizes(engine: Any) -> list[int]:
    """Rank memories of all sizes that are ranked by different forms of a kernel; their numbers of chunks."""
    config, kept = engine.config, engine.config.chunk_topk
    heads, device = config.num_retrieval_heads, engine.device
    query = torch.zeros((1, 1, heads, config.retrieval_dim // heads), dtype=engine.dtype, device=device)
    if not triton_runs_on(query):
        return []
    from hsa_ultralong.ops.chunk_topk.plan import chunks_of_all_forms

    factor = engine.model.model.upper_groups()[0].retriever.factor()
    dim = max(16, next_power_of_two(query.shape[-1]))
    sizes = chunks_of_all_forms(kept, dim, query.element_size(), shared_memory(device.index))
    reader = torch.zeros((1, 1), dtype=torch.int32, device=device)
    with torch.no_grad():
        for count in sizes:
            landmarks = torch.zeros((1, count, *query.shape[2:]), dtype=engine.dtype, device=device)
            everyone = torch.full((1, count), READABLE_BY_ALL, dtype=torch.int32, device=device)
            visible = ChunkVisibility(reader, reader, everyone, torch.zeros_like(everyone))
            chunks = ChunkTensors(landmarks, landmarks, landmarks, everyone, everyone, everyone)
            GraphView(chunks, visible).topk(query, Search(kept, factor))
            del landmarks, chunks
    if query.is_cuda:
        torch.cuda.empty_cache()  # the largest landmarks take 0.5 GB, which nothing needs again
    return sizes


def _combine(engine: Any) -> None:
    """Rank lists of one, two and more memories together, short and long ones."""
    kept, heads = engine.config.chunk_topk, engine.config.num_retrieval_heads
    for count in range(1, MOST_LISTS + 1):
        # more memories than the kernel takes lists make one long one
        most = MOST_ENTRIES if count == MOST_LISTS else min(MOST_ENTRIES, next_power_of_two(count * kept))
        entries = 1
        while entries <= most:
            widths = [max(1, entries // count)] * (count - 1)
            widths.append(max(1, entries - sum(widths)))
            lists = []
            for number, width in enumerate(widths):
                shape = (1, 1, heads, width)
                empty = torch.full(shape, -1, dtype=torch.int32, device=engine.device)
                scores = torch.full(shape, -torch.inf, dtype=torch.float32, device=engine.device)
                lists.append(ScoredChunks(empty, scores, number))
            if sum(widths) <= MOST_ENTRIES:
                combine_topk(lists, topk=kept)
            entries *= 2


def small_memories(model: Any, **options: Any) -> list[Memory]:
    """What to warm up with: memories of the kind that `memorize` makes with these options."""
    return [memorize(model, tokens, **options) for tokens in small_texts(model.config)]


def small_texts(config: Any) -> list[torch.Tensor]:
    """Token ids (n,) of fewer chunks than a token retrieves, and of twice as many."""
    counts = (min(3, config.chunk_topk), 2 * config.chunk_topk + 2)
    return [torch.arange(count * config.chunk_size) % config.vocab_size for count in counts]
