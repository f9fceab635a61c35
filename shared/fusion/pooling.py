"""Intermediate fusions that pool the modalities used, each taken into one space first."""

from __future__ import annotations

from abc import abstractmethod
from functools import reduce

import torch
from torch import Tensor

from gapweave.shared.fusion import FUSIONS, Fused, Fusion, Shape
from gapweave.shared.fusion.parts import Docks, Head, HiddenSettings, equal_shares, present_only, weighted_sum


class Pooling(Fusion):
    """One vector of the modalities used, through a head."""

    Settings = HiddenSettings
    reads_slots = False

    def __init__(self, shape: Shape, settings: HiddenSettings | None = None) -> None:
        super().__init__(shape)
        settings = settings or HiddenSettings()
        self.docks = Docks(shape.modalities, shape.embedding, shape.embedding)
        self.head = Head(shape.embedding, shape.outputs, settings.hidden)

    def forward(self, slots: Tensor, used: Tensor, modality_logits: Tensor) -> Fused:
        """Pool and decide."""
        pooled, weights = self.pool(self.docks(slots, used), used)
        return Fused(logits=self.head(pooled), weights=weights)

    @abstractmethod
    def pool(self, docked: Tensor, used: Tensor) -> tuple[Tensor, Tensor | None]:
        """[B, M, d], 0 for modalities not used, to [B, d] and each one's share."""


@FUSIONS.register("sum")
class SumFusion(Pooling):
    """The sum of the embeddings of the modalities that are there.

    Reference: Baltrusaitis et al. 2019, "Multimodal Machine Learning: A Survey and Taxonomy" (TPAMI 41)
    Form: g(sum over used m of W_m v^m + b_m), so that the number of modalities shows
    Couples: nothing
    """

    def pool(self, docked: Tensor, used: Tensor) -> tuple[Tensor, Tensor | None]:
        """Add up."""
        return docked.sum(1), None


@FUSIONS.register("mean")
class MeanFusion(Pooling):
    """The mean of the embeddings of the modalities that are there.

    Reference: Havaei et al. 2016, "HeMIS: Hetero-Modal Image Segmentation" (MICCAI)
    Form: g(mean over used m of W_m v^m + b_m); HeMIS' variance over modalities is left out: one modality has none
    Couples: nothing
    """

    gives_shares = True

    def pool(self, docked: Tensor, used: Tensor) -> tuple[Tensor, Tensor | None]:
        """Average."""
        weights = equal_shares(used)
        return weighted_sum(weights, docked), weights


@FUSIONS.register("max")
class MaxFusion(Pooling):
    """The largest of the embeddings of the modalities that are there, component by component.

    A modality's share is that of the components that it won; those that are equal share one.

    Reference: Su et al. 2015, "Multi-view Convolutional Neural Networks" (ICCV)
    Form: g(max over used m of W_m v^m + b_m)
    Couples: nothing
    """

    gives_shares = True

    def pool(self, docked: Tensor, used: Tensor) -> tuple[Tensor, Tensor | None]:
        """Take the largest."""
        some = used.any(1, keepdim=True)
        pooled = torch.where(some, present_only(docked, used, -torch.inf).amax(1), 0.0)
        won = present_only((docked == pooled.unsqueeze(1)).to(docked.dtype), used).detach()
        shares = won / won.sum(1, keepdim=True).clamp(min=1)
        return pooled, shares.mean(-1)


@FUSIONS.register("product")
class ProductFusion(Pooling):
    """The product of what each modality that is there says, component by component.

    Reference: Kim et al. 2017, "Hadamard Product for Low-rank Bilinear Pooling" (ICLR)
    Form: g(product over used m of 1 + tanh(W_m v^m + b_m)): an absent modality is a factor of 1, and no factor can
        change a component's sign or wipe out the others' gradients, as one that is 0 would
    Couples: nothing
    """

    def pool(self, docked: Tensor, used: Tensor) -> tuple[Tensor, Tensor | None]:
        """Multiply, one modality after the other: torch's own product treats a batch with a zero in it otherwise."""
        factors = present_only(1 + torch.tanh(docked), used, 1.0)
        return reduce(torch.mul, factors.unbind(1)), None
