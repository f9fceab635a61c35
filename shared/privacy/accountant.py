"""The cost of a list of events: by privacy loss distributions, and at one Renyi order for comparison.

Formal guarantee of `epsilon`: for a schedule fixed in advance, everything that the events describe is (epsilon,
delta) differentially private for adding or removing all records of one patient.

| event                           | dominated by                                                           |
|---------------------------------|------------------------------------------------------------------------|
| dp_sgd                          | the Poisson-sampled Gaussian mechanism, `steps` times                  |
| noisy_statistic, dp_sgd at q=1  | one Gaussian mechanism for all of them: noises add as 1/sigma^2        |
| noisy_count, count_table        | randomised response of 1/scale: discrete Laplace noise has this loss   |
| noisy_max                       | randomised response of 1/scale, as every mechanism of pure epsilon     |
| unnoised, noise_multiplier 0    | nothing: epsilon is infinite                                           |
| an unknown kind, no steps       | refused                                                                |

Report-noisy-max with Gumbel noise is the exponential mechanism. Its scores are sums over patients of parts in
[0, 1], so that one patient moves all of them by at most 1 and in one direction: with noise of scale 1/eps no
outcome's log-probability changes by more than eps, and all changes lie in an interval of width eps. The first is
pure epsilon, the second is eps^2/8 zCDP (Cesar and Rogers 2021, arXiv 2004.07223).

Reference: Doroshenko et al. 2022 (arXiv 2207.04380); Mironov, Talwar, Zhang 2019 (arXiv 1908.10530).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING

from gapweave.shared.errors import GapweaveError
from gapweave.shared.privacy.events import KINDS, PURE, PrivacyEvent

if TYPE_CHECKING:
    from gapweave.shared.privacy.loss import LossDistribution

INTERVAL = 4e-3
"""Grid of the privacy loss, coarse first; halved until epsilon moves by less than `TOLERANCE`."""
TOLERANCE = 0.004
"""With it epsilon is at most 0.01 above its value on the finest grid: the error falls at least as the grid's root."""

ORDERS: tuple[int, ...] = (*range(2, 17), 18, 20, 22, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 256)
"""Renyi orders: at whole ones the sampled Gaussian mechanism has an exact finite sum."""

Mechanism = tuple[str, float, float]
"""(kind, noise multiplier, sample rate): what decides a step's cost."""
Counted = tuple[tuple[Mechanism, int], ...]
"""Mechanisms with how often each was run."""


def epsilon(events: Iterable[PrivacyEvent], delta: float) -> float:
    """Epsilon of all events together.

    Args:
        events: in any order; equal mechanisms are composed at once.
        delta: of the guarantee.

    Returns:
        An upper bound of epsilon, infinite when anything was released without noise.

    Raises:
        GapweaveError: for an event of an unknown kind, without steps, or with impossible numbers.
    """
    return _epsilon(_counted(events), delta)


def fixed_epsilon(events: Iterable[PrivacyEvent], delta: float) -> float:
    """Epsilon of one study's schedule, fixed but for the noised number of patients that it was planned with.

    Whatever that number turns out to be, the rest costs at most this figure less the number's own epsilon; a pure
    epsilon adds (basic composition, which allows the rest to be chosen after it).
    """
    everything = list(events)
    if _unnoised(_counted(everything)):
        return math.inf
    counts = [event for event in everything if event.kind == "noisy_count"]
    rest = [event for event in everything if event.kind != "noisy_count"]
    return math.fsum(event.steps / event.noise_multiplier for event in counts) + epsilon(rest, delta)


def _counted(events: Iterable[PrivacyEvent]) -> Counted:
    counts: Counter[Mechanism] = Counter()
    for event in events:
        known = event.kind in KINDS and event.steps >= 1 and event.sample_rate > 0
        if not known or not math.isfinite(event.noise_multiplier):
            raise GapweaveError(f"this cannot be accounted for: {event}", where="ledger")
        counts[(event.kind, event.noise_multiplier, event.sample_rate)] += event.steps
    return tuple(sorted(counts.items()))


def _unnoised(mechanisms: Counted) -> bool:
    return any(kind == "unnoised" or noise <= 0 for (kind, noise, _), _ in mechanisms)


@lru_cache(maxsize=4096)
def _epsilon(mechanisms: Counted, delta: float) -> float:
    if not mechanisms:
        return 0.0
    if _unnoised(mechanisms):
        return math.inf
    interval = INTERVAL
    result = _at_interval(mechanisms, delta, interval)
    while True:
        interval /= 2
        finer = _at_interval(mechanisms, delta, interval)
        if abs(result - finer) < TOLERANCE or result == finer:
            return finer
        result = finer


def _at_interval(mechanisms: Counted, delta: float, interval: float) -> float:
    """Epsilon on one grid, the larger one of a patient removed and a patient added."""
    from gapweave.shared.privacy.loss import compose

    directions = (True, False) if any(_sampled(mechanism) for mechanism, _ in mechanisms) else (True,)
    return max(compose(_parts(mechanisms, interval, removed)).epsilon(delta) for removed in directions)


def _sampled(mechanism: Mechanism) -> bool:
    kind, _, rate = mechanism
    return kind == "dp_sgd" and rate < 1


def _parts(mechanisms: Counted, interval: float, removed: bool) -> list[tuple[LossDistribution, int]]:
    from gapweave.shared.privacy.loss import gaussian, pure

    parts, full = [], []
    for mechanism, count in mechanisms:
        kind, noise, rate = mechanism
        if kind in PURE:
            parts.append((pure(1 / noise, interval), count))
        elif _sampled(mechanism):
            parts.append((gaussian(noise, rate, interval, removed=removed), count))
        else:
            full.append(count / noise**2)
    if full:
        parts.append((gaussian(1 / math.sqrt(math.fsum(full)), 1.0, interval, removed=True), 1))
    return parts


def renyi_order(delta: float, cap: float) -> int:
    """The order at which a cap has room for the most full-batch Gaussian noise; fixed with delta and cap.

    A Renyi filter must fix its order before it sees any result (Feldman and Zrnic 2021, arXiv 2008.11193). At order
    a, noise of sigma costs a / (2 sigma^2) of what the conversion to (cap, delta) leaves.
    """

    def room(order: int) -> float:
        return (cap - _conversion(order, delta)) / order

    return max(ORDERS, key=room)


def renyi_epsilon(events: Iterable[PrivacyEvent], delta: float, order: int | None = None) -> float:
    """Epsilon of all events by Renyi composition; at one fixed order, what a site's cap binds.

    Args:
        events: in any order.
        delta: of the guarantee.
        order: at which costs add up, of `ORDERS`; None takes the best one for these events, which holds only for a
            schedule fixed in advance.

    Returns:
        An upper bound of epsilon, as a rule looser than `epsilon`; infinite when anything left without noise.

    Raises:
        GapweaveError: for an event of an unknown kind, without steps, or with impossible numbers.
    """
    mechanisms = _counted(events)
    if not mechanisms:
        return 0.0
    if _unnoised(mechanisms):
        return math.inf
    orders = ORDERS if order is None else (order,)
    return min(
        math.fsum(count * _divergence(mechanism, each) for mechanism, count in mechanisms) + _conversion(each, delta)
        for each in orders
    )


def _conversion(order: int, delta: float) -> float:
    """What the conversion to (epsilon, delta) adds (Canonne, Kamath, Steinke 2020, arXiv 2004.00010, prop. 12)."""
    return max(0.0, math.log1p(-1 / order) - math.log(delta * order) / (order - 1))


@lru_cache(maxsize=65536)
def _divergence(mechanism: Mechanism, order: int) -> float:
    """Renyi divergence of one step."""
    kind, noise, rate = mechanism
    if kind == "noisy_count":
        return 1 / noise  # a schedule is planned with it: its whole epsilon adds, at every order
    if kind not in PURE:
        return _sampled_gaussian(noise, rate, order) if _sampled(mechanism) else order / (2 * noise**2)
    pure = _randomised_response(1 / noise, order)
    return min(pure, order / (8 * noise**2)) if kind == "noisy_max" else pure


def _randomised_response(eps: float, order: int) -> float:
    """Of randomised response with odds exp(eps); at most eps and at most order eps^2 / 2."""
    likely, unlikely = -math.log1p(math.exp(-eps)), -eps - math.log1p(math.exp(-eps))
    first = order * likely + (1 - order) * unlikely
    second = order * unlikely + (1 - order) * likely
    return (first + math.log1p(math.exp(second - first))) / (order - 1)


def _sampled_gaussian(sigma: float, rate: float, order: int) -> float:
    """Of the Poisson-sampled Gaussian mechanism (Mironov, Talwar, Zhang 2019, arXiv 1908.10530, section 3.3)."""
    import numpy as np
    from scipy.special import gammaln, logsumexp

    k = np.arange(order + 1)
    choices = gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1)
    terms = choices + k * math.log(rate) + (order - k) * math.log1p(-rate) + k * (k - 1) / (2 * sigma**2)
    return max(0.0, float(logsumexp(terms))) / (order - 1)
