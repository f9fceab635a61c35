"""The loss of one record, as a function of that record and public parameters only.

loss = CE(fused, y) + mean over used m of w CE(m's head, y) + mean over hidden m of |imputed - embedding|^2 / d
with w = 1, or the fusion's own detached weight of m for the true class
(OmniFuse with the corrections of docs/decisions/0003: only modalities hidden on purpose supervise the imputer,
and their embedding is a detached target).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from gapweave.shared.config.study import TaskKind as TaskKind
from gapweave.shared.model import Outputs


def record_losses(outputs: Outputs, target: Tensor, label_mask: Tensor, kind: TaskKind) -> Tensor:
    """Loss of each record.

    Args:
        outputs: of the model.
        target: [B, K].
        label_mask: [B, K] bool.
        kind: the task's.

    Returns:
        [B]; records are not coupled, and no number depends on the batch size.
    """
    fused = outputs.logits if outputs.joint is None else outputs.joint
    losses = _cross_entropy(fused, target, label_mask, kind)
    used = outputs.used
    votes = _cross_entropy(
        outputs.modality_logits,
        target.unsqueeze(1).expand_as(outputs.modality_logits),
        label_mask.unsqueeze(1),
        kind,
        outputs.vote_weights,
    )
    losses = losses + _mean_over(votes, used)
    distance = (outputs.imputed - outputs.embeddings.detach()).square().mean(-1)
    return losses + _mean_over(distance, outputs.present & ~used)


def _cross_entropy(
    logits: Tensor, target: Tensor, mask: Tensor, kind: TaskKind, weights: Tensor | None = None
) -> Tensor:
    """[..., K] -> [...]: softmax for multiclass, else the sum of K two-class problems over K; weighed by true class."""
    if kind == "multiclass":
        chosen = target if weights is None else target * weights
        return -(chosen * torch.log_softmax(logits, -1)).sum(-1) * mask[..., 0]
    losses = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    if weights is not None:
        negative, positive = weights.chunk(2, -1)
        losses = losses * torch.where(target > 0, positive, negative)
    return torch.where(mask, losses, 0.0).mean(-1)


def _mean_over(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of [B, M] over the masked entries of a row; 0 where there is none."""
    return torch.where(mask, values, 0.0).sum(1) / mask.sum(1).clamp(min=1)


def probabilities(logits: Tensor, kind: TaskKind) -> Tensor:
    """[..., K] logits to [..., classes]: both classes for binary, softmax, or one a label."""
    if kind == "multiclass":
        return torch.softmax(logits, -1)
    positive = torch.sigmoid(logits)
    return torch.cat([1 - positive, positive], dim=-1) if kind == "binary" else positive
