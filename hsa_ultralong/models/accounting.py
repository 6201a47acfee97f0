"""What a configuration costs, in closed form and without building it: parameters, FLOP, bytes of memory.

FLOP follow docs/results.md, bytes follow facts 5 to 7 of docs/architecture.md. Used by `hsa plan` and the training
metrics; checked against built models and memories in tests/models/test_accounting.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from hsa_ultralong.models.cache_hsa import REWIND
from hsa_ultralong.models.configuration_hsa import HSAConfig

_INT32 = 4
# lengths, segments and ends of ChunkMemory
_BOOKKEEPING_PER_CHUNK = 3 * _INT32


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters; embedding + lower + encoder + upper + norm + head = total.

    Attributes:
        total: all of them. active: those that one token uses (all but the experts that it does not pass).
        embedding: the table. head: 0 if tied to it.
        lower: lower decoder. encoder: chunk encoder with its key, value and landmark projections.
        upper: retrieval, HSA and window layers of all groups. norm: the final one.
        per_token: active ones without the embedding table, head included: what multiplies each token.
        reading: active ones of lower decoder and encoder: all that memorising runs (fact 5).
    """

    total: int
    active: int
    embedding: int
    lower: int
    encoder: int
    upper: int
    norm: int
    head: int
    per_token: int
    reading: int


@dataclass(frozen=True)
class MemoryBytes:
    """Bytes of the memory of one document.

    Attributes:
        keys_values, landmarks: what fact 7 counts. bookkeeping: three int32 per chunk.
        token_ids: kept for edits, sources and rebuilding. continuation: fixed state of an open document.
    """

    keys_values: int
    landmarks: int
    bookkeeping: int
    token_ids: int
    continuation: int

    @property
    def tensors(self) -> int:
        """ChunkMemory.num_bytes: keys, values, landmarks and bookkeeping."""
        return self.keys_values + self.landmarks + self.bookkeeping

    @property
    def total(self) -> int:
        return self.tensors + self.token_ids + self.continuation

    @property
    def landmark_share(self) -> float:
        """Landmarks as a fraction of keys, values and landmarks: the part that every token scans."""
        return self.landmarks / max(self.landmarks + self.keys_values, 1)


def _head_dim(config: HSAConfig) -> int:
    assert config.head_dim is not None
    return config.head_dim


def _swiglu(width: int, inner: int) -> int:
    return 3 * width * inner


def _attention(config: HSAConfig, use_qk_norm: bool | None = None) -> int:
    """Query, key, value and output projections and the two head norms."""
    use_qk_norm = config.use_qk_norm if use_qk_norm is None else use_qk_norm
    dim = _head_dim(config)
    projections = 2 * config.hidden_size * dim * (config.num_attention_heads + config.num_key_value_heads)
    return projections + (2 * dim if use_qk_norm else 0)


def _qkv_biases(config: HSAConfig, use_qkv_bias: bool | None = None) -> int:
    use_qkv_bias = config.use_qkv_bias if use_qkv_bias is None else use_qkv_bias
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    return heads * _head_dim(config) if use_qkv_bias else 0


def _feed_forward(config: HSAConfig, layer: int) -> tuple[int, int]:
    """(total, active) parameters of the feed-forward block of decoder layer `layer`."""
    width = config.hidden_size
    if config.num_experts == 0 or layer < config.num_dense_layers:
        dense = _swiglu(width, config.intermediate_size)
        return dense, dense
    assert config.moe_intermediate_size is not None
    expert = _swiglu(width, config.moe_intermediate_size)
    always = width * config.num_experts + config.num_shared_experts * expert
    return always + config.num_experts * expert, always + config.num_experts_per_token * expert


def _chunk_reading(config: HSAConfig) -> int:
    """What retrieves chunks and attends to them in one layer."""
    width, dim = config.hidden_size, _head_dim(config)
    retrieval = width + width * config.retrieval_dim
    retrieval += config.num_retrieval_heads if config.learned_temperature else 0
    retrieval += 1 if config.position_decay else 0
    hsa = width + 2 * width * config.num_attention_heads * dim + (dim if config.use_qk_norm else 0)
    hsa += config.num_attention_heads * dim if config.use_qkv_bias else 0
    return retrieval + hsa


def _hsa_extra(config: HSAConfig) -> int:
    """What an HSA layer and its retrieval have besides the feed-forward block and its norm."""
    window = config.hidden_size + _attention(config) + _qkv_biases(config) if config.hsa_sliding_window else 0
    return _chunk_reading(config) + window


def _encoder(config: HSAConfig) -> int:
    width, dim = config.hidden_size, _head_dim(config)
    assert config.encoder_intermediate_size is not None
    layer = _attention(config, config.encoder_qk_norm) + _qkv_biases(config, config.encoder_qkv_bias)
    layer += _swiglu(width, config.encoder_intermediate_size) + 2 * width
    keys_values = 2 * width * config.num_memory_heads * dim + (dim if config.use_qk_norm else 0)
    # CLS and the final norm, one width each
    return config.num_encoder_layers * layer + 2 * width + keys_values + width * config.retrieval_dim


def count_expert_parameters(config: HSAConfig, first_layer: int = 0) -> int:
    """Parameters of all routed experts from a decoder layer on: what ParallelConfig.expert spreads."""
    if config.num_experts == 0:
        return 0
    assert config.moe_intermediate_size is not None
    layers = max(0, config.num_hidden_layers - max(config.num_dense_layers, first_layer))
    return layers * config.num_experts * _swiglu(config.hidden_size, config.moe_intermediate_size)


def count_memory_parameters(config: HSAConfig) -> int:
    """Parameters that make or read the memory (train.lora.is_memory)."""
    skip = config.hidden_size**2 if config.embedding_skip else 0
    return _encoder(config) + skip + len(set(config.reading_layers)) * _chunk_reading(config)


def count_parameters(config: HSAConfig) -> ParameterCount:
    """Parameters of HSAForCausalLM(config), buffers not counted."""
    width = config.hidden_size
    reading = set(config.reading_layers)
    lower = active_lower = upper = active_upper = 0
    for layer in range(config.num_hidden_layers):
        total, active = _feed_forward(config, layer)
        above = layer - config.num_lower_layers
        is_hsa = layer in reading
        rest = width + (_hsa_extra(config) if is_hsa else width + _attention(config) + _qkv_biases(config))
        if above < 0:
            lower, active_lower = lower + rest + total, active_lower + rest + active
        else:
            upper, active_upper = upper + rest + total, active_upper + rest + active
    encoder, embedding = _encoder(config), config.vocab_size * width
    if config.embedding_skip:
        lower, active_lower = lower + width * width, active_lower + width * width
    head = 0 if config.tie_word_embeddings else embedding
    per_token = active_lower + encoder + active_upper + width + embedding
    return ParameterCount(
        total=embedding + lower + encoder + upper + width + head,
        active=per_token + head,
        embedding=embedding,
        lower=lower,
        encoder=encoder,
        upper=upper,
        norm=width,
        head=head,
        per_token=per_token,
        reading=active_lower + encoder,
    )


def _keys_in_window(window: int, context: int, average: bool) -> float:
    """min(W, t + 1) keys at position t = context, or the mean over t = 0 .. context - 1."""
    if not average:
        return min(window, context + 1)
    full = max(context - window, 0)
    start = context - full
    return (start * (start + 1) / 2 + full * window) / context


def _visible_chunks(limit: int | None, size: int, context: int, average: bool) -> float:
    """min(limit, floor(t / S)) chunks at position t = context, or the mean over t = 0 .. context - 1 (fact 1)."""
    if not average:
        return min(context // size, limit) if limit is not None else context // size
    chunks = context // size
    if limit is not None and chunks > limit:
        return (size * limit * (limit - 1) / 2 + (context - size * limit) * limit) / context
    return (size * chunks * (chunks - 1) / 2 + (context - size * chunks) * chunks) / context


def _check_context(context: int) -> None:
    if context < 1:
        raise ValueError(f"context must be at least 1 token, got {context}")


def flops_per_token(config: HSAConfig, context: int, training: bool = False, average: bool | None = None) -> float:
    """FLOP that one token costs, as docs/results.md defines them for MFU; recomputation is not counted.

    Forward: 2 * parameters (active, without the embedding table, head included) + attention on visible keys: windows
    4 * Hq * D * min(W, t + 1), HSA 4 * Hq * D * S * min(K, C), retrieval 2 * Hr * R * C, with C = floor(t / S) visible
    chunks. Training: 3 times that. The encoder's attention inside a chunk is left out (under 1%).

    Args:
        context: number of tokens.
        average: the mean over a sequence of `context` tokens (default in training), or the cost of the one token that
            comes after `context` others (default otherwise: decoding).
    """
    _check_context(context)
    mean = training if average is None else average
    per_key = 4 * config.num_attention_heads * _head_dim(config)
    size, groups = config.chunk_size, config.num_upper_groups
    windows = config.num_hidden_layers - groups
    attention = windows * per_key * _keys_in_window(config.sliding_window, context, mean)
    if config.hsa_sliding_window:
        attention += groups * per_key * _keys_in_window(config.hsa_sliding_window, context, mean)
    attention += groups * per_key * size * _visible_chunks(config.chunk_topk, size, context, mean)
    attention += groups * 2 * config.retrieval_dim * _visible_chunks(None, size, context, mean)
    return (3 if training else 1) * (2 * count_parameters(config).per_token + attention)


def full_attention_training_flops(config: HSAConfig, context: int, parameters: int, layers: int) -> float:
    """FLOP of training a transformer of the config's heads with full attention (baselines/) on one token: 6 *
    parameters (tied embedding once, as the head) + 3 * attention on the visible keys, (T + 1) / 2 on average."""
    _check_context(context)
    per_key = 4 * config.num_attention_heads * _head_dim(config)
    return 6 * parameters + 3 * layers * per_key * (context + 1) / 2


def reading_flops_per_token(config: HSAConfig) -> float:
    """FLOP to memorise one token: lower decoder with full windows and encoder, whatever the context (fact 5)."""
    per_key = 4 * config.num_attention_heads * _head_dim(config)
    return 2 * count_parameters(config).reading + config.num_lower_layers * per_key * config.sliding_window


def memory_bytes_per_token(config: HSAConfig, dtype_bytes: int = 2) -> float:
    """Fact 7: (2 * Hkv * D + Hr * R / S) numbers per token, whatever the number of HSA layers.

    Token ids (4 bytes) and bookkeeping (12 bytes per chunk) come on top: see memory_bytes.
    """
    numbers = 2 * config.num_memory_heads * _head_dim(config) + config.retrieval_dim / config.chunk_size
    return numbers * dtype_bytes


def memory_bytes(
    config: HSAConfig, tokens: int, dtype_bytes: int = 2, *, token_id_bytes: int = _INT32, is_open: bool = False
) -> MemoryBytes:
    """Bytes of the memory of one document of `tokens` tokens.

    Args:
        dtype_bytes: size of one key, value or landmark number.
        token_id_bytes: size of one token id; 0 leaves the ids out.
        is_open: the document may still grow: only full chunks, and the continuation state. A closed document turns its
            tail into a short chunk, which takes the room of a full one.
    """
    if tokens < 0:
        raise ValueError(f"tokens must not be negative, got {tokens}")
    size = config.chunk_size
    chunks = tokens // size if is_open else -(-tokens // size)
    return MemoryBytes(
        keys_values=chunks * size * 2 * config.num_memory_heads * _head_dim(config) * dtype_bytes,
        landmarks=chunks * config.retrieval_dim * dtype_bytes,
        bookkeeping=chunks * _BOOKKEEPING_PER_CHUNK,
        token_ids=tokens * token_id_bytes,
        continuation=continuation_bytes(config, dtype_bytes) if is_open else 0,
    )


def continuation_bytes(config: HSAConfig, dtype_bytes: int = 2) -> int:
    """Bytes that an open document needs to go on, at most: a fixed state, whatever its length.

    Keys and values of the last W - 1 + REWIND tokens of every lower layer, and the lower outputs of the last U + S
    tokens, which contain the unfinished chunk (docs/architecture.md, "Documents, and what a memory is").
    """
    kept = config.num_lower_layers * (config.sliding_window - 1 + REWIND)
    windows = kept * 2 * config.num_key_value_heads * _head_dim(config)
    outputs = (config.upper_reach + config.chunk_size) * config.hidden_size
    return (windows + outputs) * dtype_bytes


def full_attention_cache_bytes(config: HSAConfig, tokens: int, dtype_bytes: int = 2) -> int:
    """Key-value cache of a full-attention model with as many layers and key-value heads, for comparison."""
    return 2 * config.num_key_value_heads * _head_dim(config) * config.num_hidden_layers * tokens * dtype_bytes
