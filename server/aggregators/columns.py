"""Rules that work on each coordinate by itself: median and trimmed mean.

Guarantee: with at most f bad sites each coordinate lies between honest values; error of order f/n times the spread of
    honest sites (trimmed mean is order-optimal).
Assumes: n > 2f.
Edge cases: an even number of sites: the median is the mean of the middle two; fewer than 2f + 1: `TooFewSites`.
Reference: Yin et al. 2018 (arXiv 1803.01498), definitions 1 and 2; Allouah et al. 2023 (arXiv 2302.01772), table 1.
"""

from __future__ import annotations

from gapweave.server.aggregators import AGGREGATORS, EVERYTHING, Columnwise, Rows


class Median(Columnwise):
    """The coordinate-wise median."""

    properties = EVERYTHING

    def combine(self, block: Rows, f: int) -> Rows:
        """[n, b] -> [b]."""
        from gapweave.server.selection import mean_of_ranks  # loads a compiler

        return mean_of_ranks(block, (len(block) - 1) // 2, len(block) // 2 + 1)


class TrimmedMean(Columnwise):
    """The mean without the f smallest and the f largest values of each coordinate: a count, never a fraction."""

    properties = EVERYTHING

    def combine(self, block: Rows, f: int) -> Rows:
        """[n, b] -> [b]."""
        from gapweave.server.selection import mean_of_ranks  # loads a compiler

        return mean_of_ranks(block, f, len(block) - f)


AGGREGATORS.register("median")(Median())
AGGREGATORS.register("trimmed_mean")(TrimmedMean())
