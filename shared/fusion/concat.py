"""Intermediate fusion: all slots and the mask, concatenated, through a wide and deep head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gapweave.shared.fusion import FUSIONS, Fused, Fusion


@FUSIONS.register("concat")
class ConcatFusion(Fusion):
    """g([slots, mask]) with a linear path and 24 tanh units."""

    def __init__(self, modalities: int, embedding: int, outputs: int, hidden: int = 24) -> None:
        super().__init__(modalities, embedding, outputs)
        width = modalities * embedding + modalities
        self.wide = nn.Linear(width, outputs)
        self.hidden = nn.Linear(width, hidden)
        self.deep = nn.Linear(hidden, outputs)

    def forward(self, slots: Tensor, used: Tensor, modality_logits: Tensor) -> Fused:
        """Concatenate and decide."""
        joined = torch.cat([slots.flatten(1), used.to(slots.dtype)], dim=-1)
        return Fused(logits=self.wide(joined) + self.deep(torch.tanh(self.hidden(joined))), weights=None)
