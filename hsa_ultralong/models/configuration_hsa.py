"""Every option of the model, declared, documented and validated in one place (docs/architecture.md, Letters)."""

import logging
import math
import os
from difflib import get_close_matches
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import GenerationConfig, PreTrainedConfig

from hsa_ultralong.files.fields import require_modest
from hsa_ultralong.files.messages import reason
from hsa_ultralong.files.strict_json import read_json
from hsa_ultralong.models.auto_map import is_own_auto_class, own_auto_map, register_models, write_remote_module
from hsa_ultralong.nn.rotary import check_scaling

logger = logging.getLogger(__name__)

_CHOICES = {
    "landmark_source": ("cls", "mean"),
    "hsa_residual": ("standard", "bypass"),
    "fusion": ("softmax", "stick_breaking", "none"),
    "memory_softmax": ("chunk", "joint"),
    "memory_positions": ("none", "rope"),
}
# keys beside our own that transformers and tools around it write into configurations; they change nothing here
_NOTED_KEYS = {
    "add_cross_attention", "attn_implementation", "auto_map", "base_model_tp_plan", "cross_attention_hidden_size",
    "experts_implementation", "finetuning_task", "is_decoder", "model_name", "model_type", "name_or_path", "num_labels",
    "output_attentions", "peft_config", "per_layer_config", "prefix", "pretraining_tp", "pruned_heads",
    "quantization_config", "task_specific_params", "text_config", "tf_legacy_loss", "tie_encoder_decoder",
    "tie_last_hidden_states", "tokenizer_class", "torch_dtype", "torchscript", "transformers_weights",
    "unsloth_fixed", "unsloth_version", "use_bfloat16",
}  # fmt: skip
# options of other architectures that look like one of ours and that tools set on any configuration: kept, with a line
_OTHERS_KEYS = {
    "batch_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon", "post_norm_eps",
}  # fmt: skip
# an int32 counts the tokens of a row
MAX_POSITIONS = 2**31 - 1
# hashes of all files of a model folder
CHECKSUMS = "checksums.json"


@strict
class HSAConfig(PreTrainedConfig):
    """Configuration of HSAModel and HSAForCausalLM.

    Size
        vocab_size (V), hidden_size (M), intermediate_size (width of the dense SwiGLU),
        num_lower_layers: sliding-window layers below the memory.
        num_upper_groups, num_layers_per_group: each upper group is one HSA layer and num_layers_per_group - 1
            sliding-window layers; a list gives every group its own number of layers.
        num_attention_heads (Hq), num_key_value_heads (of the windows), head_dim (D; default hidden / heads).
        tie_word_embeddings: head = embedding.
    Window
        sliding_window (W): number of keys including the token's own.
        hsa_sliding_window: window inside the HSA layer; 0 leaves it out (HSA only).
        use_qk_norm, rms_norm_eps, initializer_range.
        rope_theta, rope_scaling: frequencies of RoPE and how a source model scaled them: None, or a dictionary with
            Hugging Face's keys, "rope_type" ("linear", "llama3", "yarn") and its numbers (nn/rotary.py). Also read from
            `rope_parameters`, transformers 5's name for both; a "rope_theta" in either becomes the option.
        use_qkv_bias: biases of the query, key and value projections of windows and encoder layers, and of the queries
            to the memory (Qwen2).
        encoder_qk_norm, encoder_qkv_bias: of the encoder's layers alone, and final_norm_eps: of the last norm; None is
            what all others have (the authors' checkpoints differ there).
    Memory
        embedding_skip: scale of a linear map, zero at first, that adds every token's embedding to what the chunk
            encoder reads, so that the memory holds which token stood there; 0: none (the paper). For converted models.
        chunk_size (S), num_encoder_layers, encoder_intermediate_size (default intermediate_size),
        num_memory_heads (Hkv of the memory), landmark_source: "cls" or "mean".
    Retrieval
        chunk_topk (K), retrieval_dim (Hr * R), num_retrieval_heads (Hr): 1 or num_memory_heads.
        normalize_retrieval: RMS-normalise queries and landmarks; learned_temperature: one per retrieval head and group.
        fusion: "softmax", "stick_breaking", or "none": scores choose chunks and do not weigh them.
        position_decay: learned slope on the recency rank (breaks fact 4).
        memory_softmax: "chunk", or "joint": one softmax over the keys of all retrieved chunks, with the logarithms of
            the fusion weights as bias; memory_positions: "none", or "rope" by the distance from token to key. The other
            values are for studies (docs/report.md), of memories on the device that are not laid together.
        gumbel_noise: noise on the selection in training.
        temperature_chunks: a token that may read n chunks, more than this number, has its scores multiplied by log(n) /
            log(temperature_chunks) before fusion, so that weights spread less in large memories; 0 = never.
        hsa_residual: "standard" or "bypass" (HSA output feeds the feed-forward block only).
        unsure_below: what `ask` judges by, measured for these weights: pairs [chunks of the memory, retrieval weight]
            of rising chunks. Between two of them the line is straight in log2(chunks), outside it is flat; an answer
            whose best weight lies below it is called unsure. None: nothing was measured, nothing is said. Changes no
            number of the model, nor its memories.
    Mixture of experts
        num_experts: 0 = dense. num_experts_per_token, num_shared_experts, moe_intermediate_size,
        num_dense_layers: first layers that stay dense (paper: 1), router_bias_update_rate.
    For tools
        max_position_embeddings: the length that tools may assume (lm-eval cuts prompts to it). No part of the model
            has a size or a limit by it: windows count positions from their own start, the memory has none. The default
            is the largest number of tokens that a row can have.
        attn_implementation: None, "sdpa" or "eager", all the same: every layer has its own kernels.
        auto_map: names the classes for `trust_remote_code`; saving writes the module that it names.

    Keys of transformers and of tools (`quantization_config`, `tokenizer_class`, ...) are kept. Other unknown keys are
    kept too, as tools annotate configurations, with one line in the log: they change nothing. What looks like a
    misspelt option, is a part of its name or follows from other options is refused, wherever it is set.
    """

    model_type = "hsa_ultralong"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    vocab_size: int = 8192
    hidden_size: int = 256
    intermediate_size: int = 704
    num_lower_layers: int = 4
    num_upper_groups: int = 2
    num_layers_per_group: int | list[int] = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int | None = None
    tie_word_embeddings: bool = True
    sliding_window: int = 128
    hsa_sliding_window: int = 128
    rope_theta: float | int = 10_000.0
    rope_scaling: dict | None = None
    use_qk_norm: bool = True
    use_qkv_bias: bool = False
    encoder_qk_norm: bool | None = None
    encoder_qkv_bias: bool | None = None
    final_norm_eps: float | int | None = None
    rms_norm_eps: float | int = 1e-6
    initializer_range: float | int = 0.02
    embedding_skip: float | int = 0
    chunk_size: int = 64
    num_encoder_layers: int = 1
    encoder_intermediate_size: int | None = None
    num_memory_heads: int = 1
    landmark_source: str = "cls"
    chunk_topk: int = 32
    retrieval_dim: int = 256
    num_retrieval_heads: int = 1
    normalize_retrieval: bool = True
    learned_temperature: bool = True
    fusion: str = "softmax"
    memory_softmax: str = "chunk"
    memory_positions: str = "none"
    position_decay: bool = False
    gumbel_noise: bool = False
    temperature_chunks: int = 0
    hsa_residual: str = "standard"
    unsure_below: list | None = None
    num_experts: int = 0
    num_experts_per_token: int = 2
    num_shared_experts: int = 1
    moe_intermediate_size: int | None = None
    num_dense_layers: int = 1
    router_bias_update_rate: float | int = 1e-3
    max_position_embeddings: int | None = MAX_POSITIONS
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> "HSAConfig":
        # every way to a model leads through a configuration, new or unpickled
        register_models()
        return super().__new__(cls)

    def __post_init__(self, **kwargs: Any) -> None:
        self._read_rope(kwargs.pop("rope_parameters", None))
        for key in kwargs:
            # generation keys, which transformers drops, never come to be set
            _refuse_similar(type(self), key)
        for key in ("attn_implementation", "_attn_implementation"):
            if kwargs.get(key) not in (None, "sdpa", "eager"):
                raise ValueError(
                    f"attn_implementation={kwargs[key]!r}: the layers of HSA-UltraLong have their own kernels, chosen "
                    "by device (docs/kernels.md); leave it out"
                )
        if kwargs.get("per_layer_config"):
            raise ValueError("per_layer_config: the layers of HSA-UltraLong have their options in common; leave it out")
        if self.head_dim is None and self.num_attention_heads:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.encoder_intermediate_size is None:
            self.encoder_intermediate_size = self.intermediate_size
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size = self.intermediate_size
        if self.max_position_embeddings is None:
            self.max_position_embeddings = MAX_POSITIONS
        kwargs["auto_map"] = own_auto_map(kwargs.get("auto_map"))
        self._check()
        super().__post_init__(**kwargs)

    def __setattr__(self, key: str, value: Any) -> None:
        if key not in self.__dict__ and not hasattr(type(self), key):
            _refuse_similar(type(self), key)
            if not _is_noted(key):
                _note_unknown(key)
        super().__setattr__(key, value)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in transformers; a file on this machine that is no JSON object, or no model's, is refused in one line."""
        place = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        file = place / "config.json" if place.is_dir() else place
        if os.path.lexists(file) and not kwargs.get("gguf_file"):
            # before transformers, which goes through nested values by recursion
            require_modest(read_json(file), str(file))
        return super().get_config_dict(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, which drops what it does not know: a misspelt option is refused here too.

        Raises:
            ValueError: a value is of another kind, or beyond any model.
        """
        for key in kwargs:
            _refuse_similar(cls, key)
        require_modest(config_dict, "configuration")
        try:
            return super().from_dict(config_dict, **kwargs)
        except ValueError:
            raise
        # whatever a value of the wrong kind makes a library stumble over
        except Exception as error:
            raise ValueError(f"this configuration cannot be used: {reason(error)}") from error

    def to_json_file(self, json_file_path: Any, use_diff: bool = True) -> None:
        """As in transformers; a config.json, by whatever it is saved, gets the module that `auto_map` names, and takes
        away checksums.json, which says what stood there before."""
        super().to_json_file(json_file_path, use_diff)
        if Path(json_file_path).name == "config.json":
            write_remote_module(Path(json_file_path).parent)
            Path(json_file_path).with_name(CHECKSUMS).unlink(missing_ok=True)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Needed for classes derived from ours only: what we save names our own classes in any case."""
        if not is_own_auto_class(cls, auto_class):
            super().register_for_auto_class(auto_class)

    def _read_rope(self, parameters: dict[str, Any] | None) -> None:
        if parameters and self.rope_scaling:
            raise ValueError("rope_scaling and rope_parameters are one thing: give one of them")
        scaling = dict(parameters or self.rope_scaling or {})
        self.rope_theta = scaling.pop("rope_theta", self.rope_theta)
        self.rope_scaling = check_scaling(scaling)

    @property
    def num_hidden_layers(self) -> int:
        """Decoder layers, the encoder not counted."""
        return self.num_lower_layers + sum(self.group_sizes)

    @property
    def group_sizes(self) -> list[int]:
        """Layers of every upper group, the HSA layer counted."""
        size = self.num_layers_per_group
        return list(size) if isinstance(size, list) else [size] * self.num_upper_groups

    @property
    def reading_layers(self) -> list[int]:
        """Numbers of the HSA layers, the first of every group, among all decoder layers."""
        return list(accumulate(self.group_sizes[:-1], initial=self.num_lower_layers))

    @property
    def layer_windows(self) -> list[int]:
        """Window of every decoder layer from the embedding up; 0 for an HSA layer without one."""
        reading = set(self.reading_layers)
        return [
            self.hsa_sliding_window if layer in reading else self.sliding_window
            for layer in range(self.num_hidden_layers)
        ]

    @property
    def lower_reach(self) -> int:
        """Tokens before a chunk that its memory depends on: sum over lower layers of (W - 1), fact 6."""
        return self.num_lower_layers * (self.sliding_window - 1)

    @property
    def lower_width(self) -> int:
        """Numbers a token that the lower half passes on: M, twice that with embedding_skip."""
        return self.hidden_size * (2 if self.embedding_skip else 1)

    @property
    def upper_reach(self) -> int:
        """U of fact 5: sum over upper layers with a window of (W - 1)."""
        return sum(max(window - 1, 0) for window in self.layer_windows[self.num_lower_layers :])

    @property
    def is_composable(self) -> bool:
        """True if chunks may be reordered and merged (fact 4)."""
        is_plain = self.memory_softmax == "chunk" and self.memory_positions == "none"
        return is_plain and self.fusion != "stick_breaking" and not self.position_decay

    def _check(self) -> None:
        at_least = {
            "vocab_size": 1, "hidden_size": 1, "intermediate_size": 1, "num_lower_layers": 1, "num_upper_groups": 1,
            "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2,
            "sliding_window": 1, "hsa_sliding_window": 0, "chunk_size": 1, "num_encoder_layers": 1,
            "encoder_intermediate_size": 1,
            "moe_intermediate_size": 1, "num_memory_heads": 1, "chunk_topk": 1,
            "retrieval_dim": 1, "num_retrieval_heads": 1, "num_experts": 0,
            "num_experts_per_token": 1, "num_shared_experts": 0, "num_dense_layers": 0,
            "max_position_embeddings": 1, "temperature_chunks": 0,
        }  # fmt: skip
        for name, minimum in at_least.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"{name} must be >= {minimum}, got {getattr(self, name)}")
        self._check_groups()
        for name in ("rope_theta", "rms_norm_eps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        if self.final_norm_eps is not None and self.final_norm_eps <= 0:
            raise ValueError(f"final_norm_eps must be > 0, got {self.final_norm_eps}")
        for name in ("initializer_range", "router_bias_update_rate", "embedding_skip"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        for heads in ("num_key_value_heads", "num_memory_heads"):
            if self.num_attention_heads % getattr(self, heads):
                raise ValueError(
                    f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                    f"{heads}={getattr(self, heads)}"
                )
        if self.num_retrieval_heads not in (1, self.num_memory_heads):
            raise ValueError(
                f"num_retrieval_heads must be 1 or num_memory_heads={self.num_memory_heads}, "
                f"got {self.num_retrieval_heads}"
            )
        if self.retrieval_dim % self.num_retrieval_heads:
            raise ValueError(
                f"retrieval_dim={self.retrieval_dim} must be a multiple of "
                f"num_retrieval_heads={self.num_retrieval_heads}"
            )
        assert self.head_dim is not None
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}")
        self._check_unsure()
        if self.temperature_chunks == 1:
            raise ValueError("temperature_chunks must be 0 (never) or at least 2, got 1, whose logarithm is 0")
        if self.num_experts and self.num_experts_per_token > self.num_experts:
            raise ValueError(
                f"num_experts_per_token={self.num_experts_per_token} exceeds num_experts={self.num_experts}"
            )

    def _check_groups(self) -> None:
        sizes = self.group_sizes
        if not sizes or min(sizes) < 1:
            raise ValueError(f"num_layers_per_group must be >= 1, got {self.num_layers_per_group}")
        if len(sizes) != self.num_upper_groups:
            raise ValueError(
                f"num_layers_per_group must be one number or num_upper_groups={self.num_upper_groups} of them, "
                f"got {self.num_layers_per_group}"
            )
        if len(set(sizes)) == 1:
            # one form of one thing
            self.num_layers_per_group = sizes[0]

    def _check_unsure(self) -> None:
        if self.unsure_below is None:
            return
        pairs = [tuple(pair) if isinstance(pair, list | tuple) else (pair,) for pair in self.unsure_below]
        is_number = {int, float}.issuperset
        if not (
            pairs
            and all(len(pair) == 2 and is_number(map(type, pair)) and 0 <= pair[1] <= 1 for pair in pairs)
            and all(low < high for low, high in pairwise([0, *(pair[0] for pair in pairs), math.inf]))
        ):
            raise ValueError(
                "unsure_below must be None or pairs [chunks, weight] of rising chunks and weights from 0 to 1, such as "
                f"[[64, 0.5], [4096, 0.3]], got {self.unsure_below!r}"
            )


def config_fields() -> list[str]:
    """Names of the options declared by HSAConfig itself."""
    return [name for name in HSAConfig.__annotations__ if name not in ("model_type", "keys_to_ignore_at_inference")]


def _refuse_similar(kind: type[HSAConfig], key: str) -> None:
    """Refuse a key that looks like an option and is none.

    Raises:
        ValueError: for a derived number, a misspelt option, or a part of its name.
    """
    declared = vars(HSAConfig).get(key)
    if isinstance(declared, property):
        raise ValueError(f"{key} follows from other options of HSAConfig; set those")
    # `top_k` belongs to sampling: transformers drops it from configurations without a word
    meant = ["chunk_topk"] if key == "top_k" else []
    if not (meant or hasattr(kind, key) or _is_noted(key) or key in _OTHERS_KEYS):
        options, words = config_fields(), set(key.lower().split("_"))
        meant = get_close_matches(key.lower(), options, n=1, cutoff=0.85)
        meant = meant or [option for option in options if words < set(option.split("_"))]
    if meant:
        raise ValueError(f"unknown configuration key {key!r}; did you mean {meant[0]!r}?")


def _is_noted(key: str) -> bool:
    """True for what transformers and its tools are known to write."""
    return key.startswith("_") or key.endswith("_token_id") or key in _NOTED_KEYS or key in _generation_keys()


@cache
def _generation_keys() -> frozenset[str]:
    return frozenset(vars(GenerationConfig()))


@cache
def _note_unknown(key: str) -> None:
    """Once a key."""
    logger.warning("configuration key %r is none of HSAConfig's: it is kept and changes nothing", key)
