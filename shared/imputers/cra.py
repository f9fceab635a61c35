"""Cascaded residual autoencoders (OmniFuse; after Tran et al., CVPR 2017), forward alone or with a way back.

As printed, the paper feeds the target into the imputer, so that a zero residual is optimal. Here a modality is
supervised only when it was observed and hidden on purpose, and the target is detached (docs/decisions/0003).
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from gapweave.shared.config.base import StrictModel
from gapweave.shared.imputers import IMPUTERS, Imputer
from gapweave.shared.objective import mean_over


class CascadeSettings(StrictModel):
    """Size of the cascade, and how much its loss counts."""

    stages: int = Field(3, ge=1, le=16, description="autoencoders one after the other")
    hidden: int = Field(32, ge=1, le=4096, description="tanh units of each")
    code: int = Field(16, ge=1, le=4096, description="width of each one's bottleneck")
    weight: float = Field(1.0, gt=0, le=100, description="weight of the loss of what it imputes")


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

    Settings = CascadeSettings
    learns = True

    def __init__(self, modalities: int, embedding: int, settings: CascadeSettings | None = None) -> None:
        super().__init__(modalities, embedding)
        self.settings = settings or self.Settings()
        self.weight = self.settings.weight
        self.stages = self.cascade(embedding)

    def cascade(self, embedding: int) -> nn.ModuleList:
        """All stages, new."""
        slots, settings = self.modalities * embedding, self.settings
        stages = range(settings.stages)
        return nn.ModuleList(
            ResidualAutoencoder(slots, self.modalities, settings.hidden, settings.code) for _ in stages
        )

    def forward(self, embeddings: Tensor, used: Tensor) -> Tensor:
        """Estimate all slots from those used."""
        return _through(self.stages, embeddings, used)


class CycleSettings(CascadeSettings):
    """The way back."""

    backward: float = Field(0.1, gt=0, le=100, description="weight of the way back's loss")


@IMPUTERS.register("cra_cycle")
class CycleConsistentAutoencoder(CascadedResidualAutoencoder):
    """As cra, and from what was imputed a second cascade has to find the way back to what was used.

    Reference: OmniFuse; Zhu et al. 2017, "Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial
        Networks" (ICCV), cycle consistency
    Form: a cascade of its own sees only the slots that were imputed and null tokens elsewhere; + backward times the
        mean over used m of |v''^m - v^m|^2 / d, v^m detached, for a record of which something was imputed. In training
        only: no prediction reads it. The paper's sees the observed slots too, for which doing nothing is optimal
    Couples: nothing
    """

    Settings = CycleSettings

    def __init__(self, modalities: int, embedding: int, settings: CycleSettings | None = None) -> None:
        super().__init__(modalities, embedding, settings)
        self.strength = (settings or CycleSettings()).backward
        self.back = self.cascade(embedding)

    def cycle(self, embeddings: Tensor, imputed: Tensor, used: Tensor) -> Tensor | None:
        """The loss of the way back; 0 for a record of which nothing was imputed."""
        seen = torch.where(used.unsqueeze(-1), self.tokens(len(used)), imputed)
        distance = (_through(self.back, seen, ~used) - embeddings.detach()).square().mean(-1)
        return self.strength * torch.where(used.all(1), 0.0, mean_over(distance, used))


def _through(stages: nn.ModuleList, slots: Tensor, known: Tensor) -> Tensor:
    """[B, M, d] slots of which some are known, [B, M], to the estimate of all."""
    current, mask = slots.flatten(1), known.to(slots.dtype)
    for stage in stages:
        current = current + stage(current, mask)
    return current.view_as(slots)
