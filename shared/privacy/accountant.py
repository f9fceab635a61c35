"""The cost of a list of events, by privacy loss distributions (`dp-accounting`, pessimistic rounding).

Formal guarantee: for a schedule fixed in advance, everything that the events describe is (epsilon, delta)
differentially private for adding or removing all records of one patient.

| events                        | epsilon                        |
|-------------------------------|--------------------------------|
| none                          | 0                              |
| any unnoised                  | infinity                       |
| noise_multiplier 0            | infinity                       |
| an unknown kind               | refused when the event is read |

Reference: Koskela et al. 2020 (arXiv 1906.03049); Doroshenko et al. 2022 (arXiv 2207.04380).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache

from gapweave.shared.privacy.events import PrivacyEvent

INTERVAL = 1e-3
"""Grid of the privacy loss, coarse first; halved until epsilon moves by less than `TOLERANCE`."""
TOLERANCE = 0.005

Mechanism = tuple[str, float, float]
"""(kind, noise multiplier, sample rate): what decides a step's cost."""


def epsilon(events: Iterable[PrivacyEvent], delta: float) -> float:
    """Epsilon of all events together.

    Args:
        events: in any order; equal mechanisms are composed at once.
        delta: of the guarantee.

    Returns:
        An upper bound of epsilon, infinite when anything was released without noise.
    """
    counts: Counter[Mechanism] = Counter()
    for event in events:
        counts[(event.kind, event.noise_multiplier, event.sample_rate)] += event.steps
    return _epsilon(tuple(sorted(counts.items())), delta)


@lru_cache(maxsize=4096)
def _epsilon(mechanisms: tuple[tuple[Mechanism, int], ...], delta: float) -> float:
    if not mechanisms:
        return 0.0
    if any(kind == "unnoised" or noise <= 0 for (kind, noise, _), _ in mechanisms):
        return math.inf
    interval = INTERVAL
    result = _pld_epsilon(mechanisms, delta, interval)
    while True:
        interval /= 2
        finer = _pld_epsilon(mechanisms, delta, interval)
        if abs(result - finer) < TOLERANCE:
            return finer
        result = finer


def _pld_epsilon(mechanisms: tuple[tuple[Mechanism, int], ...], delta: float, interval: float) -> float:
    import dp_accounting
    from dp_accounting.pld.pld_privacy_accountant import PLDAccountant

    accountant = PLDAccountant(
        neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
        value_discretization_interval=interval,
    )
    for (kind, noise, rate), count in mechanisms:
        if kind == "noisy_count":
            event = dp_accounting.dp_event.DiscreteLaplaceDpEvent(1 / noise, 1)
        else:
            gaussian = dp_accounting.GaussianDpEvent(noise)
            event = gaussian if rate >= 1 else dp_accounting.PoissonSampledDpEvent(rate, gaussian)
        accountant.compose(event, count)
    return float(accountant.get_epsilon(delta))
