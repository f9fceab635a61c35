"""Who pulls against the others: under noise no single round shows it, rounds together do.

Two honest updates point the same way a little, noise points nowhere, a lie that harms points the other way. Each round
and each group give a site one number, standard normal if its updates had nothing to do with the others'. Their sum over
the run tells a site that keeps pulling against a majority which pulls together; it reads only what was released.

Reference: updates of many rounds against attacks that hide in the variance of one, Karimireddy et al. 2021 (arXiv
2012.10333); the test is ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

CERTAIN = 4.0
"""Standard deviations from which it is certain that a site pulls against the others, and that these pull together."""
SHARE = 0.5
"""How strongly a site must pull against the others, over how strongly they pull together: one whose patients are merely
unlike theirs hardly ever does."""

FEWEST = 4
"""Holders of a group among whom the median over the others is no single site's word."""

Part = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Agreement:
    """How a site's updates agreed with the others' so far.

    Attributes:
        total: sum of standard normal numbers, if they had nothing to do with each other.
        count: of these numbers.
        out: whether it was left out in the round before.
    """

    total: float = 0.0
    count: int = 0
    out: bool = False

    @classmethod
    def read(cls, content: Any) -> Agreement:
        """From a checkpoint."""
        return cls(**content) if content else cls()

    @property
    def score(self) -> float:
        """Standard normal, if the site's updates had nothing to do with the others'."""
        return self.total / math.sqrt(self.count) if self.count else 0.0

    def __add__(self, more: float) -> Agreement:
        return replace(self, total=self.total + more, count=self.count + 1)


def agreements(updates: Mapping[str, Part]) -> dict[str, float]:
    """How the updates of one group in one round agree.

    The median over the others, so that sites which act together cannot vouch for each other.

    Args:
        updates: by site; of fewer than four nothing is said: among three, one bad site is half of what each of the
            honest ones meets, and could have them left out.

    Returns:
        By site: the median cosine with the others' updates, in standard deviations of what noise would give, and no
        more than is usual.
    """
    heard = [site for site, update in updates.items() if any(value.any() for value in update.values())]
    if len(heard) < FEWEST:
        return {}
    others, products, size = len(heard) - 1, np.zeros((len(heard), len(heard))), 0
    for name in updates[heard[0]]:
        rows = np.stack([updates[site][name].ravel() for site in heard]).astype(np.float64)
        products += rows @ rows.T
        size += rows.shape[1]
    lengths = np.sqrt(np.diag(products))
    cosines = products / lengths / lengths[:, None]
    scale = math.sqrt(size * 2 * others / math.pi)  # over the sd of a cosine, and of a median of that many
    numbers = {site: scale * float(np.median(np.delete(cosines[at], at))) for at, site in enumerate(heard)}
    # Who copies the others' noise once would agree beyond all measure, and could pull against them from then on.
    usual = max(CERTAIN, median(numbers.values()))
    return {site: min(number, usual) for site, number in numbers.items()}


def against_the_others(so_far: Mapping[str, Agreement]) -> dict[str, str]:
    """Sites that keep pulling against the others.

    A site that was left out stays so until it has agreed as far beyond chance as it must pull against the others to be
    left out: what rounds show early in a run, when all still have far to go, fades later.

    Args:
        so_far: agreement by site; judged only among three and more, of which most pull together.

    Returns:
        Reasons, by site.
    """
    scores = {site: agreement.score for site, agreement in so_far.items() if agreement.count}
    together = median(scores.values()) if len(scores) > 2 else 0.0
    limit = max(CERTAIN, SHARE * together)
    judged = together >= CERTAIN
    return {
        site: "over the rounds it pulls against the others"
        for site, score in scores.items()
        if (score < limit if so_far[site].out else judged and score < -limit)
    }
