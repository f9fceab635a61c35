"""The sum of clipped per-patient gradients of one mini-batch.

Guarantee: the result changes by at most the engine's `sensitivity` in L2 norm when one patient, with all records,
is added to or removed from the mini-batch. A patient whose loss or gradient is not finite contributes exactly zero.

Assumes: losses that are sums over a patient's own records (shared/objective.py), and a model whose layers do not
mix rows.

Edge cases: an empty mini-batch gives zeros; a parameter that no record uses gives zeros.

Engines: `fast` (book-keeping: one forward, one backward of activations only), `opacus` (per-record gradients from
hooks: the oracle in tests, and the way out for layers that `fast` does not know), `plain` (no clipping, for runs
without privacy).
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from gapweave.shared.model import MultimodalModel
from gapweave.shared.objective import TaskKind, record_losses
from gapweave.shared.schema import Batch
from gapweave.shared.schemes import Objective

Gradient = dict[str, Tensor]
"""Gradient by parameter name."""


class GradientEngine(Protocol):
    """Computes a mini-batch's sum of patients' gradients."""

    sensitivity: float
    """Most that one patient can change the sum in L2 norm."""

    def sum(self, batch: Batch, used: Tensor, objective: Objective | None = None) -> Gradient:
        """Sum over the batch's patients.

        Args:
            batch: records of the sampled patients.
            used: [R, M] bool, modalities that inform the prediction.
            objective: the loss of each record; None for the plain one.
        """
        ...


def plain_objective(kind: TaskKind) -> Objective:
    """The loss without a training scheme."""

    def losses(model: MultimodalModel, batch: Batch, used: Tensor) -> Tensor:
        return record_losses(model(batch.inputs, batch.present, used), batch.target, batch.label_mask, kind)

    return losses
