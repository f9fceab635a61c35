"""What the finite precision of the noise (noise.py) adds to a guarantee; a report needs no torch to say it."""

from __future__ import annotations

import math
from typing import NamedTuple

CELL_ERROR = 2.0**-32
"""Bound of the relative error of any grid point's probability, for radii below 10.8 (docs/decisions/0007)."""
FAR = 2.0**-84
"""Probability of a radius of 10.8 or more, where `CELL_ERROR` is not claimed."""


class Numerics(NamedTuple):
    """What finite precision adds to a guarantee."""

    epsilon: float
    delta: float


def numerical_epsilon(coordinates: int, steps: int, slack: float = 1e-10) -> Numerics:
    """What the sampler's finite precision adds to epsilon and delta, for reports.

    Each released coordinate's law differs from the ideal one by a factor within exp(+-CELL_ERROR); by advanced
    composition over all of them, on both sides of the comparison, epsilon grows by
    2 (eta sqrt(2 d T ln(1/slack)) + d T eta^2).

    Args:
        coordinates: d, numbers in one release.
        steps: T, releases.
        slack: delta of the composition.

    Returns:
        Both terms; delta is the slack and the probability that some radius lies in the far tail, on both sides.

    Reference: Dwork and Roth 2014, theorem 3.20.
    """
    count = coordinates * steps
    spread = CELL_ERROR * math.sqrt(2.0 * count * math.log(1.0 / slack))
    return Numerics(epsilon=2.0 * (spread + count * CELL_ERROR**2), delta=2.0 * (slack + count * FAR))
