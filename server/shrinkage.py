"""Noise-aware shrinkage: how much of what was learnt is kept, when much of it may be noise.

The final parameters are the public start plus a change. The change holds noise whose variance is public: each site's
plan says what its updates carry, and server momentum, histories and averages over rounds are linear in the updates. A
change that is hardly longer than its noise says little, so the start is kept; one that is much longer is kept whole.
One share serves all shared groups (`shared/shrinkage.py`).

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
from gapweave.shared.shrinkage import share_kept
from gapweave.shared.tensorfile import Arrays

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


def shrunk(study: Study, start: Arrays, reached: Arrays, variances: Variances) -> tuple[Arrays, float]:
    """The start and what is kept of the change; and how much that is, from 0 to 1.

    Args:
        study: how updates became parameters.
        start: public initial values of the shared groups.
        reached: values that the rounds led to.
        variances: of the rounds' noise.
    """
    sizes = {group: sum(value.size for value in part.values()) for group, part in reached.items()}
    square = sum(
        float(((value.astype(np.float64) - start[group][name]) ** 2).sum())
        for group, part in reached.items()
        for name, value in part.items()
    )
    kept = share_kept(square, *noise_square(study, variances, sizes))
    share = np.float32(kept)
    return {
        group: {name: start[group][name] + share * (value - start[group][name]) for name, value in part.items()}
        for group, part in reached.items()
    }, kept
