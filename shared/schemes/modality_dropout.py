"""Modality dropout (Neverova et al. 2016, arXiv 1501.00102): random subsets whatever the imputer."""

from __future__ import annotations

from torch import Tensor

from gapweave.shared.schemes import SCHEMES, random_subset


@SCHEMES.register("modality_dropout")
def modality_dropout(present: Tensor, uniform: Tensor, imputer_learns: bool) -> Tensor:
    """Use a random non-empty subset of the modalities.

    Reference: Neverova et al. 2016, "ModDrop: Adaptive Multi-modal Gesture Recognition" (TPAMI 38)
    Form: with probability 0.6 a random non-empty subset of what a record has, by secret draws under privacy
    Couples: nothing
    """
    return random_subset(present, uniform)
