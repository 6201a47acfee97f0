"""HSAModel: from tokens to hidden states, the first seven steps of docs/architecture.md (paper sec. 3.1).

One forward serves training, reading piece by piece and decoding; what differs lives in HSACache. The reader in
`inference` calls the same pieces (`read_lower`, `chunk_encoder`, `decode_upper`). Tests: tests/models/.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.utils import can_return_tuple

from hsa_ultralong.memory.chunk_memory import ChunkMemory
from hsa_ultralong.models.arguments import check_arguments, check_noise_seed, check_tokens
from hsa_ultralong.models.auto_map import is_own_auto_class
from hsa_ultralong.models.build import (
    RecomputedDecoderLayer,
    RecomputedHSALayer,
    build_encoder,
    build_group,
    build_lower_layer,
)
from hsa_ultralong.models.cache_hsa import CACHE_NAME, HSACache, given_cache
from hsa_ultralong.models.configuration_hsa import HSAConfig
from hsa_ultralong.models.folder import CheckedLoading, FolderContent
from hsa_ultralong.models.layout import Layout, packed_layout, plain_layout, restrict, slice_layout, whole_chunks
from hsa_ultralong.models.outputs import HSAModelOutput
from hsa_ultralong.models.padding import Padding, check_positions, real_tokens
from hsa_ultralong.models.ranks import ALONE, ContextExchange, PoolExchange
from hsa_ultralong.models.stack import Windows, run_lower, run_upper
from hsa_ultralong.models.views import POOLS, memory_view, own_view, pooled_view
from hsa_ultralong.nn.chunk_encoder import ChunkEncoder, EncoderLayer
from hsa_ultralong.nn.chunk_retriever import ChunkRetriever, Retrieval
from hsa_ultralong.nn.embedding_skip import EmbeddingSkip
from hsa_ultralong.nn.moe import MixtureOfExperts
from hsa_ultralong.nn.rotary import RotaryTable, rotary_table
from hsa_ultralong.nn.upper_group import UpperGroup
from hsa_ultralong.nn.views import ChunkTensors, MemoryView
from hsa_ultralong.nn.window_attention import extends_a_cache


class HSAPreTrainedModel(CheckedLoading, PreTrainedModel):
    config_class = HSAConfig
    config: HSAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = [RecomputedDecoderLayer.__name__, RecomputedHSALayer.__name__, EncoderLayer.__name__]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, nn.RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, ChunkEncoder):
            init.normal_(module.cls, mean=0.0, std=std)
            init.zeros_(module.landmark_center)
        elif isinstance(module, EmbeddingSkip):
            init.zeros_(module.weight)
        elif isinstance(module, ChunkRetriever):
            for parameter in (module.log_temperature, module.position_decay):
                if parameter is not None:
                    init.zeros_(parameter)
        elif isinstance(module, MixtureOfExperts):
            init.normal_(module.gate_up, mean=0.0, std=std)
            init.normal_(module.down, mean=0.0, std=std)
            init.zeros_(module.router_bias)
            init.zeros_(module.expert_load)

    @classmethod
    def folder_content(cls) -> FolderContent:
        is_ours = cls.__module__.startswith("hsa_ultralong.")
        return FolderContent(HSAModel, has_head=issubclass(cls, GenerationMixin), may_have_more=not is_ours)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Needed for classes derived from ours only, as in HSAConfig."""
        if not is_own_auto_class(cls, auto_class):
            super().register_for_auto_class(auto_class)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, **options: Any
    ) -> None:
        """As in transformers; only the non-reentrant form, because gradients also flow through the shared memory."""
        if getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise ValueError("HSA-UltraLong needs gradient checkpointing with use_reentrant=False")
        recompute = partial(gradient_checkpointing_func, use_reentrant=False)
        super()._set_gradient_checkpointing(enable, partial(_recompute_without_cache, recompute), **options)


def _recompute_without_cache(recompute: Callable[..., Any], layer: Callable[..., Any], *args: Any) -> Any:
    return layer(*args) if extends_a_cache(args) else recompute(layer, *args)


class HSAModel(HSAPreTrainedModel):
    """Token ids -> hidden states after the final norm, (B, T, M)."""

    def __init__(self, config: HSAConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.lower_layers = nn.ModuleList(build_lower_layer(config, i) for i in range(config.num_lower_layers))
        skip = EmbeddingSkip(config.hidden_size, config.embedding_skip) if config.embedding_skip else None
        self.embedding_skip = skip
        self.chunk_encoder = build_encoder(config)
        self.groups = nn.ModuleList(build_group(config, i) for i in range(config.num_upper_groups))
        eps = config.rms_norm_eps if config.final_norm_eps is None else config.final_norm_eps
        self.norm = nn.RMSNorm(config.hidden_size, eps=eps)
        # set from outside: processes that share every row, and processes whose rows share a pool (distributed/)
        self.context_ranks: ContextExchange = ALONE
        self.pool_ranks: PoolExchange = ALONE
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def memory_parts(self) -> dict[str, nn.Module]:
        """What a memory depends on (fact 5), by name."""
        parts = {"embed_tokens": self.embed_tokens, "lower": self.lower_layers, "encoder": self.chunk_encoder}
        return parts if self.embedding_skip is None else {**parts, "skip": self.embedding_skip}

    def upper_groups(self) -> list[UpperGroup]:
        """The groups, from the memory up."""
        # wrapped groups (compiled, trained by an adapter) pass their attributes on
        return list(self.groups)  # type: ignore[arg-type]

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: HSACache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        segment_ids: torch.Tensor | None = None,
        isolate_documents: bool | torch.Tensor | None = None,
        pool_memory: bool | str = False,
        source_ids: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_retrieval: bool = False,
        retrieval_to_keep: int | torch.Tensor | None = None,
        noise_seed: int | torch.Tensor | None = None,
        cache: HSACache | None = None,
        **kwargs: Any,
    ) -> HSAModelOutput:
        """
        Args:
            input_ids: (B, T). inputs_embeds: (B, T, M) instead.
            attention_mask: (B, n + T), 1 at real tokens, 0 at masked ones anywhere, n = tokens in the cache. A row
                equals itself without the masked tokens; their outputs repeat the last real token's, 0 before the first.
            position_ids: (B, T), checked only: positions follow from the mask, the documents and the cache.
            past_key_values, cache: HSACache to continue, by the older or the newer of transformers' names; built when
                `use_cache`, whose default is False in training. Layers that extend a cache are not checkpointed.
            segment_ids: (B, T) int32 packed documents, each starting at a multiple of the chunk size, numbered
                upwards along the row, -1 on padding. Windows stay inside a document; retrieval also reaches the
                documents before it in the row.
            isolate_documents: True, or (B,) per row: retrieval stays inside the document too, in a pool as well.
            pool_memory: "attended" (or True): a token may also retrieve all chunks of other sources in the batch;
                "compete": those take slots and fusion weight, and contribute zero (docs/pooled-memory.md).
            source_ids: any integers, (B,) per row or with segment_ids (B, T) per document, whose chunks of the same
                source stay out of the pool, as they may show the future; by default every row is a source of its own.
                Used with pool_memory only.
            output_hidden_states: also return the embeddings and the output of every decoder layer, the last one normed.
            output_retrieval: also return what every upper group retrieved (models/outputs.py).
            retrieval_to_keep: number of last tokens (or index tensor) whose retrieval is wanted; all without it.
            noise_seed: of the selection noise (gumbel_noise, in training mode), in place of a draw; see chunk_topk.
            kwargs: return_dict=False for a tuple; names that change nothing here (models/arguments.py).

        Raises:
            ValueError: on inputs that do not fit together or are not supported. TypeError: on unknown names.
        """
        check_arguments(type(self).forward, {"output_attentions": self.config.output_attentions, **kwargs})
        check_tokens(input_ids, inputs_embeds)
        check_noise_seed(noise_seed, self.training and self.config.gumbel_noise)
        if pool_memory not in POOLS:
            raise ValueError(f"pool_memory must be one of {POOLS}, got {pool_memory!r}")
        if pool_memory and not self.config.is_composable:
            raise ValueError(
                "pool_memory needs softmax fusion without position decay, and chunks read as in the paper: a pool has "
                "no order (fact 4)"
            )
        if retrieval_to_keep is not None and not output_retrieval:
            raise ValueError("retrieval_to_keep goes with output_retrieval=True")
        cache = self._cache(given_cache(past_key_values, cache), use_cache)
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        assert tokens is not None
        layout = self._layout(tokens, attention_mask, position_ids, segment_ids, cache)
        layout = restrict(layout, isolate_documents, source_ids if pool_memory else None)
        collected = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states: list[torch.Tensor] | None = [] if collected else None
        retrieved: list[Retrieval] = []
        embeddings = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, M)
        x = layout.close_up(embeddings)
        windows, segments = self._windows(cache, layout), layout.window_segments
        rotary = self.rotary(x, windows)
        x = self.read_lower(x, rotary, segments, windows, states=states)
        chunks = self.encode(x, layout, cache)
        views = self.views(chunks, layout, cache, pool_memory)
        note = (lambda found: retrieved.append(layout.placed(found, retrieval_to_keep))) if output_retrieval else None
        noise = self._noise(layout, noise_seed)
        x = self.decode_upper(x, rotary, views, segments, windows, states=states, note=note, **noise)
        x = layout.spread(self.norm(x))
        if cache is not None:
            self._leave(cache, layout)
        named: dict[str, Any] = {CACHE_NAME: cache}
        if states is not None:
            named["hidden_states"] = (embeddings, *map(layout.spread, states[:-1]), x)
        if output_retrieval:
            named["retrieval"] = tuple(retrieved)
        return HSAModelOutput(last_hidden_state=x, **named)

    def _windows(self, cache: HSACache | None, layout: Layout) -> Windows | None:
        """What the windows read before the call's own tokens."""
        if self.context_ranks.size > 1:
            return self.context_ranks.windows(self.config.layer_windows, layout.num_tokens)
        if cache is not None and layout.padding is not None:
            cache.open_gaps(max(layout.padding.gaps))
        return cache

    def _leave(self, cache: HSACache, layout: Layout) -> None:
        """Count the call's tokens as seen by a cache."""
        cache.advance(layout.num_tokens)
        if layout.padding is not None:
            cache.close_gaps(layout.padding.mask, layout.padding.gaps)
        if layout.is_packed:
            cache.dead_end = "a packed row (segment_ids), whose chunks it does not hold"

    def _noise(self, layout: Layout, seed: int | torch.Tensor | None = None) -> dict[str, Any]:
        """Seed of the selection noise; a slice of rows that are shared over processes draws its part of theirs."""
        seed = self.draw_noise_seed() if seed is None else seed
        return {"noise_seed": seed, "noise_start": self.context_ranks.rank * layout.num_tokens}

    def rotary(self, x: torch.Tensor, windows: Windows | None) -> RotaryTable:
        """Angles of the tokens x (B, T, M) and of those before them that a window holds."""
        config = self.config
        assert config.head_dim is not None
        length = (0 if windows is None else windows.length) + x.shape[1]
        return rotary_table(length, config.head_dim, config.rope_theta, x.device, x.dtype, config.rope_scaling)

    def read_lower(
        self,
        x: torch.Tensor,
        rotary: RotaryTable,
        segments: torch.Tensor | None = None,
        windows: Windows | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Step 2, the lower decoder: embeddings (B, T, M) -> (B, T, M); options are those of stack.run_lower.

        With embedding_skip (B, T, 2M): behind the lower outputs stands what is added to them for the memory alone.
        """
        lower = run_lower(self.lower_layers, x, rotary, segments=segments, windows=windows, **options)
        return lower if self.embedding_skip is None else torch.cat((lower, self.embedding_skip(x)), dim=-1)

    def decode_upper(
        self,
        x: torch.Tensor,
        rotary: RotaryTable,
        views: Sequence[MemoryView],
        segments: torch.Tensor | None = None,
        windows: Windows | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Steps 5 to 7, the upper decoder over the given memories: what read_lower returned -> (B, T, M); options of
        run_upper."""
        x = x[..., : self.config.hidden_size]
        return run_upper(
            self.upper_groups(), x, rotary, views, first_layer=self.config.num_lower_layers,
            topk=self.config.chunk_topk, segments=segments, windows=windows, **options,
        )  # fmt: skip

    def draw_noise_seed(self) -> int | None:
        """Seed of a forward's selection noise, or None without: drawn on the host, so reproducible."""
        return int(torch.randint(2**31, ())) if self.training and self.config.gumbel_noise else None

    def _cache(self, cache: HSACache | None, use_cache: bool | None) -> HSACache | None:
        if cache is not None and not isinstance(cache, HSACache):
            raise ValueError(f"a cache (past_key_values) must be an HSACache, got {type(cache).__name__}")
        if self.context_ranks.size > 1:
            if cache is not None or use_cache:
                raise ValueError("a row shared over processes (context_ranks) cannot use a cache")
            return None
        if cache is not None and cache.dead_end is not None:
            raise ValueError(f"this cache cannot be continued: it comes from {cache.dead_end}")
        if cache is not None and use_cache is False:
            raise ValueError("use_cache=False with a cache: every call extends the cache it is given; leave one out")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        return HSACache(self.config) if cache is None and use_cache else cache

    def _layout(
        self,
        x: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        segment_ids: torch.Tensor | None,
        cache: HSACache | None,
    ) -> Layout:
        """Where the tokens x (B, T, ...) stand, and what is masked among them."""
        size, context = self.config.chunk_size, self.context_ranks
        shape = (x.shape[0], x.shape[1])
        if context.size > 1 and (attention_mask is not None or shape[1] % size):
            raise ValueError(
                "context parallelism takes slices of a multiple of chunk_size tokens without attention_mask; got "
                f"{shape[1]} tokens a rank and chunk_size={size}; pad the rows and give segment_ids, -1 on padding"
            )
        if context.size > 1 and position_ids is not None:
            raise ValueError("context parallelism takes no position_ids: they follow from the slices; leave them out")
        if segment_ids is not None and segment_ids.shape != shape:
            raise ValueError(f"segment_ids must be {shape}, got {tuple(segment_ids.shape)}")
        is_real = None
        if attention_mask is not None and segment_ids is None:
            is_real = real_tokens(attention_mask, *shape, cache)
        if position_ids is not None:
            check_positions(position_ids, shape, is_real=is_real, segment_ids=segment_ids, cache=cache)
        if segment_ids is not None:
            layout = packed_layout(segment_ids, size, attention_mask, cache)
        else:
            layout = plain_layout(x, None if is_real is None else Padding(is_real, shape[1]), cache)
        return layout if context.size == 1 else slice_layout(layout, context, max(self.config.layer_windows) - 1)

    def encode(self, x: torch.Tensor, layout: Layout, cache: HSACache | None = None) -> ChunkTensors | None:
        """Step 3: all chunks of the rows, those that the lower outputs x (B, T, M) complete among them.

        Without a cache they are the call's own, in the autograd graph, on all processes that share the rows. With one
        they are kept in it; a packed row's are not.
        """
        kept = None if layout.is_packed else cache
        if kept is None:
            new = whole_chunks(x, layout, self.config.chunk_size)
        else:
            new = kept.complete_chunks(x, layout.counts)
        own = None
        if new is not None:
            fixed = cache is not None
            k, v, landmarks = self.chunk_encoder(new.hidden, new.lengths, self._total, fixed_center=fixed)
            parts = (k, v, landmarks, new.full_lengths, new.segments, new.ends)
            own = ChunkTensors(*map(self.context_ranks.gather, parts))
            if kept is not None:
                kept.append_chunks(new, own, lambda: self.empty_memory(x.shape[0], k.dtype, k.device))
        return own if kept is None else kept.chunks

    def _total(self, part: torch.Tensor) -> torch.Tensor:
        """The sum over all processes that retrieve each other's chunks."""
        return self.pool_ranks.total(self.context_ranks.total(part))

    def views(
        self,
        chunks: ChunkTensors | None,
        layout: Layout,
        cache: HSACache | None = None,
        pool_memory: bool | str = False,
    ) -> list[MemoryView]:
        """Step 4: who may see what of a memory, the pool of the batch, and the rows' own chunks, in this order."""
        views, context = [], self.context_ranks
        if cache is not None and cache.memory is not None:
            views.append(memory_view(cache.memory, layout.segments, layout.positions))
        if chunks is None:
            return views
        if pool_memory:
            is_read = pool_memory != "compete"
            views.append(pooled_view(chunks, layout, is_read=is_read, context=context, ranks=self.pool_ranks))
        return [*views, own_view(chunks, layout, is_causal=cache is None, context=context)]

    def empty_memory(
        self, batch: int, dtype: torch.dtype, device: torch.device, capacity: int = 0, fingerprint: str = ""
    ) -> ChunkMemory:
        """A ChunkMemory of this model's shape without chunks."""
        config = self.config
        assert config.head_dim is not None
        return ChunkMemory.empty(
            batch=batch,
            chunk_size=config.chunk_size,
            num_memory_heads=config.num_memory_heads,
            head_dim=config.head_dim,
            num_retrieval_heads=config.num_retrieval_heads,
            retrieval_dim=config.retrieval_dim,
            dtype=dtype,
            device=device,
            capacity=capacity,
            fingerprint=fingerprint,
            is_composable=config.is_composable,
        )
