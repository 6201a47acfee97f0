"""A memory file opened: all at once into device memory, or with keys and values left where they are.

It is ChunkMemory.load, and called by reader.py and file_reader.py; tests/memory/test_saving.py, test_stores.py.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from hsa_ultralong.files.messages import shown
from hsa_ultralong.memory.chunk_memory import ChunkMemory, Continuation, Document, Memory
from hsa_ultralong.memory.columns import from_payload, require_lengths, require_model_columns
from hsa_ultralong.memory.files import MemoryFile, MemoryFileError
from hsa_ultralong.memory.files.reader import require_fingerprint
from hsa_ultralong.memory.half_read import half_read, way_on
from hsa_ultralong.memory.landmark_index import LandmarkIndex
from hsa_ultralong.memory.landmark_lists import LandmarkLists
from hsa_ultralong.memory.landmark_scan import FEWEST_CHUNKS, LandmarkScan, has_native_products
from hsa_ultralong.memory.stored_memory import StoredMemory
from hsa_ultralong.memory.stores import CachedStore, FileStore
from hsa_ultralong.memory.tiers import BLOCK_CHUNKS, QuantizedLandmarks, TieredStore
from hsa_ultralong.nn.views import ChunkTensors, KeyValueStore

logger = logging.getLogger(__name__)
STORES = ("device", "host", "tiered", "file")
LOOKUPS = ("exact", "sketch", "lists")
# chunks converted at a time
_STEP = 4096
_CACHE_BYTES = 256 * 2**20


class StoredDocument(Document):
    """A document of a memory file; its token ids are read when first asked for."""

    def __init__(self, file: MemoryFile, id: int, first_chunk: int, continuation: Continuation | None) -> None:
        record = file.document(id)
        self._file, self._id, self._num_tokens = file, id, record.num_tokens
        self._tokens: torch.Tensor | None = None
        self.first_chunk, self.num_chunks = first_chunk, record.num_chunks
        self.is_open, self.continuation, self.name = record.is_open, continuation, record.name

    @property
    def tokens(self) -> torch.Tensor:  # type: ignore[override]
        if self._tokens is None:
            self._tokens = self._file.document_tokens(self._id)
        return self._tokens

    @tokens.setter
    def tokens(self, value: torch.Tensor) -> None:
        self._tokens, self._num_tokens = value, len(value)

    @property
    def num_tokens(self) -> int:
        return self._num_tokens


def stored_continuation(
    file: MemoryFile, device: torch.device | str, dtype: torch.dtype
) -> tuple[Continuation, torch.Tensor]:
    """State and unfinished chunk's tokens, (n,) int32, of a file's open document, as `pack_continuation` wrote them.

    What a model in another dtype wrote is rounded.

    Raises:
        MemoryFileError: there is none, or no such state, or one of another document.
    """
    document, stored = file.manifest.open_document, file.continuation()
    assert document is not None
    tensors = {} if stored is None else stored[0]
    count = sum(name.endswith("_keys") for name in tensors)
    pairs = [(f"window_{number}_keys", f"window_{number}_values") for number in range(count)]
    states = {"lower", *(name for pair in pairs for name in pair)}
    rest = document.num_tokens - document.num_chunks * file.spec.chunk_size
    problem = None
    if set(tensors) != {*states, "tail_tokens"}:
        problem = "there is none" if stored is None else f"it holds {shown(sorted(tensors))}"
    elif any(not tensors[name].is_floating_point() for name in states):
        problem = "its states are no floating-point numbers"
    elif tensors["tail_tokens"].dtype != torch.int32 or tensors["tail_tokens"].shape != (rest,):
        tail = tensors["tail_tokens"]
        problem = f"tail_tokens are {tuple(tail.shape)} {tail.dtype}, not ({rest},) int32"
    if problem:
        raise MemoryFileError(
            f"{file.path}: {document.label} cannot be gone on with, its continuation is not as a model writes it "
            f"({problem}); delete the document (hsa memory edit --delete) and read it again"
        )
    windows = [(tensors[keys], tensors[values]) for keys, values in pairs]
    return Continuation(windows, tensors["lower"]).to(device, dtype), tensors["tail_tokens"]


def open_memory(
    path: str | Path | MemoryFile,
    *,
    store: str = "file",
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    cache_bytes: int | None = None,
    device_bytes: int | None = None,
    lookup: str = "exact",
    fingerprint: str | None = None,
    part: tuple[int, int] | None = None,
) -> Memory:
    """Open a memory file.

    Args:
        path: its folder, or a snapshot of it, which must not be closed as long as the memory is read.
        store: "device" reads everything into a ChunkMemory, which can be changed; the others make a StoredMemory:
            "host" keeps keys and values in host memory (pinned beside a GPU, which reads them there), "tiered" the
            first `device_bytes` of them (default 0) on the device, "file" all on disk. Landmarks are on the device.
        dtype: that the model reads; default the file's, bf16 for 8-bit formats.
        lookup: "exact" scans all landmarks (int8 ones as they are on a GPU, bf16 ones on a CPU that multiplies them,
            landmark_scan.py), "sketch" a projection of them first (landmark_index.py), "lists" a part of these
            projections (landmark_lists.py). Made anew at every opening.
        cache_bytes: of hot chunks kept ready on the device ("file" only); default 256 MiB.
        fingerprint: refuse another model's memory.
        part: first and last + 1 of the chunks to open; the documents are those of the whole (inference/sharding.py).

    Returns:
        A ChunkMemory for "device", else a StoredMemory: read and copied as any other, changed by `Library` alone.

    Raises:
        MemoryFileError: no memory, another model's, truncated or damaged.
        ValueError: an unknown store or lookup, or bytes that the store does not take.
    """
    if store not in STORES:
        raise ValueError(f"store must be one of {', '.join(STORES)}, got {store!r}")
    if lookup not in LOOKUPS:
        raise ValueError(f"lookup must be one of {', '.join(LOOKUPS)}, got {lookup!r}")
    for name, given, taker in (("cache_bytes", cache_bytes, "file"), ("device_bytes", device_bytes, "tiered")):
        if given is not None and store != taker:
            raise ValueError(f"{name} goes with store={taker!r}, got store={store!r}")
    if isinstance(path, MemoryFile):
        file = path
        require_fingerprint(file.path, file.spec, fingerprint)
        file.read_residents()
    else:
        file = MemoryFile.open(path, fingerprint=fingerprint)
    require_model_columns(file.spec)
    first, stop = part or (0, file.num_chunks)
    kind = file.spec.columns["keys_values"]
    if dtype is None:
        dtype = kind.dtype if kind.dtype.itemsize > 1 else torch.bfloat16
    half = half_read(file.manifest.open_document, file.build_state)
    if half is not None:
        logger.warning("%s: %s; only that much is known here; to finish it, %s", file.path, half, way_on(file.path))
    counts = torch.tensor([document.num_chunks for document in file.documents], dtype=torch.int64)
    firsts = counts.cumsum(0) - counts
    documents = _records(file, firsts.tolist(), device, dtype)
    tensors, scan = _resident(file, firsts, counts, (first, stop), device, dtype, lookup)
    pairs: KeyValueStore = FileStore(file, device, dtype, first)
    if store == "file":
        chunk_bytes = 2 * file.spec.chunk_size * math.prod(kind.shape[2:]) * dtype.itemsize
        room = _CACHE_BYTES if cache_bytes is None else cache_bytes
        pairs = CachedStore(pairs, min(max(1, room // chunk_bytes), max(1, stop - first)))
    elif store != "device":
        pairs = _load_tiers(file, (first, stop), device, dtype, device_bytes or 0)
    k = v = torch.empty((1, 0, *kind.shape[2:]), dtype=dtype, device=device)
    memory: Memory = StoredMemory(
        file.spec.chunk_size, tensors._replace(k=k, v=v), stop - first, documents, file.spec.fingerprint,
        file.spec.is_composable, scan, store=pairs,
    )  # fmt: skip
    if store == "device":
        memory = memory.loaded()
    builds = {"sketch": LandmarkIndex.build, "lists": LandmarkLists.build}
    if lookup in builds:
        memory.lookup = builds[lookup](memory.landmarks[0])
    elif (
        scan is None and store != "device" and stop - first >= FEWEST_CHUNKS and has_native_products(tensors.landmarks)
    ):
        # of a memory that does not change
        memory.lookup = LandmarkScan(tensors.landmarks[0])
    else:
        memory.lookup = scan
    return memory


ChunkMemory.load = staticmethod(open_memory)


def _records(file: MemoryFile, firsts: Sequence[int], device: torch.device | str, dtype: torch.dtype) -> list[Document]:
    is_open = file.manifest.open_document is not None
    continuation = stored_continuation(file, device, dtype)[0] if is_open else None
    return [
        StoredDocument(file, record.id, first, continuation if record.is_open else None)
        for record, first in zip(file.documents, firsts, strict=True)
    ]


def _resident(
    file: MemoryFile,
    firsts: torch.Tensor,
    counts: torch.Tensor,
    part: tuple[int, int],
    device: torch.device | str,
    dtype: torch.dtype,
    lookup: str,
) -> tuple[ChunkTensors, QuantizedLandmarks | None]:
    """What every store has on the device: landmarks, lengths, documents and ends of chunks; k and v are empty."""
    first, stop = part
    segments = torch.repeat_interleave(torch.arange(len(counts)), counts)  # (C,)
    ends = (torch.arange(file.num_chunks) - firsts[segments] + 1) * file.spec.chunk_size
    payload = file.resident("landmarks")[first:stop]
    scales = file.resident("landmarks_scale")[first:stop] if "landmarks_scale" in file.spec.columns else None
    scan = None
    if payload.dtype == torch.int8 and lookup == "exact" and torch.device(device).type == "cuda" and len(payload):
        assert scales is not None
        scan = QuantizedLandmarks(*payload.shape[1:], device, len(payload))  # type: ignore[call-arg]
        scan.put(0, payload[None].to(device), scales[None].to(device))
        landmarks = torch.zeros(1, dtype=dtype, device=device).expand(1, *payload.shape)
    else:
        landmarks = from_payload(payload, scales, device, dtype)[None]  # (1, C, Hr, R)
    lengths = file.resident("lengths")
    require_lengths(lengths, file.documents, file.spec.chunk_size)
    lengths, segments, ends = (x[first:stop].to(device, torch.int32)[None] for x in (lengths, segments, ends))
    nothing = landmarks[:, :0]
    return ChunkTensors(nothing, nothing, landmarks, lengths, segments, ends), scan


def _load_tiers(
    file: MemoryFile, part: tuple[int, int], device: torch.device | str, dtype: torch.dtype, device_bytes: int
) -> TieredStore:
    """Keys and values in the file's own form, copied to the tiers."""
    first, stop = part
    columns = file.spec.columns
    kind = columns["keys_values"]
    row_bytes = sum(columns[name].row_bytes for name in ("keys_values", "keys_values_scale") if name in columns)
    block = min(BLOCK_CHUNKS, max(1, stop - first))
    store = TieredStore(
        kind.shape, format=file.spec.metadata["formats"]["key_values"], device=device, dtype=dtype,
        device_chunks=device_bytes // row_bytes, block_chunks=block,
    )  # fmt: skip
    for begin in range(first, stop, _STEP):
        end = min(begin + _STEP, stop)
        scales = file.read("keys_values_scale", begin, end) if "keys_values_scale" in columns else None
        store.put(begin - first, file.read("keys_values", begin, end), scales)
    return store
