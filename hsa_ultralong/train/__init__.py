"""Training on one device: stages, loop, resumable checkpoints."""

from hsa_ultralong.train.config import StageConfig, TrainConfig, apply_overrides, as_dict
from hsa_ultralong.train.loop import Trainer, TrainingDiverged

__all__ = ["StageConfig", "TrainConfig", "Trainer", "TrainingDiverged", "apply_overrides", "as_dict"]
