"""What each study released from a site, what it cost, and what it left at home."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gapweave.shared.privacy.events import LOOK, SCORES, PrivacyEvent
from gapweave.shared.privacy.ledger import Entry, LedgerView, folded

NUMBER_BYTES = 8
"""Bytes of one number of a count or a table."""
PARAMETER_BYTES = 4
"""Bytes of one number of an update."""

UPDATE, COUNT = "update of round", "number of training patients"
LEAVES = (UPDATE, COUNT, SCORES, LOOK)
"""What is sent; other charged values are used at the site, and show in what is sent only."""
WORDS = {
    COUNT: "number of training patients, noised",
    UPDATE: "updates of shared model parameters",
    SCORES: "tables of scores of the test patients, noised",
    LOOK: "tables of scores of the test patients on the way, noised",
    "class balance of the training patients": "class balance of the training patients, noised; used at the site",
    "means and spreads of the columns": "means and spreads of the columns, noised; used at the site",
    "fine-tuning": "fine-tuning; charged, but its result stays at the site",
}
"""What an event's text, without its number, is called in a report."""


@dataclass(frozen=True, kw_only=True)
class Release:
    """Equal events of one study.

    Attributes:
        what: in words.
        kind: of the events, as the accountant knows it.
        noised: whether noise was added.
        times: number of events.
        steps: noised steps in all of them.
        noise_multiplier: sigma.
        sample_rate: q.
        max_grad_norm: clipping bound.
        n_hat: public number of training patients, None where none was used.
        sent: how many of them left the site; at most `times`.
        bytes: of the numbers that left; None where an older version kept no record of it.
    """

    what: str
    kind: str
    noised: bool
    times: int
    steps: int
    noise_multiplier: float
    sample_rate: float
    max_grad_norm: float
    n_hat: int | None
    sent: int
    bytes: int | None


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a study's runs had in common, or all of it where they differ.

    Attributes:
        modalities: that the site held.
        shared: parameter groups that left.
        kept: parameter groups that were trained and stayed.
        versions: of Gapweave.
        policies: hashes of what the hospital allowed.
    """

    modalities: tuple[str, ...]
    shared: tuple[str, ...]
    kept: tuple[str, ...]
    versions: tuple[str, ...]
    policies: tuple[str, ...]


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
        planned: of this study alone, once its open runs have used what they reserved.
        cumulative: exact epsilon of the ledger after the study's last charge.
        cumulative_filter: what the cap bound then.
        setting: None where an older version kept no record of it.
        releases: what left, or was charged.
    """

    name: str
    study: str
    runs: int
    first: str
    last: str
    epsilon: float | None
    planned: float | None
    cumulative: float | None
    cumulative_filter: float | None
    setting: Setting | None
    releases: tuple[Release, ...]


def finite(value: float) -> float | None:
    """None for infinity, which JSON does not know."""
    return value if math.isfinite(value) else None


def study_costs(view: LedgerView) -> tuple[StudyCost, ...]:
    """Every study of a ledger, in order of its first charge."""
    studies = dict.fromkeys(entry.body["study"] for entry in view.entries if entry.kind == "charge")
    return tuple(_study(view, study) for study in studies)


def run_settings(view: LedgerView) -> dict[str, dict[str, Any]]:
    """What the ledger says of each run beside its events (`client/setting.py`), by the run's id."""
    return {
        entry.body["run"]: entry.body["setting"]
        for entry in view.entries
        if entry.kind == "reserve" and "setting" in entry.body
    }


def _study(view: LedgerView, study: str) -> StudyCost:
    alone = replace(view, entries=tuple(entry for entry in view.entries if _concerns(entry, study)))
    charges = [entry for entry in alone.entries if entry.kind == "charge"]
    names = [entry.body["name"] for entry in alone.entries if entry.kind == "approve"]
    until = view.until(charges[-1].sequence)
    return StudyCost(
        name=names[-1] if names else "",
        study=study,
        runs=len({entry.body["run"] for entry in charges}),
        first=charges[0].time[:10],
        last=charges[-1].time[:10],
        epsilon=finite(alone.spent()),
        planned=finite(alone.planned()),
        cumulative=finite(until.spent()),
        cumulative_filter=finite(until.bound()),
        setting=_setting(list(run_settings(alone).values())),
        releases=_releases(view, charges),
    )


def _concerns(entry: Entry, study: str) -> bool:
    return entry.kind in ("open", "close") or entry.body.get("study") == study


def _setting(settings: Sequence[dict[str, Any]]) -> Setting | None:
    def every(key: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for setting in settings for name in setting[key]))

    if not settings:
        return None
    return Setting(
        modalities=every("modalities"),
        shared=every("shared"),
        kept=every("kept"),
        versions=tuple(dict.fromkeys(setting["gapweave_version"] for setting in settings)),
        policies=tuple(dict.fromkeys(setting["policy"] for setting in settings)),
    )


def _releases(view: LedgerView, charges: Iterable[Entry]) -> tuple[Release, ...]:
    """Charges of equal events of equal meaning counted together."""
    alike: dict[tuple[Any, ...], list[Entry]] = {}
    for entry in charges:
        event = PrivacyEvent.from_dict(entry.body["event"])
        mechanism = (event.kind, event.noise_multiplier, event.sample_rate, event.max_grad_norm, event.n_hat)
        alike.setdefault((_subject(entry), *mechanism), []).append(entry)
    answers = _Answers(view)
    return tuple(_release(answers, members) for members in alike.values())


def _subject(charge: Entry) -> str:
    """What an event released, without its number."""
    return re.sub(r"\s*\d+$", "", charge.body["event"]["released"])


def _release(answers: _Answers, members: Sequence[Entry]) -> Release:
    events = [PrivacyEvent.from_dict(entry.body["event"]) for entry in members]
    line, subject = folded(events)[0], _subject(members[0])
    sizes = [answers.size(entry) for entry in members if answers.sent(entry)]
    known = [size for size in sizes if size is not None]
    return Release(
        what=WORDS.get(subject, subject),
        kind=line["kind"],
        noised=line["kind"] != "unnoised",
        times=line["releases"],
        n_hat=events[0].n_hat,
        sent=len(sizes),
        bytes=sum(known) if len(known) == len(sizes) else None,
        **{key: line[key] for key in ("steps", "noise_multiplier", "sample_rate", "max_grad_norm")},
    )


class _Answers:
    """What a ledger tells of the answers to charged requests."""

    def __init__(self, view: LedgerView) -> None:
        self._marked = {entry.body["request"] for entry in view.entries if entry.kind == "released"}
        values = (entry.body for entry in view.entries if entry.kind == "value")
        self._numbers = {body["request"]: len(body["value"]) for body in values}
        self._settings = run_settings(view)

    def sent(self, charge: Entry) -> bool:
        """Whether it left; a number of patients goes with the site's plan, which nothing marks."""
        subject = _subject(charge)
        return subject in LEAVES and (subject == COUNT or charge.body["request"] in self._marked)

    def size(self, charge: Entry) -> int | None:
        """Bytes of its noised numbers; None where an older version kept no record."""
        if _subject(charge) == COUNT:
            return NUMBER_BYTES
        if _subject(charge) != UPDATE:
            return NUMBER_BYTES * self._numbers.get(charge.body["request"], 0)
        setting = self._settings.get(charge.body["run"])
        return None if setting is None else PARAMETER_BYTES * int(setting["parameters_shared"])
