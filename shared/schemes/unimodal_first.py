"""Encoders learn alone before the fusion sees them together."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from gapweave.shared.config.study import Study
from gapweave.shared.schemes import SCHEMES, Moment, Scheme, SchemeSettings, one_of


class FirstSettings(SchemeSettings):
    """How long each modality is alone."""

    share: float = Field(0.3, ge=0, le=1, description="share of the rounds, the first ones, with one modality a record")


@SCHEMES.register("unimodal_first")
class UnimodalFirst(Scheme):
    """In the first rounds one modality of each record at a time, then all of them.

    Reference: Du et al. 2023, "On Uni-Modal Feature Learning in Supervised Multi-Modal Learning" (ICML), its unimodal
        ensemble
    Form: in the first rounds, a public share of the study, a step uses one modality of each record, by secret draws, so
        that no encoder can lean on another one's; afterwards all that a record has (random subsets when an imputer
        learns)
    Couples: which modality is trained alone, and how long, chosen by validation scores; here both are public
    """

    Settings = FirstSettings

    def __init__(self, study: Study, settings: FirstSettings | None = None) -> None:
        super().__init__(study, settings)
        self.share = (settings or FirstSettings()).share

    def used(self, present: Tensor, uniform: Tensor, at: Moment) -> Tensor:
        """One modality, then all."""
        if at.progress <= self.share:
            return one_of(present, uniform[:, :-1])
        return super().used(present, uniform, at)
