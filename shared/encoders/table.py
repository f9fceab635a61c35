"""Encoder of tables: wide and deep over scaled values and observed flags."""

from __future__ import annotations

from torch import nn

from gapweave.shared.encoders import ENCODERS
from gapweave.shared.encoders.widedeep import WideDeep
from gapweave.shared.schema import Modality


@ENCODERS.register("table")
def table_encoder(modality: Modality, embedding: int) -> nn.Module:
    """[B, F] -> [B, d]."""
    return WideDeep(modality.shape[0], embedding)
