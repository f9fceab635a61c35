"""What a robust rule sees of a site: the weighted mean of its updates so far, of which later ones count more.

Under noise a lie may be as large as the noise and stay among honest updates in every single round, always in the same
direction. In a mean over rounds honest noise shrinks, the lie does not, and the rule sees it.

Guarantee: none beyond the rule's own; it reads only what was released, so that it costs no privacy.
Assumes: that what is to be learnt changes slowly between rounds.
Reference: Karimireddy et al. 2021 (arXiv 2012.10333), algorithm 2: there each site keeps its momentum; here the server
    does, since it must not trust them to.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gapweave.server.aggregators import Update
from gapweave.shared.config.study import Study
from gapweave.shared.tensorfile import Arrays

NOISED = 0.8
"""Default decay under privacy: honest noise shrinks to a third, and a change of direction is seen after five rounds."""


def decay_of(study: Study) -> float:
    """How much an update counts one round later."""
    named = study.aggregation.history
    return (NOISED if study.privacy.enabled else 0.0) if named is None else named


class History:
    """Sums of updates by site and group.

    Args:
        decay: of each sum a round; 0 for no history.
        sums: continued from a checkpoint.
        counts: how many updates each holds, likewise.
    """

    def __init__(
        self,
        decay: float,
        sums: Mapping[str, Arrays] | None = None,
        counts: Mapping[str, Mapping[str, int]] | None = None,
    ) -> None:
        self.decay = decay
        self.sums: dict[str, Arrays] = {site: dict(groups) for site, groups in (sums or {}).items()}
        self.counts: dict[str, dict[str, int]] = {site: dict(groups) for site, groups in (counts or {}).items()}

    def take(self, site: str, group: str, update: Update) -> Update:
        """Add one update, and give the mean of all."""
        if self.decay == 0:
            return update
        before, decay = self.sums.get(site, {}).get(group), np.float32(self.decay)
        total = {name: value if before is None else decay * before[name] + value for name, value in update.items()}
        self.sums.setdefault(site, {})[group] = total
        counts = self.counts.setdefault(site, {})
        counts[group] = counts.get(group, 0) + 1
        share = np.float32((1 - self.decay) / (1 - self.decay ** counts[group]))
        return {name: share * value for name, value in total.items()}

    def noise(self, site: str, group: str) -> float:
        """Variance of the noise in the mean of a site's updates, over that of one update."""
        count, decay = self.counts.get(site, {}).get(group, 1), self.decay
        return (1 - decay) / (1 + decay) * (1 + decay**count) / (1 - decay**count)
