"""Late fusions: what the modalities that are there say, weighed or counted."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from gapweave.shared.config.base import StrictModel
from gapweave.shared.fusion import FUSIONS, Fused, Fusion, Shape
from gapweave.shared.fusion.parts import Numbers, equal_shares, present_only, softmax_shares, weighted_sum


class Decision(Fusion):
    """A late fusion with a shared intercept."""

    stage = "late"
    reads_slots = False
    gives_shares = True

    def __init__(self, shape: Shape, settings: StrictModel | None = None) -> None:
        super().__init__(shape)
        self.task = shape.task
        self.intercept = Numbers(1, shape.outputs)


@FUSIONS.register("weighted")
class WeightedFusion(Decision):
    """A mean of the votes with one learned weight a modality.

    Reference: Kittler et al. 1998, "On Combining Classifiers" (TPAMI 20)
    Form: s = b + sum over used m of w_m times the logits of m, w = softmax over used m of learned scores: weights of
        the modalities that are there add up to 1
    Couples: weights set from each modality's validation score; here they are trained, clipped and noised as the rest
    """

    def __init__(self, shape: Shape, settings: StrictModel | None = None) -> None:
        super().__init__(shape)
        self.scores = Numbers(shape.modalities, 1)

    def forward(self, slots: Tensor, used: Tensor, modality_logits: Tensor) -> Fused:
        """Weigh the votes."""
        weights = softmax_shares(self.scores(used)[:, :, 0], used)
        votes = present_only(modality_logits, used)
        return Fused(logits=weighted_sum(weights, votes) + self.intercept(used)[:, 0], weights=weights)


@FUSIONS.register("qmf")
class UncertaintyFusion(Decision):
    """A mean of the votes in which a modality that is surer of this record weighs more.

    Reference: Zhang et al. 2023, "Provable Dynamic Fusion for Low-Quality Multimodal Data" (ICML)
    Form: weights are softplus(a_m E^m + b_m) over their sum, E^m the detached energy log sum exp of the logits of m
        (of +z/2 and -z/2 for two classes), a from 1, b from 0
    Couples: the regulariser that orders patients of a batch by their loss history; it is left out, and a and b are
        learned from the record's own loss
    """

    instead = "weighted"

    def __init__(self, shape: Shape, settings: StrictModel | None = None) -> None:
        super().__init__(shape)
        self.slope = Numbers(shape.modalities, 1, start=1.0)
        self.level = Numbers(shape.modalities, 1)

    def forward(self, slots: Tensor, used: Tensor, modality_logits: Tensor) -> Fused:
        """Weigh the votes by their energy."""
        votes = present_only(modality_logits, used)
        classes = torch.cat([-votes / 2, votes / 2], -1) if self.task == "binary" else votes
        energy = torch.logsumexp(classes.detach(), -1)
        trust = functional.softplus(self.slope(used)[:, :, 0] * energy + self.level(used)[:, :, 0])
        trust = torch.where(used, trust, 0.0)
        weights = trust / trust.sum(1, keepdim=True).clamp(min=1e-12)
        return Fused(logits=weighted_sum(weights, votes) + self.intercept(used)[:, 0], weights=weights)


@FUSIONS.register("majority")
class MajorityFusion(Decision):
    """A count of votes: each modality that is there has one, for the class that it favours.

    Reference: Kuncheva 2014, "Combining Pattern Classifiers" (Wiley), majority vote
    Form: s = b + a log((votes for + 1) / (votes against + 1)), a learned from 1; for several classes a log(votes + 1).
        Heads learn from their own losses only: a count has no gradient. Labels of a multilabel task are counted one by
        one
    Couples: nothing
    """

    def __init__(self, shape: Shape, settings: StrictModel | None = None) -> None:
        super().__init__(shape)
        self.scale = Numbers(1, 1, start=1.0)

    def forward(self, slots: Tensor, used: Tensor, modality_logits: Tensor) -> Fused:
        """Count the votes."""
        visible = used.unsqueeze(-1)
        if self.task == "multiclass":
            favoured = functional.one_hot(modality_logits.argmax(-1), modality_logits.shape[-1])
            counts = torch.log1p((visible & favoured.bool()).sum(1))
        else:
            votes_for = (visible & (modality_logits > 0)).sum(1)
            votes_against = used.sum(1, keepdim=True) - votes_for
            counts = torch.log1p(votes_for) - torch.log1p(votes_against)
        logits = self.scale(used)[:, 0] * counts + self.intercept(used)[:, 0]
        return Fused(logits=logits, weights=equal_shares(used))
