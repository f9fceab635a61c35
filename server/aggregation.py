"""One round's aggregation: screening, then a rule, group by group over the sites that hold it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from statistics import fmean, median_low
from typing import Any

import numpy as np

from gapweave.server.aggregators import Accumulator, Sum, Update
from gapweave.server.agreement import Agreement, against_the_others, agreements
from gapweave.server.fednova import Normalisation, scaled
from gapweave.server.history import History
from gapweave.server.rules import begin, protection, quorum_of, resolve, rule_of, start, written
from gapweave.server.scaffold import Variates
from gapweave.server.screening import norm, reason_to_reject, too_long, too_quiet
from gapweave.shared.config.sharing import AnyRule
from gapweave.shared.config.study import Study
from gapweave.shared.errors import TooFewSites, UsageError
from gapweave.shared.model import MultimodalModel, groups, shared_groups
from gapweave.shared.optimizers import ServerOptimizer
from gapweave.shared.tensorfile import Arrays, size

MOST_COLUMNS, MOST_TRIALS = 1024, 32
"""Numbers of noise on which a rule is tried at once, and how often: enough to know a variance to a few percent."""


class GroupAggregation:
    """One round's aggregation, group by group over the sites that hold it.

    A group whose rule is the mean, whoever comes, is summed as updates arrive; for other rules they are kept.

    Args:
        study: names the rules.
        current: the shared groups before the round.
        optimizer: what is done with each group's aggregate; its moments move on.
        agreements: how each site agreed with the others so far, by site.
        history: of their updates; it moves on.
        variates: of SCAFFOLD, which gave this round's corrections; they move on.
    """

    def __init__(
        self,
        study: Study,
        current: Arrays,
        optimizer: ServerOptimizer | None = None,
        agreements: Mapping[str, Agreement] | None = None,
        history: History | None = None,
        variates: Variates | None = None,
    ) -> None:
        self._optimizer = optimizer or ServerOptimizer(study.aggregation)
        self.bytes = 0
        self.agreements = dict(agreements or {})
        self._history = history or History(0)
        self._variates = variates or Variates(study)
        self._paths = Normalisation(study.training)
        self._study, self._current = study, current
        self._kept: dict[str, dict[str, Update]] = {group: {} for group in current}
        self._sums = {group: Sum() for group in current if rule_of(study.aggregation, group, 0) == "mean"}
        self._norms: dict[str, dict[str, float]] = {group: {} for group in current}
        self._noise: dict[str, dict[str, float]] = {group: {} for group in current}
        self._patients: dict[str, int] = {}
        self.noise: dict[str, float] = dict.fromkeys(current, 0.0)
        """Variance of the noise in each coordinate of a group's aggregate, for shrinkage; 0 where it is not known."""
        self._screened: dict[str, dict[str, str]] = {group: {} for group in current}

    def add(self, site: str, arrays: Arrays, patients: int = 1, noise_sd: float = 0.0) -> None:
        """Take one site's groups; each is screened on its own.

        Args:
            site: its name.
            arrays: its updates.
            patients: public number of its training patients, which `aggregation.weights: patients` weighs by. A number
                that is too large moves the mean that far: sites are taken to state it honestly.
            noise_sd: of the noise in each coordinate; 0 for unknown.
        """
        self.bytes += size(arrays)
        for group, update in arrays.items():
            reason = reason_to_reject(update, self._current[group])
            if reason is not None:
                self._reject(group, site, reason)
                continue
            length, numbers = norm(update), sum(value.size for value in update.values())
            path = self._paths.path(site, patients)
            self._norms[group][site] = length / path
            self._noise[group][site] = noise_sd * math.sqrt(numbers) / path
            self._patients[site] = patients
            quiet = too_quiet(length, numbers, noise_sd)
            if quiet is not None:
                self._reject(group, site, quiet)
                continue
            self._variates.take(site, group, update, patients)
            update = scaled(update, 1 / path)
            if group in self._sums:
                self._give(self._sums[group], update, patients)
            else:
                self._kept[group][site] = update

    @property
    def usable(self) -> set[str]:
        """Sites with a group whose keys, shapes and numbers are those of an update."""
        return set(self._patients)

    @property
    def broken(self) -> dict[str, str]:
        """The others, and why."""
        return {
            site: why for part in self._screened.values() for site, why in part.items() if site not in self._patients
        }

    def finish(self) -> tuple[Arrays, dict[str, Any]]:
        """The groups after the round, and a log line a group, also of those that nobody sent."""
        result, lines = dict(self._current), {}
        for group, noise in self._noise.items():
            self._screen(group, too_long(self._norms[group], median_low(noise.values() or [0.0])))
        if self._study.privacy.enabled:
            self._compare()
        for group in sorted(self._current):
            holders = sorted(self._norms[group].keys() - self._screened[group].keys())
            rule = rule_of(self._study.aggregation, group, len(holders))
            lines[group] = {
                "rule": written(rule),
                "quorum": quorum_of(rule),
                "protects": protection(rule, len(holders)),
                "holders": holders,
                "norms": dict(sorted(self._norms[group].items())),
                "screened": self._screened[group],
            }
            try:
                aggregate = self._combine(group, holders)
            except TooFewSites as error:
                lines[group] |= {"left_alone": error.what, "protects": "none"}
                continue
            except (ValueError, TypeError, ArithmeticError, LookupError) as error:
                if all(type(stage).__module__.startswith("gapweave.") for stage in resolve(rule)):
                    raise
                raise _unsound(rule, group, f"fails ({type(error).__name__})") from error
            self._require_sound(group, rule, aggregate)
            self.noise[group] = self._variance(group, rule, holders)
            change = self._optimizer.step(group, aggregate)
            result[group] = {name: value + change[name] for name, value in self._current[group].items()}
        return result, lines

    def _require_sound(self, group: str, rule: AnyRule, aggregate: Update) -> None:
        """Refuse what a rule must not give: sites would be sent it, and refuse it as if they were at fault.

        Raises:
            UsageError: naming rule and group.
        """
        shapes = {name: value.shape for name, value in self._current[group].items()}
        fits = {name: value.shape for name, value in aggregate.items()} == shapes
        if not fits or not all(np.isfinite(value).all() for value in aggregate.values()):
            raise _unsound(rule, group, "gave numbers that are not finite" if fits else "gave other tensors")

    def _variance(self, group: str, rule: AnyRule, holders: list[str]) -> float:
        """What the rule leaves of the holders' noise; tried on noise alone, for rules differ in whom they heed."""
        lengths = [self._noise[group][site] for site in holders]
        if not self._study.aggregation.shrink or not all(lengths):
            return 0.0
        numbers = sum(value.size for value in self._current[group].values())
        generator, columns = np.random.default_rng(0), min(numbers, MOST_COLUMNS)
        squares = []
        for _ in range(min(MOST_TRIALS, math.ceil(MOST_COLUMNS / columns))):
            combined = Sum() if group in self._sums else start(rule, group, len(holders))
            for site, length in zip(holders, lengths, strict=True):
                row = length / math.sqrt(numbers) * generator.standard_normal(columns)
                noise = self._expected(group, site) * columns / numbers
                self._give(combined, {"noise": row.astype(np.float32)}, self._patients[site], noise)
            squares.append(float(np.mean(combined.finish()["noise"].astype(np.float64) ** 2)))
        return self._usual(group, holders) ** 2 * fmean(squares)

    def _give(self, combined: Accumulator, update: Update, patients: int, noise: float = 0.0) -> None:
        """A mean may weigh by patients; robust rules weigh all alike."""
        if isinstance(combined, Sum) and self._study.aggregation.weights == "patients":
            combined.add(update, weight=patients)
        else:
            combined.add(update, noise)

    def _expected(self, group: str, site: str) -> float:
        """Expected squared length of the noise in an update, for distances; 0 where it is not known.

        SCAFFOLD's corrections hold noise of the round before: in a mean over rounds it cancels in part.
        """
        return 0.0 if self._study.training.scaffold else self._noise[group][site] ** 2

    def _usual(self, group: str, holders: list[str]) -> float:
        return self._paths.usual(holders, self._study.aggregation.weights if group in self._sums else None)

    def _reject(self, group: str, site: str, reason: str) -> None:
        self._screened[group][site] = reason
        self._variates.forget(site, group)

    def _screen(self, group: str, reasons: Mapping[str, str]) -> None:
        """Take updates out of a group again; a mean that was summed up on the way cannot do that."""
        for site, reason in reasons.items():
            if self._kept[group].pop(site, None) is not None:
                self._reject(group, site, reason)

    def _compare(self) -> None:
        """Leave out who pulls against the others; it may come back, since it is still compared."""
        for group in sorted(self._kept):
            for site, number in agreements(self._variates.uncorrected(group, self._kept[group])).items():
                self.agreements[site] = self.agreements.get(site, Agreement()) + number
        reasons = against_the_others(self.agreements)
        self.agreements = {site: replace(it, out=site in reasons) for site, it in self.agreements.items()}
        for group in self._kept:
            self._screen(group, reasons)

    def _combine(self, group: str, holders: list[str]) -> Update:
        accumulator = begin(self._study.aggregation, group, len(holders))
        if group in self._sums:
            return scaled(self._sums[group].finish(), self._usual(group, holders))
        for site in holders:
            mean = self._history.take(site, group, self._kept[group].pop(site))
            accumulator.add(mean, self._expected(group, site) * self._history.noise(site, group))
        return scaled(accumulator.finish(), self._usual(group, holders))


def initial_groups(study: Study) -> Arrays:
    """The public initial values of every group that the study shares."""
    model = MultimodalModel(study, study.order)
    all_groups = groups(model)
    return {
        group: {name: tensor.numpy().copy() for name, tensor in all_groups[group].items()}
        for group in shared_groups(study, all_groups)
    }


def _unsound(rule: AnyRule, group: str, what: str) -> UsageError:
    remedy = "Resume the run with another rule; tests/test_rule_contract.py says what this one does wrong"
    return UsageError(f"the rule {written(rule)} of {group!r} {what}", where="study:aggregation", remedy=remedy)
