"""Averaging over late rounds: the mean of the shared groups after each of the last rounds, kept as a running sum.

Reference: Polyak and Juditsky 1992, SIAM J. Control Optim. 30(4); it smooths noise and costs no privacy.
"""

from __future__ import annotations

import math

import numpy as np

from gapweave.shared.config.study import Study
from gapweave.shared.tensorfile import Arrays


def late_rounds(study: Study) -> int:
    """How many rounds, the last ones, are averaged."""
    return math.ceil(study.aggregation.average_last * study.training.rounds)


def add_late(study: Study, number: int, sums: Arrays, current: Arrays) -> Arrays:
    """The sums after a round.

    Args:
        study: says which rounds count.
        number: of the round.
        sums: after the round before; empty at first.
        current: the shared groups after the round.
    """
    if number <= study.training.rounds - late_rounds(study):
        return sums
    return {
        group: {name: sums[group][name] + value if sums else value.copy() for name, value in part.items()}
        for group, part in current.items()
    }


def late_mean(study: Study, sums: Arrays) -> Arrays | None:
    """The average; None where no round is averaged."""
    if not sums:
        return None
    share = np.float32(1 / late_rounds(study))
    return {group: {name: share * value for name, value in part.items()} for group, part in sums.items()}
