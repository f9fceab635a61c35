"""One round's aggregation: screening, then a rule, group by group over the sites that hold it."""

from __future__ import annotations

from typing import Any

from gapweave.server.aggregators import Sum, Update, protection, rule_for, start
from gapweave.server.optimizers import ServerOptimizer
from gapweave.server.screening import norm, reason_to_reject, too_long
from gapweave.shared.config.study import Study
from gapweave.shared.errors import TooFewSites
from gapweave.shared.model import MultimodalModel, groups, shared_groups
from gapweave.shared.tensorfile import Arrays, size


class GroupAggregation:
    """One round's aggregation, group by group over the sites that hold it.

    A group whose rule is the mean, whoever comes, is summed as updates arrive; for other rules they are kept.

    Args:
        study: names the rules.
        current: the shared groups before the round.
        optimizer: what is done with each group's aggregate; its moments move on.
    """

    def __init__(self, study: Study, current: Arrays, optimizer: ServerOptimizer | None = None) -> None:
        self._optimizer = optimizer or ServerOptimizer(study.aggregation)
        self.bytes = 0
        self._study, self._current = study, current
        self._kept: dict[str, dict[str, Update]] = {group: {} for group in current}
        self._sums = {group: Sum() for group in current if self._rule(group, 0) == "mean"}
        self._norms: dict[str, dict[str, float]] = {group: {} for group in current}
        self._screened: dict[str, dict[str, str]] = {group: {} for group in current}

    def add(self, site: str, arrays: Arrays, patients: int = 1) -> None:
        """Take one site's groups; each is screened on its own.

        Args:
            site: its name.
            arrays: its updates.
            patients: public number of its training patients, which `aggregation.weights: patients` weighs by. A number
                that is too large moves the mean that far: sites are taken to state it honestly.
        """
        self.bytes += size(arrays)
        for group, update in arrays.items():
            reason = reason_to_reject(update, self._current[group])
            if reason is not None:
                self._screened[group][site] = reason
                continue
            self._norms[group][site] = norm(update)
            if group in self._sums:
                self._sums[group].add(update, 1 if self._study.aggregation.weights == "uniform" else patients)
            else:
                self._kept[group][site] = update

    def finish(self) -> tuple[Arrays, dict[str, Any]]:
        """The groups after the round, and a log line a group, also of those that nobody sent."""
        result, lines = dict(self._current), {}
        for group in sorted(self._current):
            if group not in self._sums:
                self._screen_norms(group)
            holders = sorted(self._norms[group].keys() - self._screened[group].keys())
            rule = self._rule(group, len(holders))
            lines[group] = {
                "rule": rule,
                "protects": protection(rule, len(holders)),
                "holders": holders,
                "norms": dict(sorted(self._norms[group].items())),
                "screened": self._screened[group],
            }
            try:
                aggregate = self._combine(group, rule, holders)
            except TooFewSites as error:
                lines[group]["left_alone"] = error.what
                continue
            change = self._optimizer.step(group, aggregate)
            result[group] = {name: value + change[name] for name, value in self._current[group].items()}
        return result, lines

    def _screen_norms(self, group: str) -> None:
        for site, reason in too_long(self._norms[group]).items():
            self._screened[group][site] = reason
            del self._kept[group][site]

    def _rule(self, group: str, holders: int) -> str:
        aggregation = self._study.aggregation
        named = aggregation.of(group)
        # Robust rules weigh all sites alike.
        return "mean" if named == "auto" and aggregation.weights == "patients" else rule_for(named, holders)

    def _combine(self, group: str, rule: str, holders: list[str]) -> Update:
        if self._study.aggregation.strict and len(holders) < 3:
            raise TooFewSites(f"{len(holders)} holders cannot protect each other, and the study is strict")
        accumulator = start(rule, group, len(holders))
        if group in self._sums:
            return self._sums[group].finish()
        for site in holders:
            accumulator.add(self._kept[group][site])
        return accumulator.finish()


def initial_groups(study: Study) -> Arrays:
    """The public initial values of every group that the study shares."""
    model = MultimodalModel(study, study.order)
    all_groups = groups(model)
    return {
        group: {name: tensor.numpy().copy() for name, tensor in all_groups[group].items()}
        for group in shared_groups(study, all_groups)
    }
