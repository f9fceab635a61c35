"""Intermediate fusion of a set of any size, by one network that is told which modality it reads."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from gapweave.shared.fusion import FUSIONS, Fused, Fusion, Shape
from gapweave.shared.fusion.parts import Head, HiddenSettings, Numbers, present_only


class HyperSettings(HiddenSettings):
    """The conditional layer."""

    rank: int = Field(8, ge=1, le=256, description="rank of the part of the layer that depends on the modality")
    token: int = Field(8, ge=1, le=256, description="numbers that describe a modality")


@FUSIONS.register("hypermm")
class HyperFusion(Fusion):
    """One layer for all modalities, with weights that a second network gives it by modality; then their sum.

    Reference: Chaptoukaev et al. 2024, "HyperMM: Robust Multimodal Learning with Varying-sized Inputs" (MICCAI
        workshop MMMI, arXiv 2407.20768)
    Form: g(sum over used m of tanh(W v^m + U (a_m * V v^m) + c_m)), (a_m, c_m) = H t_m of a learned t_m a modality: the
        weights that the hypernetwork makes have a fixed part and one of low rank. Nothing stands in for what is missing
    Couples: the paper trains the extractor with all patients first and freezes it; here all is trained together
    """

    Settings = HyperSettings
    reads_slots = False

    def __init__(self, shape: Shape, settings: HyperSettings | None = None) -> None:
        super().__init__(shape)
        settings = settings or HyperSettings()
        width, self.rank = shape.embedding, settings.rank
        self.token = Numbers(shape.modalities, settings.token)
        nn.init.normal_(self.token.table.weight)
        self.hyper = nn.Linear(settings.token, settings.rank + width)
        self.whole, self.down = nn.Linear(width, width), nn.Linear(width, settings.rank, bias=False)
        self.up = nn.Linear(settings.rank, width, bias=False)
        self.head = Head(width, shape.outputs, settings.hidden)

    def forward(self, slots: Tensor, used: Tensor, modality_logits: Tensor) -> Fused:
        """Read every modality by its own weights, add up and decide."""
        clean = present_only(slots, used)
        scale, shift = self.hyper(self.token(used)).split((self.rank, slots.shape[-1]), -1)
        read = torch.tanh(self.whole(clean) + self.up(scale * self.down(clean)) + shift)
        return Fused(logits=self.head(present_only(read, used).sum(1)), weights=None)
