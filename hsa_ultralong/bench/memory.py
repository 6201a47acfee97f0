"""Points of the memory itself: reading speed against length, decoding latency against length, store and format.

Records have the form of docs/results.md (suite memory). Tokens are random: no timing depends on what is read. In a
process group all processes measure the same points; what they do together names the store "device, 2 processes".
Called by `hsa bench memory`; tests/bench/test_memory_benchmark.py.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hsa_ultralong.eval.metadata import peak_host_bytes
from hsa_ultralong.eval.needles_over_ranks import store_label
from hsa_ultralong.files.strict_json import read_json
from hsa_ultralong.inference import DecodingEngine, memorize_together, open_shared, share_out
from hsa_ultralong.memory import LandmarkIndex, MemoryFile, TieredStore, open_memory
from hsa_ultralong.memory.chunk_memory import ChunkMemory, Memory
from hsa_ultralong.memory.stored_memory import SharedMemory
from hsa_ultralong.models import HSACache, HSAForCausalLM

# tokens of a question, and steps before the clock starts
_PROMPT_TOKENS, _WARM_STEPS = 16, 2
# what is read before the clock starts, in pieces of reading on a GPU, and such a piece unless the settings name one
_WARM_PIECES, _WARM_TOKENS = 8, 1 << 16
_DISK_BLOCK = 1 << 23


@dataclass(frozen=True)
class MemorySettings:
    """lengths: tokens memorised. stores and formats: of opened files. file_max: longest memory that is written to a
    file. steps: tokens decoded and timed (the median counts). batches: sequences that share the memory. store,
    key_values, landmarks: where and in which form the memory that is read lies; None is the model's own form.
    compile_layers, tune: decode with fused layers, chosen by measuring (on a GPU)."""

    lengths: tuple[int, ...] = (8192, 65_536, 262_144)
    stores: tuple[str, ...] = ("device", "host", "file")
    formats: tuple[str, ...] = ("bf16", "int8")
    file_max: int = 2**20
    batches: tuple[int, ...] = (1,)
    steps: int = 32
    piece_tokens: int | None = None
    lookups: tuple[str, ...] = ("exact",)
    store: str = "device"
    key_values: str | None = None
    landmarks: str | None = None
    compile_layers: bool = True
    tune: bool = False
    seed: int = 0

    @property
    def form(self) -> str:
        """How records name the form of the memory that is read, "" for the model's own."""
        parts = [self.key_values or "", f"landmarks {self.landmarks}" if self.landmarks else ""]
        return parts[0] if self.key_values == self.landmarks else ", ".join(filter(None, parts))


def continued(path: Path, meta: dict[str, Any]) -> dict[str, Any]:
    """The results file at `path`, or an empty one, ready for a further run: meta is the newest run's, "runs" all."""
    earlier = read_json(path) if path.is_file() else {"meta": {}, "records": []}
    runs = [*earlier["meta"].get("runs", []), {key: meta[key] for key in ("command", "commit", "date")}]
    return {"meta": {**meta, "runs": runs}, "records": earlier["records"]}


def add_record(result: dict[str, Any], record: dict[str, Any]) -> None:
    """Put a record of the newest run in the place of an older one of the same point."""
    fields = ("metric", "preset", "store", "dtype", "tokens", "batch")
    key = [record[name] for name in fields]
    result["records"] = [old for old in result["records"] if [old[name] for name in fields] != key]
    result["records"].append({**record, "run": len(result["meta"]["runs"]) - 1})


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Recorder:
    """Makes records of one model."""

    def __init__(self, model: HSAForCausalLM, name: str, settings: MemorySettings) -> None:
        self.model, self.name, self.settings = model, name, settings
        weight = model.model.embed_tokens.weight
        self.device, self.dtype = weight.device, weight.dtype
        self._is_warm = False

    def record(
        self, metric: str, value: float, tokens: int, *, store: str = "device", format: str = "", batch: int = 1
    ) -> dict[str, Any]:
        dtype = format or {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(self.dtype, "fp32")
        return {
            "metric": metric, "preset": self.name, "store": store, "dtype": dtype, "tokens": tokens, "batch": batch,
            "value": value,
        }  # fmt: skip

    @torch.no_grad()
    def reading(self, tokens: int, path: Path | None = None, format: str = "") -> tuple[Memory, list[dict[str, Any]]]:
        """Memorise random tokens where the settings say, or into a new file in this form; the memory and its records.

        On a GPU eight pieces are read before the clock starts, and what they took, compiling included, is a record
        of its own.
        """
        generator = torch.Generator().manual_seed(self.settings.seed)
        ids = torch.randint(3, self.model.config.vocab_size, (tokens,), generator=generator, dtype=torch.int32)
        is_gpu = self.device.type == "cuda"
        before, found = 0, []
        place: Any = {"store": self.settings.store, "format": self.settings.form}
        if path is not None:
            place = {"store": "file", "format": format}
        if is_gpu:
            if not self._is_warm:
                start, warm = time.perf_counter(), _WARM_PIECES * (self.settings.piece_tokens or _WARM_TOKENS)
                self._memorize(ids[:warm])
                found.append(self.record("warmup_s", time.perf_counter() - start, tokens, **place))
                self._is_warm = tokens >= warm
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
        start = time.perf_counter()
        memory = self._memorize(ids, path, format)
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated(self.device) - before if is_gpu else peak_host_bytes()
        found += [
            self.record("read_s", seconds, tokens, **place),
            self.record("read_tokens_per_s", tokens / seconds, tokens, **place),
            self.record("peak_device_bytes" if is_gpu else "peak_host_bytes", peak, tokens, **place),
        ]
        if path is None:
            found.append(self.record("bytes_per_token", memory.num_bytes / tokens, tokens, **place))
        return memory, found

    @torch.no_grad()
    def reading_together(self, tokens: int) -> list[dict[str, Any]]:
        """Every process memorises its part of the same tokens, as a document of its own; until the last has done so."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        ids = torch.randint(3, self.model.config.vocab_size, (tokens,), generator=generator, dtype=torch.int32)
        own = ids.tensor_split(dist.get_world_size())[dist.get_rank()]
        dist.barrier()
        start = time.perf_counter()
        memorize_together(self.model, own, piece_tokens=self.settings.piece_tokens)
        _synchronize(self.device)
        dist.barrier()
        seconds = time.perf_counter() - start
        place: Any = {"store": label(self.settings.store, is_shared=True), "format": self.settings.form}
        return [
            self.record("read_s", seconds, tokens, **place),
            self.record("read_tokens_per_s", tokens / seconds, tokens, **place),
        ]

    def _memorize(self, ids: torch.Tensor, path: Path | None = None, format: str = "") -> Memory:
        settings = self.settings
        place: Any = {"store": settings.store, "key_values": settings.key_values, "landmarks": settings.landmarks}
        if path is not None:
            place = {"store": path, "key_values": format, "landmarks": landmark_form(format)}
        memory = self.model.memorize(ids, piece_tokens=settings.piece_tokens, **place)
        _synchronize(self.device)
        return memory

    @torch.no_grad()
    def decoding(
        self, memory: Memory, tokens: int, *, store: str = "device", format: str = "", batch: int = 1
    ) -> list[dict[str, Any]]:
        """Milliseconds of one greedy step for sequences that share a memory, and what a store had to fetch.

        On a GPU the time of all steps is shared out: they follow each other without waiting for the host. Records of
        tuned layers name the store "device, tuned".
        """
        is_compiled = self.device.type == "cuda" and self.settings.compile_layers
        generator = torch.Generator().manual_seed(self.settings.seed + 1)
        prompts = torch.randint(3, self.model.config.vocab_size, (batch, _PROMPT_TOKENS), generator=generator)
        engine = DecodingEngine(
            self.model, memory, batch=batch, max_tokens=_PROMPT_TOKENS + _WARM_STEPS + self.settings.steps,
            compile_layers=is_compiled, tune=self.settings.tune,
        )  # fmt: skip
        store += ", tuned" if is_compiled and self.settings.tune else ""
        start = time.perf_counter()
        engine.start(0, prompts[0])
        _synchronize(self.device)
        first = time.perf_counter() - start
        for row in range(1, batch):
            engine.start(row, prompts[row])
        for _ in range(_WARM_STEPS):
            engine.step()
        _synchronize(self.device)
        times, start = [], time.perf_counter()
        for _ in range(self.settings.steps):
            engine.step()
            if self.device.type != "cuda":
                times.append(1e3 * (time.perf_counter() - start))
                start = time.perf_counter()
        _synchronize(self.device)
        times = times or [1e3 * (time.perf_counter() - start) / self.settings.steps]
        found = [
            self.record("decode_ms", sorted(times)[len(times) // 2], tokens, store=store, format=format, batch=batch),
            self.record("first_token_s", first, tokens, store=store, format=format, batch=batch),
        ]
        counts = getattr(_here(memory), "store", None)
        hits, misses = getattr(counts, "num_hits", 0), getattr(counts, "num_misses", 0)
        if hits + misses:
            for metric, value in (
                ("hit_rate", hits / (hits + misses)),
                ("fetch_fraction", misses / max(1, memory.num_chunks)),
            ):
                found.append(self.record(metric, value, tokens, store=store, format=format, batch=batch))
        if isinstance(counts, TieredStore):
            read = torch.cat([indices.flatten() for indices, _ in engine.retrieved])
            read = read[(read >= 0) & (read < memory.num_chunks)]
            share = float(counts.is_on_host(read).float().mean()) if len(read) else 0.0
            found.append(self.record("host_share", share, tokens, store=store, format=format, batch=batch))
        return found

    def opening(
        self, path: Path, store: str, *, format: str = "", lookup: str = "exact"
    ) -> tuple[Memory, list[dict[str, Any]]]:
        """Open a file; the memory and its records."""
        start = time.perf_counter()
        opened = open_shared if dist.is_initialized() else open_memory
        memory = opened(path, store=store, device=self.device, dtype=self.dtype, lookup=lookup)
        _synchronize(self.device)
        seconds = time.perf_counter() - start
        name = label(store, lookup, is_shared=dist.is_initialized())
        return memory, [self.record("open_s", seconds, memory.num_tokens, store=name, format=format)]

    @torch.no_grad()
    def lookup_quality(self, memory: Memory, lookup: str, *, format: str = "") -> list[dict[str, Any]]:
        """Recall of the lookup against the exact scan, for queries of all retrieval layers on text of the memory, and
        the times of one query by both."""
        own = _here(memory)
        index = own.lookup
        assert isinstance(index, LandmarkIndex)
        every = memory.num_chunks  # scoring all candidates is the exact scan
        text = memory.documents[0].tokens[: self.settings.steps][None].long().to(self.device)
        queries: list[tuple[torch.Tensor, Any]] = []

        def keep(query: torch.Tensor, topk: int, *, visible: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
            queries.append((query, options))
            return index.search(query, topk, visible=visible, **options)

        own.lookup = _Observed(keep)
        self.model(text, past_key_values=HSACache(self.model.config, memory=memory), logits_to_keep=1)
        own.lookup = index
        found = []
        for topk in (32, 64):
            shares = []
            for query, options in queries:
                fast = index.search(query, topk, **options)[0]
                exact = index.search(query, topk, num_scored=every, **options)[0]
                shares.append((fast[..., :, None] == exact[..., None, :]).any(-1).float().mean())
            recall = float(torch.stack(shares).mean())
            found.append(self.record(f"recall_{topk}", recall, memory.num_tokens, store=lookup, format=format))
        one, options = queries[0][0][:, :1].contiguous(), queries[0][1]
        for metric, call in (
            ("exact_scan_ms", lambda: index.search(one, 32, num_scored=every, **options)),
            ("lookup_ms", lambda: index.search(one, 32, **options)),
        ):
            times = []
            for _ in range(11):
                start = time.perf_counter()
                call()
                _synchronize(self.device)
                times.append(1e3 * (time.perf_counter() - start))
            found.append(self.record(metric, sorted(times)[5], memory.num_tokens, store=lookup, format=format))
        return found


def _here(memory: Memory) -> Memory:
    """What of a memory this process holds."""
    return memory.own if isinstance(memory, SharedMemory) else memory


class _Observed:
    """A lookup whose searches are seen."""

    is_capturable = False

    def __init__(self, search: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.search = search


def label(store: str, lookup: str = "exact", *, is_shared: bool = False) -> str:
    """How records name a store: "file", "file, sketch", "device, 2 processes"."""
    place = store if lookup == "exact" else f"{store}, {lookup}"
    return store_label(place, dist.get_world_size()) if is_shared else place


def memory_records(
    model: HSAForCausalLM, name: str, settings: MemorySettings, on_record: Callable[[dict[str, Any]], None]
) -> None:
    """Reading and decoding at every length, and through files up to file_max."""
    recorder = Recorder(model, name, settings)
    for tokens in settings.lengths:
        memory, found = recorder.reading(tokens)
        for batch in settings.batches:
            found += recorder.decoding(memory, tokens, store=settings.store, format=settings.form, batch=batch)
        if dist.is_initialized():
            part, place = share_out(memory), label(settings.store, is_shared=True)
            for batch in settings.batches:
                found += recorder.decoding(part, tokens, store=place, format=settings.form, batch=batch)
            del part
        for record in found:
            on_record(record)
        more: Iterator[dict[str, Any]] = iter(())
        if dist.is_initialized():
            # room for what is read next
            del memory
            more = iter(recorder.reading_together(tokens))
        elif tokens <= settings.file_max and isinstance(memory, ChunkMemory):
            more = _through_files(recorder, memory, tokens)
        for record in more:
            on_record(record)


def landmark_form(format: str) -> str:
    """Of a file whose keys and values are in this form; landmarks in fp8 lose too much."""
    return "int8" if format == "fp8" else format


def _disk_seconds(path: Path, num_bytes: int) -> float:
    """Plain writing of so many bytes until they are on disk."""
    block = torch.randint(0, 256, (min(num_bytes, _DISK_BLOCK),), dtype=torch.uint8).numpy().data
    start = time.perf_counter()
    with path.open("wb", buffering=0) as stream:
        for done in range(0, num_bytes, len(block)):
            stream.write(block[: num_bytes - done])
        os.fsync(stream.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds


def _through_files(recorder: Recorder, memory: Memory, tokens: int) -> Iterator[dict[str, Any]]:
    """Reading into a file beside what it cannot be faster than: hashing and writing alone (save_s), the disk alone."""
    with tempfile.TemporaryDirectory(prefix="hsa-bench-") as folder:
        for format in recorder.settings.formats:
            path = Path(folder) / f"{format}.hsa"
            yield from recorder.reading(tokens, path, format)[1]
            shutil.rmtree(path)
            start = time.perf_counter()
            memory.save(path, key_values=format, landmarks=landmark_form(format))
            yield recorder.record("save_s", time.perf_counter() - start, tokens, store="file", format=format)
            with MemoryFile.open(path) as file:
                num_bytes = file.num_bytes
            yield recorder.record("bytes_per_token", num_bytes / tokens, tokens, store="file", format=format)
            seconds = _disk_seconds(Path(folder) / "plain", num_bytes)
            yield recorder.record("disk_s", seconds, tokens, store="file", format=format)
            for store in recorder.settings.stores:
                opened, found = recorder.opening(path, store, format=format)
                found += recorder.decoding(opened, tokens, store=store, format=format)
                yield from found


def file_records(
    model: HSAForCausalLM,
    name: str,
    path: Path,
    settings: MemorySettings,
    on_record: Callable[[dict[str, Any]], None],
) -> None:
    """Opening an existing memory file and decoding on it: what a user waits for, and the memory that it takes."""
    recorder = Recorder(model, name, settings)
    with MemoryFile.open_unverified(path) as file:
        format = file.spec.metadata.get("formats", {}).get("key_values", "")
    for store, lookup in product(settings.stores, settings.lookups):
        memory, found = recorder.opening(path, store, format=format, lookup=lookup)
        tokens, place = memory.num_tokens, label(store, lookup, is_shared=dist.is_initialized())
        for batch in settings.batches:
            found += recorder.decoding(memory, tokens, store=place, format=format, batch=batch)
        found.append(recorder.record("peak_host_bytes", peak_host_bytes(), tokens, store=place, format=format))
        if lookup != "exact":
            found += recorder.lookup_quality(memory, lookup, format=format)
        for record in found:
            on_record(record)
