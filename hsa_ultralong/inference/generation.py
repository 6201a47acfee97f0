"""Generation on top of a memorised library: the prompt as a new document, or as the continuation of the open one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig

from hsa_ultralong.inference.fingerprint import require_same_model
from hsa_ultralong.inference.reader import evaluating, replay_upper
from hsa_ultralong.models import HSACache, HSAForCausalLM
from hsa_ultralong.models.cache_hsa import CACHE_NAME
from hsa_ultralong.nn.chunk_memory import ChunkMemory


def question_cache(model: HSAForCausalLM, memory: ChunkMemory) -> HSACache:
    """Cache of new documents (any batch) that may read the whole memory, windows empty."""
    require_same_model(model, memory)
    return HSACache(model.config, library=memory)


def continuation_cache(model: HSAForCausalLM, memory: ChunkMemory) -> tuple[HSACache, torch.Tensor]:
    """Cache that continues the open document, and the tokens of its unfinished chunk (n,), which the cache has seen.

    Raises:
        ValueError: if the memory has no open document.
    """
    require_same_model(model, memory)
    document = memory.open_document
    if document is None:
        raise ValueError("the memory has no open document to continue; memorise with close=False")
    assert document.continuation is not None
    cache = HSACache(model.config, library=memory)
    for number, (keys, values) in enumerate(document.continuation.windows):
        state = cache.state(number)
        state.keys, state.values = keys.clone(), values.clone()
    with evaluating(model):
        replay_upper(model, memory, cache)
    rest = document.num_tokens - document.num_chunks * model.config.chunk_size
    lower = document.continuation.lower
    cache.pending = lower[:, lower.shape[1] - rest :].clone() if rest else None
    cache.advance(rest)
    return cache, document.tokens[document.num_tokens - rest :].long()


def generate_with_memory(
    model: HSAForCausalLM,
    generate: Callable[..., Any],
    input_ids: torch.Tensor | None,
    memory: ChunkMemory,
    generation_config: GenerationConfig | None = None,
    *args: Any,
    continue_document: bool = False,
    **kwargs: Any,
) -> Any:
    """transformers' `generate` with a memory: see HSAForCausalLM.generate.

    Returns what `generate` returns; with `continue_document` the sequences are the prompt and the new tokens.

    Raises:
        ValueError: for another model's memory, a missing prompt, or a batch that cannot continue one document.
    """
    if input_ids is None or input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError("generate with a memory needs a prompt: input_ids (B, T) with T >= 1")
    if not continue_document:
        cache = question_cache(model, memory)
        return generate(input_ids, generation_config, *args, **{CACHE_NAME: cache}, **kwargs)
    options = {} if generation_config is None else generation_config.to_diff_dict()
    options |= kwargs
    if input_ids.shape[0] != 1 or max(options.get(name) or 1 for name in ("num_beams", "num_return_sequences")) > 1:
        raise ValueError("continuing a document takes one sequence: batch 1, no beams, one returned sequence")
    if kwargs.get("attention_mask") is not None and not bool(kwargs.pop("attention_mask").all()):
        raise ValueError("a continued document takes no padding")
    cache, open_tokens = continuation_cache(model, memory)
    prompt = torch.cat((open_tokens.to(input_ids.device)[None], input_ids), dim=1)
    for name in ("max_length", "min_length"):
        if options.get(name) is not None:
            kwargs[name] = options[name] + len(open_tokens)
    # without a mask, tokens of the document that look like padding would be taken for it
    kwargs["attention_mask"] = torch.ones_like(prompt)
    result = generate(prompt, generation_config, *args, **{CACHE_NAME: cache}, **kwargs)
    if isinstance(result, torch.Tensor):
        return result[:, len(open_tokens) :]
    result.sequences = result.sequences[:, len(open_tokens) :]
    return result
