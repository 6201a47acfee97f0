"""Passes of the model over the documents of a memory: reading (the lower half), and the end of an open one (the upper).

No loop over a text and no files. Called by inference/ and remembering.py; tests/inference/test_reader.py.
"""

from __future__ import annotations

import torch

from hsa_ultralong.memory.chunk_memory import Continuation, Memory
from hsa_ultralong.models import HSACache, HSAForCausalLM
from hsa_ultralong.models.evaluation import evaluating
from hsa_ultralong.models.fingerprint import require_same_model
from hsa_ultralong.models.finite import FiniteCheck
from hsa_ultralong.models.pieces import SplitParts, compiled, run_encoder
from hsa_ultralong.models.wrapped import unwrapped
from hsa_ultralong.nn.views import ChunkTensors, MemoryView
from hsa_ultralong.nn.window_attention import WindowState
from hsa_ultralong.ops import ChunkVisibility


def kept_lower_outputs(model: HSAForCausalLM) -> int:
    """Lower outputs kept of an open document: U + S, so that any of its last S tokens' logits can be had."""
    return model.config.upper_reach + model.config.chunk_size


class DocumentReader:
    """Reads one document into a memory, piece by piece.

    `lower` holds the lower outputs of the last tokens; chunks are written as they fill. Reading can begin inside a
    document (`first_token`) with empty windows: outputs are exact `lower_reach` tokens later (fact 6).
    """

    def __init__(self, model: HSAForCausalLM, *, keep: int, compiled_piece: int | None = None) -> None:
        """keep: lower outputs to keep. compiled_piece: pieces of this length run compiled; None: none do."""
        self.model, self.inner, self.size, self.keep = model, model.model, model.config.chunk_size, keep
        self.compiled_piece = compiled_piece
        self.cache = HSACache(model.config)
        self.lower: torch.Tensor | None = None
        self.check = FiniteCheck()

    def _states(self) -> list[WindowState]:
        return [self.cache.state(number) for number in range(self.model.config.num_lower_layers)]

    def resume(self, continuation: Continuation) -> None:
        for number, (keys, values) in enumerate(continuation.windows):
            state = self.cache.state(number)
            state.keys, state.values = keys, values
        self.lower = continuation.lower

    def continuation(self) -> Continuation:
        windows = []
        for number in range(self.model.config.num_lower_layers):
            state = self.cache.state(number)
            assert state.keys is not None and state.values is not None
            windows.append((state.keys, state.values))
        assert self.lower is not None
        return Continuation(windows, self.lower[:, max(0, self.lower.shape[1] - self.keep) :].clone())

    def read(self, tokens: torch.Tensor) -> torch.Tensor:
        """Lower outputs of the next tokens (n,), (1, n, M); the last `keep` of all stay in `self.lower`."""
        x = self.inner.embed_tokens(tokens[None].long())
        rotary = self.inner.rotary(x, self.cache)
        if x.shape[1] == self.compiled_piece and all(state.length == state.keep for state in self._states()):
            x = self.inner.read_lower(x, rotary, None, self.cache, parts=SplitParts(compiled))
        else:
            x = self.inner.read_lower(x, rotary, None, self.cache)
        self.check.note(x)
        joined = x if self.lower is None else torch.cat((self.lower, x), dim=1)
        self.lower = joined[:, max(0, joined.shape[1] - self.keep) :]
        return joined

    def complete_chunks(
        self, tokens: torch.Tensor, num_tokens: int, num_chunks: int, document: int
    ) -> ChunkTensors | None:
        """Read tokens (n,) after `num_tokens` of its document; the chunks beyond `num_chunks` that are full now."""
        joined = self.read(tokens)
        count = num_tokens + len(tokens)
        complete = count // self.size - num_chunks
        if complete <= 0:
            return None
        begin = joined.shape[1] - (count - num_chunks * self.size)
        return self.encode(joined[:, begin : begin + complete * self.size], num_chunks, document)

    def encode(self, hidden: torch.Tensor, first_chunk: int, document: int, length: int | None = None) -> ChunkTensors:
        """Chunks of lower outputs (1, n*S, M), the first being chunk `first_chunk` of document number `document`."""
        chunks = hidden.unflatten(1, (-1, self.size))  # (1, n, S, M)
        count = chunks.shape[1]
        lengths = torch.full((1, count), self.size, dtype=torch.int32, device=hidden.device)
        if length is not None:
            lengths[:, -1] = length
        if self.compiled_piece == count * self.size:
            k, v, landmarks = compiled(run_encoder)(self.inner.chunk_encoder, chunks)
        else:
            k, v, landmarks = self.inner.chunk_encoder(chunks, None if length is None else lengths)
        self.check.note(k, v, landmarks)
        index = torch.arange(first_chunk, first_chunk + count, dtype=torch.int32, device=hidden.device)[None]
        return ChunkTensors(k, v, landmarks, lengths, torch.full_like(index, document), (index + 1) * self.size)

    def encode_short(self, hidden: torch.Tensor, chunk: int, document: int) -> ChunkTensors:
        """The short chunk of a closed document's last m < S lower outputs, (1, m, M)."""
        length = hidden.shape[1]
        padded = torch.nn.functional.pad(hidden, (0, 0, 0, self.size - length))
        return self.encode(padded, chunk, document, length)


def document_view(memory: Memory, document: int, positions: torch.Tensor) -> MemoryView:
    """The memory as tokens at `positions` (1, T) of one of its documents see it: their own past, all of the others."""
    segments = torch.full_like(positions, document)
    tensors = memory.tensors
    visible = ChunkVisibility(segments, positions, tensors.segments, tensors.ends, "past")
    return memory.view(visible, is_for_all=False)


def replay_upper(model: HSAForCausalLM, memory: Memory, cache: HSACache | None) -> torch.Tensor:
    """Run the upper decoder over the kept lower outputs of the open document, (1, n, M) after the final norm.

    The last n - U positions are exact; with `cache`, the upper windows afterwards are those of the document's end.
    """
    document = memory.open_document
    assert document is not None and document.continuation is not None
    lower = document.continuation.lower
    positions = torch.arange(
        document.num_tokens - lower.shape[1], document.num_tokens, dtype=torch.int32, device=lower.device
    )[None]
    views = [document_view(memory, len(memory.documents) - 1, positions)] if memory.num_chunks else []
    inner = model.model
    return inner.norm(inner.decode_upper(lower, inner.rotary(lower, None), views, None, cache))


def last_logits(model: HSAForCausalLM, memory: Memory, num_logits: int = 1) -> torch.Tensor:
    """Logits (num_logits, V) of the last tokens of the memory's open document, equal to one full forward's.

    Raises:
        ValueError: without an open document, or for more than chunk_size logits.
    """
    model = unwrapped(model)
    require_same_model(model, memory)
    if memory.open_document is None:
        raise ValueError("the memory has no open document; memorise with close=False")
    if not 1 <= num_logits <= model.config.chunk_size:
        raise ValueError(f"num_logits must be 1..{model.config.chunk_size}, got {num_logits}")
    with evaluating(model):
        hidden = replay_upper(model, memory, None)
        return model.lm_head(hidden[0, -num_logits:])
