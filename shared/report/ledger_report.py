"""What a site's ledger says, for its privacy officer and an ethics board: as facts, as text, as a page."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from gapweave.shared.errors import GapweaveError, RefusedError
from gapweave.shared.privacy.ledger import LedgerView, OpenRun
from gapweave.shared.privacy.room import further_epsilon
from gapweave.shared.report.audit_result import AuditResult
from gapweave.shared.report.ledger_studies import StudyCost, finite, run_settings, study_costs

Curve = tuple[tuple[int, float], ...]
"""(number of charges, epsilon)."""
POINTS = 40
"""At most so many points of the curve: each costs an accounting of all events before it."""

UNKNOWN_PARAMETERS = 10**7
"""Trained numbers that finite precision is computed for where a ledger does not say how many there were."""


@dataclass(frozen=True, kw_only=True)
class Precision:
    """What the finite precision of Gaussian noise adds to the guarantee (shared/privacy/noise.py).

    Attributes:
        epsilon: to every epsilon of the report.
        delta: to delta.
        assumed: whether the number of trained parameters was assumed for a part, as `UNKNOWN_PARAMETERS`.
    """

    epsilon: float
    delta: float
    assumed: bool


@dataclass(frozen=True, kw_only=True)
class LedgerFacts:
    """A ledger, added up.

    Attributes:
        summary: as `LedgerView.summary` gives it.
        left: the largest epsilon of one further study that the cap has room for; None after a release without noise.
        reserved: exact epsilon of everything charged and everything reserved by runs that are not closed.
        reserved_filter: the same as the cap binds it.
        open_runs: which runs these are.
        recovered: whether entries were lost once.
        lost: epsilon that was assumed for lost entries; part of all figures of the whole ledger.
        precision: what finite precision adds.
        filter_order: Renyi order of the figure that the cap binds.
        studies: in order of their first charge.
        curve: (number of charges, cumulative exact epsilon); it ends before a release without noise.
        curve_filter: the same as the cap binds it.
        audit: result of an audit that the report was given; None for none.
        entries: number of entries.
        broken_at: sequence number at which the chain breaks.
        head: hash of the last entry.
        written: when the last entry was written; UTC, ISO 8601.
    """

    summary: dict[str, Any]
    left: float | None
    reserved: float | None
    reserved_filter: float | None
    open_runs: tuple[OpenRun, ...]
    recovered: bool
    lost: float
    precision: Precision
    filter_order: int
    studies: tuple[StudyCost, ...]
    curve: Curve
    curve_filter: Curve
    audit: AuditResult | None
    entries: int
    broken_at: int | None
    head: str
    written: str

    def to_dict(self) -> dict[str, Any]:
        """As `gapweave privacy report --json` prints it."""
        content = asdict(self)
        return {**content.pop("summary"), **content}


UNREADABLE: dict[str, Any] = {
    **dict.fromkeys(("site", "cohort", "unit", "epsilon", "epsilon_filter", "delta", "cap", "releases")),
    "intact": False,
    "entries": 0,
    "broken_at": None,
}
"""The summary of a ledger of which nothing can be read."""


def verified(view: LedgerView) -> dict[str, Any]:
    """The ledger's summary; of a changed ledger, what can still be read of it.

    Args:
        view: the ledger.

    Raises:
        RefusedError: when the ledger holds no opening entry.
    """
    extra = {"entries": len(view.entries), "broken_at": view.broken_at, "recovered": view.recovered}
    if view.intact and not view.opening:
        raise RefusedError("the ledger holds no entries", remedy="Restore it from the newest backup")
    try:
        return {**view.summary(), **extra}
    except (GapweaveError, StopIteration, KeyError, TypeError, ValueError):
        if view.intact:
            raise
    return {**UNREADABLE, **extra}


def ledger_facts(view: LedgerView, audit: AuditResult | None = None) -> LedgerFacts:
    """Add up a ledger whose chain holds.

    Args:
        view: the ledger; `LedgerView.under` where the site file has another cap by now.
        audit: of the code that trains, to be shown beside it.

    Raises:
        RefusedError: when it was changed: its figures would mean nothing.
    """
    summary = verified(view)
    if not view.intact:
        raise RefusedError(broken_text(view), remedy="Restore the newest backup; figures of this ledger mean nothing")
    return LedgerFacts(
        summary=summary,
        left=further_epsilon(view),
        reserved=finite(view.planned()),
        reserved_filter=finite(view.bound([*view.outstanding()])),
        open_runs=tuple(view.open_runs),
        recovered=view.recovered,
        lost=view.assumed,
        precision=_precision(view),
        filter_order=view.order,
        studies=study_costs(view),
        curve=_curve(view, LedgerView.spent),
        curve_filter=_curve(view, LedgerView.bound),
        audit=audit,
        entries=view.entries[-1].sequence,
        broken_at=None,
        head=view.entries[-1].hash,
        written=view.entries[-1].time,
    )


def broken_text(view: LedgerView) -> str:
    """What is wrong with a ledger whose chain does not hold."""
    return (
        f"the chain of hashes breaks at entry {view.broken_at}: "
        "this entry or the one before it was changed, removed or inserted after it was written"
    )


def _curve(view: LedgerView, figure: Callable[[LedgerView], float]) -> Curve:
    """A figure of the ledger as it stood after each of some charges."""
    charges = [entry.sequence for entry in view.entries if entry.kind == "charge"]
    numbers = sorted({round(len(charges) * at / POINTS) for at in range(1, POINTS + 1)} - {0})
    points = [(0, 0.0)]
    for number in numbers:
        value = figure(view.until(charges[number - 1]))
        if math.isinf(value):
            break
        points.append((number, value))
    return tuple(points)


def _precision(view: LedgerView) -> Precision:
    """Over all numbers that Gaussian noise was added to."""
    from gapweave.shared.privacy.precision import numerical_epsilon

    settings, numbers, assumed = run_settings(view), 0, False
    for entry in view.entries:
        if entry.kind != "charge" or entry.body["event"]["kind"] not in ("dp_sgd", "noisy_statistic"):
            continue
        setting = settings.get(entry.body["run"])
        assumed = assumed or setting is None
        numbers += entry.body["event"]["steps"] * (UNKNOWN_PARAMETERS if setting is None else setting["parameters"])
    added = numerical_epsilon(numbers, 1)
    return Precision(epsilon=added.epsilon, delta=added.delta, assumed=assumed)
