"""Gradients without clipping, for runs without privacy."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gapweave.client.gradients import Gradient, plain_objective
from gapweave.shared.model import MultimodalModel
from gapweave.shared.objective import TaskKind
from gapweave.shared.schema import Batch
from gapweave.shared.schemes import Objective


class PlainEngine:
    """One backward of the summed loss.

    Args:
        model: updated in place by the caller between calls.
        kind: of the task.
    """

    sensitivity = math.inf

    def __init__(self, model: MultimodalModel, kind: TaskKind) -> None:
        self.model = model
        self._plain = plain_objective(kind)

    def sum(self, batch: Batch, used: Tensor, objective: Objective | None = None) -> Gradient:
        """The plain sum of gradients."""
        names = self.model.named
        if len(batch) == 0:
            return {name: torch.zeros_like(parameter) for name, parameter in names.items()}
        loss = torch.dot((objective or self._plain)(self.model, batch, used), batch.weight)
        gradients = torch.autograd.grad(loss, list(names.values()), allow_unused=True)
        return {
            name: torch.zeros_like(parameter) if gradient is None else gradient
            for (name, parameter), gradient in zip(names.items(), gradients, strict=True)
        }
