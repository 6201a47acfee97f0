"""Named model sizes, and `key=value` changes to them. A preset is code: every number says where it comes from.

P1 = paper 2511.23319; C1 = the authors' released configuration and code (docs/paper_facts.md, B.1 and B.2).
Parameter counts are those of models/accounting.py. Called by the command line and the recipes;
tests/models/test_presets.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from hsa_ultralong.models.configuration_hsa import HSAConfig, config_fields

_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def debug() -> HSAConfig:
    """For tests and smoke runs on a CPU: every part of the model, 115,634 parameters.

    All numbers are ours. Two groups of two layers, so that a second retrieval and an ordinary upper layer exist;
    chunks, windows and K are small enough that 100 tokens exercise chunk borders, selection and window borders.
    """
    return HSAConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_lower_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=16,
        hsa_sliding_window=16,
        chunk_size=16,
        chunk_topk=4,
        retrieval_dim=32,
    )


def nano() -> HSAConfig:
    """The model to train first: 9,231,938 parameters, 17.6 MiB in bf16. The shipped one has R = 512 in its place, and
    feed-forward blocks of 672 (recipe nano_facts).

    The defaults of HSAConfig are this model. Layout, window 128, R = 256, chunks of 64, SwiGLU of 2.75 widths, tied
    8,192-word vocabulary and normed heads of 64 are those of a 31M prototype at half its
    width; K = 32 and 4 query heads to a memory head instead of 16:1 follow C1 and the prototype's 8:1 as far as
    four heads allow. Retrieval is normalised, with a learned temperature: flat scores were what failed there at
    long range.
    """
    return HSAConfig()


def mini() -> HSAConfig:
    """The next size after nano, trained by the same recipe: 31,471,426 parameters.

    Twice nano's width and heads, as the 31M prototype had, and R = 512: larger landmarks for a wider margin, at 8
    bytes more a token of memory in bf16. Not trained yet.
    """
    return HSAConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_attention_heads=8,
        head_dim=64,
        retrieval_dim=512,
    )


def smol_135m() -> HSAConfig:
    """SmolLM2-135M-Instruct as `hsa convert` makes it with 7 groups of 2 layers: 144,110,023 parameters.

    Sizes are the source's (Llama layout, tied 49,152-word vocabulary, 9 heads of 64, 3 key-value heads, RoPE theta
    100,000). Ours: windows of 512, 16 layers below the memory, 3 memory heads, whose keys and values begin as the
    source's, K = 64 (docs/log.md).
    """
    return HSAConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_lower_layers=16,
        num_upper_groups=7,
        num_layers_per_group=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        num_memory_heads=3,
        head_dim=64,
        sliding_window=512,
        hsa_sliding_window=512,
        rope_theta=100_000.0,
        use_qk_norm=False,
        rms_norm_eps=1e-5,
        chunk_topk=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )


def small_345m() -> HSAConfig:
    """The authors' released configuration hsa-swa-2group-345M: 385,060,160 parameters.

    C1 (facts B.2): width 1024, SwiGLU 4096, vocabulary 100,278 with bos = eos = 100,257, tied; 8 lower layers; 2 groups
    of one HSA layer and 4 window layers; 16 heads of 64, 2 window and 1 memory key-value heads; window 512, theta
    10,000; chunks of 64, K = 32, one retrieval head of 1024; encoder SwiGLU 2688 = floor(8/3 * 1024 / 64) * 64; HSA
    layers without a window; bypass residual; softmax fusion of plain scores; Gumbel noise in training.
    The "345M" are the 341.8M of the 16 window layers and the embedding, to which HSA adds 43.3M.
    Differences: position decay is off (it breaks fact 4), the encoder has query-key norm and no q, k, v biases
    (1,280 numbers), the final norm has eps 1e-6 (C1: 1e-5), and landmarks are centred (no effect on the output).
    models/authors.py reads their checkpoints with all of it.
    """
    return HSAConfig(
        vocab_size=100_278,
        hidden_size=1024,
        intermediate_size=4096,
        num_lower_layers=8,
        num_upper_groups=2,
        num_layers_per_group=5,
        num_attention_heads=16,
        num_key_value_heads=2,
        num_memory_heads=1,
        sliding_window=512,
        hsa_sliding_window=0,
        encoder_intermediate_size=2688,
        chunk_topk=32,
        retrieval_dim=1024,
        normalize_retrieval=False,
        learned_temperature=False,
        position_decay=False,
        gumbel_noise=True,
        hsa_residual="bypass",
        bos_token_id=100_257,
        eos_token_id=100_257,
    )


def dense_0_5b() -> HSAConfig:
    """The paper's 0.5B dense model: 537,719,106 parameters; P1 sec. 4.1 states 537.7M.

    P1 sec. 3.1, 4.1: windows of 4096, two of the layers with HSA and a window of 512 of their own, chunks of 64,
    K = 64, 16 query heads to a memory head, half of the layers below the memory.
    P1 gives no dimensions. Inferred: 24 layers of C1's shape (1024, SwiGLU 4096, 16 heads of 64, 2 key-value heads)
    with the tied 157,184-word vocabulary of Ling 2.0, the family that P1 follows, count 519.62M without HSA, and with
    C1's encoder (2688) and retrieval (1024) in two layers 537.72M: P1 states 519.6M and 537.7M. Agreement to four
    digits is strong evidence, not proof.
    Ours: residual, normalised retrieval with a learned temperature (2 parameters), as in nano. P1 prints plain softmax
    fusion and is silent on the rest.
    """
    return HSAConfig(
        vocab_size=157_184,
        hidden_size=1024,
        intermediate_size=4096,
        num_lower_layers=12,
        num_upper_groups=2,
        num_layers_per_group=6,
        num_attention_heads=16,
        num_key_value_heads=2,
        num_memory_heads=1,
        sliding_window=4096,
        hsa_sliding_window=512,
        encoder_intermediate_size=2688,
        chunk_topk=64,
        retrieval_dim=1024,
    )


def moe_8b_a1b() -> HSAConfig:
    """The paper's 8B-A1B mixture of experts: 8,409,423,490 parameters, 1,237,163,650 active.

    P1 sec. 3.1, 4.2: 64 experts, 4 active, 1 shared, first layer dense, loss-free balancing, windows of 4096, chunks of
    64, half of the layers below the memory, structure after Ling 2.0, 16 query heads to a memory head.
    P1 gives no dimensions. From Ling-mini-2.0 (its public configuration): width 2048, 20 layers, 16 heads of 128, 4
    window key-value heads, dense SwiGLU 5120, vocabulary 157,184. Expert width 1024 = 5120 / (4 + 1): a token passes as
    much SwiGLU in a sparse layer as in the dense one, and the sums fit P1: 8.4B, and 0.92B active outside the
    embedding. Tied embeddings as the count of dense_0_5b implies for P1 (Ling 2.0 does not tie: 0.32B more).
    As in dense_0_5b: two groups, HSA window 512, K = 64, encoder SwiGLU floor(8/3 * 2048 / 64) * 64 = 5440, one
    retrieval head as wide as the model (C1: 1024 at 1024; RAMba: 2560 at 2560).
    """
    return HSAConfig(
        vocab_size=157_184,
        hidden_size=2048,
        intermediate_size=5120,
        num_lower_layers=10,
        num_upper_groups=2,
        num_layers_per_group=5,
        num_attention_heads=16,
        num_key_value_heads=4,
        num_memory_heads=1,
        sliding_window=4096,
        hsa_sliding_window=512,
        encoder_intermediate_size=5440,
        chunk_topk=64,
        retrieval_dim=2048,
        num_experts=64,
        num_experts_per_token=4,
        num_shared_experts=1,
        moe_intermediate_size=1024,
        num_dense_layers=1,
    )


PRESETS: dict[str, Callable[[], HSAConfig]] = {
    "debug": debug,
    "nano": nano,
    "mini": mini,
    "smol_135m": smol_135m,
    "small_345m": small_345m,
    "dense_0_5b": dense_0_5b,
    "moe_8b_a1b": moe_8b_a1b,
}


# beyond what any machine holds; counting layers one by one must end
_LARGEST, _LARGEST_REAL, _MOST_LAYERS = 2**31 - 1, 10**18, 1000
_LAYERS = ("num_lower_layers", "num_upper_groups", "num_layers_per_group", "num_encoder_layers", "num_dense_layers")


def preset(name: str, **overrides: Any) -> HSAConfig:
    """The configuration called `name`, with some options changed.

    Raises:
        ValueError: for an unknown name (hyphens count as underscores) or option, or a value that does not fit.
    """
    key = name.replace("-", "_")
    if key not in PRESETS:
        raise ValueError(f"unknown preset {name!r}{_hint(key, PRESETS)} (known: {', '.join(PRESETS)})")
    return replace_options(PRESETS[key](), overrides)


def replace_options(config: HSAConfig, overrides: Mapping[str, Any]) -> HSAConfig:
    """A new configuration with some options changed.

    Options that follow others by default (head_dim, encoder_intermediate_size, moe_intermediate_size) keep following
    them unless they are set to something else.

    Raises:
        ValueError: for an unknown option or a value that does not fit.
    """
    for key, value in overrides.items():
        _check_kind(key, value)
    values = {name: getattr(config, name) for name in config_fields()}
    followed = {
        "head_dim": config.hidden_size // config.num_attention_heads,
        "encoder_intermediate_size": config.intermediate_size,
        "moe_intermediate_size": config.intermediate_size,
    }
    values.update({name: None for name, default in followed.items() if values[name] == default})
    return HSAConfig(**{**values, **overrides})


def set_options(config: HSAConfig, options: Iterable[str]) -> HSAConfig:
    """A new configuration with options such as "chunk_topk=64" applied, as `--set` of the command line does."""
    return replace_options(config, parse_options(options))


def parse_options(options: Iterable[str]) -> dict[str, Any]:
    """["chunk_topk=64", "use_qk_norm=false"] -> values typed by the declared fields of HSAConfig.

    Raises:
        ValueError: for text without "=", an unknown key, a key given twice, or a value of another type.
    """
    values: dict[str, Any] = {}
    for option in options:
        key, separator, text = (part.strip() for part in option.partition("="))
        if not separator or not key:
            raise ValueError(f"expected key=value, got {option!r}")
        if key in values:
            raise ValueError(f"{key} is set twice")
        values[key] = _parse(key, text)
    return values


def _hint(word: str, known: Iterable[str]) -> str:
    close = get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _kinds(key: str) -> list[str]:
    """Declared types of an option, such as ["int", "None"]."""
    if key not in config_fields():
        raise ValueError(f"unknown option {key!r}{_hint(key, config_fields()) or '; HSAConfig lists all'}")
    declared = HSAConfig.__annotations__[key]
    text = declared.__name__ if isinstance(declared, type) else str(declared)
    return [kind.strip() for kind in text.split("|")]


def _mismatch(key: str, value: Any) -> ValueError:
    names = {
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "str": "a word",
        "None": "none",
        "list[int]": "whole numbers separated by commas",
        "dict": "a JSON object",
    }
    return ValueError(f"{key} must be {' or '.join(names[kind] for kind in _kinds(key))}, got {value!r}")


def _check_kind(key: str, value: Any) -> None:
    kinds = _kinds(key)
    fits = {
        "int": isinstance(value, int) and not isinstance(value, bool),
        "float": isinstance(value, int | float) and not isinstance(value, bool),
        "bool": isinstance(value, bool),
        "str": isinstance(value, str),
        "None": value is None,
        "list[int]": isinstance(value, list) and all(type(item) is int for item in value),
        "dict": isinstance(value, dict),
    }
    if not any(fits[kind] for kind in kinds):
        raise _mismatch(key, value)
    for number in value if isinstance(value, list) else [value]:
        largest = _MOST_LAYERS if key in _LAYERS else _LARGEST if isinstance(number, int) else _LARGEST_REAL
        # not a number is in no range
        if isinstance(number, int | float) and not -largest <= number <= largest:
            raise ValueError(f"{key} must be at most {largest:,}, got {str(number)[:40]}")


def _parse(key: str, text: str) -> Any:
    kinds = _kinds(key)
    if "None" in kinds and text.lower() in ("none", "null"):
        return None
    try:
        if "dict" in kinds:
            value = json.loads(text)
            _check_kind(key, value)
            return value
        if "list[int]" in kinds and "," in text:
            return [int(item) for item in text.split(",")]
        if "bool" in kinds:
            return _WORDS[text.lower()]
        if "float" in kinds:
            return float(text)
        if "int" in kinds:
            return int(text)
    except (KeyError, ValueError):
        raise _mismatch(key, text) from None
    return text
