"""Early stop: looks at the scores after some rounds, and whether they still get better.

What is looked at was released: noised tables that each site charges to its ledger, reserved before the first round.
The median over sites of what each one gained since the best look decides: a minority cannot end a run, or keep it
going, by what it says. The median of what they say would not do: whoever says high first and low later moves it alone.

Guarantee: the decision is post-processing of charged tables; with their noise it costs no further privacy. What a site
    spent is counted as its whole schedule, or by the filter (`LedgerView.spent`): ending early depends on results.
Assumes: nothing; sites that give no table are left out, and without any figure a run goes on.
Edge cases: the best of several noised figures is too high by chance, so that a run ends a little early: see `patience`.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

from gapweave.server.evaluation import Released
from gapweave.shared.config.training import Training

Look = dict[str, Any]
"""As kept and logged: round, auroc, sites, reasons, and whether it ended the run."""


class EarlyStop:
    """What was seen, and whether it is enough.

    Args:
        training: says when to look, and for how long to wait.
        looks: before, from a checkpoint.
    """

    def __init__(self, training: Training, looks: list[Look]) -> None:
        self._training = training
        self.looks = list(looks)

    def due(self, number: int) -> bool:
        """Whether the model after a round is to be looked at, and was not."""
        return number in self._training.looks and all(look["round"] != number for look in self.looks)

    def add(self, number: int, aurocs: Mapping[str, float | None], reasons: Mapping[str, str]) -> Look:
        """Take what was seen after a round.

        Args:
            number: of the round.
            aurocs: by site.
            reasons: why sites said nothing.

        Returns:
            The look, as logged.
        """
        known = [value for value in aurocs.values() if value is not None]
        look = {
            "round": number,
            "auroc": median(known) if known else None,
            "sites": dict(aurocs),
            "reasons": {site: reason for site, reason in reasons.items() if reason},
        }
        self.looks.append(look)
        look["ends_run"] = self.reached
        return look

    @property
    def reached(self) -> bool:
        """Whether so many looks in a row were no better than the best one before them."""
        if self._training.early_stop is None:
            return False
        best: dict[str, float] = {}
        waited = 0
        for look in self.looks:
            seen = {site: value for site, value in look["sites"].items() if value is not None}
            gains = [seen[site] - best[site] for site in seen.keys() & best.keys()]
            if seen and (not gains or median(gains) > 0):
                best, waited = seen, 0
            else:
                waited += bool(seen)
        return waited >= self._training.early_stop.patience


UNRANKED = "its table ranks nobody: too few of a class, or most scores in one bin or two"


def seen_of(released: Mapping[str, Released]) -> tuple[dict[str, float | None], dict[str, str]]:
    """AUROC of each site's table, and why sites gave none."""
    aurocs = {site: (what.metrics() or {}).get("auroc") for site, what in released.items()}
    silent = {site: what.reason for site, what in released.items()}
    mute = {site: UNRANKED for site, what in released.items() if what.tables and aurocs[site] is None}
    return aurocs, silent | mute
