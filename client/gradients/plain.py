"""Gradients without clipping, for runs without privacy."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gapweave.client.gradients import Gradient
from gapweave.shared.model import MultimodalModel
from gapweave.shared.objective import TaskKind, record_losses
from gapweave.shared.schema import Batch


class PlainEngine:
    """One backward of the summed loss.

    Args:
        model: updated in place by the caller between calls.
        kind: of the task.
    """

    sensitivity = math.inf

    def __init__(self, model: MultimodalModel, kind: TaskKind) -> None:
        self.model = model
        self.kind = kind

    def sum(self, batch: Batch, used: Tensor) -> Gradient:
        """The plain sum of gradients."""
        names = self.model.named
        if len(batch) == 0:
            return {name: torch.zeros_like(parameter) for name, parameter in names.items()}
        outputs = self.model(batch.inputs, batch.present, used)
        losses = record_losses(outputs, batch.target, batch.label_mask, self.kind) * batch.weight
        gradients = torch.autograd.grad(losses.sum(), list(names.values()), allow_unused=True)
        return {
            name: torch.zeros_like(parameter) if gradient is None else gradient
            for (name, parameter), gradient in zip(names.items(), gradients, strict=True)
        }
