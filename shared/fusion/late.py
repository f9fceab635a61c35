"""Late fusion: the mean of the logits of the modalities that are there."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gapweave.shared.config.base import StrictModel
from gapweave.shared.fusion import FUSIONS, Fused, Fusion, Shape
from gapweave.shared.fusion.parts import equal_shares, present_only, weighted_sum


@FUSIONS.register("late")
class LateFusion(Fusion):
    """The mean of the votes of the modalities that are there.

    The strongest fusion under noise in the trials (docs/decisions/0004), and the easiest to read: each
    modality's share is 1 over the number used.

    Reference: Kittler et al. 1998, "On Combining Classifiers" (TPAMI 20)
    Form: s = b + mean over used m of the logits of m, with a shared intercept b
    Couples: nothing
    """

    stage = "late"
    reads_slots = False
    gives_shares = True

    def __init__(self, shape: Shape, settings: StrictModel | None = None) -> None:
        super().__init__(shape)
        self.intercept = nn.Embedding(1, shape.outputs)
        nn.init.zeros_(self.intercept.weight)

    def forward(self, slots: Tensor, used: Tensor, modality_logits: Tensor) -> Fused:
        """Average the votes."""
        weights = equal_shares(used)
        first = torch.zeros(len(used), dtype=torch.int64, device=used.device)
        votes = present_only(modality_logits, used)
        return Fused(logits=weighted_sum(weights, votes) + self.intercept(first), weights=weights)
