"""RivalModel and RivalForCausalLM: our embedding, norms, feed-forward blocks, head and loss around other attentions.

Twins differ from HSAForCausalLM by attention only. A row is one text: a token may read every token before it in its
row that its layer's mask lets it, also of earlier packed documents, as retrieval does. tests/baselines/.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from hsa_ultralong.baselines.attention import Rope
from hsa_ultralong.baselines.build import build_layer
from hsa_ultralong.baselines.configuration import RivalConfig
from hsa_ultralong.baselines.gated_delta import GatedDelta
from hsa_ultralong.baselines.nsa import Compressor
from hsa_ultralong.baselines.state import RivalCache
from hsa_ultralong.models.arguments import check_labels, check_tokens
from hsa_ultralong.models.cache_hsa import CACHE_NAME, given_cache
from hsa_ultralong.models.evaluation import evaluating
from hsa_ultralong.models.head import head_loss
from hsa_ultralong.models.padding import Rows, counted_labels
from hsa_ultralong.nn.decoder_layer import DecoderLayer

# what transformers passes on its own, with the value that changes nothing
_NEUTRAL: dict[str, Any] = {"is_causal": True, "output_attentions": False, "cache_position": None, "return_dict": True}


def check_unknown(kind: str, given: dict[str, Any]) -> None:
    """Refuse keyword arguments that nothing reads.

    Raises:
        TypeError: naming the first.
    """
    for name, value in given.items():
        if value is not None and (name not in _NEUTRAL or value != _NEUTRAL[name]):
            raise TypeError(f"{kind} takes no {name}={value!r}: leave it out")


class RivalPreTrainedModel(PreTrainedModel):
    config_class = RivalConfig
    config: RivalConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = False
    _no_split_modules = [DecoderLayer.__name__]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, RivalModel):
            if module.landmark is not None:
                init.normal_(module.landmark, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, Compressor):
            init.constant_(module.weights, 1 / len(module.weights))
            init.normal_(module.places, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, GatedDelta):
            init.uniform_(module.convolution, -0.5, 0.5)
            for parameter, start in zip((module.log_rate, module.step_bias), module.starting_decay(), strict=True):
                init.copy_(parameter, start)


class RivalModel(RivalPreTrainedModel):
    """Token ids -> hidden states after the final norm, (B, T, M)."""

    def __init__(self, config: RivalConfig) -> None:
        super().__init__(config)
        assert config.layers is not None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(build_layer(config, name) for name in config.layers)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.landmark = nn.Parameter(torch.zeros(config.hidden_size)) if config.has_landmarks else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embed_tokens = value

    def new_cache(self) -> RivalCache:
        """An empty cache for this model's layers."""
        states = [layer.attention.new_state() for layer in self.layers]  # type: ignore[union-attr, operator]
        return RivalCache(states, self.config.chunk_size if self.config.has_landmarks else 0)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: None = None,
        past_key_values: RivalCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        segment_ids: torch.Tensor | None = None,
        isolate_documents: bool | torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        cache: RivalCache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids: (B, T). inputs_embeds: (B, T, M) instead.
            attention_mask: (B, n + T) of 0 and 1, n = tokens in the cache. Without a cache zeros may stand anywhere: a
                row equals itself without the masked tokens. With one there are none.
            position_ids: none: positions count the real tokens of a row.
            past_key_values, cache: RivalCache to continue, by either of transformers' names; built when `use_cache`.
            segment_ids: (B, T), -1 on padding; what else it says is not read: a row is one text.
            output_hidden_states: also return the embeddings and the output of every layer, the last one normed.

        Raises:
            ValueError: on inputs that do not fit together or are not supported. TypeError: on unknown names.
        """
        check_unknown("a rival", kwargs)
        check_tokens(input_ids, inputs_embeds)
        if position_ids is not None:
            raise ValueError("a rival takes no position_ids: positions count the real tokens of a row")
        if isolate_documents is not None and bool(torch.as_tensor(isolate_documents).any()):
            raise ValueError("a rival reads a row as one text: it takes no isolate_documents; give a row per document")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, M)
        before = given_cache(past_key_values, cache)
        rows = self._rows(x, attention_mask, segment_ids, before, use_cache)
        before = self._cache(before, use_cache, is_plain=rows is None)
        collected = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        embeddings = x
        x = x if rows is None else rows.close_up(x)
        x, states = self._run(x, before)
        if rows is not None:
            x, states = rows.spread(x), [rows.spread(state) for state in states] if collected else []
        named: dict[str, Any] = {CACHE_NAME: before}
        if collected:
            named["hidden_states"] = (embeddings, *states[:-1], x)
        return BaseModelOutputWithPast(last_hidden_state=x, **named)

    def _run(self, x: torch.Tensor, cache: RivalCache | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Normed output, and the output of every layer."""
        seen, states = 0 if cache is None else cache.num_seen, []
        places, tokens = torch.arange(seen, seen + x.shape[1], device=x.device), None
        if self.landmark is not None:
            x, places, tokens = self._with_landmarks(x, seen, self.landmark)
        rotary = Rope(self.config.head_dim, *self.config.rope()).at(places, x.dtype)
        for number, layer in enumerate(self.layers):
            x = layer(x, rotary, None, None if cache is None else cache.states[number])
            states.append(x if tokens is None else x[:, tokens])
        return self.norm(states[-1]), states

    def _with_landmarks(
        self, x: torch.Tensor, seen: int, landmark: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The stream of tokens x (B, T, M) after `seen` others, its positions, and where in it the tokens are.

        A landmark follows every S - 1 tokens; it has the position of the token after it.
        """
        size, new = self.config.chunk_size, x.shape[1]
        last = seen + new
        first_place, stop = seen + seen // (size - 1), last + last // (size - 1)
        n = torch.arange(first_place, stop, device=x.device)
        position = n - n // size
        is_landmark = (n % size == size - 1)[:, None]
        stream = torch.where(is_landmark, landmark.to(x.dtype), x[:, (position - seen).clamp_max(new - 1)])
        t = torch.arange(seen, last, device=x.device)
        return stream, position, t + t // (size - 1) - first_place

    def _rows(
        self,
        x: torch.Tensor,
        attention_mask: torch.Tensor | None,
        segment_ids: torch.Tensor | None,
        cache: RivalCache | None,
        use_cache: bool | None,
    ) -> Rows | None:
        """How rows with padding are closed up; None where there is none."""
        if segment_ids is not None:
            if attention_mask is not None or cache is not None or use_cache:
                raise ValueError("segment_ids go without attention_mask and without a cache: use_cache=False")
            if segment_ids.shape != x.shape[:2]:
                raise ValueError(f"segment_ids must be {tuple(x.shape[:2])}, got {tuple(segment_ids.shape)}")
            return Rows(segment_ids >= 0)
        if attention_mask is None:
            return None
        seen = 0 if cache is None else cache.num_seen
        if not isinstance(attention_mask, torch.Tensor) or attention_mask.shape != (x.shape[0], seen + x.shape[1]):
            raise ValueError(f"attention_mask must be a tensor ({x.shape[0]}, {seen + x.shape[1]}) of 0 and 1")
        is_real = attention_mask == 1
        if not bool((is_real | (attention_mask == 0)).all()):
            raise ValueError("attention_mask must hold 1 at real tokens and 0 at masked ones, and no other numbers")
        if bool(is_real.all()):
            return None
        if cache is not None or use_cache:
            raise ValueError(
                "a rival's cache holds rows of one length: generate from prompts without padding, one by one or "
                "several of a length"
            )
        return Rows(is_real)

    def _cache(self, cache: RivalCache | None, use_cache: bool | None, *, is_plain: bool) -> RivalCache | None:
        if cache is not None and not isinstance(cache, RivalCache):
            raise ValueError(f"a cache (past_key_values) must be a RivalCache, got {type(cache).__name__}")
        if cache is not None and use_cache is False:
            raise ValueError("use_cache=False with a cache: every call extends the cache it is given; leave one out")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and is_plain
        return self.new_cache() if cache is None and use_cache else cache


class RivalForCausalLM(RivalPreTrainedModel, GenerationMixin):
    """RivalModel with a language-modelling head, tied to the embedding if the configuration says so."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: RivalConfig) -> None:
        super().__init__(config)
        self.model = RivalModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: None = None,
        past_key_values: RivalCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        segment_ids: torch.Tensor | None = None,
        isolate_documents: bool | torch.Tensor | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        cache: RivalCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As RivalModel.forward, and labels, logits_to_keep, num_items_in_batch as HSAForCausalLM.forward.

        Returns:
            loss (mean over labels, 0 without any) and logits (B, T, V); in training with labels, logits is None.
        """
        check_unknown("a rival", kwargs)
        check_labels("labels", labels, input_ids if inputs_embeds is None else inputs_embeds)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=given_cache(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            segment_ids=segment_ids,
            isolate_documents=isolate_documents,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        hidden = outputs.last_hidden_state
        loss = logits = None
        if labels is not None:
            targets = counted_labels(torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100), attention_mask)
            total = head_loss(self.lm_head, hidden, targets, self.config.vocab_size)
            counted = (targets != -100).sum() if num_items_in_batch is None else num_items_in_batch
            loss = total / torch.as_tensor(counted, device=total.device).clamp_min(1)
        if labels is None or not self.training:
            kept = hidden[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else hidden[:, logits_to_keep]
            logits = self.lm_head(kept)
        named: dict[str, Any] = {CACHE_NAME: getattr(outputs, CACHE_NAME)}
        return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=outputs.hidden_states, **named)

    @wraps(GenerationMixin.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' generate, in evaluation mode whatever the mode of the model."""
        with evaluating(self):
            return super().generate(*args, **kwargs)

    def _prepare_position_ids_for_generation(self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any]) -> None:
        """Positions follow from the cache."""

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """generate() would otherwise build a cache of its own kind."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"generate takes no cache_implementation={generation_config.cache_implementation!r} with a rival: it "
                "has its own cache, which grows as needed; leave it out"
            )
        if model_kwargs.get(CACHE_NAME) is None and generation_config.use_cache is not False:
            model_kwargs[CACHE_NAME] = self.model.new_cache()
            return None
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
