"""Intermediate fusions in which the modalities of a record change each other before they meet."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gapweave.shared.fusion import FUSIONS, Fused, Fusion, Shape
from gapweave.shared.fusion.concat import joined
from gapweave.shared.fusion.gates import SqueezeSettings
from gapweave.shared.fusion.parts import Head, equal_shares, present_only, weighted_sum


class Exchange(Fusion):
    """A bottleneck of what is there, from which each modality is changed."""

    Settings = SqueezeSettings
    reads_slots = False
    gives_shares = True

    def __init__(self, shape: Shape, settings: SqueezeSettings | None = None) -> None:
        super().__init__(shape)
        self.settings = settings or SqueezeSettings()
        slots = shape.modalities * shape.embedding
        self.squeeze = nn.Linear(slots + shape.modalities, self.settings.squeeze)
        self.gate = nn.Linear(self.settings.squeeze, slots)

    def squeezed(self, slots: Tensor, used: Tensor) -> Tensor:
        """[B, squeeze] of the modalities used."""
        return torch.tanh(self.squeeze(joined(present_only(slots, used), used)))


@FUSIONS.register("mmtm")
class TransferFusion(Exchange):
    """Every modality keeps a branch of its own, whose components all modalities together turn up or down.

    Reference: Joze et al. 2020, "MMTM: Multimodal Transfer Module for CNN Fusion" (CVPR)
    Form: mean over used m of g_m(v^m * 2 sigmoid(V_m tanh(U [v of all used, mask]))); the module stands once, after the
        encoders. Branches count alike
    Couples: batch normalisation in the paper's networks; the squeeze is of one record
    """

    def __init__(self, shape: Shape, settings: SqueezeSettings | None = None) -> None:
        super().__init__(shape, settings)
        heads = (Head(shape.embedding, shape.outputs, self.settings.hidden) for _ in range(shape.modalities))
        self.branches = nn.ModuleList(heads)

    def forward(self, slots: Tensor, used: Tensor, modality_logits: Tensor) -> Fused:
        """Gate each branch, and average them."""
        gates = 2 * torch.sigmoid(self.gate(self.squeezed(slots, used)))
        opened = present_only(slots, used) * gates.view_as(slots)
        each = torch.stack([branch(opened[:, at]) for at, branch in enumerate(self.branches)], 1)
        weights = equal_shares(used)
        return Fused(logits=weighted_sum(weights, present_only(each, used)), weights=weights)


@FUSIONS.register("daft")
class AffineFusion(Exchange):
    """Every modality's components are scaled and shifted by what the others say.

    Reference: Poelsterl et al. 2021, "Combining 3D Image and Tabular Data via the Dynamic Affine Feature Map Transform"
        (MICCAI)
    Form: g(mean over used m of v^m * (1 + A_m t^m) + B_m t^m), t^m = tanh(U [v of all used but m, mask]): the paper's
        image changed by the table, for any modality and any others; alone it is changed by the mask
    Couples: batch normalisation in the paper's networks; there is none
    """

    def __init__(self, shape: Shape, settings: SqueezeSettings | None = None) -> None:
        super().__init__(shape, settings)
        self.shift = nn.Linear(self.settings.squeeze, shape.modalities * shape.embedding)
        self.head = Head(shape.embedding, shape.outputs, self.settings.hidden)

    def forward(self, slots: Tensor, used: Tensor, modality_logits: Tensor) -> Fused:
        """Change each modality, average, and decide."""
        clean, modalities = present_only(slots, used), slots.shape[1]
        own = torch.eye(modalities, dtype=torch.bool, device=used.device).unsqueeze(-1)
        said = torch.stack([self.squeezed(clean.masked_fill(own[at], 0), used) for at in range(modalities)], 1)
        scale, shift = (
            layer(said).view(len(said), modalities, modalities, -1).diagonal(dim1=1, dim2=2).transpose(1, 2)
            for layer in (self.gate, self.shift)
        )
        weights = equal_shares(used)
        changed = present_only(clean * (1 + scale) + shift, used)
        return Fused(logits=self.head(weighted_sum(weights, changed)), weights=weights)
