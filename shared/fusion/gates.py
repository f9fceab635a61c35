"""Intermediate fusions that open and close the components of a record's modalities."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from gapweave.shared.fusion import FUSIONS, Fused, Fusion, Shape
from gapweave.shared.fusion.concat import joined
from gapweave.shared.fusion.parts import (
    Docks,
    Head,
    HiddenSettings,
    Numbers,
    present_only,
    softmax_shares,
    weighted_sum,
)
from gapweave.shared.fusion.pooling import Pooling


@FUSIONS.register("gated")
class GatedFusion(Fusion):
    """Each component is a weighted mean over the modalities that are there; all of them together give the weights.

    Reference: Arevalo et al. 2017, "Gated Multimodal Units for Information Fusion" (ICLR workshop)
    Form: g(sum over used m of z_m * tanh(W_m v^m + b_m)), z = softmax over used m of U_m [v of all used, mask]; with
        two modalities the paper's sigmoid gate. A modality's share is its gate, averaged over the components
    Couples: nothing
    """

    Settings = HiddenSettings
    reads_slots = False
    gives_shares = True

    def __init__(self, shape: Shape, settings: HiddenSettings | None = None) -> None:
        super().__init__(shape)
        settings = settings or HiddenSettings()
        modalities, width = shape.modalities, shape.embedding
        self.docks = Docks(modalities, width, width)
        self.gate = nn.Linear(modalities * (width + 1), modalities * width)
        self.head = Head(width, shape.outputs, settings.hidden)

    def forward(self, slots: Tensor, used: Tensor, modality_logits: Tensor) -> Fused:
        """Gate and decide."""
        scores = self.gate(joined(present_only(slots, used), used)).view_as(slots)
        gates = softmax_shares(scores.transpose(1, 2), used.unsqueeze(1)).transpose(1, 2)
        fused = (gates * torch.tanh(self.docks(slots, used))).sum(1)
        return Fused(logits=self.head(fused), weights=gates.mean(-1))


class SqueezeSettings(HiddenSettings):
    """A bottleneck before the gates."""

    squeeze: int = Field(8, ge=1, le=1024, description="width of the bottleneck that computes the gates")


@FUSIONS.register("se_gate")
class SqueezeGateFusion(Fusion):
    """Squeeze and excitation: every component of every slot is turned up or down by what the whole record says.

    Reference: Hu et al. 2018, "Squeeze-and-Excitation Networks" (CVPR)
    Form: g([s * 2 sigmoid(V tanh(U [s, mask])), mask]) over all slots s, imputed ones too; gates start near 1
    Couples: batch normalisation in the paper's networks; the squeeze is of one record and never of the batch
    """

    Settings = SqueezeSettings

    def __init__(self, shape: Shape, settings: SqueezeSettings | None = None) -> None:
        super().__init__(shape)
        settings = settings or SqueezeSettings()
        slots = shape.modalities * shape.embedding
        self.squeeze = nn.Linear(slots + shape.modalities, settings.squeeze)
        self.excite = nn.Linear(settings.squeeze, slots)
        self.head = Head(slots + shape.modalities, shape.outputs, settings.hidden)

    def forward(self, slots: Tensor, used: Tensor, modality_logits: Tensor) -> Fused:
        """Gate and decide."""
        gates = 2 * torch.sigmoid(self.excite(torch.tanh(self.squeeze(joined(slots, used)))))
        return Fused(logits=self.head(joined(slots * gates.view_as(slots), used)), weights=None)


@FUSIONS.register("embracenet")
class EmbraceFusion(Pooling):
    """Each component comes from one of the modalities that are there: its expectation.

    Reference: Choi and Lee 2019, "EmbraceNet: A robust deep learning architecture for multimodal classification"
        (Information Fusion 51)
    Form: g(sum over used m of p_m relu(W_m v^m + b_m)), p = softmax over used m of learned scores. The paper draws the
        modality of each component from p; this is the mean of that draw, the same for a record whenever it is asked.
        What the draw does for training, modalities hidden at random by secret draws do (`method=embracenet` sets the
        scheme modality_dropout)
    Couples: nothing
    """

    gives_shares = True

    def __init__(self, shape: Shape, settings: HiddenSettings | None = None) -> None:
        super().__init__(shape, settings)
        self.scores = Numbers(shape.modalities, 1)

    def pool(self, docked: Tensor, used: Tensor) -> tuple[Tensor, Tensor | None]:
        """Embrace."""
        weights = softmax_shares(self.scores(used)[:, :, 0], used)
        return weighted_sum(weights, torch.relu(docked)), weights
