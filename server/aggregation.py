"""One round's aggregation: screening, then a rule, group by group over the sites that hold it."""

from __future__ import annotations

from typing import Any

from gapweave.server.aggregators import AGGREGATORS, resolve
from gapweave.server.screening import norm, reason_to_reject
from gapweave.shared.config.study import Study
from gapweave.shared.errors import TooFewSites
from gapweave.shared.model import MultimodalModel, groups, shared_groups
from gapweave.shared.tensorfile import Arrays, size


class GroupAggregation:
    """One round's aggregation, group by group over the sites that hold it.

    Args:
        study: names the rules.
        current: the shared groups before the round.
    """

    def __init__(self, study: Study, current: Arrays) -> None:
        self.bytes = 0
        self._study, self._current = study, current
        self._updates: dict[str, dict[str, Any]] = {}
        self._screened: dict[str, dict[str, str]] = {}

    def add(self, site: str, arrays: Arrays) -> None:
        """Take one site's groups; each is screened on its own."""
        self.bytes += size(arrays)
        for group, update in arrays.items():
            reason = reason_to_reject(update, self._current[group])
            if reason is not None:
                self._screened.setdefault(group, {})[site] = reason
            else:
                self._updates.setdefault(group, {})[site] = update

    def finish(self) -> tuple[Arrays, dict[str, Any]]:
        """The groups after the round, and a log line a group."""
        result, lines = dict(self._current), {}
        for group in sorted(self._updates.keys() | self._screened.keys()):
            updates = dict(sorted(self._updates.get(group, {}).items()))
            rule = resolve(self._study.aggregation.of(group))
            line: dict[str, Any] = {
                "rule": rule,
                "holders": list(updates),
                "norms": {site: norm(update) for site, update in updates.items()},
                "screened": self._screened.get(group, {}),
            }
            lines[group] = line
            try:
                result[group] = self._combine(group, rule, updates)
            except TooFewSites as error:
                line["left_alone"] = error.what
        return result, lines

    def _combine(self, group: str, rule: str, updates: dict[str, Any]) -> dict[str, Any]:
        if self._study.aggregation.strict and len(updates) < 3:
            raise TooFewSites(f"{len(updates)} holders cannot protect each other, and the study is strict")
        accumulator = AGGREGATORS[rule].start(group, len(updates))
        for update in updates.values():
            accumulator.add(update)
        change = accumulator.finish()
        return {name: value + change[name] for name, value in self._current[group].items()}


def initial_groups(study: Study) -> Arrays:
    """The public initial values of every group that the study shares."""
    model = MultimodalModel(study, study.order)
    all_groups = groups(model)
    return {
        group: {name: tensor.numpy().copy() for name, tensor in all_groups[group].items()}
        for group in shared_groups(study, all_groups)
    }
