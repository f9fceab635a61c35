"""Intermediate fusions that put something of their own where a modality is missing."""

from __future__ import annotations

import math

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
    equal_shares,
    mean_used,
    present_only,
    weighted_sum,
)


class SharedSettings(HiddenSettings):
    """How much the two parts are kept apart."""

    alignment: float = Field(0.1, ge=0, le=100, description="weight of the distance between shared features")
    domain: float = Field(0.1, ge=0, le=100, description="weight of telling modalities apart by specific features")


@FUSIONS.register("shaspec")
class SharedSpecificFusion(Fusion):
    """What all modalities share stands in for a missing one; what is a modality's own is lost with it.

    Reference: Wang et al. 2023, "Multi-modal Learning with Missing Modality via Shared-Specific Feature Modelling"
        (CVPR)
    Form: s^m = tanh(S v^m), S the same for all, r^m = tanh(R_m v^m); g([s^m + r^m for used m, the mean of their s
        elsewhere, mask]); + alignment times the mean over used m of |s^m - mean s|^2 / d + domain times the mean over
        used m of the cross-entropy of telling m from r^m
    Couples: nothing
    """

    Settings = SharedSettings
    reads_slots = False

    def __init__(self, shape: Shape, settings: SharedSettings | None = None) -> None:
        super().__init__(shape)
        self.settings = settings = settings or SharedSettings()
        self.shared = nn.Linear(shape.embedding, shape.embedding)
        self.specific = Docks(shape.modalities, shape.embedding, shape.embedding)
        self.domain = nn.Linear(shape.embedding, shape.modalities)
        self.head = Head(shape.modalities * (shape.embedding + 1), shape.outputs, settings.hidden)

    def forward(self, slots: Tensor, used: Tensor, modality_logits: Tensor) -> Fused:
        """Fill and decide."""
        shared = present_only(torch.tanh(self.shared(present_only(slots, used))), used)
        specific = torch.tanh(self.specific(slots, used))
        mean = weighted_sum(equal_shares(used), shared).unsqueeze(1)
        filled = torch.where(used.unsqueeze(-1), shared + specific, mean)
        apart = mean_used((shared - mean).square().mean(-1), used)
        told = torch.log_softmax(self.domain(specific), -1).diagonal(dim1=1, dim2=2)
        penalty = self.settings.alignment * apart - self.settings.domain * mean_used(told, used)
        return Fused(logits=self.head(joined(filled, used)), weights=None, penalty=penalty)


class PrototypeSettings(HiddenSettings):
    """The prototypes."""

    prototypes: int = Field(8, ge=1, le=256, description="number of learned typical records")
    strength: float = Field(0.5, ge=0, le=100, description="weight of how badly they describe a record")


@FUSIONS.register("prototypes")
class PrototypeFusion(Fusion):
    """A missing modality is that of the learned typical records which the patient resembles.

    Reference: Zhang et al. 2022, "M3Care: Learning with Missing Modalities in Multimodal Healthcare Data" (KDD)
    Form: R typical records p_r, learned; c = softmax over r of the mean over used m of v^m . p_r^m / sqrt d; g([v^m for
        used m, sum over r of c_r tanh(p_r^m) elsewhere, mask]); + strength times the mean over used m of |sum over r of
        c_r tanh(p_r^m) - v^m|^2 / d, v^m detached
    Couples: the similar patients of the batch, from whom the paper takes what is missing; typical records are
        parameters, clipped and noised as the rest
    """

    Settings = PrototypeSettings
    reads_slots = False

    def __init__(self, shape: Shape, settings: PrototypeSettings | None = None) -> None:
        super().__init__(shape)
        settings = settings or PrototypeSettings()
        self.strength = settings.strength
        self.typical = Numbers(settings.prototypes, shape.modalities * shape.embedding)
        nn.init.normal_(self.typical.table.weight)
        self.head = Head(shape.modalities * (shape.embedding + 1), shape.outputs, settings.hidden)

    def forward(self, slots: Tensor, used: Tensor, modality_logits: Tensor) -> Fused:
        """Resemble, fill and decide."""
        clean = present_only(slots, used)
        typical = self.typical(used).view(len(slots), -1, *slots.shape[1:])
        alike = (typical * clean.unsqueeze(1)).sum(-1) / math.sqrt(clean.shape[-1])
        shares = torch.softmax(weighted_sum(equal_shares(used), alike.transpose(1, 2)), -1)
        guess = (shares[:, :, None, None] * torch.tanh(typical)).sum(1)
        filled = torch.where(used.unsqueeze(-1), clean, guess)
        error = mean_used((guess - clean.detach()).square().mean(-1), used)
        return Fused(logits=self.head(joined(filled, used)), weights=None, penalty=self.strength * error)


class ExpertSettings(HiddenSettings):
    """The experts."""

    experts: int = Field(4, ge=1, le=64, description="number of experts")
    width: int = Field(16, ge=1, le=1024, description="width of what they give")


@FUSIONS.register("flex_moe")
class ExpertFusion(Fusion):
    """A bank fills what is missing by what is there, and experts are chosen by the combination.

    Reference: Yun et al. 2024, "Flex-MoE: Modeling Arbitrary Modality Combination via the Flexible Mixture-of-Experts"
        (NeurIPS)
    Form: slot m of an absent modality is the mean over used n of a learned vector t_nm; g(sum over e of a_e tanh(E_e
        [slots, mask])), a = softmax over experts of R [slots, mask] + Q mask. The paper's bank has a vector for each
        combination and missing modality, here it is linear in M^2; all experts take part, so that a record's answer
        does not jump
    Couples: the balance of the experts' loads over the batch; it is left out. The router is trained with all patients
        from the start, not with complete ones first
    """

    Settings = ExpertSettings
    reads_slots = False

    def __init__(self, shape: Shape, settings: ExpertSettings | None = None) -> None:
        super().__init__(shape)
        settings = settings or ExpertSettings()
        width = shape.modalities * (shape.embedding + 1)
        self.width = settings.width
        self.bank = nn.Linear(shape.modalities, shape.modalities * shape.embedding, bias=False)
        self.router = nn.Linear(width, settings.experts)
        self.pattern = nn.Linear(shape.modalities, settings.experts, bias=False)
        self.experts = nn.Linear(width, settings.experts * settings.width)
        self.head = Head(settings.width, shape.outputs, settings.hidden)

    def forward(self, slots: Tensor, used: Tensor, modality_logits: Tensor) -> Fused:
        """Fill, choose experts, and decide."""
        filled = torch.where(used.unsqueeze(-1), slots, self.bank(equal_shares(used).to(slots.dtype)).view_as(slots))
        inputs = joined(filled, used)
        shares = torch.softmax(self.router(inputs) + self.pattern(used.to(slots.dtype)), -1)
        said = torch.tanh(self.experts(inputs)).view(len(slots), -1, self.width)
        return Fused(logits=self.head(weighted_sum(shares, said)), weights=None)
