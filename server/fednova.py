"""FedNova: updates of unequal numbers of local steps count a step, not a site's number of steps.

A site that makes more steps moves farther; in a plain mean it would count for as much more. Each update is divided by
how much path it has behind it, and the aggregate is multiplied by the path of a usual site. Where all sites make
equally many steps, this is plain averaging.

Guarantee: with the mean, a fixed point is a stationary point of the mean of the sites' losses (to first order in the
    learning rate), whatever numbers of steps they make. It reads released updates and public numbers of patients, and
    costs no privacy.
Assumes: that sites state their numbers of patients honestly; robust rules take the median site's path for the usual
    one, so that a minority's lies do not stretch the step.
Edge cases: momentum goes on over rounds here, so that every step has its full effect in the end: it counts as without.
Reference: Wang et al. 2020 (arXiv 2007.07481), equation 6 and section 4.
"""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median_low
from typing import Literal

import numpy as np

from gapweave.server.aggregators import Update
from gapweave.shared.config.training import Training


def path(training: Training, patients: int) -> float:
    """How much path an update has behind it: the sum of what its steps count for, the norm |a|_1 of the paper.

    Args:
        training: a proximal term shrinks what earlier steps did.
        patients: public number of the site's training patients, from which its number of steps follows.
    """
    kept = 1 - training.lr * training.proximal
    return sum(kept**step for step in range(training.steps_for(patients)))


class Normalisation:
    """One round's: updates in, each divided by its path; an aggregate out, multiplied by the usual path.

    Args:
        training: where sites do not make passes, all make equally many steps, and nothing is changed.
    """

    def __init__(self, training: Training) -> None:
        self._training = training
        self._paths: dict[str, float] = {}
        self._patients: dict[str, int] = {}

    def path(self, site: str, patients: int) -> float:
        """What an update of a site is divided by; 1 where nothing is changed."""
        if self._training.passes is None:
            return 1.0
        self._patients[site] = patients
        return self._paths.setdefault(site, path(self._training, patients))

    def usual(self, sites: Iterable[str], weights: Literal["uniform", "patients"] | None) -> float:
        """What their aggregate is multiplied by.

        Args:
            sites: whose updates were combined.
            weights: of a mean of updates; None for a robust rule.
        """
        if self._training.passes is None:
            return 1.0
        paths = {site: self._paths[site] for site in sites}
        if weights is None:
            return median_low(paths.values())
        shares = {site: self._patients[site] if weights == "patients" else 1 for site in paths}
        return sum(shares[site] * length for site, length in paths.items()) / sum(shares.values())


def scaled(update: Update, factor: float) -> Update:
    """A multiple of an update; for 1 the update itself."""
    return update if factor == 1 else {name: np.float32(factor) * value for name, value in update.items()}
