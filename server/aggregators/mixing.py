"""Pre-aggregators: nearest-neighbour mixing and bucketing. What they give still needs a rule."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from gapweave.server.aggregators import AGGREGATORS, EVERYTHING, Floats, Gram, Mixer, Tolerance


class Buckets(Tolerance):
    """What bucketing is given."""

    size: int = Field(2, ge=2, description="updates of a bucket")


class NearestNeighbourMixing(Mixer):
    """Each update becomes the mean of its n - f nearest ones, itself among them.

    Guarantee: rules after it reach the best possible error order, also when honest sites differ.
    Assumes: n > 2f.
    Edge cases: ties go by the order of values, not of sites.
    Reference: Allouah et al. 2023 (arXiv 2302.01772), algorithm 2.
    """

    properties = EVERYTHING

    def mix(self, gram: Gram, f: int) -> Floats:
        """[n, n]."""
        near = gram.nearest()[:, : gram.n - f]
        weights = np.zeros((gram.n, gram.n))
        np.put_along_axis(weights, near, 1 / (gram.n - f), axis=1)
        return weights


class Bucketing(Mixer):
    """Means of `size` updates drawn at random. The draw comes from the updates themselves: a resumed round draws alike.

    Guarantee: honest sites look more alike; the number of bad rows stays at most f.
    Assumes: that the rule after it takes f bad ones among so many fewer rows: of little use for six sites or fewer.
    Edge cases: sites that are left over are a smaller bucket; the draw changes when all updates are moved.
    Reference: Karimireddy et al. 2022 (arXiv 2006.09365), algorithm 1.
    """

    Parameters = Buckets
    properties = EVERYTHING - {"translation"}

    def rows(self, n: int) -> int:
        """One a bucket."""
        return -(-n // int(self.parameters.size))

    def mix(self, gram: Gram, f: int) -> Floats:
        """[ceil(n / size), n]."""
        order = np.random.default_rng(list(gram.lot)).permutation(gram.n)
        weights = np.zeros((self.rows(gram.n), gram.n))
        size = self.parameters.size
        for row, at in enumerate(range(0, gram.n, size)):
            members = order[at : at + size]
            weights[row, members] = 1 / len(members)
        return weights


AGGREGATORS.register("nnm")(NearestNeighbourMixing())
AGGREGATORS.register("bucketing")(Bucketing())
