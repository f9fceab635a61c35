"""Privacy loss distributions on a grid, and their composition by one Fourier transform.

A mechanism is given by a pair of distributions P, Q that dominates it: what its output tells about one patient is
at most what a draw from P or Q tells about which of the two it was. The privacy loss ln P/Q of a draw from P is put
on the points of a grid such that the pair on the grid dominates the pair itself (*connect the dots*): every figure
is an upper bound, and tends to the exact one as the grid gets finer.

`dp_accounting` does the same one mechanism at a time, which is too slow for a ledger of many; it is the oracle in
the tests (fine grid above, optimistic rounding below).

Reference: Doroshenko et al. 2022 (arXiv 2207.04380, algorithm 1); Koskela et al. 2021 (arXiv 2102.12412, Fourier
transform and tail bounds); Zhu, Dong, Wang 2022 (arXiv 2106.08567, dominating pairs compose).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.fft import irfft, next_fast_len, rfft
from scipy.linalg.blas import dtbsv
from scipy.special import ndtr, ndtri_exp

Floats = NDArray[np.float64]

LOG_TAIL = -50.0
"""Logarithm of the mass of a single mechanism that is counted as an infinite loss instead of put on the grid."""
TAIL = 1e-15
"""Mass of a composition that may lie outside of the window; it is added to the infinite loss."""
LARGEST_EXPONENT = 700.0
"""Beyond it exp() overflows; losses are then rounded up to the next point of the grid, which is an upper bound."""


@dataclass(frozen=True, kw_only=True)
class LossDistribution:
    """The distribution of a privacy loss on the points `interval * (start + 0, 1, 2, ...)`.

    Attributes:
        interval: distance of the points.
        start: index of the first point.
        masses: probabilities of the points.
        infinite: probability of an infinite loss.
    """

    interval: float
    start: int
    masses: Floats
    infinite: float

    @property
    def losses(self) -> Floats:
        """The points."""
        points: Floats = self.interval * (self.start + np.arange(len(self.masses), dtype=np.float64))
        return points

    def epsilon(self, delta: float) -> float:
        """The smallest epsilon >= 0 whose hockey-stick divergence is at most delta; infinite if there is none."""
        if self.infinite > delta:
            return math.inf
        tail = self.infinite + np.cumsum(self.masses[::-1])[::-1]
        # weight[j] = sum over i >= j of masses[i] exp(losses[j] - losses[i]), as a recursion that cannot overflow
        # (a triangular system of two bands; scipy.signal has a filter for it, and takes half a second to import)
        bands = np.array([[1.0], [-math.exp(-self.interval)]]).repeat(len(self.masses), axis=1)
        weight = dtbsv(1, bands, self.masses[::-1], lower=1, diag=1)[::-1]
        above = np.flatnonzero(tail - weight > delta)
        point = 0 if len(above) == 0 else int(above[-1]) + 1
        if point == len(self.masses):
            return max(0.0, float(self.losses[-1]))
        excess = float(tail[point]) - delta
        if excess <= 0:
            return 0.0
        return max(0.0, float(self.losses[point]) + math.log(excess / float(weight[point])))


def pure(epsilon: float, interval: float) -> LossDistribution:
    """Randomised response with odds exp(epsilon): it dominates every mechanism of pure epsilon.

    Reference: Kairouz, Oh, Viswanath 2015 (arXiv 1311.0776, theorem 2).
    """
    start, stop = math.floor(-epsilon / interval), math.floor(epsilon / interval)
    first, second = np.zeros(stop - start + 1), np.zeros(stop - start + 1)
    likely = 1 / (1 + math.exp(-epsilon))
    first[[0, -1]] = 1 - likely, likely
    second[[0, -1]] = likely, 1 - likely
    return _connect(start, first, second, interval, 0.0)


def gaussian(sigma: float, rate: float, interval: float, *, removed: bool) -> LossDistribution:
    """The Gaussian mechanism of sensitivity 1 with Poisson sampling.

    The two pairs are N(0, sigma^2) and (1-rate) N(0, sigma^2) + rate N(1, sigma^2), in both orders.

    Args:
        sigma: sd of the noise.
        rate: probability with which the patient is in the sum.
        interval: of the grid.
        removed: whether the patient is in the data set from which P is drawn; false: in the one of Q.
    """
    reach = -sigma * float(ndtri_exp(LOG_TAIL))
    ends = _loss(np.array([-reach, reach + 1.0]), sigma, rate)
    start, stop = math.floor(ends[0] / interval), math.ceil(ends[1] / interval)
    if not removed:
        start, stop = -stop, -start
    edges = interval * np.arange(start, stop + 1)
    cuts = _outcome(edges if removed else -edges, sigma, rate)
    without = _between(cuts, sigma)
    with_patient = (1 - rate) * without + rate * _between(cuts - 1.0, sigma)
    first, second = (with_patient, without) if removed else (without, with_patient)
    infinite = 2 * math.exp(LOG_TAIL)
    return _connect(start, np.abs(first), np.abs(second), interval, infinite)


def _loss(outcome: Floats, sigma: float, rate: float) -> Floats:
    """The ratio's logarithm of the sampled to the plain Gaussian at an outcome; increasing."""
    plain: Floats = (outcome - 0.5) / sigma**2
    if rate >= 1:
        return plain
    mixed: Floats = np.logaddexp(math.log1p(-rate), math.log(rate) + plain)
    return mixed


def _outcome(loss: Floats, sigma: float, rate: float) -> Floats:
    """The inverse of `_loss`; minus infinity below its range."""
    if rate >= 1:
        return 0.5 + sigma**2 * loss
    lost = math.log1p(-rate)
    inside = loss > lost
    plain = np.full_like(loss, -np.inf)
    plain[inside] = loss[inside] + np.log(-np.expm1(lost - loss[inside])) - math.log(rate)
    return 0.5 + sigma**2 * plain


def _between(cuts: Floats, sigma: float) -> Floats:
    """Masses of N(0, sigma^2) between neighbouring cuts (negative where they fall), each from its nearer tail."""
    cuts = cuts / sigma
    below, above = np.diff(ndtr(cuts)), -np.diff(ndtr(-cuts))
    masses: Floats = np.where(cuts[1:] + cuts[:-1] > 0, above, below)
    return masses


def _connect(start: int, first: Floats, second: Floats, interval: float, infinite: float) -> LossDistribution:
    """Put the masses that P and Q have between neighbouring points on these points, both totals kept."""
    losses = interval * (start + np.arange(len(first)))
    held = second * np.exp(np.minimum(losses, LARGEST_EXPONENT))
    upper = np.clip((first - held) / -math.expm1(-interval), 0.0, first)
    masses = np.append(first - upper, 0.0)
    masses[1:] += upper
    return LossDistribution(interval=interval, start=start, masses=masses, infinite=infinite)


def compose(parts: Sequence[tuple[LossDistribution, int]]) -> LossDistribution:
    """The sum of independent losses, each taken a number of times.

    Args:
        parts: distributions on one grid, with how often each enters.
    """
    if len(parts) == 1 and parts[0][1] == 1:
        return parts[0][0]
    interval = parts[0][0].interval
    origin = sum(part.start * count for part, count in parts)
    low, high = _window(parts)
    size = next_fast_len(max(high - low + 1, *(len(part.masses) for part, _ in parts)), real=True)
    spectrum = np.ones(size // 2 + 1, dtype=np.complex128)
    for part, count in parts:
        spectrum *= _power(rfft(part.masses, size), count)
    masses = np.roll(irfft(spectrum, size), origin - low)[: high - low + 1]
    finite = sum(count * math.log1p(-part.infinite) for part, count in parts)
    return LossDistribution(
        interval=interval, start=low, masses=np.maximum(masses, 0.0), infinite=TAIL - math.expm1(finite)
    )


def _power(values: NDArray[np.complex128], exponent: int) -> NDArray[np.complex128]:
    """A positive integer power by repeated squaring: a tenth of the time of `**`."""
    result = None
    while True:
        if exponent & 1:
            result = values if result is None else result * values
        exponent >>= 1
        if not exponent:
            return values if result is None else result
        values = values * values


def _window(parts: Sequence[tuple[LossDistribution, int]]) -> tuple[int, int]:
    """Indices between which all but `TAIL` of the sum lies, by Chernoff bounds."""
    interval = parts[0][0].interval
    low = sum(part.start * count for part, count in parts)
    high = low + sum((len(part.masses) - 1) * count for part, count in parts)
    spread = math.sqrt(max(sum(count * _variance(part) for part, count in parts), interval**2))
    best = math.sqrt(2 * math.log(2 / TAIL)) / spread
    low = max(low, math.floor(_chernoff(parts, -best) / interval))
    return low, min(high, math.ceil(_chernoff(parts, best) / interval))


def _chernoff(parts: Sequence[tuple[LossDistribution, int]], order: float) -> float:
    """A loss beyond which half of `TAIL` lies: above for a positive order, below for a negative one.

    The given order is the best one for a Gaussian sum; a sum with a heavy tail has a smaller one, which is searched
    for as long as the bound gets tighter.
    """
    found = math.inf
    while True:
        total = sum(count * _log_moment(part, order) for part, count in parts)
        distance = (total + math.log(2 / TAIL)) / abs(order)
        if distance >= found:
            return found if order > 0 else -found
        found, order = distance, 0.6 * order


def _variance(part: LossDistribution) -> float:
    mean = float(part.masses @ part.losses)
    return float(part.masses @ (part.losses - mean) ** 2)


def _log_moment(part: LossDistribution, order: float) -> float:
    """Logarithm of the moment generating function of the finite losses."""
    exponents = order * part.losses
    largest = float(exponents[0] if order < 0 else exponents[-1])
    return largest + math.log(max(float(part.masses @ np.exp(exponents - largest)), 1e-300))
