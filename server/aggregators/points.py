"""Rules that look for one point near most updates: geometric median, centred clipping, norm bound.

Each of them weighs updates by how far they are, so a few steps on the Gram matrix find the weights.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from gapweave.server.aggregators import AGGREGATORS, EVERYTHING, Floats, Gram, Weigher
from gapweave.shared.config.base import StrictModel

STEPS = 1000
TOLERANCE = 1e-12
"""Weiszfeld's steps end when no weight moves by more than this."""
CLIPPING_STEPS = 20


class Bound(StrictModel):
    """What the norm bound is given."""

    bound: float = Field(3.0, gt=0, description="longest update let through as it is, in lengths of the median one")


class GeometricMedian(Weigher):
    """The point with the smallest sum of distances to all updates, by Weiszfeld's steps.

    Guarantee: error of order f/(n - 2f) times the spread of honest sites.
    Assumes: n > 2f.
    Edge cases: a point that falls onto an update is held off it by 1e-12 of the farthest one's distance.
    Reference: Pillutla et al. 2019, RFA (arXiv 1912.13445), algorithm 2.
    """

    properties = EVERYTHING

    def weigh(self, gram: Gram, f: int) -> Floats:
        """Weights of sum 1."""
        weights = np.full(gram.n, 1 / gram.n)
        floor = 1e-12 * float(np.sqrt(gram.distances_to(weights).max()))
        if floor == 0:
            return weights  # all sites agree
        for _ in range(STEPS):
            pull = 1 / np.maximum(np.sqrt(gram.distances_to(weights)), floor)
            before, weights = weights, pull / pull.sum()
            if np.abs(weights - before).max() < TOLERANCE:
                break
        return weights


class CentredClipping(Weigher):
    """Steps from no change at all towards the updates, each of which pulls by at most the median distance.

    Guarantee: one step moves by at most the radius, whatever f < n/2 bad sites send.
    Assumes: n > 2f.
    Edge cases: it starts at zero, so moving every update does not move the result alike.
    Reference: Karimireddy et al. 2021 (arXiv 2012.10333), algorithm 2; the radius is read off the updates here.
    """

    properties = EVERYTHING - {"translation"}

    def weigh(self, gram: Gram, f: int) -> Floats:
        """Weights of a sum of at most 1."""
        weights = np.zeros(gram.n)
        for _ in range(CLIPPING_STEPS):
            distances = np.sqrt(gram.distances_to(weights))
            radius = np.sort(distances)[(gram.n - 1) // 2]
            pull = np.minimum(1.0, radius / np.maximum(distances, 1e-300)) / gram.n
            weights = weights * (1 - pull.sum()) + pull
        return weights


class NormBound(Weigher):
    """The mean of updates shortened to `bound` times the length of the (lower) median one.

    Guarantee: no site moves the result by more than bound/n times that length; for one or two holders that is
        all there is.
    Assumes: nothing; a majority of bad sites also sets the median.
    Edge cases: of two holders the shorter one's length counts.
    Reference: Sun et al. 2019 (arXiv 1911.07963), section 4, with a bound read off the updates.
    """

    Parameters = Bound
    properties = EVERYTHING - {"translation", "breakdown"}

    def needs(self, f: int) -> int:
        """One site."""
        return 1

    def weigh(self, gram: Gram, f: int) -> Floats:
        """At most 1/n each."""
        norms = gram.norms()
        bound = self.parameters.bound * np.sort(norms)[(gram.n - 1) // 2]
        shares: Floats = np.minimum(1.0, bound / np.maximum(norms, 1e-300)) / gram.n
        return shares


AGGREGATORS.register("geometric_median")(GeometricMedian())
AGGREGATORS.register("centred_clipping")(CentredClipping())
AGGREGATORS.register("norm_bound")(NormBound())
