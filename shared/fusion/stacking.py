"""Late fusion by a model of the votes."""

from __future__ import annotations

import torch
from torch import Tensor

from gapweave.shared.fusion import FUSIONS, Fused, Fusion, Shape
from gapweave.shared.fusion.concat import joined
from gapweave.shared.fusion.parts import Head, HiddenSettings, equal_shares, present_only, weighted_sum


@FUSIONS.register("stacking")
class StackingFusion(Fusion):
    """A small model reads the votes of the modalities that are there.

    Reference: Wolpert 1992, "Stacked Generalization" (Neural Networks 5)
    Form: mean over used m of the logits + g([tanh(logits of m / 2) for used m, mask]), votes detached: heads learn from
        their own losses only, the meta-learner from what they say, in the same private step, beginning near the mean
    Couples: a meta-learner fitted to votes on held-out patients; here it sees those that are trained on, and its few
        parameters are clipped and noised as the rest
    """

    Settings = HiddenSettings
    stage = "late"
    reads_slots = False

    def __init__(self, shape: Shape, settings: HiddenSettings | None = None) -> None:
        super().__init__(shape)
        settings = settings or HiddenSettings()
        self.head = Head(shape.modalities * (shape.outputs + 1), shape.outputs, settings.hidden)

    def forward(self, slots: Tensor, used: Tensor, modality_logits: Tensor) -> Fused:
        """Read the votes."""
        votes = present_only(modality_logits.detach(), used)
        mean = weighted_sum(equal_shares(used), votes)
        return Fused(logits=mean + self.head(joined(torch.tanh(votes / 2), used)), weights=None)
