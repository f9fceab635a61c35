"""Losses of fusion and modalities, weighed."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from gapweave.shared.config.base import unknown_key
from gapweave.shared.config.study import Study
from gapweave.shared.errors import UsageError
from gapweave.shared.objective import mean_over
from gapweave.shared.schemes import SCHEMES, Lesson, Scheme, SchemeSettings


class BlendSettings(SchemeSettings):
    """Weights of the losses."""

    joint: float = Field(1.0, ge=0, le=100, description="weight of the fusion's loss")
    votes: dict[str, float] = Field(
        default_factory=dict,
        description="by modality, factor of `vote_weight` for the loss of its own head; 1 for the others",
    )


@SCHEMES.register("g_blend")
class GradientBlending(Scheme):
    """The losses of the fusion and of each modality's head have weights of their own.

    Reference: Wang et al. 2020, "What Makes Training Multi-Modal Classification Networks Hard?" (CVPR)
    Form: w_0 CE(fused, y) + mean over used m of w_m CE(m's head, y), all weights public and fixed by the study
    Couples: weights from how much each modality overfits, measured on held-out patients; the study fixes them, from
        public data or an earlier charged release. Weights act before the clip, on the parts of one patient's gradient
    """

    Settings = BlendSettings

    def __init__(self, study: Study, settings: BlendSettings | None = None) -> None:
        super().__init__(study, settings)
        settings = settings or BlendSettings()
        for name, weight in settings.votes.items():
            where = "study:scheme.settings.votes"
            if name not in study.order:
                raise UsageError(
                    unknown_key(name, list(study.order)), where=where, remedy="Name modalities of the study"
                )
            if not 0 <= weight <= 100:
                raise UsageError(f"{name}={weight:g} is not from 0 to 100", where=where, remedy="Correct that weight")
        self.joint = settings.joint
        self.weights = [settings.votes.get(name, 1.0) for name in study.order]

    def total(self, lesson: Lesson) -> Tensor:
        """Weigh the losses."""
        terms = lesson.terms
        weights = self.vote_weight * torch.tensor(self.weights, device=terms.votes.device)
        return self.joint * terms.joint + mean_over(weights * terms.votes, lesson.outputs.used) + terms.rest
