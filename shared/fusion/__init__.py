"""Fusions: from slots and per-modality logits to one prediction.

A fusion is a function of one record and public parameters, handles every non-empty pattern of modalities, and
never reads the slot or the logits of a modality that the record lacks (an imputed slot never votes alone). One that
declares `reads_slots` reads what the imputer put there instead. Absent modalities are masked, rows are never left
out, and all layers are ones for which per-patient gradients are known.

Each class's docstring has three sections, from which docs/methods.md is made: *Reference* (paper), *Form* (what is
built here), *Couples* (where the original couples patients, and what replaces that).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from gapweave.shared.config.base import NoSettings, StrictModel, parse
from gapweave.shared.config.study import Study, TaskKind
from gapweave.shared.errors import UsageError
from gapweave.shared.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a study fixes of a fusion.

    Attributes:
        modalities: number M of the study's modalities.
        embedding: width d.
        outputs: number K of logits.
        task: what the logits mean.
    """

    modalities: int
    embedding: int
    outputs: int
    task: TaskKind


@dataclass(frozen=True, kw_only=True)
class Fused:
    """A fusion's answer.

    Attributes:
        logits: [B, K].
        weights: [B, M] share of each modality in the decision, 0 for absent ones; None when the fusion has no
            such shares.
        joint: [B, K] that training reads in place of `logits`; None for `logits`.
        vote_weights: [B, M, C], detached, what the loss of each modality's vote is multiplied with, by true class: one
            number a class for multiclass, else those for "no" to every label and then those for "yes"; None for 1.
        penalty: [B] that is added to the record's loss; it knows no label. None for 0.
    """

    logits: Tensor
    weights: Tensor | None
    joint: Tensor | None = None
    vote_weights: Tensor | None = None
    penalty: Tensor | None = None


class Fusion(nn.Module):
    """Base of all fusions.

    Args:
        shape: fixed by the study.
        settings: of the class's `Settings`; None for the defaults.
    """

    Settings: ClassVar[type[StrictModel]] = NoSettings
    """What `model.fusion_settings` may hold."""
    stage: ClassVar[Literal["early", "intermediate", "late"]] = "intermediate"
    """Where modalities meet."""
    reads_slots: ClassVar[bool] = True
    """Whether imputed slots can change the prediction."""
    gives_shares: ClassVar[bool] = False
    """Whether it says each modality's share in the decision."""
    instead: ClassVar[str | None] = None
    """For a fusion that cannot do several labels a record: the nearest one that can."""

    def __init__(self, shape: Shape, settings: StrictModel | None = None) -> None:
        super().__init__()

    @classmethod
    def check(cls, shape: Shape, settings: StrictModel) -> None:
        """Refuse what this fusion cannot do, before anything is built.

        Raises:
            UsageError: naming the way out.
        """
        if shape.task == "multilabel" and cls.instead is not None:
            raise UsageError(
                "this fusion needs classes that exclude each other, the task is multilabel",
                where="study:model.fusion",
                remedy=f"Use {cls.instead}, the nearest fusion that can",
            )

    def forward(self, slots: Tensor, used: Tensor, modality_logits: Tensor) -> Fused:
        """Fuse.

        Args:
            slots: [B, M, d]: embeddings of the modalities used, the imputer's estimates elsewhere.
            used: [B, M] bool.
            modality_logits: [B, M, K], 0 for modalities not used.
        """
        raise NotImplementedError


FUSIONS: Registry[type[Fusion]] = Registry("fusion", "gapweave.shared.fusion")


def chosen_fusion(study: Study) -> tuple[type[Fusion], Shape, StrictModel]:
    """The fusion that a study names, with what it is built from.

    Raises:
        UsageError: for a name that is not installed, settings that it does not have, or a study that it cannot serve.
    """
    entry = FUSIONS[study.model.fusion]
    shape = Shape(
        modalities=len(study.order),
        embedding=study.model.embedding,
        outputs=study.task.outputs,
        task=study.task.kind,
    )
    settings = parse(entry.Settings, study.model.fusion_settings, "study:model.fusion_settings")
    entry.check(shape, settings)
    return entry, shape, settings


def build_fusion(study: Study) -> Fusion:
    """The fusion that a study names.

    Raises:
        UsageError: as `chosen_fusion`.
    """
    entry, shape, settings = chosen_fusion(study)
    return entry(shape, settings)
