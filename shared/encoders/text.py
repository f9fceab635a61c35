"""Encoder of hashed text: wide and deep over word buckets."""

from __future__ import annotations

from torch import Tensor, nn

from gapweave.shared.encoders import ENCODERS
from gapweave.shared.encoders.widedeep import WideDeep
from gapweave.shared.schema import Modality

SCALE = 4.0


@ENCODERS.register("text")
class TextEncoder(nn.Module):
    """[B, buckets] -> [B, d].

    Hashed words have unit L2 norm, a table's inputs a norm of some units: `SCALE` brings both to one size, so
    that under clipping no modality's gradient crowds out another's.
    """

    def __init__(self, modality: Modality, embedding: int) -> None:
        super().__init__()
        self.body = WideDeep(modality.shape[0], embedding)

    def forward(self, words: Tensor) -> Tensor:
        """Embed hashed words."""
        embedded: Tensor = self.body(words * SCALE)
        return embedded
