"""Per-record gradients from Opacus' hooks: the oracle, and the fallback for layers that `fast` does not know."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from gapweave.client.gradients import Gradient
from gapweave.shared.errors import UsageError
from gapweave.shared.model import MultimodalModel
from gapweave.shared.objective import TaskKind, record_losses
from gapweave.shared.schema import Batch

COLUMNS = 2048
"""Parameters that are converted to float64 at a time: a block that stays in the cache is several times faster."""


class OpacusEngine:
    """Per-record gradients from Opacus' hooks, folded to patients, clipped, summed in float64.

    Args:
        model: its layers must be known to Opacus; updated in place by the caller between calls.
        kind: of the task.
        bound: clipping bound of one patient's gradient over all parameters together.

    Raises:
        UsageError: naming the layer that mixes patients or that Opacus does not know.
    """

    def __init__(self, model: MultimodalModel, kind: TaskKind, bound: float) -> None:
        from opacus import GradSampleModule
        from opacus.validators import ModuleValidator

        if ModuleValidator.validate(model, strict=False):
            name, layer = _faulty_layer(model)
            raise UsageError(
                f"{type(layer).__name__} at `{name}` mixes patients or has no known per-patient gradient",
                where="study:model",
                remedy="Use GroupNorm or LayerNorm for normalisation, and layers that Opacus supports",
            )
        self.kind = kind
        self.bound = self.sensitivity = bound
        self.module = GradSampleModule(model, batch_first=True, loss_reduction="sum")
        self.names = dict(model.named_parameters())

    def sum(self, batch: Batch, used: Tensor) -> Gradient:
        """The sum of clipped per-patient gradients, float64."""
        if len(batch) == 0:
            return {name: torch.zeros_like(parameter, dtype=torch.float64) for name, parameter in self.names.items()}
        self.module.zero_grad(set_to_none=True)
        with warnings.catch_warnings():
            # Integer indices of an Embedding have no gradient; torch warns about Opacus' backward hook on it.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            outputs = self.module(batch.inputs, batch.present, used)
            losses = record_losses(outputs, batch.target, batch.label_mask, self.kind)
            (torch.where(batch.weight > 0, losses, 0.0) * batch.weight).sum().backward()
        records = torch.cat([self._samples(parameter, len(batch)) for parameter in self.names.values()], dim=1)
        self.module.zero_grad(set_to_none=True)
        patients = torch.zeros(batch.patients, records.shape[1], dtype=records.dtype, device=records.device)
        return self._split(self._clipped_sum(patients.index_add_(0, batch.patient, records)))

    def _samples(self, parameter: Tensor, records: int) -> Tensor:
        """[R, numel] gradients of each record; zeros for a parameter that nothing used."""
        samples: Tensor | None = getattr(parameter, "grad_sample", None)
        if samples is None:
            return torch.zeros(records, parameter.numel(), dtype=parameter.dtype, device=parameter.device)
        return samples.reshape(records, -1)

    def _clipped_sum(self, patients: Tensor) -> Tensor:
        """[P, D] gradients to the float64 sum [D] of those that are finite, each scaled down to the bound."""
        squares = torch.zeros(len(patients), dtype=torch.float64, device=patients.device)
        for block in patients.split(COLUMNS, dim=1):
            squares += torch.linalg.vector_norm(block.double(), dim=1).square()
        # Selected, not multiplied away: zero times NaN is NaN.
        finite = torch.isfinite(squares)
        factor = (self.bound / squares[finite].sqrt().clamp(min=1e-12)).clamp(max=1.0)
        kept = patients if bool(finite.all()) else patients[finite]
        return torch.cat([factor @ block.double() for block in kept.split(COLUMNS, dim=1)])

    def _split(self, total: Tensor) -> Gradient:
        parts = total.split([parameter.numel() for parameter in self.names.values()])
        return {
            name: part.view_as(parameter) for (name, parameter), part in zip(self.names.items(), parts, strict=True)
        }


def _faulty_layer(model: nn.Module) -> tuple[str, nn.Module]:
    """The innermost layer that Opacus refuses, with its name."""
    from opacus.validators import ModuleValidator

    for name, layer in model.named_children():
        if ModuleValidator.validate(layer, strict=False):
            inner, culprit = _faulty_layer(layer)
            return f"{name}.{inner}".rstrip("."), culprit
    return "", model
