"""The unweighted mean over holders.

Guarantee: none against a dishonest site; one site can move the result without limit.
Assumes: finite updates of equal shapes (screened before).
Edge cases: one holder: its own update; no holder: `TooFewSites`.
Reference: McMahan et al. 2017 (arXiv 1602.05629), with equal weights: declared sizes are no reason for trust.
"""

from __future__ import annotations

import numpy as np

from gapweave.server.aggregators import AGGREGATORS, EVERYTHING, Floats, Gram, NoParameters, Weigher


class Mean(Weigher):
    """All sites weigh alike."""

    Parameters = NoParameters
    properties = EVERYTHING - {"breakdown"}
    streams = True

    def needs(self, f: int) -> int:
        """One site; nothing is promised about bad ones."""
        return 1

    def weigh(self, gram: Gram, f: int) -> Floats:
        """1/n each."""
        return np.full(gram.n, 1 / gram.n)


AGGREGATORS.register("mean")(Mean())
