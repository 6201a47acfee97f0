"""What a lookup that reads a part of a memory loses and gains at several sizes, with real text and real weights.

    python scripts/lookup_recall.py checkpoints/nano --shards SHARDS --chunks 65536,262144,1048576 -o runs/lookup
    python scripts/lookup_recall.py checkpoints/nano --chunks 4096 --least 4096 --sentences 20 -o runs/small

One document is read on and on; at each size the exact lookup, the sketch and the lists (docs/memory.md) answer the same
queries of all retrieval layers:
- of plain text: which of the exact K are found, in passages of a text apart (Opticks without --queries);
- of the question about a hidden sentence, one in the text at a time, its chunks written by an exact edit: is its chunk
  found, where the exact K hold it. Lists are not made anew for each: a chunk farther from all others than the least odd
  one would be odd, and is put among them. The --builds sentences that are least far have the lists made anew with them
  in place, which also checks this; the others that are not far enough are undecided and count as lost.
Then the time of one query, the share of sketches looked at, and the time to make sketch and lists.

A text too short for the largest size is followed by its lines in new orders. Written: records.jsonl, a line a size,
and summary.json. The same command goes on with the sizes that are missing; more may be asked for.
tests/test_lookup_recall.py.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lookup_sentences import PIECE, Bench, sentence_recall

from hsa_ultralong.cli.common import haystack, load_model
from hsa_ultralong.cli.numbers import parse_counts
from hsa_ultralong.eval.haystack import count_distinct, recombined
from hsa_ultralong.eval.intervals import draws, middle
from hsa_ultralong.eval.metadata import peak_host_bytes, run_metadata, write_json
from hsa_ultralong.eval.recorded_run import RecordedRun, model_settings, tokens_digest
from hsa_ultralong.inference import memorize
from hsa_ultralong.inference.placement import available_device_bytes, tiered_memory
from hsa_ultralong.memory.chunk_memory import Memory
from hsa_ultralong.memory.landmark_index import LandmarkIndex
from hsa_ultralong.memory.landmark_lists import LandmarkLists
from hsa_ultralong.ops import ChunkVisibility, chunk_topk
from hsa_ultralong.ops._common import blocks
from hsa_ultralong.ops.chunk_topk.visibility import READABLE_BY_ALL

# of a passage the tokens, and those at its end whose queries count
PASSAGE, COUNTED = 64, 16
# device memory left for making lists, a chunk: sketches thrice, points and their copies in fp32, for 64 directions
_WORK_BYTES = 1536


def timed(device: torch.device, call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and its seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def median_ms(device: torch.device, call: Callable[[], Any]) -> float:
    times = [timed(device, call)[1] for _ in range(14 if device.type == "cuda" else 6)][3:]
    return round(1e3 * sorted(times)[len(times) // 2], 4)


def scan(query: torch.Tensor, landmarks: torch.Tensor, topk: int) -> torch.Tensor:
    """The best chunks (1, T, Hr, K) of queries (1, T, Hr, R) by plain products, block after block."""
    rows = query[0].transpose(0, 1).float()  # (Hr, T, R)
    best, chosen = rows.new_empty((*rows.shape[:2], 0)), rows.new_empty((*rows.shape[:2], 0)).long()
    for start, stop in blocks(len(landmarks), 1 << 17):
        products = rows @ landmarks[start:stop].float().permute(1, 2, 0)  # (Hr, T, n)
        numbers = torch.arange(start, stop, device=rows.device).expand(products.shape)
        best, kept = torch.cat((best, products), -1).topk(min(topk, stop), sorted=False)
        chosen = torch.cat((chosen, numbers), -1).gather(-1, kept)
    return chosen.transpose(0, 1)[None].to(torch.int32)


def shared(exact: torch.Tensor, found: torch.Tensor) -> float:
    """Share of the chunks (..., K) that are also found."""
    return float((exact[..., :, None] == found[..., None, :]).any(-1).float().mean())


def plain_recall(
    bench: Bench, indices: dict[str, LandmarkIndex], passages: Sequence[Sequence[int]]
) -> list[dict[str, Any]]:
    """Recall of every lookup in every layer, the mean over passages with its bootstrap interval."""
    shares: dict[tuple[str, int], list[float]] = {}
    for ids in passages:
        for layer, asked in enumerate(bench.ask(ids)):
            query, exact = asked.query[:, -COUNTED:].contiguous(), asked.found[:, -COUNTED:]
            for name, index in indices.items():
                found = index.search(query, bench.topk, scale=asked.scale)[0]
                shares.setdefault((name, layer), []).append(shared(exact, found))
    records = []
    for (name, layer), values in shares.items():
        means = np.asarray(values)[draws(len(values), np.random.default_rng(0))].mean(1)
        low, high = middle(means)
        records.append({"lookup": name, "layer": layer, "recall": float(np.mean(values)), "ci_low": low,
                        "ci_high": high, "passages": len(values), "queries": len(values) * COUNTED})  # fmt: skip
    return records


def one_size(bench: Bench, passages: Sequence[Sequence[int]], options: argparse.Namespace) -> dict[str, Any]:
    """Everything measured at the size that was read."""
    chunks, device = bench.memory.num_chunks, bench.device
    landmarks = bench.landmarks
    # what a first call costs is no part of any time
    LandmarkLists.build(landmarks[: 1 << 16], least_chunks=options.least)
    sketch, sketch_seconds = timed(device, lambda: LandmarkIndex.build(landmarks))
    lists, lists_seconds = timed(device, lambda: LandmarkLists.build(landmarks, least_chunks=options.least))
    say(f"{chunks:,} chunks: sketch made in {sketch_seconds:.1f} s, lists in {lists_seconds:.1f} s")
    indices: dict[str, LandmarkIndex] = {"sketch": sketch}
    made: dict[str, Any] = {"sketch": {"seconds": sketch_seconds, "bytes": sketch.num_bytes}}
    if isinstance(lists, LandmarkLists):
        indices["lists"] = lists
        made["lists"] = {"seconds": lists_seconds, "bytes": lists.num_bytes, "odd": lists.num_odd,
                         "scanned": lists.num_scanned(bench.topk) / chunks}  # fmt: skip
    asked = bench.ask(passages[0])
    agrees = [shared(scan(one.query[:, -1:], landmarks, bench.topk), one.found[:, -1:]) for one in asked]
    query, scale = asked[0].query[:, -1:].contiguous(), asked[0].scale
    nobody = torch.zeros((1, 1), dtype=torch.int32, device=device)
    every = torch.full((1, chunks), READABLE_BY_ALL, dtype=torch.int32, device=device)
    visible = ChunkVisibility(nobody, nobody, every, torch.zeros_like(every))
    times = {"exact": median_ms(
        device, lambda: chunk_topk(query, landmarks[None], visible, topk=bench.topk, scale=scale)
    )}  # fmt: skip
    for name in indices:
        times[name] = median_ms(device, lambda name=name: indices[name].search(query, bench.topk, scale=scale))
    say(f"{chunks:,} chunks: ms a query {times}")
    plain = plain_recall(bench, indices, passages)
    say(f"{chunks:,} chunks: recall {[(one['lookup'], one['layer'], round(one['recall'], 4)) for one in plain]}")
    hidden = sentence_recall(bench, indices, options.sentences, options.seed, options.builds, options.least)
    layers = [(one["lists"], one["exact"]) for one in hidden["layers"]]
    say(f"{chunks:,} chunks: sentences found by lists, of those that exact finds: {layers}")
    dims = None if sketch.basis is None else sketch.basis.shape[-1]
    return {"chunks": chunks, "landmark_dim": landmarks.shape[-1], "sketch_dim": dims, "made": made, "query_ms": times,
            "exact_agrees_with_plain_scan": min(agrees), "plain": plain, "hidden": hidden}  # fmt: skip


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def peak_device_bytes(device: torch.device) -> int | None:
    """Of the process so far."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else None


def empty_memory(model: Any, chunks: int) -> Memory:
    """Room for so many chunks; on a GPU keys and values in int8, in host memory where the card is full."""
    device = model.model.embed_tokens.weight.device
    if device.type != "cuda":
        return tiered_memory(model, chunks, store="device")
    landmark_bytes = chunks * 2 * model.config.retrieval_dim
    room = available_device_bytes(device) - landmark_bytes - chunks * _WORK_BYTES
    return tiered_memory(model, chunks, store="tiered", key_values="int8", device_bytes=max(0, room))


def write(run: RecordedRun, command: str) -> None:
    """summary.json of the sizes so far."""
    meta = run_metadata(command, run.settings["seed"], settings=run.settings)
    records = sorted(run.records, key=lambda record: record["chunks"])
    write_json(run.folder / "summary.json", {"meta": meta, "records": records})


def measure(
    model: Any, tokenizer: Any, base: torch.Tensor, run: RecordedRun, passages: Sequence[Sequence[int]],
    options: argparse.Namespace, command: str,
) -> None:  # fmt: skip
    """Add the sizes that are missing, and write summary.json after each."""
    done = {record["chunks"] for record in run.records}
    sizes = [chunks for chunks in sorted(set(options.chunks)) if chunks not in done]
    if not sizes:
        return
    device, size = model.model.embed_tokens.weight.device, model.config.chunk_size
    text = recombined(base.to(device), sizes[-1] * size, tokenizer, options.seed)
    say(f"a text of {len(text):,} tokens, {len(base):,} as they were")
    if device.type == "cuda":
        # compiles the layers, which is no part of any size's reading
        memorize(model, text[: 3 * PIECE["cuda"]], piece_tokens=PIECE["cuda"])
    bench = Bench(model, tokenizer, empty_memory(model, sizes[-1]), text, model.config.chunk_topk)
    for chunks in sizes:
        before = bench.memory.num_chunks
        _, seconds = timed(device, lambda chunks=chunks: bench.read_to(chunks))
        say(f"{chunks - before:,} chunks read in {seconds:.1f} s")
        record = one_size(bench, passages, options)
        meta = run_metadata("", options.seed)
        record |= {"tokens": chunks * size, "read_chunks": chunks - before, "read_seconds": seconds,
                   "distinct_chunks": count_distinct(text[: chunks * size], size, device),
                   "commit": meta["commit"], "hardware": meta["hardware"], "date": meta["date"],
                   "peak_host_bytes": peak_host_bytes(), "peak_device_bytes": peak_device_bytes(device)}  # fmt: skip
        run.add([record])
        write(run, command)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model folder of this library")
    parser.add_argument("--shards", type=Path, help="folder of token shards, whose documents are the text")
    parser.add_argument("--text", type=Path, action="append", help="file or folder, as of hsa eval; default Opticks")
    parser.add_argument("--queries", type=Path, action="append", help="text of the plain queries; default Opticks")
    parser.add_argument("--chunks", default="65536,262144,1048576", help="sizes, each a number of chunks")
    parser.add_argument("--sentences", type=int, default=100, help="hidden at each size, one at a time")
    parser.add_argument("--passages", type=int, default=64, help=f"of {PASSAGE} tokens; the last {COUNTED} ask")
    parser.add_argument("--builds", type=int, default=8, help="sentences for which lists are made anew")
    parser.add_argument("--least", type=int, default=1 << 16, help="chunks from which there are lists")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the run")
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(given)
    try:
        options.chunks = parse_counts(options.chunks, "--chunks")
        if min(options.sentences, options.passages) < 1 or options.builds < 0:
            raise ValueError("--sentences and --passages: 1 or more, --builds: 0 or more")
        model, tokenizer = load_model(options.model, options.device, options.dtype)
        longest = max(options.chunks) * model.config.chunk_size
        base = haystack(tokenizer, options.text, "text", "auto", options.shards, longest)
        asked = haystack(tokenizer, options.queries, "text", "auto", None, 1 << 24)
        if len(asked) < PASSAGE:
            raise ValueError(f"--queries: {PASSAGE} tokens or more, got {len(asked)}")
        starts = np.linspace(0, len(asked) - PASSAGE, options.passages).astype(int).tolist()
        passages = [asked[start : start + PASSAGE].tolist() for start in starts]
        settings = {**model_settings(model), "seed": options.seed, "sentences": options.sentences,
                    "passages": options.passages, "builds": options.builds, "least": options.least,
                    "queries": tokens_digest(asked), "shards": options.shards is not None,
                    "text": [path.name for path in options.text or []]}  # fmt: skip
        with RecordedRun(options.output, settings) as run:
            command = "python scripts/lookup_recall.py " + shlex.join(given)
            measure(model, tokenizer, base, run, passages, options, command)
            write(run, command)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
