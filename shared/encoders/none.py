"""No encoder: an embedding of zeros, for studies whose heads have a linear path and no budget for more."""

from __future__ import annotations

from torch import Tensor

from gapweave.shared.encoders import ENCODERS, TwoStage
from gapweave.shared.schema import Modality


@ENCODERS.register("none")
class NoEncoder(TwoStage):
    """[B, ...] -> zeros [B, d].

    Under noise every parameter costs signal: with `model.linear_path` a modality then votes by a linear function of its
    features alone.
    """

    def __init__(self, modality: Modality, embedding: int) -> None:
        super().__init__()
        self.embedding = embedding

    def features(self, inputs: Tensor) -> Tensor:
        """[B, ...] -> [B, 0]: nothing is read."""
        return inputs.flatten(1)[:, :0]

    def embed(self, features: Tensor) -> Tensor:
        """[B, 0] -> [B, d]."""
        return features.new_zeros(len(features), self.embedding)
