"""Modalities of a record are to matter alike."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from gapweave.shared.config.study import Study
from gapweave.shared.objective import mean_over
from gapweave.shared.schemes import SCHEMES, Lesson, Scheme, SchemeSettings, several


class AttributionSettings(SchemeSettings):
    """How much unequal contributions cost."""

    strength: float = Field(0.5, ge=0, le=100, description="weight of their variance; 0: none")


@SCHEMES.register("attribution")
class AttributionRegularization(Scheme):
    """What each modality contributes to the score of the truth is kept from differing much.

    Reference: Yerramilli et al. 2024, "Attribution Regularization for Multimodal Paradigms" (arXiv 2404.02359)
    Form: + strength times the variance over used m of a^m, a^m = log p_y(B) - log p_y(B without m), by the fusion; none
        where a record uses one modality. The paper attributes by integrated gradients, whose own gradient per-patient
        engines do not have; leaving a modality out asks the same
    Couples: nothing
    """

    Settings = AttributionSettings

    def __init__(self, study: Study, settings: AttributionSettings | None = None) -> None:
        super().__init__(study, settings)
        self.strength = (settings or AttributionSettings()).strength

    def total(self, lesson: Lesson) -> Tensor:
        """Add the variance of the contributions."""
        used = lesson.outputs.used
        without = [used & (torch.arange(used.shape[1], device=used.device) != at) for at in range(used.shape[1])]
        losses = torch.stack([lesson.cross_entropy(lesson.joint(rest)) for rest in without], 1)
        contributions = losses - lesson.terms.joint.unsqueeze(1)
        mean = mean_over(contributions, used).unsqueeze(1)
        variance = mean_over((contributions - mean).square(), used)
        return lesson.plain + self.strength * torch.where(several(used), variance, 0.0)
