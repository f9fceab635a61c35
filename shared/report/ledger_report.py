"""What a site's ledger says, for its privacy officer and an ethics board: as facts, as text, as a page."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gapweave.shared.errors import GapweaveError, RefusedError
from gapweave.shared.privacy.accountant import epsilon
from gapweave.shared.privacy.events import PrivacyEvent
from gapweave.shared.privacy.ledger import LedgerView, folded

POINTS = 40
"""At most so many points of the curve: each costs an accounting of all events before it."""

WORDS = {
    "number of training patients": "number of training patients, noised",
    "update of round": "updates of shared model parameters",
    "fine-tuning": "fine-tuning; charged, but its result stays at the site",
}
"""What an event's text, without its number, is called in a report."""


@dataclass(frozen=True, kw_only=True)
class Release:
    """Equal events of one study.

    Attributes:
        what: in words.
        noised: whether noise was added.
        times: number of events.
        steps: noised steps in all of them.
        noise_multiplier: sigma.
        sample_rate: q.
        max_grad_norm: clipping bound.
        n_hat: public number of training patients, None where none was used.
    """

    what: str
    noised: bool
    times: int
    steps: int
    noise_multiplier: float
    sample_rate: float
    max_grad_norm: float
    n_hat: int | None


@dataclass(frozen=True, kw_only=True)
class StudyCost:
    """One study's part of a ledger.

    Attributes:
        name: as it was approved; empty if it never was.
        study: its hash.
        runs: number of runs.
        first: day of the first charge.
        last: day of the last charge.
        epsilon: of this study alone; None after a release without noise.
        releases: what left, or was charged.
    """

    name: str
    study: str
    runs: int
    first: str
    last: str
    epsilon: float | None
    releases: tuple[Release, ...]


@dataclass(frozen=True, kw_only=True)
class LedgerFacts:
    """A ledger, added up.

    Attributes:
        summary: as `LedgerView.summary` gives it.
        left: of the cap; None after a release without noise.
        reserved: epsilon of everything charged and everything reserved by runs that are not closed.
        studies: in order of their first charge.
        curve: (number of charges, cumulative epsilon); it ends before a release without noise.
        entries: number of entries.
        broken_at: sequence number at which the chain breaks.
        head: hash of the last entry.
    """

    summary: dict[str, Any]
    left: float | None
    reserved: float | None
    studies: tuple[StudyCost, ...]
    curve: tuple[tuple[int, float], ...]
    entries: int
    broken_at: int | None
    head: str

    def to_dict(self) -> dict[str, Any]:
        """As `gapweave privacy report --json` prints it."""
        content = asdict(self)
        return {**content.pop("summary"), **content}


def verified(view: LedgerView) -> dict[str, Any]:
    """The ledger's summary; of a changed ledger, what can still be read of it.

    Args:
        view: the ledger.

    Raises:
        RefusedError: when the ledger holds no opening entry.
    """
    extra = {"entries": len(view.entries), "broken_at": view.broken_at}
    if view.intact and not view.opening:
        raise RefusedError("the ledger holds no entries", remedy="Restore it from the newest backup")
    try:
        return {**view.summary(), **extra}
    except (GapweaveError, StopIteration, KeyError, TypeError, ValueError):
        if view.intact:
            raise
    keys = ("site", "cohort", "unit", "epsilon", "delta", "cap", "releases")
    return {**dict.fromkeys(keys), "intact": False, **extra}


def ledger_facts(view: LedgerView) -> LedgerFacts:
    """Add up a ledger whose chain holds.

    Raises:
        RefusedError: when it was changed: its figures would mean nothing.
    """
    summary = verified(view)
    if not view.intact:
        raise RefusedError(broken_text(view), remedy="Restore the newest backup; figures of this ledger mean nothing")
    charges = [entry for entry in view.entries if entry.kind == "charge"]
    studies = dict.fromkeys(entry.body["study"] for entry in charges)
    spent = summary["epsilon"]
    return LedgerFacts(
        summary=summary,
        left=None if spent is None else max(0.0, summary["cap"] - spent),
        reserved=_finite(epsilon([*view.events(), *view.outstanding()], view.delta)),
        studies=tuple(_study(view, study) for study in studies),
        curve=_curve(view.events(), view.delta),
        entries=len(view.entries),
        broken_at=None,
        head=view.entries[-1].hash,
    )


def broken_text(view: LedgerView) -> str:
    """What is wrong with a ledger whose chain does not hold."""
    return (
        f"the chain of hashes breaks at entry {view.broken_at}: "
        "this entry or the one before it was changed, removed or inserted after it was written"
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _study(view: LedgerView, study: str) -> StudyCost:
    charges = [entry for entry in view.entries if entry.kind == "charge" and entry.body["study"] == study]
    names = [entry.body["name"] for entry in view.entries if entry.kind == "approve" and entry.body["study"] == study]
    events = [PrivacyEvent.from_dict(entry.body["event"]) for entry in charges]
    return StudyCost(
        name=names[-1] if names else "",
        study=study,
        runs=len({entry.body["run"] for entry in charges}),
        first=charges[0].time[:10],
        last=charges[-1].time[:10],
        epsilon=_finite(epsilon(events, view.delta)),
        releases=_releases(events),
    )


def _releases(events: Sequence[PrivacyEvent]) -> tuple[Release, ...]:
    """Equal events of equal meaning counted together."""
    kinds: dict[tuple[str, int | None], list[PrivacyEvent]] = {}
    for event in events:
        kinds.setdefault((re.sub(r"\s*\d+$", "", event.released), event.n_hat), []).append(event)
    return tuple(
        Release(
            what=WORDS.get(what, what),
            noised=line["kind"] != "unnoised",
            times=line["releases"],
            n_hat=n_hat,
            **{key: line[key] for key in ("steps", "noise_multiplier", "sample_rate", "max_grad_norm")},
        )
        for (what, n_hat), members in kinds.items()
        for line in folded(members)
    )


def _curve(events: Sequence[PrivacyEvent], delta: float) -> tuple[tuple[int, float], ...]:
    count = len(events)
    numbers = sorted({round(count * at / POINTS) for at in range(1, POINTS + 1)} - {0})
    points = [(0, 0.0)]
    for number in numbers:
        value = epsilon(events[:number], delta)
        if math.isinf(value):
            break
        points.append((number, value))
    return tuple(points)
