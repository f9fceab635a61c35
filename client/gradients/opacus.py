"""Per-record gradients from Opacus' hooks: the oracle, and the fallback for layers that `fast` does not know."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from gapweave.client.gradients import Gradient, plain_objective
from gapweave.client.gradients.clipping import Grouping, clip_factors, grouped, together
from gapweave.client.gradients.padding import align, padded
from gapweave.shared.errors import UsageError
from gapweave.shared.model import MultimodalModel
from gapweave.shared.objective import TaskKind
from gapweave.shared.schema import Batch
from gapweave.shared.schemes import Objective

COLUMNS = 2048
"""Parameters that are converted to float64 at a time: a block that stays in the cache is several times faster."""


class OpacusEngine:
    """Per-record gradients from Opacus' hooks, folded to patients, clipped, summed in float64.

    Args:
        model: its layers must be known to Opacus; updated in place by the caller between calls.
        kind: of the task.
        bound: clipping bound of one patient's gradient over all parameters.
        grouping: which parameters are clipped together.

    Raises:
        UsageError: naming the layer that mixes patients or that Opacus does not know.
    """

    def __init__(self, model: MultimodalModel, kind: TaskKind, bound: float, grouping: Grouping = together) -> None:
        from opacus import GradSampleModule
        from opacus.validators import ModuleValidator

        if ModuleValidator.validate(model, strict=False):
            name, layer = _faulty_layer(model)
            raise UsageError(
                f"{type(layer).__name__} at `{name}` mixes patients or has no known per-patient gradient",
                where="study:model",
                remedy="Use GroupNorm or LayerNorm for normalisation, and layers that Opacus supports",
            )
        self.model, self._plain = model, plain_objective(kind)
        self.bound = self.sensitivity = bound
        align(model)
        self.module = GradSampleModule(model, batch_first=True, loss_reduction="sum")
        self.names = dict(model.named_parameters())
        self._groups = grouped(self.names, grouping)

    def sum(self, batch: Batch, used: Tensor, objective: Objective | None = None) -> Gradient:
        """The sum of clipped per-patient gradients, float64."""
        if len(batch) == 0:
            return {name: torch.zeros_like(parameter, dtype=torch.float64) for name, parameter in self.names.items()}
        batch, used = padded(batch, used)
        self.module.zero_grad(set_to_none=True)
        with warnings.catch_warnings():
            # Integer indices of an Embedding have no gradient; torch warns about Opacus' backward hook on it.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            losses = (objective or self._plain)(self.model, batch, used)
            (torch.where(batch.weight > 0, losses, 0.0) * batch.weight).sum().backward()
        groups = [self._patients(batch, names) for names in self._groups]
        self.module.zero_grad(set_to_none=True)
        each, keep = clip_factors(torch.stack([_norms(group) for group in groups]), self.bound)
        total: Gradient = {}
        for names, group, factor in zip(self._groups, groups, each, strict=True):
            total |= self._split(_weighted_sum(group, factor, keep), names)
        return {name: total[name] for name in self.names}

    def _patients(self, batch: Batch, names: list[str]) -> Tensor:
        """[P, D] gradients of each patient in the named parameters."""
        records = torch.cat([self._samples(self.names[name], len(batch)) for name in names], dim=1)
        patients = torch.zeros(batch.patients, records.shape[1], dtype=records.dtype, device=records.device)
        return patients.index_add_(0, batch.patient, records)

    def _samples(self, parameter: Tensor, records: int) -> Tensor:
        """[R, numel] gradients of each record; zeros for a parameter that nothing used."""
        samples: Tensor | None = getattr(parameter, "grad_sample", None)
        if samples is None:
            return torch.zeros(records, parameter.numel(), dtype=parameter.dtype, device=parameter.device)
        return samples.reshape(records, -1)

    def _split(self, total: Tensor, names: list[str]) -> Gradient:
        parts = total.split([self.names[name].numel() for name in names])
        return {name: part.view_as(self.names[name]) for name, part in zip(names, parts, strict=True)}


def _norms(patients: Tensor) -> Tensor:
    """[P, D] to [P] in float64."""
    squares = torch.zeros(len(patients), dtype=torch.float64, device=patients.device)
    for block in patients.split(COLUMNS, dim=1):
        squares += torch.linalg.vector_norm(block.double(), dim=1).square()
    return squares.sqrt()


def _weighted_sum(patients: Tensor, factor: Tensor, keep: Tensor | None) -> Tensor:
    """[P, D] gradients and [P] factors to the float64 sum [D] over the patients to keep."""
    if keep is not None:
        patients, factor = patients[keep], factor[keep]
    return torch.cat([factor @ block.double() for block in patients.split(COLUMNS, dim=1)])


def _faulty_layer(model: nn.Module) -> tuple[str, nn.Module]:
    """The innermost layer that Opacus refuses, with its name."""
    from opacus.validators import ModuleValidator

    for name, layer in model.named_children():
        if ModuleValidator.validate(layer, strict=False):
            inner, culprit = _faulty_layer(layer)
            return f"{name}.{inner}".rstrip("."), culprit
    return "", model
