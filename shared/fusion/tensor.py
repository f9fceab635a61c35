"""Intermediate fusions over products of the modalities' components."""

from __future__ import annotations

from functools import reduce

import torch
from pydantic import Field
from torch import Tensor, nn

from gapweave.shared.config.base import StrictModel
from gapweave.shared.errors import UsageError
from gapweave.shared.fusion import FUSIONS, Fused, Fusion, Shape
from gapweave.shared.fusion.parts import Docks, Head, HiddenSettings, present_only

LARGEST = 4096
"""Numbers that a record's tensor may have: each has noise of its own, which buries the signal before memory ends."""


class TensorSettings(StrictModel):
    """Size of the tensor."""

    width: int = Field(4, ge=1, le=256, description="components of each modality, beside a constant 1")

    def size(self, modalities: int) -> int:
        """Numbers of a record's tensor."""
        return int((self.width + 1) ** modalities)


@FUSIONS.register("tensor")
class TensorFusion(Fusion):
    """All products of components of the modalities that are there.

    Reference: Zadeh et al. 2017, "Tensor Fusion Network for Multimodal Sentiment Analysis" (EMNLP)
    Form: a linear map of the outer product over m of [1, tanh(P_m v^m + b_m)], with [1, 0] for an absent modality: the
        products of those that are there stay as they are. Refused when (width + 1)^M is beyond 4096
    Couples: dropout and batch normalisation in the paper's networks; there is none
    """

    Settings = TensorSettings
    reads_slots = False

    def __init__(self, shape: Shape, settings: TensorSettings | None = None) -> None:
        super().__init__(shape)
        settings = settings or TensorSettings()
        self.docks = Docks(shape.modalities, shape.embedding, settings.width)
        self.out = nn.Linear(settings.size(shape.modalities), shape.outputs)

    @classmethod
    def check(cls, shape: Shape, settings: StrictModel) -> None:
        """Refuse a tensor that is too large."""
        super().check(shape, settings)
        settings = TensorSettings.model_validate(settings)
        size = settings.size(shape.modalities)
        if size > LARGEST:
            raise UsageError(
                f"the tensor of {shape.modalities} modalities of width={settings.width} has "
                f"{settings.width + 1}^{shape.modalities} = {size:,} numbers, at most {LARGEST:,} are allowed",
                where="study:model.fusion",
                remedy="Use low_rank_tensor, a smaller model.fusion_settings.width, or fewer modalities",
            )

    def forward(self, slots: Tensor, used: Tensor, modality_logits: Tensor) -> Fused:
        """Multiply out and decide."""
        docked = torch.tanh(self.docks(slots, used))
        extended = torch.cat([torch.ones_like(docked[:, :, :1]), docked], -1)
        outer = reduce(lambda one, other: (one.unsqueeze(2) * other.unsqueeze(1)).flatten(1), extended.unbind(1))
        return Fused(logits=self.out(outer), weights=None)


class LowRankSettings(HiddenSettings):
    """Rank and width of the product."""

    rank: int = Field(4, ge=1, le=64, description="number of products that are added up")
    width: int = Field(8, ge=1, le=256, description="components of the result")


@FUSIONS.register("low_rank_tensor")
class LowRankTensorFusion(Fusion):
    """The tensor's linear map as a sum of a few products, linear in the number of modalities.

    Reference: Liu et al. 2018, "Efficient Low-rank Multimodal Fusion with Modality-Specific Factors" (ACL)
    Form: g(mean over r of the product over used m of W_m,r v^m + b_m,r), b starting at 1; an absent modality is a
        factor of 1, so that the scale does not depend on the pattern
    Couples: dropout and batch normalisation in the paper's networks; there is none
    """

    Settings = LowRankSettings
    reads_slots = False

    def __init__(self, shape: Shape, settings: LowRankSettings | None = None) -> None:
        super().__init__(shape)
        settings = settings or LowRankSettings()
        self.rank = settings.rank
        self.docks = Docks(shape.modalities, shape.embedding, settings.rank * settings.width, start=1.0)
        self.head = Head(settings.width, shape.outputs, settings.hidden)

    def forward(self, slots: Tensor, used: Tensor, modality_logits: Tensor) -> Fused:
        """Multiply and decide."""
        factors = present_only(self.docks(slots, used), used, 1.0)
        products = reduce(torch.mul, factors.unbind(1)).view(len(factors), self.rank, -1)
        return Fused(logits=self.head(products.mean(1)), weights=None)
