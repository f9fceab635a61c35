"""Noise-aware shrinkage: how much of what was learnt is kept, when much of it may be noise.

The final parameters are the public start plus a change. The change holds noise whose variance is public: each site's
plan says what its updates carry, and server momentum, histories and averages over rounds are linear in the updates. A
change that is hardly longer than its noise says little, so the start is kept; one that is much longer is kept whole.
One factor k serves all shared groups: a signal of length s and noise of expected square V make a change whose square
is V / (1 - k) on average, where k = s^2 / (s^2 + V) is the best share to keep. The factor is the mean of k given the
square that came out, all k equally likely beforehand. Where that square is sure it is the positive-part estimator of
James and Stein (1961) and Baranchik (1964), max(0, 1 - V / |change|^2); but it is never quite 0, so that a model
without a public start still ranks its patients. That k is best for the parameters; predictions want more (`ALONG`).

Guarantee: costs no privacy: it reads what was released, and public plans.
Assumes: that a rule acts on noise beside a signal as it does on noise alone, on which it is tried; that all sites
    answer each round; and that gradients do not undo noise (they do a little, so that too much is shrunk).
Edge cases: without noise, or with a site whose noise is not known, nothing is shrunk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from gapweave.server.history import decay_of
from gapweave.server.rules import rule_of
from gapweave.shared.config.study import Study
from gapweave.shared.late import add_late, late_mean
from gapweave.shared.optimizers import ServerOptimizer
from gapweave.shared.tensorfile import Arrays

SHARES = (np.arange(10_000) + 0.5) / 10_000
"""That may be kept of a change."""
ALONG = 4.0
"""How much more a unit of signal moves predictions than a unit of noise: what is learnt lies along directions in which
patients differ, noise lies along all. Chosen on runs (docs/decisions/0024); 1 is best for the parameters themselves."""

Variances = Mapping[str, Sequence[float]]
"""Group -> round by round, the variance of the noise in each coordinate of the aggregate; 0 for a round without."""


def responses(study: Study, rounds: int, history: float) -> list[float]:
    """By round, what the final parameters hold of a unit of noise in this round's aggregate.

    Args:
        study: gives optimiser, average and the pull of the ridge.
        rounds: that were run.
        history: decay of updates in the mean that the group's rule sees; 0 for none.
    """
    training = study.training
    step = 1 - training.lr * (study.shrinkage + training.proximal)
    pull = training.lr * study.shrinkage * sum(step**number for number in range(training.local_steps))
    return [_response(study, rounds, at, history, pull) for at in range(1, rounds + 1)]


def _response(study: Study, rounds: int, at: int, history: float, pull: float) -> float:
    optimizer = ServerOptimizer(study.aggregation)
    current: Arrays = {"unit": {"x": np.zeros(1, np.float32)}}
    late: Arrays = {}
    total = np.zeros(1, np.float32)  # of updates, earlier ones counting less: the pull comes late, too
    for number in range(1, rounds + 1):
        update = np.float32(number == at) - np.float32(pull) * current["unit"]["x"]
        total = np.float32(history) * total + update
        share = np.float32((1 - history) / (1 - history**number))
        change = optimizer.step("unit", {"x": share * total})
        current = {"unit": {"x": current["unit"]["x"] + change["x"]}}
        late = add_late(study, number, late, current)
    return float((late_mean(study, late) or current)["unit"]["x"][0])


def noise_square(study: Study, variances: Variances, sizes: Mapping[str, int]) -> tuple[float, float]:
    """The expected square of the length of the noise in the final parameters, and its degrees of freedom.

    Args:
        study: how updates become parameters.
        variances: by group and round.
        sizes: numbers in each group.

    Returns:
        V, and the number of equally noisy parameters that would make it vary as much (Satterthwaite 1946).
    """
    gains: dict[tuple[int, float], list[float]] = {}
    square, spread = 0.0, 0.0
    for group, by_round in variances.items():
        key = len(by_round), 0.0 if rule_of(study.aggregation, group, 0) == "mean" else decay_of(study)
        if key not in gains:
            gains[key] = responses(study, *key)
        variance = sum(gain**2 * value for gain, value in zip(gains[key], by_round, strict=True))
        square += sizes[group] * variance
        spread += sizes[group] * variance**2
    return square, square**2 / spread if spread else math.inf


def factor(start: Arrays, reached: Arrays, noise: float, freedom: float) -> float:
    """What is best kept of the change for the parameters themselves, from 0 to 1.

    Args:
        start: public initial values.
        reached: values that the rounds led to.
        noise: V.
        freedom: its degrees of freedom.
    """
    square = sum(
        float(((value.astype(np.float64) - start[group][name]) ** 2).sum())
        for group, part in reached.items()
        for name, value in part.items()
    )
    if square == 0 or noise == 0:
        return 1.0
    expected = 1 / (1 - SHARES)  # of square / noise, a noncentral chi-squared over its degrees of freedom, about normal
    variance = (4 * expected - 2) / freedom
    likely = -((square / noise - expected) ** 2) / (2 * variance) - np.log(variance) / 2
    return float(np.average(SHARES, weights=np.exp(likely - likely.max())))


def shrunk(study: Study, start: Arrays, reached: Arrays, variances: Variances) -> tuple[Arrays, float]:
    """The start and what is kept of the change; and how much that is, from 0 to 1.

    Args:
        study: how updates became parameters.
        start: public initial values of the shared groups.
        reached: values that the rounds led to.
        variances: of the rounds' noise.
    """
    sizes = {group: sum(value.size for value in part.values()) for group, part in reached.items()}
    of_length = factor(start, reached, *noise_square(study, variances, sizes))
    kept = ALONG * of_length / (1 + (ALONG - 1) * of_length)
    share = np.float32(kept)
    return {
        group: {name: start[group][name] + share * (value - start[group][name]) for name, value in part.items()}
        for group, part in reached.items()
    }, kept
