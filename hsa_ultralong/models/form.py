"""Does what a file holds fit the model? A file's checksums say that it is whole, its fingerprint whose it says it is.

Every way from a file to the model passes here, so that a crafted file is one line and no error of shapes in a layer.
Called by fingerprint.require_same_model and by library.py; tests/models/test_form.py.
"""

from __future__ import annotations

import torch

from hsa_ultralong.memory import MemoryFileError, MemorySpec
from hsa_ultralong.memory.chunk_memory import Continuation, Memory
from hsa_ultralong.memory.columns import memory_spec, require_model_columns
from hsa_ultralong.models import HSACache, HSAConfig


def model_spec(config: HSAConfig, key_values: str, landmarks: str, **others: object) -> MemorySpec:
    """The form of this model's memories; `others` are further arguments of memory_spec.

    Raises:
        ValueError: an unknown format.
    """
    assert config.head_dim is not None
    return memory_spec(
        chunk_size=config.chunk_size,
        num_memory_heads=config.num_memory_heads,
        head_dim=config.head_dim,
        num_retrieval_heads=config.num_retrieval_heads,
        retrieval_dim=config.retrieval_dim,
        key_values=key_values,  # type: ignore[arg-type]
        landmarks=landmarks,  # type: ignore[arg-type]
        is_composable=config.is_composable,
        **others,  # type: ignore[arg-type]
    )


def require_model_spec(config: HSAConfig, spec: MemorySpec, who: str) -> None:
    """Refuse a file of another form; its fingerprint is the file's own word.

    Raises:
        MemoryFileError: names the columns.
    """
    require_model_columns(spec)
    others = {"fingerprint": spec.fingerprint, "tokenizer": spec.tokenizer}
    model_spec(config, **spec.metadata["formats"], **others).require_compatible(spec, who)


def require_form(config: HSAConfig, memory: Memory) -> None:
    """Refuse a memory whose chunks or open document have other shapes than the model's.

    Raises:
        MemoryFileError: names the shape.
    """
    heads = config.num_retrieval_heads
    for name, found, needed in (
        ("chunks", (memory.chunk_size,), (config.chunk_size,)),
        ("landmarks", tuple(memory.landmarks.shape[2:]), (heads, config.retrieval_dim // heads)),
        ("keys", tuple(memory.storage.k.shape[2:]), (config.num_memory_heads, config.head_dim)),
        ("values", tuple(memory.storage.v.shape[2:]), (config.num_memory_heads, config.head_dim)),
    ):
        if found != needed:
            raise MemoryFileError(
                f"this memory's {name} have the shape {found}, the model's {needed}; memorise the text again with it"
            )
    document = memory.open_document
    if document is not None and document.continuation is not None:
        require_state(config, document.continuation, document.num_tokens)


def require_state(config: HSAConfig, state: Continuation, num_tokens: int) -> None:
    """Refuse a continuation that no reading of `num_tokens` tokens by this model gives.

    Raises:
        MemoryFileError: names what does not fit.
    """
    cache, heads = HSACache(config), (config.num_key_value_heads, config.head_dim)
    problem = None
    if len(state.windows) != config.num_lower_layers:
        problem = f"windows of {len(state.windows)} layers, not {config.num_lower_layers}"
    for number, pair in enumerate(state.windows[: config.num_lower_layers]):
        # what the window needs; reading from the beginning keeps a little more
        least, most = (min(num_tokens, keys) for keys in (config.sliding_window - 1, cache.state(number).keep))
        for part in pair:
            length = part.shape[1] if part.ndim == 4 else -1
            if part.shape != (1, length, *heads) or part.shape != pair[0].shape or not least <= length <= most:
                problem = f"a window {tuple(part.shape)}, not (1, {least}..{most}, {heads[0]}, {heads[1]})"
    # enough to close the document: the lower outputs of its unfinished chunk
    least, length = min(num_tokens, config.chunk_size), state.lower.shape[1] if state.lower.ndim == 3 else -1
    if state.lower.shape != (1, length, config.lower_width) or not least <= length <= num_tokens:
        problem = f"lower outputs {tuple(state.lower.shape)}, not (1, {least}..{num_tokens}, {config.lower_width})"
    if problem:
        raise MemoryFileError(
            f"the continuation of this memory's open document does not fit the model: {problem}; delete the document "
            "(hsa memory edit --delete) and read it again"
        )


def require_vocabulary(config: HSAConfig, tokens: torch.Tensor, label: str) -> None:
    """Refuse stored token ids (n,) that the model does not have.

    Raises:
        MemoryFileError: names the document.
    """
    low, high = (int(tokens.min()), int(tokens.max())) if len(tokens) else (0, 0)
    if low < 0 or high >= config.vocab_size:
        raise MemoryFileError(
            f"{label} holds token ids {low}..{high}, the model has 0..{config.vocab_size - 1}; delete the document "
            "(hsa memory edit --delete) and read it again"
        )
