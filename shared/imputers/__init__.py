"""Imputers: what stands in the slot of a modality that a record lacks.

Every imputer owns one learned null token a modality (an Embedding, so that per-patient gradients are known) and
is a function of one record's embeddings, its mask, and public parameters. Tokens and imputer are one parameter
group, `imputer`. Docstrings have the sections of the fusions' (shared/fusion).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from gapweave.shared.config.base import NoSettings, StrictModel, parse
from gapweave.shared.config.study import Study
from gapweave.shared.registry import Registry


class Imputer(nn.Module):
    """Base of all imputers: the null tokens.

    Args:
        modalities: number M of the study's modalities, held here or not.
        embedding: width d.
        settings: of the class's `Settings`; None for the defaults.
    """

    Settings: ClassVar[type[StrictModel]] = NoSettings
    """What `model.imputer_settings` may hold."""
    learns: ClassVar[bool] = False
    """Whether it is trained on modalities hidden on purpose."""
    weight: float = 1.0
    """Of the loss of what it imputes, beside the classification losses."""

    def __init__(self, modalities: int, embedding: int, settings: StrictModel | None = None) -> None:
        super().__init__()
        self.null = nn.Embedding(modalities, embedding)
        nn.init.zeros_(self.null.weight)
        self.modalities = modalities

    def tokens(self, records: int) -> Tensor:
        """[records, M, d]: the null token of every slot."""
        index = torch.arange(self.modalities, device=self.null.weight.device)
        tokens: Tensor = self.null(index.expand(records, -1))
        return tokens

    def forward(self, embeddings: Tensor, used: Tensor) -> Tensor:
        """Estimate all slots.

        Args:
            embeddings: [B, M, d], null tokens in the slots not used.
            used: [B, M] bool.

        Returns:
            [B, M, d]; only the slots not used are read.
        """
        raise NotImplementedError

    def cycle(self, embeddings: Tensor, imputed: Tensor, used: Tensor) -> Tensor | None:
        """What a way back from the imputed slots to those used adds to each record's loss.

        Args:
            embeddings: [B, M, d] of the encoders.
            imputed: [B, M, d], the estimate.
            used: [B, M] bool.

        Returns:
            [B], or None where there is no way back.
        """
        return None


IMPUTERS: Registry[type[Imputer]] = Registry("imputer", "gapweave.shared.imputers")


def build_imputer(study: Study) -> Imputer:
    """The imputer that a study names.

    Raises:
        UsageError: for a name that is not installed, or settings that it does not have.
    """
    entry = IMPUTERS[study.model.imputer]
    settings = parse(entry.Settings, study.model.imputer_settings, "study:model.imputer_settings")
    return entry(len(study.order), study.model.embedding, settings)
