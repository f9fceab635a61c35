"""Late and intermediate at once: the votes, weighed by what the others are sure of, beside a joint head."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from gapweave.shared.fusion import FUSIONS, Fused, Fusion, Shape
from gapweave.shared.fusion.concat import joined
from gapweave.shared.fusion.parts import Head, HiddenSettings, present_only

FLOOR = math.log(1e-6)
"""Smallest logarithm of a probability, so that one modality cannot veto a class alone."""


class DynamicSettings(HiddenSettings):
    """How strongly the others' certainty counts."""

    beta: float = Field(1.0, ge=0, le=10, description="exponent of the weights; 0: all votes count alike")


@FUSIONS.register("dwfuse")
class DynamicWeightedFusion(Fusion):
    """Dynamic Weighted Fuse: a vote for a class counts where the other modalities do not see that class.

    A modality's share is its weight for the favoured class over the sum of these weights; the joint head has none.

    Reference: Liu et al. 2018, "Learn to Combine Modalities in Multimodal Deep Learning" (arXiv 1805.11730); OmniFuse
    Form: w^m_c = [product over used n other than m of 1 - p^n_c]^(beta / (|B| - 1)), 1 if m is alone; the score of a
        class is (log o_c + sum over used m of w^m_c log p^m_c) / (|B| + 1), o = g([slots, mask]), p at least 1e-6.
        Trained are CE(o, y) and the mean over used m of w^m_y CE(p^m, y), weights detached; several labels are as many
        two-class problems. Probabilities are without the site's prior, which is added to the scores
    Couples: nothing
    """

    Settings = DynamicSettings
    stage = "late"
    gives_shares = True

    def __init__(self, shape: Shape, settings: DynamicSettings | None = None) -> None:
        super().__init__(shape)
        settings = settings or DynamicSettings()
        self.beta, self.exclusive = settings.beta, shape.task == "multiclass"
        self.head = Head(shape.modalities * (shape.embedding + 1), shape.outputs, settings.hidden)

    def forward(self, slots: Tensor, used: Tensor, modality_logits: Tensor) -> Fused:
        """Weigh the votes of all classes."""
        joint = self.head(joined(slots, used))
        votes = class_log_probabilities(present_only(modality_logits, used), self.exclusive)
        weights = present_only(class_weights(votes.detach().exp(), used, self.beta), used)
        total = class_log_probabilities(joint, self.exclusive) + (weights * votes).sum(1)
        scores = total / (used.sum(1, keepdim=True) + 1)
        return Fused(
            logits=scores if self.exclusive else _positive_less_negative(scores),
            weights=self._shares(scores, weights),
            joint=joint,
            vote_weights=weights,
        )

    def _shares(self, scores: Tensor, weights: Tensor) -> Tensor:
        favoured = weights.gather(2, scores.argmax(1).view(-1, 1, 1).expand(-1, weights.shape[1], 1))[:, :, 0]
        shares: Tensor = favoured / favoured.sum(1, keepdim=True).clamp(min=1e-30)
        return shares


def class_log_probabilities(logits: Tensor, exclusive: bool) -> Tensor:
    """[..., K] to [..., C]: of each class, or of "no" to every label and then of "yes" to every label."""
    if exclusive:
        return torch.log_softmax(logits, -1).clamp(min=FLOOR)
    return functional.logsigmoid(torch.cat([-logits, logits], -1)).clamp(min=FLOOR)


def class_weights(probabilities: Tensor, used: Tensor, beta: float) -> Tensor:
    """w^m_c of Liu et al. over the modalities used.

    Args:
        probabilities: [B, M, C].
        used: [B, M] bool.
        beta: exponent.

    Returns:
        [B, M, C]; meaningless for modalities not used.
    """
    doubts = present_only((1 - probabilities).clamp(min=1e-6).log(), used)
    others = doubts.sum(1, keepdim=True) - doubts
    count = (used.sum(1).view(-1, 1, 1) - 1).clamp(min=1)
    return torch.exp(beta * others / count)


def _positive_less_negative(scores: Tensor) -> Tensor:
    negative, positive = scores.chunk(2, -1)
    return positive - negative
