"""Encoder of hashed text: wide and deep over word buckets."""

from __future__ import annotations

from torch import Tensor, nn

from gapweave.shared.encoders import ENCODERS
from gapweave.shared.encoders.widedeep import WideDeep
from gapweave.shared.schema import Modality


@ENCODERS.register("text")
class TextEncoder(nn.Module):
    """[B, buckets] -> [B, d].

    Inputs have unit L2 norm over hundreds of buckets; they are scaled up so that the linear path starts with
    outputs of the size that tables give.
    """

    def __init__(self, modality: Modality, embedding: int) -> None:
        super().__init__()
        self.scale = modality.shape[0] ** 0.5
        self.body = WideDeep(modality.shape[0], embedding)

    def forward(self, words: Tensor) -> Tensor:
        """Embed hashed words."""
        embedded: Tensor = self.body(words * self.scale)
        return embedded
