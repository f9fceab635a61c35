"""What a plan costs, in numbers and in plain words, beside other plans of the same target."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from gapweave.shared.config.site import Policy
from gapweave.shared.config.study import Study
from gapweave.shared.errors import UsageError
from gapweave.shared.outlook import alone_warning
from gapweave.shared.privacy.accountant import epsilon, fixed_epsilon, renyi_epsilon, renyi_order
from gapweave.shared.privacy.events import PrivacyEvent
from gapweave.shared.privacy.ledger import LedgerView, folded
from gapweave.shared.privacy.plan import (
    COUNT_SHARE,
    USUAL_DELTA,
    VALIDATION_FOLDS,
    Plan,
    longest_prefix,
    usual_plan,
)
from gapweave.shared.report.wording import budget, left_figure

DEFAULT_CAP = float(Policy.model_fields["epsilon"].default)
"""Cap of a site whose file sets none."""
WEAK = 10.0
"""Above it a guarantee is "weak to none" (Ponomareva et al. 2023, How to DP-fy ML, JAIR 77, section 5.2.1, tier 3)."""


def weakness(epsilon: float) -> str:
    """What to say of a target that promises patients little; empty for others."""
    return f"epsilon {epsilon:g} is weak to no formal protection (above {WEAK:g})" if epsilon > WEAK else ""


@dataclass(frozen=True, kw_only=True)
class PlanReport:
    """A plan, what a site's cap makes of it, and its alternatives.

    Attributes:
        study: what is planned.
        plan: as a site with so many patients makes it.
        cap: of the site.
        epsilon_filter: the plan's epsilon by Renyi composition, at the order that delta and cap fix, with everything
            that the ledger shows as spent or reserved.
        rounds_allowed: rounds that the cap has room for beside that.
        beside: whether there is anything beside the plan.
        alternatives: plans of other schedules for the same target, with what differs.
    """

    study: Study
    plan: Plan
    cap: float
    epsilon_filter: float
    rounds_allowed: int
    beside: bool
    alternatives: tuple[tuple[str, Plan], ...]

    def to_dict(self) -> dict[str, Any]:
        """As `gapweave privacy plan --json` prints it."""
        return {
            "study": self.study.name,
            "patients": self.plan.n_hat,
            **_figures(self.plan),
            "delta": self.plan.delta,
            "cap": self.cap,
            "epsilon_filter": self.epsilon_filter,
            "rounds_allowed": self.rounds_allowed,
            "releases": folded(schedule(self.plan)),
            "warnings": list(self.warnings()),
            "alternatives": [{"change": change, **_figures(plan)} for change, plan in self.alternatives],
        }

    def warnings(self) -> Iterator[str]:
        """What a person should know before choosing this plan."""
        if weak := weakness(self.study.privacy.epsilon):
            yield f"{weak[0].upper()}{weak[1:]}."
        if self.study.privacy.delta > self.plan.delta:
            yield f"The study's delta of {self.study.privacy.delta:g} is not used: a site's smaller one wins."
        if self.rounds_allowed < self.plan.rounds:
            cap = f"What other runs leave of a cap of {self.cap:g}" if self.beside else f"A cap of {self.cap:g}"
            yield (
                f"{cap} has room for {self.rounds_allowed} of the {self.plan.rounds} rounds: "
                "the site leaves the study after them."
            )
        elif self.epsilon_filter > self.cap:
            yield (
                f"A cap of {self.cap:g} has room for this study only as a site's first, by the exact figure, and then "
                "for no other: plan more rounds with more noise each, a smaller epsilon, or a larger cap."
            )
        outlook = alone_warning(self.study, self.plan)
        if outlook is not None:
            yield outlook


def plan_report(
    study: Study,
    patients: int,
    cap: float = DEFAULT_CAP,
    delta: float = USUAL_DELTA,
    *,
    held: Sequence[str] | None = None,
    tables: bool = True,
    view: LedgerView | None = None,
) -> PlanReport:
    """Plan a study as a site does that declares its number of patients.

    Args:
        study: target and schedule.
        patients: public number of training patients.
        cap: of the site.
        delta: of the site.
        held: modalities of the site; None for all.
        tables: whether the site releases counts.
        view: the site's ledger; None for an empty one.

    Raises:
        UsageError: for a study without privacy, a cap of nothing, or a target that no noise reaches.
    """
    if cap <= 0:
        raise UsageError(f"a cap of {cap:g} has room for nothing", where="--cap", remedy="Give a positive epsilon")
    if not study.privacy.enabled:
        raise UsageError(
            "the study has no privacy to plan", where="study:privacy.enabled", remedy="Set privacy.enabled to true"
        )
    make = partial(usual_plan, delta=delta, held=held, tables=tables)
    plan = make(study, patients)
    used = view.under(cap) if view is not None and (view.recovered or view.events() or view.open_runs) else None
    return PlanReport(
        study=study,
        plan=plan,
        cap=cap,
        epsilon_filter=_with(used, schedule(plan))
        if used
        else renyi_epsilon(schedule(plan), plan.delta, renyi_order(plan.delta, cap)),
        rounds_allowed=_rounds_allowed(plan, cap, used),
        beside=used is not None,
        alternatives=tuple(_alternatives(study, patients, make)),
    )


def schedule(plan: Plan) -> list[PrivacyEvent]:
    """The events that a site charges for a plan."""
    return [*plan.preparation, *plan.schedule()]


def _with(view: LedgerView, events: Sequence[PrivacyEvent]) -> float:
    return view.filtered([*view.outstanding(), *events])


def _rounds_allowed(plan: Plan, cap: float, view: LedgerView | None) -> int:
    """The longest prefix of the rounds that a cap has room for: as a site's first study by the exact figure."""

    def fits(events: Sequence[PrivacyEvent]) -> bool:
        asked = [*plan.preparation, *events]
        return (fixed_epsilon(asked, plan.delta) if view is None else _with(view, asked)) <= cap

    return min(longest_prefix(plan.schedule(), fits), plan.rounds)


def _alternatives(study: Study, patients: int, make: Callable[[Study, int], Plan]) -> Iterator[tuple[str, Plan]]:
    """Plans of other schedules, where the target can be reached at all."""
    for change, other in _others(study, patients):
        with suppress(UsageError):
            yield change, make(other, patients)


def _others(study: Study, patients: int) -> Iterator[tuple[str, Study]]:
    """Schedules with less noise a step, or with fewer steps to add noise in."""
    rounds, batch = study.training.rounds, study.training.batch
    if rounds > 1:
        yield "half the rounds", _changed(study, rounds=rounds // 2)
    if 2 * batch < patients:
        yield "twice the batch", _changed(study, batch=2 * batch)
    if batch < patients:
        yield "full batch", _changed(study, batch=patients)


def _changed(study: Study, **training: int) -> Study:
    return study.model_copy(update={"training": study.training.model_copy(update=training)})


def noise(plan: Plan) -> float:
    """The noise's sd in each coordinate of a step's mean gradient, sigma C / (q n_hat)."""
    return plan.noise_multiplier * plan.max_grad_norm / (plan.sample_rate * plan.n_hat)


def _figures(plan: Plan) -> dict[str, Any]:
    return {
        "sigma": plan.noise_multiplier,
        "rounds": plan.rounds,
        "steps": plan.rounds * plan.steps + plan.finetune_steps,
        "batch": plan.sample_rate * plan.n_hat,
        "sample_rate": plan.sample_rate,
        "noise": noise(plan),
        "epsilon": plan.epsilon,
    }


def plan_lines(report: PlanReport) -> list[str]:
    """The report as text of at most 80 columns."""
    plan, study = report.plan, report.study
    figures = _figures(plan)
    share = figures["epsilon"] / report.cap
    mean = noise(plan) / plan.max_grad_norm
    tuning = f", fine-tuning {plan.finetune_steps} without 1 in {VALIDATION_FOLDS} patients"
    rounds = f"{plan.rounds} rounds of {plan.steps}{tuning if plan.finetune_steps else ''}"
    return [
        f"{study.name}: {plan.n_hat} patients, target epsilon {study.privacy.epsilon:g} at delta {plan.delta:g}",
        "",
        f"  sigma          {plan.noise_multiplier:.4g}  (sd of the noise over the clipping bound)",
        f"  steps          {figures['steps']}  ({rounds})",
        f"  sampling rate  {plan.sample_rate:.4g}  ({figures['batch']:.4g} patients expected in a step)",
        f"  epsilon        {figures['epsilon']:.3g}  ({share:.1%} of a cap of {report.cap:g})",
        f"  Renyi epsilon  {budget(report.epsilon_filter)}  ({_left(report)})",
        "",
        f"Each coordinate of a step's mean gradient, whose norm is at most {plan.max_grad_norm:g},",
        f"gets noise of sd {noise(plan):.3g}: {mean:.2%} of the largest signal, in every coordinate.",
        f"A site that does not declare its number of patients spends {COUNT_SHARE:.0%} of epsilon on it.",
        *_beside(study, plan),
        "",
        f"{'':<16}{'rounds':>7}{'batch':>8}{'sigma':>9}{'steps':>7}{'noise sd':>11}{'epsilon':>9}",
        *(_row(change, _figures(other)) for change, other in [("this plan", plan), *report.alternatives]),
        *(line for warning in report.warnings() for line in ("", *textwrap.wrap(f"Warning: {warning}", 80))),
    ]


def _left(report: PlanReport) -> str:
    left = report.cap - report.epsilon_filter
    told = f"{left_figure(left)} left of the cap" if left >= 0 else "beyond the cap"
    return f"with what is spent and reserved; {told}" if report.beside else told


def _beside(study: Study, plan: Plan) -> Iterator[str]:
    """What the plan's epsilon pays for beside training."""
    for event in plan.preparation:
        yield f"Epsilon {epsilon([event], plan.delta):.2g} of it buys: {event.released}."
    if plan.table is None:
        yield f"No table of scores leaves the site: {plan.no_table}."
    else:
        yield f"Epsilon {epsilon([plan.table], plan.delta):.2g} of it buys: {plan.table.released}, as a noised table."
    if plan.looks:
        cost = epsilon(plan.looks, plan.delta)
        yield f"Epsilon {cost:.2g} of it buys: the same on the way, {len(plan.looks)} times; the run may end early."
    elif study.training.early_stop is not None:
        yield f"No look at the scores on the way, and so no early stop by this site: {plan.no_looks}."


def _row(change: str, figures: dict[str, Any]) -> str:
    return (
        f"{change:<16}{figures['rounds']:>7}{figures['batch']:>8.4g}{figures['sigma']:>9.4g}{figures['steps']:>7}"
        f"{figures['noise']:>11.3g}{figures['epsilon']:>9.3g}"
    )
