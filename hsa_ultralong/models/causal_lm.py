"""HSAForCausalLM: HSAModel with a head, its loss, and what makes it remember (paper sec. 3.1). Tests: tests/models/."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from hsa_ultralong.models.adapters import offer_adapter_targets
from hsa_ultralong.models.cache_hsa import CACHE_NAME, HSACache, given_cache
from hsa_ultralong.models.configuration_hsa import HSAConfig
from hsa_ultralong.models.modeling_hsa import HSAModel, HSAPreTrainedModel
from hsa_ultralong.nn.chunk_memory import ChunkMemory
from hsa_ultralong.nn.moe import MixtureOfExperts
from hsa_ultralong.ops import linear_cross_entropy


class HSAForCausalLM(HSAPreTrainedModel, GenerationMixin):
    """HSAModel with a language-modelling head; `memorize` and `generate(memory=...)` make it remember."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: HSAConfig) -> None:
        super().__init__(config)
        self.model = HSAModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        offer_adapter_targets()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: HSACache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        segment_ids: torch.Tensor | None = None,
        isolate_documents: bool | torch.Tensor | None = None,
        pool_memory: bool | str = False,
        source_ids: torch.Tensor | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        cache: HSACache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As HSAModel.forward, and:

        Args:
            labels: (B, T) int64, the tokens themselves (shifted inside), -100 = not counted.
            logits_to_keep: number of last positions (or index tensor) whose logits are wanted; 0 = all.
            num_items_in_batch: divisor of the summed loss instead of the number of labels here.

        Returns:
            loss (mean over labels) and logits (B, T, V); in training with labels, logits is None and never computed.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=given_cache(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            segment_ids=segment_ids,
            isolate_documents=isolate_documents,
            pool_memory=pool_memory,
            source_ids=source_ids,
        )
        hidden = outputs.last_hidden_state
        loss = logits = None
        if labels is not None:
            ranks = self.model.context_ranks
            targets = F.pad(labels[:, 1:], (0, 1), value=-100) if ranks is None else ranks.next_labels(labels)
            total = linear_cross_entropy(hidden.flatten(0, 1), self.lm_head.weight, targets.flatten())
            counted = num_items_in_batch
            if counted is None:
                counted = (targets != -100).sum()
                counted = counted if ranks is None else ranks.total(counted)
                counted = counted.clamp_min(1)
            loss = total / counted
        if labels is None or not self.training:
            kept = hidden[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else hidden[:, logits_to_keep]
            logits = self.lm_head(kept)
        named: dict[str, Any] = {CACHE_NAME: getattr(outputs, CACHE_NAME)}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **named)

    def update_router_bias(self) -> list[torch.Tensor]:
        """After an optimiser step: balance every mixture of experts; returns their imbalance (max / mean load)."""
        rate = self.config.router_bias_update_rate
        return [part.update_router_bias(rate) for part in self.modules() if isinstance(part, MixtureOfExperts)]

    def memorize(self, tokens: Any, **options: Any) -> ChunkMemory:
        """Read any amount of text into a ChunkMemory in linear time: see inference.reader.memorize."""
        from hsa_ultralong.inference import memorize

        return memorize(self, tokens, **options)

    def generate(
        self, input_ids: torch.Tensor | None = None, *args: Any, memory: ChunkMemory | None = None, **kwargs: Any
    ):
        """transformers' generate; with `memory`, the input is a new document that may read all of it.

        With `continue_document=True` the input continues the memory's open document instead, exactly.
        """
        cache = given_cache(kwargs.pop("past_key_values", None), kwargs.pop("cache", None))
        if cache is not None:
            kwargs[CACHE_NAME] = cache
        if memory is None:
            return super().generate(input_ids, *args, **kwargs)
        from hsa_ultralong.inference import generate_with_memory

        return generate_with_memory(self, super().generate, input_ids, memory, **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ):
        """generate() would otherwise build a cache of its own kind."""
        if model_kwargs.get(CACHE_NAME) is None and generation_config.use_cache is not False:
            if generation_config.cache_implementation is not None:
                raise ValueError("HSA-UltraLong has its own cache; leave cache_implementation unset")
            model_kwargs[CACHE_NAME] = HSACache(self.config)
            return None
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
