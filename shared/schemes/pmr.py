"""Encoders of a record's weaker modalities are drawn to public prototypes of the classes."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from gapweave.shared.config.study import Study
from gapweave.shared.objective import mean_over
from gapweave.shared.schemes import SCHEMES, Lesson, Scheme, SchemeSettings, others_mean, several


class PrototypeSettings(SchemeSettings):
    """How much a weaker modality is drawn."""

    alpha: float = Field(1.0, ge=0, le=10, description="weight of the prototypes' loss; 0: none")


@SCHEMES.register("pmr")
class PrototypicalRebalance(Scheme):
    """A modality that is less sure of the truth than the others is drawn to the prototype of the record's class.

    Reference: Fan et al. 2023, "PMR: Prototypical Modal Rebalance for Multimodal Learning" (CVPR)
    Form: + alpha mean over used m of b^m CE(-|v^m - prototypes|^2, y), b^m = clip(mean over other used n of
        p^n_y / p^m_y - 1, 0, 1), detached, p from the same distances; two classes or a label have prototypes q and -q.
        The entropy term for stronger modalities in the first epochs is left out
    Couples: prototypes are means of the embeddings of each class; here they are orthogonal unit vectors drawn by the
        study's seed, the same for all modalities, so that nothing is released. The ratio is of one record, not of the
        batch
    """

    Settings = PrototypeSettings

    def __init__(self, study: Study, settings: PrototypeSettings | None = None) -> None:
        super().__init__(study, settings)
        self.alpha = (settings or PrototypeSettings()).alpha
        self.prototypes = prototypes(study.seed, study.task.outputs, study.model.embedding)

    def total(self, lesson: Lesson) -> Tensor:
        """Add the prototypes' loss."""
        used = lesson.outputs.used
        # Of |v - q|^2 only v . q differs between classes; two classes q and -q differ by 4 v . q.
        scale = 2.0 if lesson.kind == "multiclass" else 4.0
        losses = lesson.cross_entropy(scale * lesson.embeddings @ self.prototypes.to(lesson.embeddings))
        sure = torch.exp(-losses.detach())
        behind = (others_mean(sure, used) / sure.clamp(min=1e-6) - 1).clamp(0, 1)
        drawn = torch.where(several(used).unsqueeze(1), behind, 0.0) * losses
        return lesson.plain + self.alpha * mean_over(drawn, used)


def prototypes(seed: int, outputs: int, embedding: int) -> Tensor:
    """[d, K]: unit vectors, orthogonal where there is room for that."""
    drawn = torch.randn(embedding, outputs, generator=torch.Generator().manual_seed(seed))
    columns: Tensor = torch.linalg.qr(drawn).Q if outputs <= embedding else drawn
    return torch.nn.functional.normalize(columns, dim=0)
