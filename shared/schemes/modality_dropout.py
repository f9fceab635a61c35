"""Modality dropout: random subsets whatever the imputer."""

from __future__ import annotations

from gapweave.shared.schemes import SCHEMES, Scheme


@SCHEMES.register("modality_dropout")
class ModalityDropout(Scheme):
    """Use a random non-empty subset of the modalities.

    Reference: Neverova et al. 2016, "ModDrop: Adaptive Multi-modal Gesture Recognition" (TPAMI 38)
    Form: with probability hide a random non-empty subset of what a record has, by secret draws under privacy
    Couples: nothing
    """

    hides = True
