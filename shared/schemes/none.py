"""The plain scheme: all modalities, or random subsets when an imputer has to learn from hidden ones."""

from __future__ import annotations

from torch import Tensor

from gapweave.shared.schemes import SCHEMES, random_subset


@SCHEMES.register("none")
def plain(present: Tensor, uniform: Tensor, imputer_learns: bool) -> Tensor:
    """Use everything, unless the imputer needs modalities hidden on purpose.

    Reference: none
    Form: all that a record has; random subsets when an imputer learns
    Couples: nothing
    """
    return random_subset(present, uniform) if imputer_learns else present
