"""Encoders: one modality's input to an embedding in [-1, 1]^d.

An encoder is a function of one record and public parameters: it sees no mask (absent rows are blanked before
it and replaced after it), holds no batch statistics (GroupNorm and LayerNorm only), and its layers are ones for
which per-patient gradients are known. One module a kind of data; `DEFAULTS` names the encoder of each kind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from gapweave.shared.registry import Registry

if TYPE_CHECKING:
    from gapweave.shared.schema import Modality

EncoderFactory = Callable[["Modality", int], nn.Module]
"""(modality, embedding width d) -> module mapping [B, *shape] to [B, d]."""

ENCODERS: Registry[EncoderFactory] = Registry("encoder", "gapweave.shared.encoders")
DEFAULTS = {"table": "table", "series": "series", "image": "image", "text": "text", "public_score": "table"}


class TwoStage(nn.Module):
    """An encoder whose first stage has no parameters: a site runs that once for all its records."""

    def features(self, inputs: Tensor) -> Tensor:
        """[B, *shape] -> [B, F], row by row."""
        raise NotImplementedError

    def embed(self, features: Tensor) -> Tensor:
        """[B, F] -> [B, d]."""
        raise NotImplementedError

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, *shape] -> [B, d]: both stages."""
        return self.embed(self.features(inputs))


def build_encoder(modality: Modality, embedding: int) -> nn.Module:
    """The encoder that the study chooses for a modality.

    Raises:
        UsageError: for a name that is not installed.
    """
    return ENCODERS[modality.spec.encoder or DEFAULTS[modality.spec.kind]](modality, embedding)
