"""Training schemes: which of a record's modalities a training step uses, and how its loss is made.

A scheme is a function of one record, of private uniform draws, of public parameters and of the public place of the
round in the study; nothing in it couples patients. It has no parameters of its own: whatever a scheme trains is in the
model, and prediction knows nothing of it. Docstrings have the sections of the fusions' (shared/fusion).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from gapweave.shared.config.base import StrictModel, parse
from gapweave.shared.config.study import Study, TaskKind
from gapweave.shared.imputers import IMPUTERS
from gapweave.shared.model import MultimodalModel, Outputs
from gapweave.shared.objective import Terms, cross_entropy, loss_terms, mean_over
from gapweave.shared.registry import Registry
from gapweave.shared.schema import Batch

Objective = Callable[[MultimodalModel, Batch, Tensor], Tensor]
"""(model, batch, used [R, M] bool) -> loss of each record [R]."""


@dataclass(frozen=True)
class Moment:
    """A round's public place in its study.

    Attributes:
        round: from 1.
        rounds: of the study.
    """

    round: int = 1
    rounds: int = 1

    @property
    def progress(self) -> float:
        """Share of the rounds that have begun, in (0, 1]."""
        return self.round / self.rounds


WHOLE = Moment()
"""The only round of its study."""


class SchemeSettings(StrictModel):
    """What every scheme may be told."""

    hide: float = Field(
        0.6,
        ge=0,
        le=1,
        description="share of records of which a random part is used, where any is hidden",
    )
    hide_features: float = Field(
        0.0, ge=0, lt=1, description="share of a record's features set to 0 in each step, the others scaled up"
    )
    vote_weight: float = Field(
        1.0, ge=0, description="weight of the losses of the modalities' own votes beside that of the fusion"
    )


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What a scheme's loss is made from.

    Attributes:
        model: of the site.
        batch: R records.
        kind: the task's.
        at: the round.
        embeddings: [R, M, d].
        votes: [R, M, K] of all modalities that a record has.
        outputs: from the modalities used.
        terms: of their loss.
        vote_weight: of the votes' losses.
    """

    model: MultimodalModel
    batch: Batch
    kind: TaskKind
    at: Moment
    embeddings: Tensor
    votes: Tensor
    outputs: Outputs
    terms: Terms
    vote_weight: float = 1.0

    @property
    def plain(self) -> Tensor:
        """[R]: the loss as every scheme has it."""
        votes = self.vote_weight * mean_over(self.terms.votes, self.outputs.used)
        return self.terms.joint + votes + self.terms.rest

    def joint(self, used: Tensor) -> Tensor:
        """[R, K]: what the fusion makes of other modalities, [R, M] bool."""
        return self.model.joint(self.embeddings, used, self.votes)

    def cross_entropy(self, logits: Tensor) -> Tensor:
        """[R, K] to [R], or [R, M, K] to [R, M]."""
        return cross_entropy(logits, self.batch.target, self.batch.label_mask, self.kind)


class Scheme:
    """Base of all schemes: all that a record has, and the plain loss.

    Args:
        study: what all sites agree on.
        settings: of the class's `Settings`; None for the defaults.

    Raises:
        UsageError: for settings that do not fit the study.
    """

    Settings: ClassVar[type[SchemeSettings]] = SchemeSettings
    """What `scheme.settings` may hold."""
    hides: ClassVar[bool] = False
    """Whether it hides modalities also where no imputer has to learn from that."""

    def __init__(self, study: Study, settings: SchemeSettings | None = None) -> None:
        self.kind: TaskKind = study.task.kind
        learns = self.hides or IMPUTERS[study.model.imputer].learns
        chosen = settings or self.Settings()
        self.hide = chosen.hide if learns else 0.0
        self.hide_features, self.vote_weight = chosen.hide_features, chosen.vote_weight

    def used(self, present: Tensor, uniform: Tensor, at: Moment) -> Tensor:
        """Which modalities inform each record's prediction in a training step.

        Args:
            present: [R, M] bool.
            uniform: [R, M + 1] independent uniform draws in [0, 1), secret under privacy.
            at: the round.

        Returns:
            [R, M] bool, a subset of present, non-empty wherever present is.
        """
        return torch.where(uniform[:, -1:] < self.hide, random_subset(present, uniform[:, :-1]), present)

    def losses(self, model: MultimodalModel, batch: Batch, used: Tensor, at: Moment) -> Tensor:
        """Loss of each record, [R].

        Args:
            model: of the site.
            batch: R records.
            used: [R, M] bool.
            at: the round.
        """
        ready = model.ready(batch.inputs, batch.present)
        embeddings = self.shown(model, batch, used, model.embed(ready, batch.present))
        votes = model.votes(embeddings, ready)
        outputs = model.decide(embeddings, batch.present, used, votes)
        return self.total(
            Lesson(
                model=model,
                batch=batch,
                kind=self.kind,
                at=at,
                embeddings=embeddings,
                votes=votes,
                outputs=outputs,
                terms=loss_terms(outputs, batch.target, batch.label_mask, self.kind),
                vote_weight=self.vote_weight,
            )
        )

    def shown(self, model: MultimodalModel, batch: Batch, used: Tensor, embeddings: Tensor) -> Tensor:
        """The embeddings, [R, M, d], as heads and fusion see them: the same numbers, with other gradients perhaps."""
        return embeddings

    def total(self, lesson: Lesson) -> Tensor:
        """The loss of each record, [R]."""
        return lesson.plain

    def choices(self, at: Moment) -> dict[str, str]:
        """Public choices of a round, for its line in rounds.jsonl."""
        return {}


SCHEMES: Registry[type[Scheme]] = Registry("scheme", "gapweave.shared.schemes")


def build_scheme(study: Study) -> Scheme:
    """The scheme that a study names.

    Raises:
        UsageError: for a name that is not installed, or settings that it does not have or that do not fit the study.
    """
    entry = SCHEMES[study.scheme.name]
    return entry(study, parse(entry.Settings, study.scheme.settings, "study:scheme.settings"))


def random_subset(present: Tensor, uniform: Tensor) -> Tensor:
    """A random non-empty subset of each record's modalities.

    Args:
        present: [R, M] bool.
        uniform: [R, M] independent uniform draws in [0, 1).
    """
    return present & ((uniform < 0.5) | one_of(present, uniform))


def one_of(present: Tensor, uniform: Tensor) -> Tensor:
    """[R, M] bool: one modality of each record, none of a record without any."""
    draw = torch.where(present, uniform, 2.0)
    return present & (draw == draw.amin(1, keepdim=True))


def others_mean(values: Tensor, used: Tensor) -> Tensor:
    """[R, M]: of each modality used, the mean over the others used; 0 where there are none."""
    values = torch.where(used, values, 0.0)
    count = used.sum(1, keepdim=True) - 1
    return (values.sum(1, keepdim=True) - values) / count.clamp(min=1)


def several(used: Tensor) -> Tensor:
    """[R]: whether a record uses more than one modality."""
    return used.sum(1) > 1
