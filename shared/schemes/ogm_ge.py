"""Encoders of a record's surer modalities are slowed down."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from gapweave.shared.config.study import Study
from gapweave.shared.model import MultimodalModel
from gapweave.shared.objective import cross_entropy
from gapweave.shared.schema import Batch
from gapweave.shared.schemes import SCHEMES, Scheme, SchemeSettings, others_mean, several


class ModulationSettings(SchemeSettings):
    """How much a surer modality is slowed down."""

    alpha: float = Field(0.5, ge=0, le=10, description="strength; 0: not at all")


@SCHEMES.register("ogm_ge")
class OnTheFlyModulation(Scheme):
    """A modality whose own head is surer of the truth than the others' gets a smaller gradient into its encoder.

    Reference: Peng et al. 2022, "Balanced Multimodal Learning via On-the-fly Gradient Modulation" (CVPR)
    Form: rho^m = p^m_y over the mean of p^n_y of the other modalities used; the record's gradient into encoder m is
        multiplied with 1 - tanh(alpha rho^m) if rho^m > 1, else 1, and so is never enlarged; rho is detached. The noise
        that the paper adds to the encoders' gradients (GE) is the one of privacy; a study without privacy has none
    Couples: rho is a ratio of sums over the batch; here it is of one record
    """

    Settings = ModulationSettings

    def __init__(self, study: Study, settings: ModulationSettings | None = None) -> None:
        super().__init__(study, settings)
        self.alpha = (settings or ModulationSettings()).alpha

    def shown(self, model: MultimodalModel, batch: Batch, used: Tensor, embeddings: Tensor) -> Tensor:
        """The same embeddings with the modulated gradient."""
        with torch.no_grad():
            votes = model.votes(embeddings, model.ready(batch.inputs, batch.present))
            sure = torch.exp(-cross_entropy(votes, batch.target, batch.label_mask, self.kind))
            factors = modulation(sure, used, self.alpha).unsqueeze(-1)
        still = embeddings.detach()
        return still + factors * (embeddings - still)


def modulation(sure: Tensor, used: Tensor, alpha: float) -> Tensor:
    """Factors of the gradients into the encoders.

    Args:
        sure: [R, M], probability of the truth by each modality's head.
        used: [R, M] bool.
        alpha: strength.

    Returns:
        [R, M] in (0, 1]; 1 for modalities that are alone or not used.
    """
    ratio = sure / others_mean(sure, used).clamp(min=1e-6)
    leading = used & several(used).unsqueeze(1) & (ratio > 1)
    return torch.where(leading, 1 - torch.tanh(alpha * ratio), 1.0)
