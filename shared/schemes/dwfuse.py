"""A modality's own vote is trained less where the other modalities see the truth already."""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field
from torch import Tensor

from gapweave.shared.config.study import Study
from gapweave.shared.fusion.dwfuse import class_log_probabilities, class_weights
from gapweave.shared.fusion.parts import present_only
from gapweave.shared.objective import cross_entropy
from gapweave.shared.schemes import SCHEMES, Lesson, Scheme, SchemeSettings


class DynamicWeightSettings(SchemeSettings):
    """How strongly the others' certainty counts."""

    beta: float = Field(1.0, ge=0, le=10, description="exponent of the weights; 0: all votes' losses count alike")


@SCHEMES.register("dwfuse")
class DynamicWeightedLoss(Scheme):
    """The training part of Dynamic Weighted Fuse, for any fusion: votes' losses weighed by what the others see.

    Reference: Liu et al. 2018, "Learn to Combine Modalities in Multimodal Deep Learning" (arXiv 1805.11730); OmniFuse
    Form: the mean over used m of w^m_y CE(p^m, y) in place of CE(p^m, y), with w^m_y = [product over used n other than
        m of 1 - p^n_y]^(beta / (|B| - 1)), detached, 1 if m is alone. The fusion `dwfuse` has that and its score, too
    Couples: nothing
    """

    Settings = DynamicWeightSettings

    def __init__(self, study: Study, settings: DynamicWeightSettings | None = None) -> None:
        super().__init__(study, settings)
        self.beta = (settings or DynamicWeightSettings()).beta

    def total(self, lesson: Lesson) -> Tensor:
        """Weigh the votes' losses, unless the fusion does so itself."""
        outputs, batch = lesson.outputs, lesson.batch
        if outputs.vote_weights is not None:
            return lesson.plain
        sure = class_log_probabilities(lesson.votes.detach(), lesson.kind == "multiclass").exp()
        weights = present_only(class_weights(sure, outputs.used, self.beta), outputs.used)
        votes = cross_entropy(outputs.modality_logits, batch.target, batch.label_mask, lesson.kind, weights)
        return replace(lesson, terms=replace(lesson.terms, votes=votes)).plain
