"""Records that the model finds easy come first."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from gapweave.shared.config.study import Study
from gapweave.shared.objective import mean_over
from gapweave.shared.schemes import SCHEMES, Lesson, Moment, Scheme, SchemeSettings


class CurriculumSettings(SchemeSettings):
    """The schedule."""

    start: float = Field(0.3, ge=0, le=1, description="difficulty up to which a record counts fully at first, of 1")
    share: float = Field(0.5, gt=0, le=1, description="share of the rounds after which every record counts fully")


@SCHEMES.register("curriculum")
class Curriculum(Scheme):
    """A record that is more difficult than the round allows counts less.

    Reference: Han et al. 2025, "CLIMD: A Curriculum Learning Framework for Imbalanced Multimodal Diagnosis" (MICCAI)
    Form: the record's loss is multiplied with min(1, l / D), detached: D = 1 - (c + k) / 2, c the mean over used m of
        p^m_y (confidence within modalities), k = p_y of the fusion (what they add up to); l grows evenly from start to
        1, a public schedule. The factor acts before the clip, and no record is left out of the sampling
    Couples: difficulty ranked over the data set and classes drawn by their frequency; here the threshold is public, and
        frequencies are the study's `preparation.class_balance`
    """

    Settings = CurriculumSettings

    def __init__(self, study: Study, settings: CurriculumSettings | None = None) -> None:
        super().__init__(study, settings)
        self.settings = settings or CurriculumSettings()

    def allowed(self, at: Moment) -> float:
        """Difficulty up to which records count fully."""
        start, share = self.settings.start, self.settings.share
        return min(1.0, start + (1 - start) * at.progress / share)

    def total(self, lesson: Lesson) -> Tensor:
        """Weigh the record."""
        terms, used = lesson.terms, lesson.outputs.used
        alone = mean_over(torch.exp(-lesson.cross_entropy(lesson.outputs.modality_logits)), used)
        difficulty = 1 - (alone + torch.exp(-terms.joint)) / 2
        factor = (self.allowed(lesson.at) / difficulty.clamp(min=1e-6)).clamp(max=1).detach()
        return factor * lesson.plain
