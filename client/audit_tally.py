"""The statistics of an audit's noise: many vectors that should be independent and standard normal.

False alarms: `ALPHA` for each test of a law, and none that counts for what is told by ten standard deviations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from gapweave.client.audit_sensitivity import SLACK

ALPHA = 5e-7
"""False alarms of one test (their sum: docs/decisions/0008)."""
WITHIN = 0.01
"""Share by which the standard deviation of all values may be off: 20 of its own for two million."""
DEVIATIONS = 12
"""Standard deviations that statistics without an exact law may be off."""
TAILS = (2.0**-8, 1.0, 2.0, 3.0, 4.0)
"""Magnitudes beyond which values are counted; within the first lie values without noise."""
SAMPLE = 100_000
"""Values whose whole distribution is compared with the normal one."""
CELL = 2.0**-12
"""Values come rounded to a grid of this width, or a finer one."""


def chi_square(total: float, count: int, alpha: float = ALPHA) -> bool:
    """Whether a sum of squares can be that of standard normal numbers; wrongly denied with probability alpha."""
    low, high = stats.chi2.ppf([alpha / 2, 1 - alpha / 2], count)
    return bool(low * (1 - SLACK) <= total <= high * (1 + SLACK))


class Tally:
    """What is kept of noise vectors.

    Args:
        sizes: numbers in each tensor, by its name.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self._sizes, self.width = dict(sizes), sum(sizes.values())
        self._starts = np.cumsum([0, *list(sizes.values())[:-1]])
        self.squares = np.zeros(len(sizes))
        self._energies: list[float] = []
        self._beyond = np.zeros(len(TAILS))
        self._sample: list[NDArray[np.float64]] = []
        self._last = np.zeros(self.width)
        self._again = 0.0

    def add(self, vector: NDArray[np.float64]) -> None:
        """Take in one vector of all tensors."""
        squares = np.square(vector)
        self.squares += np.add.reduceat(squares, self._starts)
        self._energies.append(float(squares.sum()))
        self._beyond += [np.count_nonzero(squares > tail**2) for tail in TAILS]
        if len(self._sample) * self.width < SAMPLE:
            self._sample.append(vector)
        self._again += float(vector @ self._last)
        self._last = vector

    def faults(self) -> Iterator[str]:
        """What does not look like independent standard normal numbers."""
        count = len(self._energies)
        yield from self._scale(count)
        yield from self._shape(count * self.width)
        if not abs(self._again) < DEVIATIONS * math.sqrt(count * self.width):
            yield "the noise of a step comes again in the next"
        # A vector of fewer dimensions than it has numbers, or of another scale each time, varies too much in length.
        spread = float(np.square(np.array(self._energies) - self.width).mean()) / (2 * self.width)
        if not abs(spread - 1) < DEVIATIONS * math.sqrt(2 / count):
            yield f"the length of the noise varies by {math.sqrt(spread):.3g} of what independent numbers give"

    def _scale(self, count: int) -> Iterator[str]:
        ratio = math.sqrt(self.squares.sum() / (count * self.width))
        if not abs(ratio - 1) <= WITHIN:
            yield f"noise is {ratio:.4g} of the declared"
        for (name, size), square in zip(self._sizes.items(), self.squares, strict=True):
            if not chi_square(square, count * size, ALPHA / len(self._sizes)):
                yield f"noise of {name} is {math.sqrt(square / count / size):.4g} of the declared"

    def _shape(self, total: int) -> Iterator[str]:
        share = ALPHA / 2 / len(TAILS)
        for tail, found in zip(TAILS, self._beyond, strict=True):
            low = stats.binom.ppf(share, total, 2 * stats.norm.sf(tail + CELL))
            high = stats.binom.isf(share, total, 2 * stats.norm.sf(tail - CELL))
            if not low <= found <= high:
                yield f"{found / total:.3g} of the noise is beyond {tail:g} standard deviations: it is not normal"
        values = np.sort(np.concatenate(self._sample))
        away = np.abs(np.arange(1, len(values) + 1) / len(values) - stats.norm.cdf(values)).max()
        # Dvoretzky, Kiefer and Wolfowitz, with Massart's constant.
        if not away <= math.sqrt(math.log(2 / ALPHA) / (2 * len(values))) + CELL:
            yield f"the distribution of the noise is {away:.3g} away from the normal one"
