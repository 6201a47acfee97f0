"""RivalConfig: a decoder whose layers are listed by the name of their attention. baselines/README.md says what each is.

tests/baselines/test_configuration.py.
"""

from __future__ import annotations

from difflib import get_close_matches
from functools import cache
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import GenerationConfig, PreTrainedConfig

from hsa_ultralong.nn.rotary import check_scaling

# name of a layer -> options that only such layers read
LAYERS: dict[str, tuple[str, ...]] = {
    "full_rope": ("rope_scaling", "decoding", "decoding_tokens", "decoding_tail"),
    "full_nope": (),
    "window": ("sliding_window",),
    "window_sinks": ("sliding_window", "num_sinks"),
    "moba": ("chunk_size", "chunk_topk", "sparse_impl"),
    "nsa": (
        "chunk_size", "chunk_topk", "sliding_window", "compression_size", "compression_stride", "num_initial_chunks",
        "num_local_chunks", "sparse_impl",
    ),
    "infllm_v2": (
        "chunk_size", "chunk_topk", "compression_size", "compression_stride", "num_initial_chunks", "num_local_chunks",
        "dense_tokens", "sparse_impl",
    ),
    "gated_delta": ("linear_impl",),
    "landmark": ("chunk_size", "chunk_topk"),
    "hils": ("chunk_size", "chunk_topk", "sliding_window", "calibration_rank"),
}  # fmt: skip
DECODING = ("full", "sinks", "pages", "blocks")
# options that may be others at evaluation than in training
AT_TEST_TIME = (
    "rope_scaling", "rope_theta", "sliding_window", "num_sinks", "chunk_topk", "dense_tokens", "linear_impl",
    "sparse_impl", "decoding", "decoding_tokens", "decoding_tail",
)  # fmt: skip
# keys beside our own that transformers and tools around it write into configurations; they change nothing here
_NOTED = {
    "architectures", "attn_implementation", "auto_map", "dtype", "torch_dtype", "model_type", "name_or_path",
    "transformers_version", "tokenizer_class", "rope_parameters", "output_hidden_states", "output_attentions",
    "return_dict", "is_encoder_decoder", "is_decoder", "chunk_size_feed_forward", "id2label", "label2id",
    "problem_type", "use_return_dict", "per_layer_config",
}  # fmt: skip


@strict
class RivalConfig(PreTrainedConfig):
    """Configuration of RivalModel and RivalForCausalLM.

    Size
        layers: attention of every layer from the embedding up, names of LAYERS.
        vocab_size, hidden_size, intermediate_size, num_attention_heads, num_key_value_heads, head_dim,
        tie_word_embeddings, use_qk_norm, rms_norm_eps, initializer_range: as in HSAConfig.
    Positions
        rope_theta; rope_scaling: as in HSAConfig ("linear" is position interpolation), and {"rope_type": "ntk",
            "factor": f}, which multiplies rope_theta by f^(D / (D - 2)).
    Attention
        sliding_window (W): keys of a window, the token's own included. num_sinks: first tokens that window_sinks keeps.
        chunk_size (S), chunk_topk (K): tokens of a chunk, chunks that a token of a selecting layer reads.
        compression_size, compression_stride: tokens of a compressed block, and from one block to the next.
        num_initial_chunks, num_local_chunks: first chunks of the row, and last ones, the token's own among them, that
            count among the K at once.
        dense_tokens: first tokens of a row that read all before them (infllm_v2).
        calibration_rank: of the map that makes a hils layer's queries for chunks.
        sparse_impl: what reads the chunks of moba, nsa and infllm_v2 and the blocks of nsa, "torch" (anywhere) or, on a
            GPU, our kernels: "triton".
        linear_impl: what computes gated_delta, "torch" or, on a GPU with flash-linear-attention, its kernels: "fla".

    Evaluation without training (decoding.py)
        decoding: what the last tokens of full_rope layers read: "full" (all), "sinks" (num_sinks first and the last
            tokens), "pages" (Quest), "blocks" (InfLLM: num_sinks first ones, blocks of chunk_size, the last ones).
        decoding_tokens: how many. decoding_tail: last tokens of a prompt that read so.

    Raises:
        ValueError: for a value that does not fit, or a key that is none of these and none of transformers'.
    """

    model_type = "hsa_rival"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    layers: list[str] | None = None
    vocab_size: int = 8192
    hidden_size: int = 256
    intermediate_size: int = 768
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    tie_word_embeddings: bool = True
    use_qk_norm: bool = True
    rms_norm_eps: float | int = 1e-6
    initializer_range: float | int = 0.02
    rope_theta: float | int = 10_000.0
    rope_scaling: dict | None = None
    sliding_window: int = 128
    num_sinks: int = 4
    chunk_size: int = 64
    chunk_topk: int = 32
    compression_size: int = 32
    compression_stride: int = 16
    num_initial_chunks: int = 1
    num_local_chunks: int = 2
    dense_tokens: int = 0
    sparse_impl: str = "torch"
    linear_impl: str = "torch"
    calibration_rank: int = 64
    decoding: str = "full"
    decoding_tokens: int = 1024
    decoding_tail: int = 64
    max_position_embeddings: int = 2**31 - 1
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> RivalConfig:
        # every way to a model leads through a configuration, new or unpickled
        register_rivals()
        return super().__new__(cls)

    def __post_init__(self, **kwargs: Any) -> None:
        for key in kwargs:
            _refuse_unknown(key)
        if kwargs.get("per_layer_config"):
            raise ValueError("per_layer_config: layers of one name have their options in common; leave it out")
        if self.layers is None:
            self.layers = ["full_rope"] * 9
        self.rope_scaling = _check_rope(self.rope_scaling)
        self._check()
        super().__post_init__(**kwargs)

    @property
    def num_hidden_layers(self) -> int:
        assert self.layers is not None
        return len(self.layers)

    @property
    def has_landmarks(self) -> bool:
        """Whether a landmark token follows every chunk_size - 1 tokens of the stream."""
        assert self.layers is not None
        return bool({"landmark", "hils"} & set(self.layers))

    def rope(self) -> tuple[float, dict[str, Any] | None]:
        """theta and scaling as nn/rotary.py takes them; "ntk" is another theta (Peng et al. 2023, sec. 3.1)."""
        scaling = self.rope_scaling
        if scaling is not None and scaling["rope_type"] == "ntk":
            return self.rope_theta * scaling["factor"] ** (self.head_dim / (self.head_dim - 2)), None
        return self.rope_theta, scaling

    def _check(self) -> None:
        assert self.layers is not None
        if not self.layers:
            raise ValueError("layers must name at least one layer")
        for name in self.layers:
            if name not in LAYERS:
                raise ValueError(f"layers must be of {', '.join(LAYERS)}, got {name!r}")
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("rope_theta", "rms_norm_eps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        if self.initializer_range < 0:
            raise ValueError(f"initializer_range must be >= 0, got {self.initializer_range}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.decoding not in DECODING:
            raise ValueError(f"decoding must be one of {', '.join(DECODING)}, got {self.decoding!r}")
        leasts = {"full": 1, "sinks": self.num_sinks + 1, "pages": 16, "blocks": 2 * (self.num_sinks + self.chunk_size)}
        least = leasts[self.decoding]
        if self.decoding_tokens < least:
            raise ValueError(f"decoding={self.decoding} needs decoding_tokens >= {least}, got {self.decoding_tokens}")
        if self.linear_impl not in ("torch", "fla"):
            raise ValueError(f'linear_impl must be "torch" or "fla", got {self.linear_impl!r}')
        if self.sparse_impl not in ("torch", "triton"):
            raise ValueError(f'sparse_impl must be "torch" or "triton", got {self.sparse_impl!r}')
        for name in ("num_initial_chunks", "dense_tokens", "decoding_tail"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        stride = self.compression_stride
        if {"nsa", "infllm_v2"} & set(self.layers) and (self.compression_size % stride or self.chunk_size % stride):
            raise ValueError(
                f"compression_size={self.compression_size} and chunk_size={self.chunk_size} must be multiples of "
                f"compression_stride={stride}"
            )
        if self.has_landmarks and self.chunk_size < 2:
            raise ValueError("a chunk of landmark and hils layers holds a landmark and a token: chunk_size >= 2")
        if self.head_dim % 2 or self.head_dim < 4:
            raise ValueError(f"head_dim must be even and >= 4, got {self.head_dim}")


_AT_LEAST_ONE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "sliding_window",
    "num_sinks", "compression_size", "compression_stride", "num_local_chunks", "calibration_rank",
    "chunk_size", "chunk_topk",
    "max_position_embeddings",
)  # fmt: skip


def _check_rope(scaling: dict[str, Any] | None) -> dict[str, Any] | None:
    """As nn/rotary.py checks it, and NTK."""
    if not scaling:
        return None
    if scaling.get("rope_type") != "ntk":
        return check_scaling(scaling)
    factor = scaling.get("factor")
    if set(scaling) != {"rope_type", "factor"} or not isinstance(factor, int | float) or not factor > 0:
        raise ValueError(f'rope_scaling of type "ntk" needs a positive factor and nothing else, got {scaling}')
    return dict(scaling)


def _refuse_unknown(key: str) -> None:
    """Refuse a key that nothing reads."""
    if key.startswith("_") or key.endswith("_token_id") or key in _NOTED or key in _generation_keys():
        return
    close = get_close_matches(key, RivalConfig.__annotations__, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"unknown configuration key {key!r}{hint}")


@cache
def _generation_keys() -> frozenset[str]:
    return frozenset(vars(GenerationConfig()))


@cache
def register_rivals() -> None:
    """Make AutoModel and AutoModelForCausalLM know the rivals."""
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from hsa_ultralong.baselines import RivalForCausalLM, RivalModel

    AutoModel.register(RivalConfig, RivalModel, exist_ok=True)
    AutoModelForCausalLM.register(RivalConfig, RivalForCausalLM, exist_ok=True)
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[RivalConfig.model_type] = RivalForCausalLM.__name__
