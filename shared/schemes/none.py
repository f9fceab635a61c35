"""The plain scheme: all modalities, or random subsets when an imputer has to learn from hidden ones."""

from __future__ import annotations

from gapweave.shared.schemes import SCHEMES, Scheme


@SCHEMES.register("none")
class Plain(Scheme):
    """Use everything, unless the imputer needs modalities hidden on purpose.

    Reference: none
    Form: all that a record has; random subsets when an imputer learns
    Couples: nothing
    """
