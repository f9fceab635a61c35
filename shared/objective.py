"""The loss of one record, as a function of that record and public parameters only.

loss = CE(fused, y) + mean over used m of w CE(m's head, y) + c times the mean over hidden m of
|imputed - embedding|^2 / d, with w = 1, or the fusion's own detached weight of m for the true class, and c = 1 unless
the imputer's settings say otherwise, plus what fusion and imputer add themselves (OmniFuse with the corrections of
docs/decisions/0003: only modalities hidden on purpose supervise the imputer, and their embedding is a detached target).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from gapweave.shared.config.study import TaskKind as TaskKind
from gapweave.shared.model import Outputs


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The parts of each record's loss.

    Attributes:
        joint: [B], of the fusion.
        votes: [B, M], of each modality's head; only those of modalities used count.
        rest: [B], of imputer and fusion, which know no label.
    """

    joint: Tensor
    votes: Tensor
    rest: Tensor


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
    terms = loss_terms(outputs, target, label_mask, kind)
    return terms.joint + mean_over(terms.votes, outputs.used) + terms.rest


def loss_terms(outputs: Outputs, target: Tensor, label_mask: Tensor, kind: TaskKind) -> Terms:
    """The parts of what `record_losses` gives, for schemes that weigh them."""
    fused = outputs.logits if outputs.joint is None else outputs.joint
    distance = functional.mse_loss(outputs.imputed, outputs.embeddings.detach(), reduction="none").mean(-1)
    rest = outputs.imputer_weight * mean_over(distance, outputs.present & ~outputs.used)
    return Terms(
        joint=cross_entropy(fused, target, label_mask, kind),
        votes=cross_entropy(outputs.modality_logits, target, label_mask, kind, outputs.vote_weights),
        rest=rest if outputs.penalty is None else rest + outputs.penalty,
    )


def cross_entropy(
    logits: Tensor, target: Tensor, mask: Tensor, kind: TaskKind, weights: Tensor | None = None
) -> Tensor:
    """Softmax for multiclass, else the sum of K two-class problems over K.

    Args:
        logits: [B, K], or [B, M, K] of several that speak about the same record.
        target: [B, K]; may be soft.
        mask: [B, K] bool.
        kind: the task's.
        weights: [B, M, C], by true class.

    Returns:
        [B] or [B, M].
    """
    if logits.ndim == 3:
        target, mask = target.unsqueeze(1).expand_as(logits), mask.unsqueeze(1)
    if kind == "multiclass":
        chosen = target if weights is None else target * weights
        return -(chosen * torch.log_softmax(logits, -1)).sum(-1) * mask[..., 0]
    losses = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    if weights is not None:
        negative, positive = weights.chunk(2, -1)
        losses = losses * torch.where(target > 0, positive, negative)
    return torch.where(mask, losses, 0.0).mean(-1)


def mean_over(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of [B, M] over the masked entries of a row; 0 where there is none."""
    return torch.where(mask, values, 0.0).sum(1) / mask.sum(1).clamp(min=1)


def probabilities(logits: Tensor, kind: TaskKind) -> Tensor:
    """[..., K] logits to [..., classes]: both classes for binary, softmax, or one a label."""
    if kind == "multiclass":
        return torch.softmax(logits, -1)
    positive = torch.sigmoid(logits)
    return torch.cat([1 - positive, positive], dim=-1) if kind == "binary" else positive
