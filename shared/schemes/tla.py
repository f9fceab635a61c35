"""Combinations of modalities that would be neglected are trained by themselves, a public one in each round."""

from __future__ import annotations

import random
from itertools import combinations

import torch
from pydantic import Field
from torch import Tensor

from gapweave.shared.config.study import Study
from gapweave.shared.schemes import SCHEMES, Lesson, Moment, Scheme, SchemeSettings

ALL_SIZES = 4
"""Modalities up to which combinations of every size take part; with more, those of one and of two."""


class LazinessSettings(SchemeSettings):
    """How much the combination of the round counts."""

    strength: float = Field(1.0, ge=0, le=100, description="weight of its loss; 0: none")


@SCHEMES.register("tla")
class LazinessActivation(Scheme):
    """Traceable Laziness Activation: every record that has the round's combination is trained on just that, too.

    Reference: OmniFuse
    Form: + strength CE(fused from combination d alone, y) for every record that has d; d is a proper part of the
        modalities, of at most two if there are more than four, and goes through a random order of all of them, drawn by
        the study's seed and written to rounds.jsonl as `lazy`; beside it modalities are hidden at random
    Couples: d is the combination with the largest mean 1 - p_y over the patients who have it; here it is public, and
        each has its turn, which costs no budget and asks no patient
    """

    Settings = LazinessSettings
    hides = True

    def __init__(self, study: Study, settings: LazinessSettings | None = None) -> None:
        super().__init__(study, settings)
        self.order, self.seed = study.order, study.seed
        self.strength = (settings or LazinessSettings()).strength
        largest = len(self.order) - 1 if len(self.order) <= ALL_SIZES else 2
        self.combinations = [
            chosen for size in range(1, largest + 1) for chosen in combinations(range(len(self.order)), size)
        ]

    def lazy(self, at: Moment) -> tuple[int, ...]:
        """Positions of the round's combination; none where a study has one modality."""
        if not self.combinations:
            return ()
        turn, place = divmod(at.round - 1, len(self.combinations))
        order = random.Random(f"{self.seed}/lazy/{turn}").sample(self.combinations, len(self.combinations))
        return order[place]

    def total(self, lesson: Lesson) -> Tensor:
        """Add the loss of the round's combination."""
        chosen = self.lazy(lesson.at)
        if not chosen:
            return lesson.plain
        present = lesson.batch.present
        part = torch.zeros_like(present[0])
        part[list(chosen)] = True
        has = (present | ~part).all(1)
        losses = lesson.cross_entropy(lesson.joint(part & has.unsqueeze(1)))
        return lesson.plain + self.strength * torch.where(has, losses, 0.0)

    def choices(self, at: Moment) -> dict[str, str]:
        """The round's combination."""
        chosen = self.lazy(at)
        return {"lazy": "+".join(self.order[position] for position in chosen)} if chosen else {}
