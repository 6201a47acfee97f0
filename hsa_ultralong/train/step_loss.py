"""What an optimiser step learns from a micro-batch: the loss of its labels or a teacher's, and that of its evidence.

Called by loop.py, which sums over micro-batches and processes; tests/train/.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from hsa_ultralong.distributed.mesh import context_place, total
from hsa_ultralong.models import HSAForCausalLM
from hsa_ultralong.train.activations import activation_context
from hsa_ultralong.train.batches import Batch, count_labels, model_inputs
from hsa_ultralong.train.config import StageConfig, TrainConfig
from hsa_ultralong.train.evidence import EvidenceLoss, count_told
from hsa_ultralong.train.graphs import GraphedSteps
from hsa_ultralong.train.parallelize import gathered
from hsa_ultralong.train.segmented import segmented_loss_backward
from hsa_ultralong.train.teaching import Counts, count_tokens, taught_by


class StepLoss:
    """The losses of a run's stages on one process.

    Args:
        source: transformers' model for stages with divergence.

    Raises:
        ValueError: a stage asks for a loss that the model does not have.
    """

    def __init__(
        self,
        model: Any,
        config: TrainConfig,
        source: PreTrainedModel | None,
        device: torch.device,
        mesh: DeviceMesh | None,
    ) -> None:
        self.model, self.config, self.device, self.mesh = model, config, device, mesh
        self.teacher = taught_by(source, model, config, device)
        self.evidence: EvidenceLoss | None = None
        self._has_evidence = False
        self._parts: dict[str, torch.Tensor] = {}
        if any(stage.evidence_loss for stage in config.stages):
            if not isinstance(model, HSAForCausalLM):
                raise ValueError("evidence_loss is of the model only: leave it out for a twin")
            self.evidence = EvidenceLoss(model)
        self.graphs = GraphedSteps(model, device, self.evidence) if config.parallel.cuda_graphs else None

    def begin(self, stage: StageConfig, batches: list[Batch]) -> list[int]:
        """A step begins: what its losses are divided by, over all processes; those of the evidence are the last two."""
        if self.graphs is not None:
            self.graphs.begin(stage)
        counts = count_tokens(batches) if stage.needs_teacher else [count_labels(batches)]
        if stage.evidence_loss:
            counts += count_told(batches, stage, self.model.config.chunk_size)
        counts = [int(one) // self.config.parallel.context for one in total(torch.tensor(counts), self.mesh)]
        self._has_evidence = bool(stage.evidence_loss and any(counts[-2:]))
        return counts

    def backward(self, stage: StageConfig, batch: Batch, counts: list[int]) -> torch.Tensor:
        """Add the gradients of one micro-batch; its share of the loss, which all processes' tokens divide."""
        if self.graphs is not None:
            loss, taught, first = self.graphs.backward(stage, batch, counts).unbind()
            if self._has_evidence:
                self._note(taught, first)
            return loss
        inputs = model_inputs(batch, stage, self.device, context_place(self.mesh), self.config.parallel.context)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            if stage.piece_tokens:
                with gathered(self.model):
                    return segmented_loss_backward(
                        self.model,
                        inputs,
                        stage.piece_tokens,
                        num_items=max(1, counts[0]),
                        offload=stage.piece_offload,
                    )
            if self.evidence is not None and stage.evidence_loss:
                self.evidence.expect(batch, stage, counts[-2:], self.device)
            if self.teacher is not None and stage.needs_teacher:
                with gathered(self.model), activation_context(self.config.parallel):
                    loss = self.teacher.losses(self.model, inputs, batch, stage, Counts(*counts[:2]))
                    (loss + self._auxiliary(stage)).backward()
                return loss.detach()
            with activation_context(self.config.parallel):
                if stage.pool_memory:
                    inputs["pool_memory"] = stage.pool_memory
                loss = self.model(**inputs, num_items_in_batch=max(1, counts[0])).loss
                whole = loss + self._auxiliary(stage)
        whole.backward()
        return loss.detach()

    def _auxiliary(self, stage: StageConfig) -> torch.Tensor | float:
        found = self.evidence.take() if self.evidence is not None and stage.evidence_loss else None
        if found is None:
            return 0.0
        loss, first = found
        self._note(loss, first)
        return stage.evidence_loss * loss

    def _note(self, loss: torch.Tensor, first: torch.Tensor) -> None:
        for name, value in (("evidence_loss", loss), ("evidence_first", first)):
            self._parts[name] = self._parts.get(name, 0) + value.detach()

    def take(self) -> dict[str, torch.Tensor]:
        """What the losses of the step consisted of, over all processes."""
        parts, self._parts = self._parts, {}
        if self._has_evidence:
            # processes exchange what all of them have; a step without any says nothing of retrieval
            for name in ("evidence_loss", "evidence_first"):
                parts.setdefault(name, torch.zeros((), device=self.device))
        if self.teacher is not None:
            parts.update(self.teacher.take())
        return {name: total(part, self.mesh) for name, part in sorted(parts.items())}
