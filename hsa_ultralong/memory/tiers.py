"""Memories larger than the card: keys and values in blocks on the device and in pinned host memory, 8 bits or 16.

A TieredMemory is written like a ChunkMemory, grows block by block without moving what is there, and is read where it
lies (ops/chunk_gather). Landmarks stay on the device, in 16 bits or in int8 with a scan of their own. Made by
inference.memorize(store="host" or "tiered"); opening.open_memory fills a store from a file. tests/memory/test_tiers.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from hsa_ultralong.memory.chunk_memory import ChunkMemory, grown
from hsa_ultralong.memory.quantization import KeyValueFormat, decode, encode, payload_dtype
from hsa_ultralong.memory.stored_memory import StoredMemory
from hsa_ultralong.nn.views import ChunkTensors
from hsa_ultralong.ops import ChunkVisibility
from hsa_ultralong.ops.chunk_gather import ChunkBlocks, gather_chunks
from hsa_ultralong.ops.chunk_topk.quantized import chunk_topk_quantized

_SCALED = ("int8", "fp8")
# chunks of a block: 4M tokens of 64 each, 512 MiB for 64 dimensions of keys and values in 8 bits
BLOCK_CHUNKS = 1 << 16


class TieredStore:
    """Keys and values by chunk range: the first `device_chunks` on the device, the rest in (pinned) host memory."""

    def __init__(
        self,
        row: tuple[int, ...],
        *,
        format: KeyValueFormat,
        device: torch.device | str,
        dtype: torch.dtype,
        device_chunks: int,
        block_chunks: int = BLOCK_CHUNKS,
    ) -> None:
        """row: shape of a chunk's pairs (2, S, Hkv, D). dtype: that the model reads. device_chunks is rounded down to
        whole blocks."""
        self.row, self._format, self.dtype = row, format, dtype
        self.device, self.device_chunks = torch.device(device), device_chunks
        self.blocks, self.num_chunks = ChunkBlocks(block_chunks, self.device), 0

    @property
    def format(self) -> KeyValueFormat:
        return self._format

    def kept(self, first: int, stop: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        size, parts, scales = self.blocks.per_block, [], []
        for number in range(first // size, -(-stop // size)):
            inside = slice(max(first - number * size, 0), min(stop - number * size, size))
            parts.append(self.blocks.payloads[number][inside].cpu())
            scales += [self.blocks.scales[number][inside].cpu()] if self.blocks.scales else []
        return torch.cat(parts), torch.cat(scales) if scales else None

    def _reserve(self, num_chunks: int) -> None:
        size = self.blocks.per_block
        while len(self.blocks.payloads) * size < num_chunks:
            is_above = (len(self.blocks.payloads) + 1) * size <= self.device_chunks
            place = {"device": self.device} if is_above else {"pin_memory": self.device.type == "cuda"}
            payload = torch.empty((size, *self.row), dtype=payload_dtype(self.format), **place)
            is_scaled = self.format in _SCALED
            self.blocks.add(
                payload, torch.empty((size, *self.row[:-1]), dtype=torch.bfloat16, **place) if is_scaled else None
            )

    def write(self, first: int, pairs: torch.Tensor) -> None:
        """Put pairs (n, 2, S, Hkv, D) at chunk `first` and following."""
        self.put(first, *encode(pairs, self.format))

    def put(self, first: int, payload: torch.Tensor, scales: torch.Tensor | None) -> None:
        """Put pairs that are in the store's form already: payload (n, 2, S, Hkv, D), scales (n, 2, S, Hkv) or None."""
        self._reserve(first + len(payload))
        self.num_chunks = max(self.num_chunks, first + len(payload))
        size, done = self.blocks.per_block, 0
        while done < len(payload):
            number, inside = divmod(first + done, size)
            count = min(size - inside, len(payload) - done)
            # the copy is ordered after the kernels that make its source, and frees it for later kernels only
            target = self.blocks.payloads[number][inside : inside + count]
            target.copy_(payload[done : done + count], non_blocking=True)
            if scales is not None:
                target = self.blocks.scales[number][inside : inside + count]
                target.copy_(scales[done : done + count], non_blocking=True)
            done += count

    def gather(self, chunks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """k and v (n, S, Hkv, D) of chunks (n,) in any order, -1 for none, without waiting for the device."""
        pairs = gather_chunks(self.blocks, chunks, self.dtype)
        return pairs[:, 0], pairs[:, 1]

    def fetch(self, chunks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.gather(chunks.to(self.device))

    def is_on_host(self, chunks: torch.Tensor) -> torch.Tensor:
        """Whether each of these chunks (any shape) lies in host memory."""
        return chunks >= self.device_chunks // self.blocks.per_block * self.blocks.per_block

    @property
    def num_bytes(self) -> int:
        parts = [*self.blocks.payloads[:1], *self.blocks.scales[:1]]
        return self.num_chunks * sum(part[0].numel() * part.element_size() for part in parts)


class QuantizedLandmarks:
    """Landmarks in int8 with a bf16 scale per chunk and head, scanned as they are."""

    def __init__(self, heads: int, dim: int, device: torch.device | str, capacity: int = 0) -> None:
        self.payload = torch.empty((1, capacity, heads, dim), dtype=torch.int8, device=device)
        self.scales = torch.empty((1, capacity, heads), dtype=torch.bfloat16, device=device)
        self.num_chunks = 0

    def write(self, first: int, landmarks: torch.Tensor) -> None:
        """Put landmarks (1, n, Hr, R) at chunk `first` and following; there must be room."""
        payload, scales = encode(landmarks, "int8")
        assert scales is not None
        self.put(first, payload, scales)

    def put(self, first: int, payload: torch.Tensor, scales: torch.Tensor) -> None:
        """Put landmarks that are in int8 already: payload (1, n, Hr, R), scales (1, n, Hr)."""
        stop = first + payload.shape[1]
        self.payload[:, first:stop], self.scales[:, first:stop] = payload, scales
        self.num_chunks = max(self.num_chunks, stop)

    def reserve(self, capacity: int) -> None:
        if capacity > self.payload.shape[1]:
            self.payload, self.scales = grown(self.payload, capacity), grown(self.scales, capacity)

    def search(
        self,
        query: torch.Tensor,
        topk: int,
        *,
        visible: ChunkVisibility,
        scale: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """indices and scores (B, T, Hr, min(K, C)) of query (B, T, Hr, R), in the form of chunk_topk."""
        part = slice(0, self.num_chunks)
        return chunk_topk_quantized(query, self.payload[:, part], self.scales[:, part], visible, topk=topk, scale=scale)

    format = "int8"
    is_capturable = True

    def landmarks(self, first: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """Landmarks (1, n, Hr, R) of chunks first..stop."""
        return decode(self.payload[:, first:stop], self.scales[:, first:stop], dtype)

    def kept(self, first: int, stop: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.payload[0, first:stop].cpu(), self.scales[0, first:stop].cpu()

    @property
    def num_bytes(self) -> int:
        return sum(part[:, : self.num_chunks].nbytes for part in (self.payload, self.scales))


@dataclass
class TieredMemory(StoredMemory):
    """A StoredMemory that grows: keys and values in a TieredStore, landmarks in `storage` or in QuantizedLandmarks.

    Chunks are appended, or replaced by as many others; anything that moves chunks is refused.
    """

    store: TieredStore = field(kw_only=True)
    lookup: QuantizedLandmarks | None = None

    def require_changeable(self, what: str, shift: int = 0) -> None:
        if shift:
            raise ValueError(
                "an edit of a memory on tiers must not change its number of chunks; replace as many tokens, or use a "
                "memory file (hsa_ultralong.inference.Library)"
            )

    @staticmethod
    def make(
        plain: ChunkMemory,
        *,
        key_values: KeyValueFormat,
        landmarks: KeyValueFormat,
        device_chunks: int,
        capacity: int = 0,
        block_chunks: int = BLOCK_CHUNKS,
    ) -> TieredMemory:
        """An empty tiered memory in the form of `plain`, an empty ordinary one, which gives shapes, dtype and device.

        Raises:
            ValueError: for landmarks in fp8.
        """
        if landmarks in _SCALED and landmarks != "int8":
            raise ValueError(f"landmarks of a tiered memory are int8 or of 16 bits and more, not {landmarks}")
        parts = plain.storage
        store = TieredStore(
            (2, plain.chunk_size, *parts.k.shape[2:]),
            format=key_values,
            device=parts.k.device,
            dtype=parts.k.dtype,
            device_chunks=device_chunks,
            block_chunks=min(block_chunks, max(1, capacity)) if capacity else block_chunks,
        )
        lookup = None
        if landmarks == "int8":
            heads, dim = parts.landmarks.shape[2:]
            lookup = QuantizedLandmarks(heads, dim, parts.landmarks.device, capacity)
            # shape without content: the scan has the numbers
            blank = parts.landmarks.new_zeros(1).expand(1, 0, *parts.landmarks.shape[2:])
            parts = parts._replace(landmarks=blank)
        else:
            parts = parts._replace(landmarks=parts.landmarks.to(payload_dtype(landmarks)))
        memory = TieredMemory(
            plain.chunk_size, parts, 0, [], plain.fingerprint, plain.is_composable, store=store, lookup=lookup
        )
        memory.reserve(capacity)
        return memory

    def reserve(self, num_chunks: int) -> None:
        capacity = self.storage.lengths.shape[1]
        if num_chunks <= capacity:
            return
        capacity = max(num_chunks, capacity + capacity // 2)
        k, v, landmarks, *rest = self.storage
        if self.lookup is None:
            landmarks = grown(landmarks, capacity)
        else:
            self.lookup.reserve(capacity)
            landmarks = landmarks.new_zeros(1).expand(1, capacity, *landmarks.shape[2:])
        self.storage = ChunkTensors(k, v, landmarks, *(grown(part, capacity) for part in rest))

    def write(self, first: int, chunks: ChunkTensors) -> None:
        count = chunks.landmarks.shape[1]
        stop = first + count
        self.reserve(stop)
        pairs = torch.stack(
            [part[0].detach().unflatten(0, (count, self.chunk_size)) for part in (chunks.k, chunks.v)], 1
        )
        self.store.write(first, pairs)
        if self.lookup is None:
            self.storage.landmarks[:, first:stop] = chunks.landmarks.detach()
        else:
            self.lookup.write(first, chunks.landmarks.detach())
        for name in ("lengths", "segments", "ends"):
            getattr(self.storage, name)[:, first:stop] = getattr(chunks, name)
        self.num_chunks = max(self.num_chunks, stop)

    def splice(self, document: int, first: int, stop: int, chunks: ChunkTensors) -> None:
        self.require_changeable("changed", chunks.landmarks.shape[1] - (stop - first))
        self.write(self.documents[document].first_chunk + first, chunks)
