"""The losses of a converted model that learns from its source: divergence on text, recall, alignment layer by layer.

Divergence: KL(source || model) on every token that is no answer, the source reading the whole document. Recall: the
ordinary loss on answers. Alignment, from the source's own hidden states at every layer that reads the memory: the
weights of retrieval against the mass of the source's attention on each chunk beyond the window (a divergence), and
window plus memory against the output of the source's attention (a relative error). What is counted is decided on the
host, from the batch as it was read, so that a device is never waited for. Called by step_loss.py;
tests/train/test_teaching.py.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import PreTrainedModel

from hsa_ultralong.models import HSAForCausalLM
from hsa_ultralong.models.layout import restrict
from hsa_ultralong.models.views import own_view
from hsa_ultralong.nn.rotary import RotaryTable
from hsa_ultralong.nn.upper_group import UpperGroup
from hsa_ultralong.nn.views import MemoryView
from hsa_ultralong.train.config import StageConfig, TrainConfig

logger = logging.getLogger(__name__)
# the head of a large vocabulary is run on so many tokens of a forward, drawn at random
_MOST_TOKENS = 8192
Inputs = dict[str, Any]


class Counts(NamedTuple):
    """Tokens of a whole optimiser step, over all processes."""

    answers: int
    texts: int


class Passed(NamedTuple):
    """A pass of the model: final hidden states (B, T, M), its angles and the rows' own chunks."""

    hidden: torch.Tensor
    rotary: RotaryTable
    view: MemoryView | None
    segments: torch.Tensor | None


def taught_by(source: Any, model: Any, config: TrainConfig, device: torch.device) -> Teacher | None:
    """The teacher of a run; None if no stage needs one.

    Raises:
        ValueError: a stage needs one and there is none, or it does not fit.
    """
    needing = [stage.name for stage in config.stages if stage.needs_teacher]
    if not needing:
        return None
    if source is None:
        raise ValueError(
            f"stage {needing[0]!r} learns from the model that was converted: name it with --teacher SOURCE, and the "
            "folder of hsa convert with --init-from"
        )
    return Teacher(source, model, config, device)


def is_learnt(stage: StageConfig, record: dict[str, Any]) -> bool:
    """Whether a log record says that the stage may end before its tokens are used up."""
    if not (loss := record.get("answer_loss", math.inf)) < stage.advance_below:
        return False
    logger.info("stage %r is over at step %d: answers have a loss of %.3f", stage.name, record["step"], loss)
    return True


def count_tokens(batches: list[Inputs]) -> list[int]:
    """Answers and other tokens that the losses of these micro-batches count."""
    return [sum(int(kind(batch).sum()) for batch in batches) for kind in (answer_tokens, text_tokens)]


def answer_tokens(batch: Inputs) -> torch.Tensor:
    """(B, T - 1) bool, true where the next token is part of an answer that the loss counts."""
    return batch["answer_mask"][:, 1:] & (batch["labels"][:, 1:] >= 0)


def text_tokens(batch: Inputs) -> torch.Tensor:
    """(B, T - 1) bool, true where the next token belongs to the same document and is no answer."""
    segments = batch["segment_ids"]
    return (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] >= 0) & ~batch["answer_mask"][:, 1:]


def token_divergence(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """KL(wanted || found) of logits (..., V), for each token (...), in fp32 (fp64 kept)."""
    wide = torch.float64 if found.dtype == torch.float64 else torch.float32
    ours, theirs = found.to(wide).log_softmax(-1), wanted.to(wide).log_softmax(-1)
    return (theirs.exp() * (theirs - ours)).sum(-1)


def divergence(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The mean of token_divergence."""
    return token_divergence(found, wanted).mean()


class Teacher:
    """The source of a converted model, and what a step learns from it.

    Args:
        source: transformers' model, Llama, Mistral, Qwen2 or Qwen3.
        model: the converted one; its layers must be the source's.

    Raises:
        ValueError: they do not fit, or the run does what a teacher does not go with.
    """

    def __init__(
        self, source: PreTrainedModel, model: HSAForCausalLM, config: TrainConfig, device: torch.device
    ) -> None:
        ours, theirs = model.config, source.config
        for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
            if getattr(ours, name) != getattr(theirs, name):
                raise ValueError(
                    f"the teacher's {name} is {getattr(theirs, name)}, the model's {getattr(ours, name)}: it is not "
                    "what the model was converted from"
                )
        for stage in config.stages:
            _check_stage(stage, config)
        self.source = source.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        self.source.eval().requires_grad_(False)
        self.reading = ours.reading_layers
        self._parts: dict[str, torch.Tensor] = {}
        self._caught: dict[tuple[str, int], torch.Tensor] = {}
        self._token_divergence = token_divergence
        if config.compile and device.type == "cuda":
            self._token_divergence = torch.compile(token_divergence, dynamic=False)
        for number in self.reading:
            layer = self.source.model.layers[number]
            layer.register_forward_pre_hook(self._catch("input", number), with_kwargs=True)
            layer.self_attn.register_forward_hook(self._catch_attention(number))
            layer.self_attn.v_proj.register_forward_hook(self._catch_output("values", number))

    def losses(
        self, model: HSAForCausalLM, inputs: Inputs, batch: Inputs, stage: StageConfig, counts: Counts
    ) -> torch.Tensor:
        """The share of one micro-batch in the loss of a step; what it consists of is kept for `take`. `batch` is on the
        host, `inputs` what the model takes of it."""
        device = inputs["input_ids"].device
        aligns = bool(stage.align_retrieval or stage.align_output)
        answers, texts = answer_tokens(batch), text_tokens(batch)
        states = self._read(inputs, keep_attention=aligns, is_packed=bool((batch["segment_ids"] != 0).any()))
        passed = run_model(model, inputs, stage.pool_memory or False)
        found = passed.hidden[:, :-1].flatten(0, 1)
        loss = found.new_zeros((), dtype=torch.float32)
        # processes exchange what all of them have; a step without answers says nothing of recall
        for name, count in (("divergence", counts.texts), ("answer_loss", counts.answers)):
            if count:
                self._note(name, loss)
        if texts.any():
            wanted = states[:, :-1].flatten(0, 1)
            loss = loss + stage.divergence * self._note(
                "divergence", self._diverge(model, found, wanted, texts, counts)
            )
        if answers.any():
            places = answers.flatten().nonzero()[:, 0].to(device, non_blocking=True)
            labels = batch["labels"][:, 1:][answers].to(device, non_blocking=True)
            summed = F.cross_entropy(model.lm_head(found[places]).float(), labels, reduction="sum")
            loss = loss + self._note("answer_loss", summed / max(1, counts.answers))
        if aligns:
            share = batch["input_ids"].numel() / stage.batch_tokens
            retrieval, output = self._alignment(model, inputs, passed)
            loss = loss + stage.align_retrieval * self._note("retrieval_error", retrieval * share)
            loss = loss + stage.align_output * self._note("output_error", output * share)
        self._caught.clear()
        return loss

    def _diverge(
        self, model: HSAForCausalLM, found: torch.Tensor, wanted: torch.Tensor, texts: torch.Tensor, counts: Counts
    ) -> torch.Tensor:
        """The divergence on some of the text's tokens, for all of them; final states (n, M) of model and source."""
        places = texts.flatten().nonzero()[:, 0]
        number, size = len(places), min(_MOST_TOKENS, len(found))
        # drawn on the host, whose random state is that of the step; always as many, so that one kernel serves all steps
        chosen = places[torch.randperm(number)[:size]]
        weights = torch.zeros(size)
        weights[: len(chosen)] = number / max(1, counts.texts) / len(chosen)
        chosen = F.pad(chosen, (0, size - len(chosen))).to(found.device, non_blocking=True)
        weights = weights.to(found.device, non_blocking=True)
        with torch.no_grad(), torch.autocast(found.device.type, enabled=False):
            theirs = self.source.lm_head(wanted[chosen])
        return (self._token_divergence(model.lm_head(found[chosen]), theirs) * weights).sum()

    def take(self) -> dict[str, torch.Tensor]:
        """What the losses since the last call consisted of."""
        parts, self._parts = self._parts, {}
        return parts

    def _note(self, name: str, value: torch.Tensor) -> torch.Tensor:
        self._parts[name] = self._parts.get(name, 0) + value.detach()
        return value

    def _catch(self, name: str, number: int) -> Callable[..., None]:
        def catch(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._caught[name, number] = args[0] if args else kwargs["hidden_states"]

        return catch

    def _catch_output(self, name: str, number: int) -> Callable[..., None]:
        def catch(module: Any, args: tuple[Any, ...], output: torch.Tensor) -> None:
            self._caught[name, number] = output

        return catch

    def _catch_attention(self, number: int) -> Callable[..., None]:
        def catch(module: Any, args: tuple[Any, ...], output: Any) -> None:
            self._caught["output", number] = output[0]
            if output[1] is not None:
                self._caught["attention", number] = output[1]

        return catch

    @torch.no_grad()
    def _read(self, inputs: Inputs, keep_attention: bool, is_packed: bool) -> torch.Tensor:
        """Final states (B, T, M) of the source, each document by itself."""
        self.source.set_attn_implementation("eager" if keep_attention else "sdpa")
        ids = inputs["input_ids"]
        mask = _document_mask(inputs["segment_ids"], self.source.dtype) if is_packed else None
        with torch.autocast(ids.device.type, enabled=False):
            return self.source.model(ids, attention_mask=mask, use_cache=False).last_hidden_state

    def _alignment(self, model: HSAForCausalLM, inputs: Inputs, passed: Passed) -> tuple[torch.Tensor, torch.Tensor]:
        """Errors of retrieval and of outputs, means over the layers that read."""
        pairs = zip(model.model.upper_groups(), self.reading, strict=True)
        errors = [self._align(group, number, model, inputs, passed) for group, number in pairs]
        return torch.stack([one for one, _ in errors]).mean(), torch.stack([one for _, one in errors]).mean()

    def _align(
        self, group: UpperGroup, number: int, model: HSAForCausalLM, inputs: Inputs, passed: Passed
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both errors of the layer `number`, the first of a group."""
        assert passed.view is not None
        target = self._chunk_mass(group, number, inputs, model)
        hidden = self._caught["input", number].to(passed.hidden.dtype)
        found = group.retriever(hidden, [passed.view], topk=model.config.chunk_topk)
        layer = group.hsa_layer
        mine = layer.hsa(layer.hsa_norm(hidden), found, [passed.view])
        if layer.window_attention is not None and layer.window_norm is not None:
            mine = mine + layer.window_attention(layer.window_norm(hidden), passed.rotary, passed.segments, None)
        counted = inputs["segment_ids"] >= 0  # (B, T)
        counted = counted & (torch.arange(counted.shape[1], device=counted.device) >= model.config.chunk_size)
        wanted = self._caught["output", number].float() * counted[..., None]
        error = (mine.float() * counted[..., None] - wanted).pow(2).sum() / wanted.pow(2).sum().clamp_min(1e-6)
        return _retrieval_error(target, found), error

    @torch.no_grad()
    def _chunk_mass(self, group: UpperGroup, number: int, inputs: Inputs, model: HSAForCausalLM) -> torch.Tensor:
        """Share of the source's attention, weighted by the norm of its values, on every visible chunk beyond the
        window: (B, T, Hr, C + 1), the last column all the rest."""
        attention = self._caught["attention", number].float()  # (B, H, T, T)
        heads, length, size = attention.shape[1], attention.shape[-1], model.config.chunk_size
        values = self._caught["values", number].float().unflatten(-1, (model.config.num_key_value_heads, -1))
        norms = values.norm(dim=-1).transpose(1, 2).repeat_interleave(heads // values.shape[2], 1)  # (B, H, T)
        mass = attention * norms[:, :, None]
        segments, places = inputs["segment_ids"], torch.arange(length, device=attention.device)
        layer_window = group.hsa_layer.window_attention
        window = 0 if layer_window is None else layer_window.window
        # the first token of a document takes what nothing else wants
        is_first = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)  # (B, T)
        beyond = ((places[:, None] - places) >= window) & ~is_first[:, None]  # (B, T, T)
        whole = mass.sum(-1)  # (B, H, T)
        chunks = length // size
        mass = (mass * beyond[:, None])[..., : chunks * size].unflatten(-1, (chunks, size)).sum(-1)  # (B, H, T, C)
        is_visible = (torch.arange(chunks, device=places.device) + 1) * size <= places[:, None]  # (T, C)
        mass = mass * is_visible
        mass = torch.cat((mass, (whole - mass.sum(-1))[..., None]), -1)
        mass = mass.unflatten(1, (model.config.num_retrieval_heads, -1)).sum(2).transpose(1, 2)  # (B, T, Hr, C + 1)
        return mass / mass.sum(-1, keepdim=True).clamp_min(1e-6) * (segments >= 0)[..., None, None]


def _retrieval_error(target: torch.Tensor, found: Any) -> torch.Tensor:
    """Divergence of the fusion weights from the target's chunks; tokens count by their share beyond the window."""
    share = target[..., :-1].sum(-1)  # (B, T, Hr)
    wanted = target[..., :-1] / share[..., None].clamp_min(1e-6)
    is_empty = found.indices < 0
    wanted = wanted.gather(-1, found.indices.long().clamp_min(0)).masked_fill(is_empty, 0)
    logs = found.scores.masked_fill(is_empty, -1e9).log_softmax(-1).masked_fill(is_empty, 0)
    errors = (wanted * (wanted.clamp_min(1e-8).log() - logs)).sum(-1)
    return (errors * share).sum() / share.sum().clamp_min(1e-6)


def run_model(model: HSAForCausalLM, inputs: Inputs, pool: bool | str) -> Passed:
    """A pass over packed rows that keeps what alignment needs."""
    inner, ids = model.model, inputs["input_ids"]
    layout = inner._layout(ids, None, None, inputs["segment_ids"], None)
    layout = restrict(layout, inputs.get("isolate_documents"), None)
    x = inner.embed_tokens(ids)
    rotary, segments = inner.rotary(x, None), layout.window_segments
    x = inner.read_lower(x, rotary, segments)
    chunks = inner.encode(x, layout)
    views = inner.views(chunks, layout, None, pool)
    options: dict[str, Any] = inner._noise(layout)
    x = inner.decode_upper(x, rotary, views, segments, **options)
    own = None if chunks is None else own_view(chunks, layout, is_causal=True)
    return Passed(inner.norm(x), rotary, own, segments)


def readable(segments: torch.Tensor) -> torch.Tensor:
    """(B, T) -> (B, T, T) bool: which tokens a token of packed rows may read; padding reads itself."""
    places = torch.arange(segments.shape[1], device=segments.device)
    return (segments[:, :, None] == segments[:, None]) & (places[:, None] >= places)


def _document_mask(segments: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What `readable` says as attention adds it, (B, 1, T, T): 0, or the least number."""
    allowed = readable(segments)
    return torch.zeros(allowed.shape, dtype=dtype, device=segments.device).masked_fill_(
        ~allowed, torch.finfo(dtype).min
    )[:, None]


def _check_stage(stage: StageConfig, config: TrainConfig) -> None:
    aligns = bool(stage.align_retrieval or stage.align_output)
    if aligns and dist.is_initialized() and config.parallel.reshard_after_forward:
        raise ValueError(
            f"stage {stage.name!r}: alignment on several processes runs layers by themselves: set "
            "parallel.reshard_after_forward=false"
        )
    for name, is_set in (
        ("piece_tokens", bool(stage.piece_tokens)),
        ("parallel.context above 1", config.parallel.context > 1),
        ("pool_memory beside alignment", aligns and bool(stage.pool_memory)),
    ):
        if is_set:
            raise ValueError(f"stage {stage.name!r}: {name} does not go with a teacher; leave it out")
