"""Intermediate fusion: all slots and the mask, concatenated, through a wide and deep head."""

from __future__ import annotations

import torch
from torch import Tensor

from gapweave.shared.fusion import FUSIONS, Fused, Fusion, Shape
from gapweave.shared.fusion.parts import Head, HiddenSettings


def joined(slots: Tensor, used: Tensor) -> Tensor:
    """[B, M d + M]: all slots, then the mask."""
    return torch.cat([slots.flatten(1), used.to(slots.dtype)], dim=-1)


@FUSIONS.register("concat")
class ConcatFusion(Fusion):
    """All slots and the mask, concatenated, through one head.

    Reference: Ngiam et al. 2011, "Multimodal Deep Learning" (ICML)
    Form: g([slots, mask]) with a linear path and tanh units; what the imputer put in a slot is read
    Couples: nothing
    """

    Settings = HiddenSettings

    def __init__(self, shape: Shape, settings: HiddenSettings | None = None) -> None:
        super().__init__(shape)
        settings = settings or HiddenSettings()
        self.head = Head(shape.modalities * (shape.embedding + 1), shape.outputs, settings.hidden)

    def forward(self, slots: Tensor, used: Tensor, modality_logits: Tensor) -> Fused:
        """Concatenate and decide."""
        return Fused(logits=self.head(joined(slots, used)), weights=None)
