"""HSAForCausalLM: HSAModel with a head, its loss, and what makes it remember (paper sec. 3.1). Tests: tests/models/."""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin
from transformers.utils import can_return_tuple

from hsa_ultralong.memory.chunk_memory import Memory
from hsa_ultralong.models.adapters import offer_adapter_targets
from hsa_ultralong.models.arguments import check_arguments, check_generation, check_labels
from hsa_ultralong.models.cache_hsa import CACHE_NAME, REWIND, HSACache, given_cache
from hsa_ultralong.models.configuration_hsa import HSAConfig
from hsa_ultralong.models.evaluation import evaluating
from hsa_ultralong.models.generation import OwnBatching, check_options, named
from hsa_ultralong.models.head import head_loss
from hsa_ultralong.models.modeling_hsa import HSAModel, HSAPreTrainedModel
from hsa_ultralong.models.outputs import HSACausalLMOutput
from hsa_ultralong.models.padding import counted_labels
from hsa_ultralong.models.registration import ABOVE
from hsa_ultralong.nn.moe import MixtureOfExperts


class HSAForCausalLM(OwnBatching, HSAPreTrainedModel, GenerationMixin):
    """HSAModel with a language-modelling head; `memorize` and `generate(memory=...)` make it remember."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: HSAConfig) -> None:
        super().__init__(config)
        self.model = HSAModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        offer_adapter_targets()

    @can_return_tuple
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
        output_hidden_states: bool | None = None,
        output_retrieval: bool = False,
        noise_seed: int | torch.Tensor | None = None,
        cache: HSACache | None = None,
        **kwargs: Any,
    ) -> HSACausalLMOutput:
        """As HSAModel.forward, and:

        Args:
            labels: (B, T) int64, the tokens themselves (shifted inside), -100 = not counted. A label is predicted from
                the last real token before it.
            logits_to_keep: number of last positions (or index tensor) whose logits, and retrieval with
                output_retrieval, are wanted; 0 = all.
            num_items_in_batch: divisor of the summed loss instead of the number of labels here.
            kwargs: shift_labels (B, T), the token after each, in place of labels; and those of HSAModel.forward.

        Returns:
            loss (mean over labels, 0 without any) and logits (B, T, V); in training with labels, logits is None and
            never computed.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        check_arguments(type(self).forward, kwargs)
        for name, given in (("labels", labels), ("shift_labels", shift_labels)):
            check_labels(name, given, input_ids if inputs_embeds is None else inputs_embeds)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=given_cache(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            segment_ids=segment_ids,
            isolate_documents=isolate_documents,
            pool_memory=pool_memory,
            source_ids=source_ids,
            output_hidden_states=output_hidden_states,
            output_retrieval=output_retrieval,
            retrieval_to_keep=logits_to_keep if output_retrieval else None,
            noise_seed=noise_seed,
            return_dict=True,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        loss = logits = None
        targets = self._targets(labels, shift_labels, attention_mask)
        if targets is not None:
            total = head_loss(self.lm_head, hidden, targets, self.config.vocab_size)
            if num_items_in_batch is None:
                counted = self.model.context_ranks.total((targets != -100).sum())
            else:
                counted = torch.as_tensor(num_items_in_batch, device=total.device)
            loss = total / counted.clamp_min(1)
        if targets is None or not self.training:
            kept = hidden[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else hidden[:, logits_to_keep]
            logits = self.lm_head(kept)
        named: dict[str, Any] = {CACHE_NAME: getattr(outputs, CACHE_NAME)}
        named |= {"hidden_states": outputs.hidden_states, "retrieval": outputs.retrieval}
        return HSACausalLMOutput(loss=loss, logits=logits, **named)

    def _targets(
        self, labels: torch.Tensor | None, shift_labels: torch.Tensor | None, attention_mask: torch.Tensor | None
    ) -> torch.Tensor | None:
        """(B, T) what each position predicts, -100 where nothing is counted."""
        targets = shift_labels
        if targets is None:
            if labels is None:
                return None
            targets = self.model.context_ranks.next_labels(labels)
        return counted_labels(targets, attention_mask)

    def update_router_bias(self) -> list[torch.Tensor]:
        """After an optimiser step: balance every mixture of experts; returns their imbalance (max / mean load)."""
        rate = self.config.router_bias_update_rate
        return [part.update_router_bias(rate) for part in self.modules() if isinstance(part, MixtureOfExperts)]

    def memorize(self, tokens: Any, **options: Any) -> Memory:
        """Read any amount of text into a memory in linear time: see inference.reader.memorize."""
        return ABOVE["memorize"](self, tokens, **options)

    def generate(
        self, inputs: torch.Tensor | None = None, *args: Any, memory: Memory | None = None, **kwargs: Any
    ) -> Any:
        """transformers' generate, in evaluation mode whatever the mode of the model.

        With `memory`, the input is a new document that may read all of it; with `continue_document=True` it continues
        the memory's open document instead, exactly. Masked tokens may stand anywhere; answers follow the last real one.

        Raises:
            ValueError: for an empty prompt, inputs of whole rows (segment_ids), use_cache=False with a memory or a
                cache, or options that cannot be honoured (generation.py).
        """
        kwargs = named(args, kwargs)
        cache = given_cache(kwargs.pop("past_key_values", None), kwargs.pop("cache", None))
        if inputs is None:
            inputs = kwargs.pop("input_ids", None)
        elif kwargs.get("input_ids") is not None:
            raise ValueError("inputs and input_ids name the same thing: give one of them")
        has_state = memory is not None or cache is not None
        check_generation(inputs, kwargs, has_state=has_state)
        rewind = check_options(self, kwargs, cache)
        if cache is None and memory is None and rewind > REWIND:
            cache = HSACache(self.config, rewind=rewind)
        if cache is not None:
            kwargs[CACHE_NAME] = cache
        if has_state:
            kwargs["use_cache"] = True
        with evaluating(self):
            if memory is None:
                return super().generate(inputs, **kwargs)
            from hsa_ultralong.models.remembering import generate_with_memory

            return generate_with_memory(self, super().generate, inputs, memory, rewind=rewind, **kwargs)

    def _prepare_position_ids_for_generation(self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any]) -> None:
        """Positions follow from the cache: none are made, which would be checked at every step."""

    @wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As in transformers; the mask goes with a prompt only, as generated tokens are never masked."""
        before = given_cache(kwargs.get("past_key_values"), kwargs.get("cache"))
        is_open = kwargs.get("is_first_iteration") and kwargs.get("next_sequence_length", 0) is None
        if is_open and isinstance(before, HSACache) and before.num_seen:
            # assisted decoding would pass on what the cache has seen; the pieces of a long prompt come without a length
            kwargs["next_sequence_length"] = input_ids.shape[1] - before.num_seen
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        cache, mask = inputs.get(CACHE_NAME), inputs.get("attention_mask")
        # the pieces of a prompt come without a length, its first call says so
        is_step = kwargs.get("next_sequence_length") is not None and not kwargs.get("is_first_iteration")
        if is_step and mask is not None and isinstance(cache, HSACache) and cache.num_seen:
            inputs["attention_mask"] = None
        return inputs

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """generate() would otherwise build a cache of its own kind."""
        if model_kwargs.get(CACHE_NAME) is None and generation_config.use_cache is not False:
            model_kwargs[CACHE_NAME] = HSACache(self.config)
            return None
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
