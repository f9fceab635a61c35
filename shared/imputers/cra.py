"""Cascaded residual autoencoders (OmniFuse; after Tran et al., CVPR 2017), forward direction.

As printed, the paper feeds the target into the imputer, so that a zero residual is optimal. Here a modality is
supervised only when it was observed and hidden on purpose, and the target is detached (docs/decisions/0003).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gapweave.shared.imputers import IMPUTERS, Imputer


class ResidualAutoencoder(nn.Module):
    """One stage: all slots and the mask through a bottleneck to a correction of all slots."""

    def __init__(self, slots: int, modalities: int, hidden: int, code: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(slots + modalities, hidden)
        self.code = nn.Linear(hidden, code)
        self.out = nn.Linear(code, slots)

    def forward(self, current: Tensor, mask: Tensor) -> Tensor:
        """[B, M d], [B, M] -> [B, M d]."""
        hidden = torch.tanh(self.hidden(torch.cat([current, mask], dim=-1)))
        correction: Tensor = self.out(torch.tanh(self.code(hidden)))
        return correction


@IMPUTERS.register("cra")
class CascadedResidualAutoencoder(Imputer):
    """v' = v_in + the sum of K corrections, each stage seeing the sum so far.

    Reference: Tran et al. 2017, "Missing Modalities Imputation via Cascaded Residual Autoencoder" (CVPR)
    Form: K autoencoders over [slots, mask] with tanh units; learns from modalities hidden on purpose, whose embedding
        is a detached target
    Couples: nothing
    """

    learns = True

    def __init__(self, modalities: int, embedding: int, stages: int = 3, hidden: int = 32, code: int = 16) -> None:
        super().__init__(modalities, embedding)
        slots = modalities * embedding
        self.stages = nn.ModuleList(ResidualAutoencoder(slots, modalities, hidden, code) for _ in range(stages))

    def forward(self, embeddings: Tensor, used: Tensor) -> Tensor:
        """Estimate all slots from those used."""
        current = embeddings.flatten(1)
        mask = used.to(current.dtype)
        for stage in self.stages:
            current = current + stage(current, mask)
        return current.view_as(embeddings)
