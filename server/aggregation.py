"""One round's aggregation: screening, then a rule, group by group over the sites that hold it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gapweave.server.aggregators import Update, protection, rule_for, start
from gapweave.server.optimizers import ServerOptimizer
from gapweave.server.screening import norm, reason_to_reject, too_long
from gapweave.shared.config.study import Study
from gapweave.shared.errors import TooFewSites
from gapweave.shared.model import MultimodalModel, groups, shared_groups
from gapweave.shared.tensorfile import Arrays, size


class GroupAggregation:
    """One round's aggregation, group by group over the sites that hold it.

    Args:
        study: names the rules.
        current: the shared groups before the round.
        optimizer: what is done with each group's aggregate; its moments move on.
    """

    def __init__(self, study: Study, current: Arrays, optimizer: ServerOptimizer | None = None) -> None:
        self._optimizer = optimizer or ServerOptimizer(study.aggregation)
        self.bytes = 0
        self._study, self._current = study, current
        self._updates: dict[str, dict[str, Any]] = {}
        self._patients: dict[str, int] = {}
        self._screened: dict[str, dict[str, str]] = {}

    def add(self, site: str, arrays: Arrays, patients: int = 1) -> None:
        """Take one site's groups; each is screened on its own.

        Args:
            site: its name.
            arrays: its updates.
            patients: public number of its training patients, which `aggregation.weights: patients` weighs by.
        """
        self.bytes += size(arrays)
        self._patients[site] = patients
        for group, update in arrays.items():
            reason = reason_to_reject(update, self._current[group])
            if reason is not None:
                self._screened.setdefault(group, {})[site] = reason
            else:
                self._updates.setdefault(group, {})[site] = update

    def finish(self) -> tuple[Arrays, dict[str, Any]]:
        """The groups after the round, and a log line a group, also of those that nobody sent."""
        result, lines = dict(self._current), {}
        for group in sorted(self._current):
            updates = dict(sorted(self._updates.get(group, {}).items()))
            norms = {site: norm(update) for site, update in updates.items()}
            for site, reason in too_long(norms).items():
                self._screened.setdefault(group, {})[site] = reason
                del updates[site]
            rule = self._rule(group, len(updates))
            line: dict[str, Any] = {
                "rule": rule,
                "protects": protection(rule, len(updates)),
                "holders": list(updates),
                "norms": norms,
                "screened": self._screened.get(group, {}),
            }
            lines[group] = line
            try:
                result[group] = self._combine(group, rule, updates)
            except TooFewSites as error:
                line["left_alone"] = error.what
        return result, lines

    def _rule(self, group: str, holders: int) -> str:
        aggregation = self._study.aggregation
        named = aggregation.of(group)
        # Robust rules weigh all sites alike.
        return "mean" if named == "auto" and aggregation.weights == "patients" else rule_for(named, holders)

    def _combine(self, group: str, rule: str, updates: dict[str, Any]) -> dict[str, Any]:
        if self._study.aggregation.strict and len(updates) < 3:
            raise TooFewSites(f"{len(updates)} holders cannot protect each other, and the study is strict")
        accumulator = start(rule, group, len(updates))
        for site, update in updates.items():
            accumulator.add(self._weighed(site, update, updates))
        change = self._optimizer.step(group, accumulator.finish())
        return {name: value + change[name] for name, value in self._current[group].items()}

    def _weighed(self, site: str, update: Update, updates: Mapping[str, Update]) -> Update:
        """An update times its site's share of all patients of the group, so that the plain mean is the weighted one.

        Assumes: sites state their numbers honestly; a number that is too large moves the mean that far.
        """
        if self._study.aggregation.weights == "uniform":
            return update
        share = self._patients[site] * len(updates) / sum(self._patients[other] for other in updates)
        return {name: value * np.float32(share) for name, value in update.items()}


def initial_groups(study: Study) -> Arrays:
    """The public initial values of every group that the study shares."""
    model = MultimodalModel(study, study.order)
    all_groups = groups(model)
    return {
        group: {name: tensor.numpy().copy() for name, tensor in all_groups[group].items()}
        for group in shared_groups(study, all_groups)
    }
