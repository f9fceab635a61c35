"""Intermediate fusions in which a record's modalities are attended to; attention never leaves the record."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor, nn

from gapweave.shared.fusion import FUSIONS, Fused, Fusion, Shape
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


@FUSIONS.register("attention")
class AttentionFusion(Pooling):
    """A weighted mean of the modalities that are there; the record itself gives the weights.

    Reference: Ilse et al. 2018, "Attention-based Deep Multiple Instance Learning" (ICML)
    Form: g(sum over used m of a_m h^m), h^m = W_m v^m + b_m, a = softmax over used m of q tanh(U h^m); the weights are
        the modalities' shares
    Couples: nothing, as long as it is the modalities of one record that are attended to
    """

    gives_shares = True

    def __init__(self, shape: Shape, settings: HiddenSettings | None = None) -> None:
        super().__init__(shape, settings)
        self.key = nn.Linear(shape.embedding, shape.embedding)
        self.query = nn.Linear(shape.embedding, 1, bias=False)

    def pool(self, docked: Tensor, used: Tensor) -> tuple[Tensor, Tensor | None]:
        """Attend."""
        weights = softmax_shares(self.query(torch.tanh(self.key(docked)))[:, :, 0], used)
        return weighted_sum(weights, docked), weights


class CrossAttentionSettings(HiddenSettings):
    """Latents and how often they look."""

    latents: int = Field(2, ge=1, le=64, description="learned vectors that attend to the modalities")
    layers: int = Field(2, ge=1, le=8, description="how often they do, with the same weights each time")


@FUSIONS.register("cross_attention")
class CrossAttentionFusion(Fusion):
    """A few learned latents attend to the modalities that are there, several times.

    Reference: Hemker et al. 2024, "HEALNet: Multimodal Fusion for Heterogeneous Biomedical Data" (NeurIPS)
    Form: latents l <- l + softmax over used m of (Q l . K h^m / sqrt d) V h^m, then l <- l + tanh(W l), weights shared
        by the layers; their mean goes through the head. All modalities are attended to at once, not one after the
        other, so that their order means nothing. A modality's share is its attention, averaged over latents and layers
    Couples: nothing: dropout is left out, and what the paper normalises is bounded by tanh
    """

    Settings = CrossAttentionSettings
    reads_slots = False
    gives_shares = True

    def __init__(self, shape: Shape, settings: CrossAttentionSettings | None = None) -> None:
        super().__init__(shape)
        settings = settings or CrossAttentionSettings()
        width = shape.embedding
        self.layers = settings.layers
        self.docks = Docks(shape.modalities, width, width)
        self.latents = Numbers(settings.latents, width)
        nn.init.normal_(self.latents.table.weight)
        self.query, self.key, self.value, self.mix = (nn.Linear(width, width) for _ in range(4))
        self.head = Head(width, shape.outputs, settings.hidden)

    def forward(self, slots: Tensor, used: Tensor, modality_logits: Tensor) -> Fused:
        """Look several times and decide."""
        docked = self.docks(slots, used)
        keys, values = self.key(docked), present_only(self.value(docked), used)
        latents, shares = self.latents(used), []
        for _ in range(self.layers):
            scores = self.query(latents) @ keys.transpose(1, 2) / math.sqrt(keys.shape[-1])
            attention = softmax_shares(scores, used.unsqueeze(1))
            latents = latents + attention @ values
            latents = latents + torch.tanh(self.mix(latents))
            shares.append(attention.mean(1))
        return Fused(logits=self.head(latents.mean(1)), weights=torch.stack(shares).mean(0))
