"""How much is kept of a change that holds noise of known variance: what the noise cannot explain.

A signal of length s and noise of expected square V make a change whose square is V / (1 - k) on average, where
k = s^2 / (s^2 + V) is the best share to keep. The share is the mean of k given the square that came out, all k equally
likely beforehand. Where that square is sure it is the positive-part estimator of James and Stein (1961) and Baranchik
(1964), max(0, 1 - V / |change|^2); but it is never quite 0, so that a model without a public start still ranks its
patients. That k is best for the parameters; predictions want more (`ALONG`).

Guarantee: costs no privacy: it reads what was noised before, and public plans.
Edge cases: without noise, or without a change, all is kept.
"""

from __future__ import annotations

import numpy as np

SHARES = (np.arange(10_000) + 0.5) / 10_000
"""That may be kept of a change."""
ALONG = 4.0
"""How much more a unit of signal moves predictions than a unit of noise: what is learnt lies along directions in which
patients differ, noise lies along all. Chosen on runs (docs/decisions/0024); 1 is best for the parameters themselves."""


def share_kept(square: float, noise: float, freedom: float) -> float:
    """What is kept of a change for predictions, from 0 to 1.

    Args:
        square: of the change's length.
        noise: V, the expected square of the length of the noise in it.
        freedom: degrees of freedom of V: for equally noisy numbers how many they are.
    """
    best = best_share(square, noise, freedom)
    return ALONG * best / (1 + (ALONG - 1) * best)


def best_share(square: float, noise: float, freedom: float) -> float:
    """What is best kept of a change for the parameters themselves, from 0 to 1; arguments as for `share_kept`."""
    if square == 0 or noise == 0:
        return 1.0
    expected = 1 / (1 - SHARES)  # of square / noise, a noncentral chi-squared over its degrees of freedom, about normal
    variance = (4 * expected - 2) / freedom
    likely = -((square / noise - expected) ** 2) / (2 * variance) - np.log(variance) / 2
    return float(np.average(SHARES, weights=np.exp(likely - likely.max())))
