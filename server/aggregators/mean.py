"""The unweighted mean over holders.

Guarantee: none against a dishonest site; one site can move the result without limit.
Assumes: finite updates of equal shapes (screened before).
Edge cases: one holder: its own update; no holder: `TooFewSites`.
Reference: McMahan et al. 2017 (arXiv 1602.05629), with equal weights: declared sizes are no reason for trust.
"""

from __future__ import annotations

import numpy as np

from gapweave.server.aggregators import AGGREGATORS, Update
from gapweave.shared.errors import TooFewSites


class MeanAccumulator:
    """Streams sums in float64: memory does not grow with the number of sites.

    Args:
        sites: number of updates that will come.
    """

    def __init__(self, sites: int) -> None:
        self._sites = sites
        self._sum: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float64]]] = {}

    def add(self, update: Update) -> None:
        """Add one update."""
        for name, value in update.items():
            if name in self._sum:
                self._sum[name] += value
            else:
                self._sum[name] = value.astype(np.float64)

    def finish(self) -> Update:
        """Divide by the number of sites."""
        return {name: (total / self._sites).astype(np.float32) for name, total in self._sum.items()}


class Mean:
    """Starts a mean."""

    def start(self, group: str, sites: int) -> MeanAccumulator:
        """Begin a group."""
        if sites < 1:
            raise TooFewSites(f"no site sent {group!r}", remedy="Wait for a site that holds it")
        return MeanAccumulator(sites)


AGGREGATORS.register("mean")(Mean())
