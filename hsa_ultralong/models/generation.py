"""What `generate` is asked for beyond tokens: honoured, or refused before any work.

tests/models/test_generation_options.py.
"""

from __future__ import annotations

import inspect
import math
from typing import Any, NoReturn

from transformers import GenerationConfig, GenerationMixin

from hsa_ultralong.models.cache_hsa import REWIND, HSACache

_OWN_CACHE = "the model has its own cache, which grows as needed: leave it out"
_BATCHES = "hsa_ultralong.inference.DecodingEngine(model, memory, batch=...) decodes many sequences at once"
_DRAFTS = "give an assistant_model or prompt_lookup_num_tokens"
_STRATEGIES = "choose greedy, sampling, beams, or assisted decoding"
# options that would be ignored, or fail on the way: what to do instead
_REFUSED = {
    "cache_implementation": _OWN_CACHE,
    "cache_config": _OWN_CACHE,
    "max_cache_len": _OWN_CACHE,
    "compile_config": "hsa_ultralong.inference.DecodingEngine(compile_layers=True) compiles decoding",
    "continuous_batching_config": _BATCHES,
    "low_memory": "it has no effect here",
    "output_attentions": "chunks are attended to without forming the matrix; DecodingEngine.stream and ask() name them",
    "assistant_early_exit": f"layers cannot be left out above a memory: {_DRAFTS}",
    "use_mtp": f"the model has no heads for several tokens: {_DRAFTS}",
    "speculation_type": f"the model has no heads for several tokens: {_DRAFTS}",
    "penalty_alpha": _STRATEGIES,
    "dola_layers": _STRATEGIES,
    "constraints": _STRATEGIES,
    "force_words_ids": _STRATEGIES,
}
# new tokens of an answer for which an assistant's growing drafts are provided for, where the answer's length is unknown
_LONG_ANSWER = 2**14
# a token of an assistant with another tokenizer may be that many here
_TOKENS_PER_TOKEN = 8


def named(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of transformers' `generate` after `inputs` by their names.

    Raises:
        TypeError: one that is given twice, or too many.
    """
    names = list(inspect.signature(GenerationMixin.generate).parameters)[2:-1]
    if len(args) > len(names):
        raise TypeError(f"generate takes at most {len(names) + 1} positional arguments, got {len(args) + 1}")
    found = dict(zip(names, args))
    for name in found:
        if name in kwargs:
            raise TypeError(f"generate got {name} by position and by name: give one of them")
    return {**found, **kwargs}


def check_options(model: Any, kwargs: dict[str, Any], cache: HSACache | None) -> int:
    """Refuse options that cannot be honoured; returns how many tokens a cache must be able to take back.

    Raises:
        ValueError: naming the option and what to do instead.
    """
    config = model._prepare_generation_config(kwargs.get("generation_config"), **_options(kwargs))[0]
    for name, instead in _REFUSED.items():
        value = getattr(config, name, None)
        if value is not None and value is not False:
            raise ValueError(f"generate takes no {name}={value!r} with HSA-UltraLong: {instead}")
    if (getattr(config, "num_beam_groups", None) or 1) > 1:
        raise ValueError(
            f"generate takes no num_beam_groups={config.num_beam_groups} with HSA-UltraLong: {_STRATEGIES}"
        )
    rewind = _rewind(model, config, kwargs)
    if cache is not None and isinstance(cache, HSACache) and rewind > cache.rewind:
        raise ValueError(
            f"drafts of this length need a cache that can take back {rewind} tokens, this one can {cache.rewind}; "
            f"make it with HSACache(config, rewind={rewind}), or let generate make it"
        )
    return rewind


def _options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What belongs to a GenerationConfig."""
    blank = GenerationConfig()
    return {name: value for name, value in kwargs.items() if hasattr(blank, name)}


def _rewind(model: Any, config: GenerationConfig, kwargs: dict[str, Any]) -> int:
    """The longest draft that may have to be taken back, at least REWIND."""
    assistant = kwargs.get("assistant_model")
    if getattr(config, "prompt_lookup_num_tokens", None):
        return max(REWIND, config.prompt_lookup_num_tokens)
    if assistant is None and not getattr(config, "is_assistant", False):
        return REWIND
    own = (model if assistant is None else assistant).generation_config
    drafted = own.num_assistant_tokens or GenerationConfig._get_default_generation_params()["num_assistant_tokens"]
    if str(own.num_assistant_tokens_schedule).startswith("heuristic"):
        # 2 more after every draft that was right: k drafts hold at least k^2 tokens
        drafted += 2 * math.isqrt(_LONG_ANSWER) + 2
    if kwargs.get("assistant_tokenizer") is not None:
        drafted *= _TOKENS_PER_TOKEN
    # an assistant takes back the token before its draft too
    return max(REWIND, int(drafted) + 2)


class OwnBatching:
    """transformers' continuous batching pages keys and values, which cannot hold chunks: refused."""

    def generate_batch(self, *args: Any, **kwargs: Any) -> NoReturn:
        """
        Raises:
            ValueError: always.
        """
        raise ValueError(f"HSA-UltraLong has no continuous batching in transformers: {_BATCHES}")

    init_continuous_batching = generate_batch
    continuous_batching_context_manager = generate_batch
