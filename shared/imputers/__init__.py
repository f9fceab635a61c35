"""Imputers: what stands in the slot of a modality that a record lacks.

Every imputer owns one learned null token a modality (an Embedding, so that per-patient gradients are known) and
is a function of one record's embeddings, its mask, and public parameters. Tokens and imputer are one parameter
group, `imputer`. Docstrings have the sections of the fusions' (shared/fusion).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gapweave.shared.registry import Registry


class Imputer(nn.Module):
    """Base of all imputers: the null tokens.

    Args:
        modalities: number M of the study's modalities, held here or not.
        embedding: width d.
    """

    learns = False
    """Whether it is trained on modalities hidden on purpose."""

    def __init__(self, modalities: int, embedding: int) -> None:
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


IMPUTERS: Registry[Callable[[int, int], Imputer]] = Registry("imputer", "gapweave.shared.imputers")
