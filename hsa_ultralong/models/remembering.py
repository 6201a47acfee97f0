"""Generation on top of a memory: the prompt as a new document, or as the continuation of the open one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from hsa_ultralong.memory.chunk_memory import Memory
from hsa_ultralong.models import HSACache, HSAForCausalLM
from hsa_ultralong.models.cache_hsa import CACHE_NAME, REWIND
from hsa_ultralong.models.evaluation import evaluating
from hsa_ultralong.models.fingerprint import require_same_model
from hsa_ultralong.models.reading import replay_upper


def question_cache(model: HSAForCausalLM, memory: Memory, rewind: int = REWIND) -> HSACache:
    """Cache of new documents (any batch) that may read the whole memory, windows empty."""
    require_same_model(model, memory)
    return HSACache(model.config, memory=memory, rewind=rewind)


def continuation_cache(model: HSAForCausalLM, memory: Memory, rewind: int = REWIND) -> tuple[HSACache, torch.Tensor]:
    """Cache that continues the open document, and the tokens of its unfinished chunk (n,), which the cache has seen.

    Raises:
        ValueError: if the memory has no open document.
    """
    require_same_model(model, memory)
    document = memory.open_document
    if document is None:
        raise ValueError("the memory has no open document to continue; memorise with close=False")
    assert document.continuation is not None
    cache = HSACache(model.config, memory=memory, rewind=rewind)
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


class _AfterTail(BaseStreamer):
    """Passes on all but the first `skipped` tokens, those of a document that goes on."""

    def __init__(self, streamer: Any, skipped: int) -> None:
        self.streamer, self.skipped = streamer, skipped

    def put(self, value: torch.Tensor) -> None:
        shown, self.skipped = value[..., self.skipped :], 0
        self.streamer.put(shown)

    def end(self) -> None:
        self.streamer.end()


def generate_with_memory(
    model: HSAForCausalLM,
    generate: Callable[..., Any],
    inputs: torch.Tensor | None,
    memory: Memory,
    *,
    continue_document: bool = False,
    rewind: int = REWIND,
    **kwargs: Any,
) -> Any:
    """transformers' `generate` with a memory: see HSAForCausalLM.generate.

    Args:
        inputs: token ids (B, T), or none with inputs_embeds (B, T, M) among the others.
        rewind: tokens that the cache must be able to take back.

    Returns what `generate` returns; with `continue_document` the sequences are the prompt and the new tokens.

    Raises:
        ValueError: for another model's memory, a missing prompt, or a batch that cannot continue one document.
    """
    if inputs is None and (continue_document or kwargs.get("inputs_embeds") is None):
        needed = "input_ids (1, T)" if continue_document else "input_ids (B, T) or inputs_embeds (B, T, M)"
        raise ValueError(f"generate with a memory needs a prompt of at least one token: {needed}")
    if inputs is not None and inputs.dim() != 2:
        raise ValueError(f"a prompt must be input_ids (B, T), got {tuple(inputs.shape)}")
    if "prepare_inputs_for_generation" in model.__dict__:
        # so does peft with adapters around the model
        raise ValueError("the prompts of this model are prepared by somebody else (prompt tuning?), not with a memory")
    if not continue_document:
        return generate(inputs, **{CACHE_NAME: question_cache(model, memory, rewind)}, **kwargs)
    assert inputs is not None
    config = kwargs.get("generation_config") or GenerationConfig()
    options = {**config.to_diff_dict(), **kwargs}
    if inputs.shape[0] != 1 or max(options.get(name) or 1 for name in ("num_beams", "num_return_sequences")) > 1:
        raise ValueError("continuing a document takes one sequence: batch 1, no beams, one returned sequence")
    if kwargs.get("attention_mask") is not None and not bool(kwargs.pop("attention_mask").all()):
        raise ValueError("a continued document takes no padding")
    for name in ("token_healing", "inputs_embeds"):
        if options.get(name) is not None and options[name] is not False:
            raise ValueError(f"a continued document takes no {name}: its last tokens are read already")
    cache, open_tokens = continuation_cache(model, memory, rewind)
    prompt = torch.cat((open_tokens.to(inputs.device)[None], inputs), dim=1)
    for name in ("max_length", "min_length"):
        if options.get(name) is not None:
            kwargs[name] = options[name] + len(open_tokens)
    if kwargs.get("streamer") is not None:
        kwargs["streamer"] = _AfterTail(kwargs["streamer"], len(open_tokens))
    # without a mask, tokens of the document that look like padding would be taken for it
    kwargs["attention_mask"] = torch.ones_like(prompt)
    result = generate(prompt, **{CACHE_NAME: cache}, **kwargs)
    if isinstance(result, torch.Tensor):
        return result[:, len(open_tokens) :]
    result.sequences = result.sequences[:, len(open_tokens) :]
    return result
