"""Late fusion: the mean of the logits of the modalities that are there."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gapweave.shared.fusion import FUSIONS, Fused, Fusion


@FUSIONS.register("late")
class LateFusion(Fusion):
    """s = b + mean over used m of the logits of m, with a shared intercept b.

    The strongest fusion under noise in the trials (docs/decisions/0004), and the easiest to read: each
    modality's share is 1 over the number used.
    """

    reads_slots = False

    def __init__(self, modalities: int, embedding: int, outputs: int) -> None:
        super().__init__(modalities, embedding, outputs)
        self.intercept = nn.Embedding(1, outputs)
        nn.init.zeros_(self.intercept.weight)

    def forward(self, slots: Tensor, used: Tensor, modality_logits: Tensor) -> Fused:
        """Average the votes."""
        weights = used / used.sum(1, keepdim=True).clamp(min=1)
        first = torch.zeros(len(used), dtype=torch.int64, device=used.device)
        logits = (weights.unsqueeze(-1) * modality_logits).sum(1) + self.intercept(first)
        return Fused(logits=logits, weights=weights)
