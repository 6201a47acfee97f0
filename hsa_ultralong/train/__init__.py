"""Training in stages, on one device or many: loop, resumable checkpoints, optimisers, metrics."""

from hsa_ultralong.distributed.mesh import ParallelConfig
from hsa_ultralong.train.config import FULL_COVERAGE, StageConfig, TrainConfig, apply_overrides, as_dict
from hsa_ultralong.train.loop import Trainer, TrainingDiverged

__all__ = [
    "FULL_COVERAGE",
    "ParallelConfig",
    "StageConfig",
    "TrainConfig",
    "Trainer",
    "TrainingDiverged",
    "apply_overrides",
    "as_dict",
]
