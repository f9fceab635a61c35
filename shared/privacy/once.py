"""Releases that a site makes once a study or once a run, beside its updates: what each is, and what it costs.

| release           | kind            | one patient changes                                 | share of epsilon   |
|-------------------|-----------------|-----------------------------------------------------|--------------------|
| class balance     | count_table     | one cell by 1 in each of `steps` tables             | `BALANCE_SHARE`    |
| means and spreads | noisy_statistic | the vector by at most sqrt(9/4 columns), in L2      | `STATISTICS_SHARE` |
| table of scores   | count_table     | one cell by 1 in each of `steps` tables             | evaluation.epsilon |
| looks on the way  | count_table     | the same, after each of some rounds                 | early_stop.epsilon |

All of them are in the plan: with the updates they cost the study's epsilon.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from typing import Final

from gapweave.shared.config.study import Study
from gapweave.shared.features.numeric import numeric_columns
from gapweave.shared.privacy.accountant import epsilon
from gapweave.shared.privacy.events import LOOK, SCORES, PrivacyEvent

BALANCE_SHARE = 0.05
"""Share of the target epsilon that counting the training labels costs."""
STATISTICS_SHARE = 0.1
"""Share of the target epsilon that means and spreads of all columns cost together."""
TABLE_SHARE = 0.25
"""Largest share of the target epsilon that the table of scores may cost, and that all looks on the way may."""
ENOUGH = 1000.0
"""Epsilon times test patients below which a table of scores says too little to be worth its cost."""

WEIGHT_SLACK = 1e-6
"""Share by which the float32 weights of one patient's records may exceed 1."""

TOO_FEW: Final = "too few patients for this privacy level"
NOT_ASKED: Final = "the study asks for no table of scores"
NO_LOOK: Final = "the study asks for no scores after this round"
NOT_ALLOWED: Final = "the site releases no counts"
NO_NOISE: Final = "the study adds no noise: scores stay at the sites"
"""Why a site gives no table."""


def problems(study: Study) -> int:
    """Number of two-class problems: one for binary, else one a class or label, each against the rest."""
    return study.task.outputs


def preparation_events(study: Study, held: Collection[str], delta: float) -> tuple[PrivacyEvent, ...]:
    """What a site releases before it trains, beside its number of patients.

    Args:
        study: says which.
        held: modalities of the site.
        delta: at which shares of epsilon hold.
    """
    events = []
    if study.preparation.class_balance == "noisy":
        events.append(balance_event(study))
    if study.preparation.standardisation == "noisy" and numeric_columns(study, held):
        events.append(statistics_event(study, held, delta))
    return tuple(events)


def balance_event(study: Study) -> PrivacyEvent:
    """Counts of the training labels: one table, or for multilabel one a label."""
    tables = problems(study) if study.task.kind == "multilabel" else 1
    return _counts(study, "class balance of the training patients", tables, BALANCE_SHARE * study.privacy.epsilon)


def statistics_event(study: Study, held: Collection[str], delta: float) -> PrivacyEvent:
    """Mean and spread of every numeric column, and how many patients they come from, in one noised vector."""
    released = "means and spreads of the columns"
    sensitivity = statistics_sensitivity(len(numeric_columns(study, held)))
    if not study.privacy.enabled:
        return PrivacyEvent(kind="unnoised", released=released, noise_multiplier=0.0, max_grad_norm=sensitivity)
    sigma = _gaussian_multiplier(STATISTICS_SHARE * study.privacy.epsilon, delta)
    return PrivacyEvent(kind="noisy_statistic", released=released, noise_multiplier=sigma, max_grad_norm=sensitivity)


def statistics_sensitivity(columns: int) -> float:
    """L2 sensitivity of (count, sum u, sum (u^2 - count/2)) over all columns, |u| <= 1.

    A patient adds (1, m, v - 1/2) to a column with m^2 <= v <= 1, or less: at most 1 + 1 + 1/4 squared. Weights in
    float32 may sum to a little more than 1.
    """
    return float((2.25 * columns) ** 0.5) * (1 + WEIGHT_SLACK)


def table_event(study: Study, n_hat: int) -> PrivacyEvent | str:
    """The table of scores of a run's model, or why there is none.

    Args:
        study: gives the cost and the share of patients held out.
        n_hat: public number of training patients, from which the number held out is estimated.
    """
    if study.evaluation.epsilon is None:
        return NOT_ASKED
    if not study.privacy.enabled:
        return NO_NOISE
    cost = table_cost(study)
    if cost * held_out(study, n_hat) < ENOUGH:
        return TOO_FEW
    return _counts(study, SCORES, problems(study), cost)


def look_events(study: Study, n_hat: int) -> tuple[PrivacyEvent, ...] | str:
    """The tables of scores after some rounds, in their order, or why there are none; arguments as `table_event`."""
    rounds = study.training.looks
    if not rounds:
        return NO_LOOK
    if not study.privacy.enabled:
        return NO_NOISE
    if look_cost(study) * held_out(study, n_hat) < ENOUGH:
        return TOO_FEW
    return tuple(_counts(study, f"{LOOK} {number}", problems(study), look_cost(study)) for number in rounds)


def look_cost(study: Study) -> float:
    """Epsilon of all tables of one look at one site."""
    asked = study.training.early_stop
    return 0.0 if asked is None else min(asked.epsilon, TABLE_SHARE * study.privacy.epsilon) / len(study.training.looks)


def look_scale(study: Study) -> float:
    """Scale of the noise in each cell of a table of a look."""
    return problems(study) / look_cost(study)


def table_cost(study: Study) -> float:
    """Epsilon of all tables of scores of one run at one site; 0 where the study asks for none."""
    return min(study.evaluation.epsilon or 0.0, TABLE_SHARE * study.privacy.epsilon)


def table_scale(study: Study) -> float:
    """Scale of the noise in each cell of a table that the study asks for."""
    return problems(study) / table_cost(study)


def held_out(study: Study, n_hat: int) -> float:
    """Public estimate of the number of test patients."""
    split = study.evaluation
    share = split.test_fraction if split.folds is None else 1 / split.folds
    return n_hat * share / (1 - share)


def _counts(study: Study, released: str, tables: int, cost: float) -> PrivacyEvent:
    if not study.privacy.enabled:
        return PrivacyEvent(kind="unnoised", released=released, noise_multiplier=0.0, steps=tables)
    return PrivacyEvent(kind="count_table", released=released, noise_multiplier=tables / cost, steps=tables)


@lru_cache(maxsize=64)
def _gaussian_multiplier(target: float, delta: float) -> float:
    """The smallest noise multiplier, to a thousandth and rounded up, at which one Gaussian release costs the target."""
    from scipy.optimize import brentq

    def excess(sigma: float) -> float:
        event = PrivacyEvent(kind="noisy_statistic", released="", noise_multiplier=sigma)
        return epsilon([event], delta) - target

    high = 2.0
    while excess(high) > 0:
        high *= 2
    low = high / 2
    while excess(low) <= 0:
        low /= 2
    return float(brentq(excess, low, high, rtol=1e-3)) * 1.002
