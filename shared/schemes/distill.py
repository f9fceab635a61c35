"""The whole record teaches the part of it."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from gapweave.shared.config.study import Study, TaskKind
from gapweave.shared.objective import cross_entropy
from gapweave.shared.schemes import SCHEMES, Lesson, Scheme, SchemeSettings


class DistillSettings(SchemeSettings):
    """How much the part learns from the whole."""

    strength: float = Field(0.5, ge=0, le=100, description="weight of the teacher's loss; 0: none")
    temperature: float = Field(2.0, gt=0, le=100, description="what logits are divided by: more is softer")


@SCHEMES.register("distill")
class Distillation(Scheme):
    """What the model says of a whole record is the target of what it says of a part of it.

    Reference: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531); from complete to
        missing modalities: Wang et al. 2020, "Multimodal Learning with Incomplete Modalities by Knowledge
        Distillation" (KDD)
    Form: + strength T^2 KL(teacher || student) where something was hidden, at temperature T; the teacher is the same
        model at the same step with all that this record has, detached
    Couples: a teacher trained on the same patients before, without noise; here there is none to train
    """

    Settings = DistillSettings
    hides = True

    def __init__(self, study: Study, settings: DistillSettings | None = None) -> None:
        super().__init__(study, settings)
        self.settings = settings or DistillSettings()

    def total(self, lesson: Lesson) -> Tensor:
        """Add the divergence from the teacher."""
        outputs, temperature = lesson.outputs, self.settings.temperature
        with torch.no_grad():
            taught = lesson.joint(outputs.present) / temperature
        said = (outputs.logits if outputs.joint is None else outputs.joint) / temperature
        away = divergence(taught, said, lesson.kind)
        hidden = (outputs.present & ~outputs.used).any(1)
        strength = self.settings.strength * temperature**2
        return lesson.plain + strength * torch.where(hidden, away, 0.0)


def divergence(taught: Tensor, said: Tensor, kind: TaskKind) -> Tensor:
    """[R]: Kullback and Leibler's, of logits [R, K] from those that teach; the mean over labels."""
    target = torch.softmax(taught, -1) if kind == "multiclass" else torch.sigmoid(taught)
    every = torch.ones_like(target, dtype=torch.bool)
    return cross_entropy(said, target, every, kind) - cross_entropy(taught, target, every, kind)
