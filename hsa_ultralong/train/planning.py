"""What a run will take before it starts: memory of one GPU by kind, and time at an assumed share of peak arithmetic.

Weights, gradients and optimiser state are exact. Activations are an estimate: what the layers keep for the backward
under bf16 autocast, times an allowance for temporaries that makes it meet the three peaks measured for nano on one H200
(results/training-nano: 10.0, 11.4 and 28.2 GiB; estimated 9.2, 10.2 and 27.0). Rows in pieces: what
train/segmented.py keeps, exactly, beside the activations of one piece of one half of the model. Used by
`hsa train --dry-run`; tests/train/test_planning.py.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from hsa_ultralong.baselines import RivalConfig
from hsa_ultralong.baselines.accounting import training_flops
from hsa_ultralong.baselines.twins import rival_parameters
from hsa_ultralong.models import HSAConfig, accounting
from hsa_ultralong.models.presets import replace_options
from hsa_ultralong.train.config import FULL_COVERAGE, StageConfig, TrainConfig
from hsa_ultralong.train.precision import require_blocks
from hsa_ultralong.train.twins import rival_of

ASSUMED_PEAK_FLOPS = 989e12  # H100 and H200, dense bf16 (docs/results.md)
_TEMPORARIES = 1.5
_FP32, _BF16 = 4, 2
# ids, labels, targets and layout of a row that runs in pieces
_ROW_BYTES = 40


@dataclass(frozen=True)
class StagePlan:
    """One stage on each of `gpus` GPUs.

    Attributes:
        steps, tokens, seq_len: of the stage. forward_tokens: tokens of one forward of one GPU.
        weights: fp32, and the bf16 copies that layers compute with. gradients, optimizer: fp32. activations: estimate.
        All in bytes of one GPU. host: bytes of pinned host memory a GPU, with piece_offload. seconds: of the whole
        stage; flops_per_token: in training (docs/results.md).
    """

    stage: str
    steps: int
    tokens: int
    seq_len: int
    forward_tokens: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    host: int
    flops_per_token: float
    seconds: float

    @property
    def total_bytes(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def planned_gpus(config: TrainConfig) -> int:
    """GPUs that the plan is for: those that config.parallel names, else config.gpus, but never fewer than it needs.

    Raises:
        ValueError: if replicate and context do not divide config.gpus.
    """
    parallel = config.parallel
    fixed = parallel.replicate * parallel.context
    if parallel.shard or config.gpus < fixed:
        return fixed * max(1, parallel.shard)
    if config.gpus % fixed:
        raise ValueError(
            f"replicate={parallel.replicate} x context={parallel.context} does not fit gpus={config.gpus}: take a "
            f"multiple of {fixed}, such as --set gpus={config.gpus // fixed * fixed}"
        )
    return config.gpus


def plan_run(config: TrainConfig, vocab_size: int | None = None) -> list[StagePlan]:
    """A StagePlan for every stage.

    Args:
        vocab_size: of the tokenizer; default the preset's.

    Raises:
        ValueError: if a step's rows cannot be shared out over the GPUs, or the model cannot train in the precision.
    """
    model = config.shape()
    if vocab_size is not None:
        model = replace_options(model, {"vocab_size": vocab_size})
    require_blocks(config.precision, model)
    rival = rival_of(config, model)
    if rival is not None:
        return [_plan_twin(config, stage, model, rival) for stage in config.stages]
    plans, window = [], model.sliding_window
    for stage in config.stages:
        window = stage.sliding_window or window
        all_chunks = stage.seq_len // model.chunk_size * stage.rows
        topk = all_chunks if stage.chunk_topk == FULL_COVERAGE else stage.chunk_topk
        plans.append(_plan_stage(config, stage, replace_options(model, {"chunk_topk": topk, "sliding_window": window})))
    return plans


def _plan_stage(config: TrainConfig, stage: StageConfig, model: HSAConfig) -> StagePlan:
    parallel, gpus = config.parallel, planned_gpus(config)
    forwards = [tokens // parallel.context for tokens in stage.forward_tokens(max(1, gpus // parallel.context))]
    tokens = max(forwards)
    cut = gpus // parallel.replicate
    counted = accounting.count_parameters(model)
    held = counted.total // cut
    tables = counted.embedding + counted.head
    frozen = counted.embedding + counted.lower + counted.encoder if config.freeze_memory else 0
    if config.freeze_source:
        frozen = counted.total - accounting.count_memory_parameters(model)
    all_trained = counted.total - frozen
    trained = all_trained // cut
    state = 8 * trained
    if config.optimizer == "muon":
        # one momentum instead of two
        state -= 4 * (counted.total - max(frozen, tables)) // cut
    copies = counted.total if gpus == 1 or not parallel.reshard_after_forward else tables + _largest_unit(model) * 2
    flops = stage.mean_over_lengths(lambda length: accounting.flops_per_token(model, length, training=True))
    return StagePlan(
        stage=stage.name,
        steps=stage.num_steps,
        tokens=stage.num_steps * stage.batch_tokens,
        seq_len=stage.seq_len,
        forward_tokens=tokens,
        weights=_FP32 * held + _BF16 * copies,
        gradients=_FP32 * _gradients(config, stage, model, all_trained),
        optimizer=state,
        activations=max(_activations(config, stage, model, each) for each in forwards),
        host=_FP32 * model.hidden_size * tokens if stage.piece_offload else 0,
        flops_per_token=flops,
        seconds=stage.num_steps * stage.batch_tokens * flops / (gpus * ASSUMED_PEAK_FLOPS * config.mfu),
    )


def _gradients(config: TrainConfig, stage: StageConfig, model: HSAConfig, trained: int) -> int:
    """Numbers of the gradients that one GPU has at once, of all `trained` ones."""
    parallel, gpus = config.parallel, planned_gpus(config)
    cut, data_world = gpus // parallel.replicate, gpus // parallel.context
    forwards = max(stage.num_forwards(data_world, step) for step in range(len(stage.lengths)))
    if parallel.gradient_sync == "every" or forwards == 1:
        return trained // cut
    spread = 0
    if parallel.expert > 1 and not config.freeze_source:
        spread = accounting.count_expert_parameters(model, model.num_lower_layers if config.freeze_memory else 0)
    return trained - spread + spread // cut


def _plan_twin(config: TrainConfig, stage: StageConfig, model: HSAConfig, rival: RivalConfig) -> StagePlan:
    """As for a model of its layers alone: what attention keeps beside queries, keys and values is not counted."""
    forwards = stage.forward_tokens(1)
    number = rival_parameters(rival)
    alike = replace_options(model, {"intermediate_size": rival.intermediate_size})

    def activations(tokens: int) -> int:
        kept = config.parallel.checkpointing(tokens)
        again = 0 if kept == "none" else layer_bytes(alike, "none")
        return int(_TEMPORARIES * tokens * (rival.num_hidden_layers * layer_bytes(alike, kept) + again))

    flops = stage.mean_over_lengths(lambda length: training_flops(rival, length))
    trained = stage.num_steps * stage.batch_tokens
    return StagePlan(
        stage=stage.name,
        steps=stage.num_steps,
        tokens=trained,
        seq_len=stage.seq_len,
        forward_tokens=max(forwards),
        weights=(_FP32 + _BF16) * number,
        gradients=_FP32 * number,
        optimizer=(4 if config.optimizer == "muon" else 8) * number,
        activations=max(map(activations, forwards)),
        host=0,
        flops_per_token=flops,
        seconds=trained * flops / (ASSUMED_PEAK_FLOPS * config.mfu),
    )


def _largest_unit(model: HSAConfig) -> int:
    """Parameters of the unit that is gathered at once, about."""
    counted = accounting.count_parameters(model)
    return max(counted.lower // model.num_lower_layers, counted.upper // model.num_upper_groups)


def layer_bytes(model: HSAConfig, kept: str) -> float:
    """Bytes per token that one decoder layer keeps for the backward; `kept` is ParallelConfig.activation_checkpointing.

    fp32 residual stream, everything else bf16.
    """
    assert model.head_dim is not None and model.moe_intermediate_size is not None
    width, heads = model.hidden_size, model.num_attention_heads * model.head_dim
    key_values = model.num_key_value_heads * model.head_dim
    if kept == "full":
        return _FP32 * width
    if kept == "selective":
        return 2 * _FP32 * width + _BF16 * (3 * heads + 2 * key_values)
    inner = model.intermediate_size
    if model.num_experts:
        used = model.num_experts_per_token
        inner = (used + model.num_shared_experts) * model.moe_intermediate_size + used * width
    # two norms with their inputs, projections and outputs; queries and keys before and after rotation; SwiGLU
    return 2 * _FP32 * width + _BF16 * (4 * width + 3 * heads + 3 * key_values + 3 * inner)


def _activations(config: TrainConfig, stage: StageConfig, model: HSAConfig, tokens: int) -> int:
    kept = config.parallel.checkpointing(tokens)
    assert model.head_dim is not None
    chunks = min(model.chunk_topk, stage.seq_len // model.chunk_size)
    # indices, scores and weights of the chunks kept, and the retrieval query
    retrieval = 12 * model.num_retrieval_heads * chunks + 2 * _BF16 * model.retrieval_dim
    # one layer is whole again while its backward runs
    again = 0 if kept == "none" else layer_bytes(model, "none")
    reading = (model.num_lower_layers + model.num_encoder_layers) * layer_bytes(model, kept)
    upper_layers = model.num_hidden_layers - model.num_lower_layers
    upper = upper_layers * layer_bytes(model, kept) + model.num_upper_groups * retrieval
    if not stage.piece_tokens:
        return int(_TEMPORARIES * tokens * (reading + upper + again))
    # one half of the model at a time, a piece of it with activations
    share = min(1.0, stage.piece_tokens / stage.seq_len)
    halves = zip((upper, reading), segmented_bytes(model, stage.piece_tokens, stage.piece_offload), strict=True)
    return int(tokens * max(_TEMPORARIES * share * (part + again) + kept_whole for part, kept_whole in halves))


def segmented_bytes(model: HSAConfig, piece_tokens: int, offload: bool = False) -> tuple[float, float]:
    """Bytes per token that train/segmented.py keeps of the whole row on the GPU while a piece of the upper half runs
    backward, and while one of the lower half does.

    In both the lower outputs (fp32), or gradients in their place, unless they wait on the host (`offload`), the fp32
    gradient of the memory, and the windows at the borders; before the lower half's backward the memory and the upper
    windows are freed.
    """
    assert model.head_dim is not None
    numbers = accounting.memory_bytes_per_token(model, 1)
    reach = [max(window - 1, 0) for window in model.layer_windows]
    window_token = 2 * _BF16 * model.num_key_value_heads * model.head_dim / piece_tokens
    lower_windows = window_token * sum(reach[: model.num_lower_layers])
    outputs = 0 if offload else _FP32 * model.hidden_size
    lower = _ROW_BYTES + outputs + lower_windows + _FP32 * numbers
    # the memory, and the gradient that a piece gives to all of it
    return lower + window_token * sum(reach[model.num_lower_layers :]) + 2 * _BF16 * numbers, lower


def plan_as_dict(config: TrainConfig, plans: list[StagePlan]) -> dict[str, Any]:
    """The plan as JSON has it, with what it assumes."""
    stages = [{**asdict(plan), "total_bytes": plan.total_bytes} for plan in plans]
    seconds = sum(plan.seconds for plan in plans)
    return {"gpus": planned_gpus(config), "mfu": config.mfu, "peak_flops": ASSUMED_PEAK_FLOPS, "stages": stages,
            "seconds": seconds}  # fmt: skip
