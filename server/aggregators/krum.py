"""Multi-Krum and Bulyan: updates that have many near neighbours.

Guarantee: with at most f bad sites the result stays near the honest mean; Bulyan also coordinate by coordinate.
Assumes: n >= 2f + 3 (Multi-Krum), n >= 4f + 3 (Bulyan).
Edge cases: fewer sites: `TooFewSites`, never another f.
Reference: Blanchard et al. 2017 (arXiv 1703.02757), sections 4 and 5: a score is the sum of the squared distances to
    the n - f - 2 nearest others, and the n - f best scores are averaged (as in Allouah et al. 2023, arXiv 2302.01772);
    El Mhamdi et al. 2018 (arXiv 1802.07927), section 4.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gapweave.server.aggregators import AGGREGATORS, EVERYTHING, Columnwise, Floats, Gram, Rows, Weigher


def scores(distances: Floats, f: int) -> Floats:
    """[n] sums of the squared distances to the n - f - 2 nearest other sites, at least one.

    Args:
        distances: [n, n], squared.
        f: bad sites.
    """
    n = len(distances)
    others = distances[~np.eye(n, dtype=bool)].reshape(n, n - 1)
    near: Floats = np.sort(others, axis=1)[:, : max(1, n - f - 2)].sum(1)
    return near


class MultiKrum(Weigher):
    """The mean of the n - f sites of the best scores."""

    properties = EVERYTHING

    def needs(self, f: int) -> int:
        """2f + 3."""
        return 2 * f + 3

    def weigh(self, gram: Gram, f: int) -> Floats:
        """1/(n - f) for the chosen."""
        best = np.argsort(scores(gram.distances(), f), kind="stable")[: gram.n - f]
        weights = np.zeros(gram.n)
        weights[best] = 1 / len(best)
        return weights


class Bulyan(Columnwise):
    """n - 2f sites chosen one by one with Krum; of each coordinate the mean of the values nearest its median."""

    properties = EVERYTHING

    def needs(self, f: int) -> int:
        """4f + 3."""
        return 4 * f + 3

    def choose(self, gram: Gram, f: int) -> NDArray[np.intp]:
        """The best by Krum's score, n - 2f times, among those that are left."""
        distances, left = gram.distances(), list(range(gram.n))
        chosen = []
        for _ in range(gram.n - 2 * f):
            best = int(np.argmin(scores(distances[np.ix_(left, left)], f)))
            chosen.append(left.pop(best))
        return np.array(chosen)

    def combine(self, block: Rows, f: int) -> Rows:
        """[n - 2f, b] -> [b]."""
        order = np.argsort(np.abs(block - np.median(block, axis=0)), axis=0, kind="stable")
        near = np.take_along_axis(block, order[: len(block) - 2 * f], axis=0)
        kept: Rows = near.mean(axis=0, dtype=np.float64).astype(np.float32)
        return kept


AGGREGATORS.register("multi_krum")(MultiKrum())
AGGREGATORS.register("bulyan")(Bulyan())
