"""Fusions: from slots and per-modality logits to one prediction.

A fusion is a function of one record and public parameters, handles every non-empty pattern of modalities, and
never reads the slot or the logits of a modality that the record lacks (an imputed slot never votes alone).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from gapweave.shared.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Fused:
    """A fusion's answer.

    Attributes:
        logits: [B, K].
        weights: [B, M] share of each modality in the decision, 0 for absent ones; None when the fusion has no
            such shares.
    """

    logits: Tensor
    weights: Tensor | None


class Fusion(nn.Module):
    """Base of all fusions.

    Args:
        modalities: number M of the study's modalities.
        embedding: width d.
        outputs: number K of logits.
    """

    reads_slots = True
    """Whether imputed slots can change the prediction."""

    def __init__(self, modalities: int, embedding: int, outputs: int) -> None:
        super().__init__()

    def forward(self, slots: Tensor, used: Tensor, modality_logits: Tensor) -> Fused:
        """Fuse.

        Args:
            slots: [B, M, d]: embeddings of the modalities used, the imputer's estimates elsewhere.
            used: [B, M] bool.
            modality_logits: [B, M, K], 0 for modalities not used.
        """
        raise NotImplementedError


FUSIONS: Registry[Callable[[int, int, int], Fusion]] = Registry("fusion", "gapweave.shared.fusion")
