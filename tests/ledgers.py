"""Mixed ledgers for tests, and the independent accountants that they are compared with."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache
from typing import Any

from dp_accounting.pld import privacy_loss_distribution as pld
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from gapweave.shared.privacy.accountant import renyi_epsilon, renyi_order
from gapweave.shared.privacy.events import PURE, PrivacyEvent

FINE = 1e-4

POOL: list[tuple[str, float, float]] = [
    *[("dp_sgd", sigma, rate) for sigma in (1.5, 3.0, 8.0, 20.0) for rate in (0.004, 0.03, 0.12, 0.5)],
    *[("dp_sgd", sigma, 1.0) for sigma in (10.0, 25.0, 60.0)],
    *[("noisy_statistic", sigma, 1.0) for sigma in (5.0, 18.0, 50.0, 120.0)],
    *[(kind, scale, 1.0) for kind in ("noisy_count", "count_table", "noisy_max") for scale in (2.5, 12.3, 70.0)],
]
"""Kinds of release from which ledgers are drawn: (kind, noise multiplier, sample rate)."""


def event(kind: str, noise: float, rate: float = 1.0, steps: int = 1) -> PrivacyEvent:
    fields: dict[str, Any] = {"kind": kind, "noise_multiplier": noise, "sample_rate": rate, "steps": steps}
    return PrivacyEvent(released=f"a {kind}", **fields)


def ledgers(kinds: int) -> st.SearchStrategy[list[PrivacyEvent]]:
    """Ledgers of at most so many different kinds, each of which ran 1 to 40 steps."""
    chosen = st.lists(st.sampled_from(POOL), min_size=1, max_size=kinds, unique=True)
    return chosen.flatmap(
        lambda members: st.tuples(*[st.integers(1, 40).map(lambda steps, of=of: event(*of, steps)) for of in members])
    ).map(list)


@cache
def single(kind: str, noise: float, rate: float, interval: float, pessimistic: bool) -> pld.PrivacyLossDistribution:
    """One step by `dp_accounting`; without pessimism a lower bound."""
    options = {"pessimistic_estimate": pessimistic, "value_discretization_interval": interval}
    if kind in PURE:
        return pld.from_discrete_laplace_mechanism(1 / noise, 1, use_connect_dots=pessimistic, **options)
    return pld.from_gaussian_mechanism(noise, sampling_prob=rate, use_connect_dots=pessimistic, **options)


def by_dp_accounting(events: Iterable[PrivacyEvent], delta: float, interval: float, *, pessimistic: bool) -> float:
    """Epsilon composed by `dp_accounting`, one mechanism after the other."""
    total = None
    for one in events:
        part = single(one.kind, one.noise_multiplier, one.sample_rate, interval, pessimistic).self_compose(one.steps)
        total = part if total is None else total.compose(part)
    assert total is not None
    return float(total.get_epsilon_for_delta(delta))


def filter_cap(events: list[PrivacyEvent], delta: float) -> float:
    """The smallest cap whose Renyi filter has room for these events; the filter's order depends on the cap."""
    cap = 1.0
    for _ in range(20):
        cap = renyi_epsilon(events, delta, renyi_order(delta, cap)) + 1e-6
    return cap


def exact_gaussian(sigma: float, steps: int, delta: float) -> float:
    """Epsilon of `steps` Gaussian mechanisms (Balle and Wang 2018, arXiv 1805.06530, theorem 8)."""
    mu = math.sqrt(steps) / sigma

    def excess(target: float) -> float:
        left = norm.cdf(mu / 2 - target / mu)
        right = math.exp(target + norm.logcdf(-mu / 2 - target / mu))
        return left - right - delta

    return float(brentq(excess, 0.0, 5000.0, xtol=1e-12)) if excess(0.0) > 0 else 0.0
