"""Reading a site's ledger: its entries, whether they are intact, and what they add up to.

A ledger is an SQLite table of entries, each with the hash of the one before. Only the site writes it
(`client/ledger.py`); anybody with the file can read and recompute it with this module.
"""

from __future__ import annotations

import hashlib
import json
import math
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from gapweave.shared.errors import GapweaveError, RefusedError, UsageError
from gapweave.shared.privacy.accountant import fixed_epsilon, renyi_epsilon, renyi_order
from gapweave.shared.privacy.events import LOOK, PrivacyEvent
from gapweave.shared.privacy.head import Head, read_anchor

LEDGER_FILE = "ledger.sqlite"
GENESIS = "0" * 64
OUTSIDE = ("IOERR", "FULL", "CANTOPEN", "READONLY", "PERM", "BUSY", "LOCKED", "PROTOCOL", "NOMEM")
"""SQLite's errors that come from the disk, or from others that use the file: they say nothing of what it holds."""
HOSPITAL = "hospital"
"""Who ended a run that got no last message."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of a ledger.

    Attributes:
        sequence: 1, 2, 3, ...
        time: UTC, ISO 8601.
        kind: open, approve, reserve, charge, released, recompute, close, value or recover.
        body: what the kind holds.
        previous: hash of the entry before.
        hash: over all of the above.
    """

    sequence: int
    time: str
    kind: str
    body: dict[str, Any]
    previous: str
    hash: str


@dataclass(frozen=True, kw_only=True)
class OpenRun:
    """A run that holds a part of a site's budget.

    Attributes:
        run: its id.
        name: of its study, as it was approved.
        since: day of its reservation.
        planned: number of releases that it reserved.
        left: how many of them it has not used.
        returns: whether these come back when the run ends.
    """

    run: str
    name: str
    since: str
    planned: int
    left: int
    returns: bool


def entry_hash(sequence: int, time: str, kind: str, body: str, previous: str) -> str:
    """SHA-256 over an entry and the hash of the one before it."""
    return hashlib.sha256("\n".join([previous, str(sequence), time, kind, body]).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class LedgerView:
    """A ledger as read.

    Attributes:
        entries: in order.
        intact: whether every hash follows from the entry and the one before.
        broken_at: sequence number expected where the chain first breaks; None while it holds.
    """

    entries: tuple[Entry, ...]
    intact: bool
    broken_at: int | None = None

    @property
    def opening(self) -> dict[str, Any]:
        """Body of the latest `open` entry: site, cohort, unit, delta, cap."""
        return next((entry.body for entry in reversed(self.entries) if entry.kind == "open"), {})

    @property
    def head(self) -> Head:
        """Where the ledger stands."""
        last = self.entries[-1].hash if self.entries else GENESIS
        return Head(site=str(self.opening.get("site", "")), length=len(self.entries), hash=last)

    def continues(self, head: Head) -> bool:
        """Whether nothing was lost since a head that somebody remembers.

        So it is when the head's entry is in the chain, or when its loss was declared by `site recover`.
        """
        if head.length <= 0:
            return True
        if head.length <= len(self.entries) and self.entries[head.length - 1].hash == head.hash:
            return True
        return any({"length": head.length, "hash": head.hash} in entry.body["lost"] for entry in self._recoveries())

    def _recoveries(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.kind == "recover"]

    @property
    def recovered(self) -> bool:
        """Whether entries were lost once, and their cost assumed."""
        return bool(self._recoveries())

    @property
    def assumed(self) -> float:
        """Epsilon of lost entries, as the site's operator declared it."""
        return math.fsum(entry.body["assume_spent"] for entry in self._recoveries())

    @property
    def delta(self) -> float:
        """Delta of the ledger, fixed when it was first opened."""
        return float(next(entry.body["delta"] for entry in self.entries if entry.kind == "open"))

    def until(self, sequence: int) -> LedgerView:
        """The ledger as it stood, but for the hospital's ends of runs: they may be for what had been seen before."""
        later = (entry for entry in self.entries[sequence:] if entry.kind == "close" and "by" in entry.body)
        return replace(self, entries=(*self.entries[:sequence], *later))

    def under(self, cap: float) -> LedgerView:
        """The ledger as it will be after the site's next message, where its site file has another cap by now."""
        if cap == self.opening["cap"]:
            return self
        last = self.entries[-1]
        body = {**self.opening, "cap": cap}
        entry = Entry(sequence=last.sequence, time=last.time, kind="open", body=body, previous="", hash=last.hash)
        return replace(self, entries=(*self.entries, entry))

    def charged(self, request: str) -> bool:
        """Whether a request was charged."""
        return any(entry.kind == "charge" and entry.body["request"] == request for entry in self.entries)

    def reservation(self, run: str) -> dict[str, Any] | None:
        """What a run has reserved."""
        found = (entry.body for entry in self.entries if entry.kind == "reserve" and entry.body["run"] == run)
        return next(found, None)

    def closed(self, run: str) -> bool:
        """Whether a run got its last message, was refused after it had reserved, or was given up by the hospital."""
        return any(entry.kind == "close" and entry.body["run"] == run for entry in self.entries)

    def given_up(self, run: str) -> bool:
        """Whether the hospital ended its part in a run: perhaps because of what it had seen."""
        return any(entry.kind == "close" and entry.body == {"run": run, "by": HOSPITAL} for entry in self.entries)

    @property
    def open_runs(self) -> list[OpenRun]:
        """Runs that hold what they have not used, in order of their reservations."""
        names = {entry.body["study"]: entry.body["name"] for entry in self.entries if entry.kind == "approve"}
        return [
            OpenRun(
                run=entry.body["run"],
                name=names.get(entry.body["study"], ""),
                since=entry.time[:10],
                planned=len(entry.body["events"]),
                left=left,
                returns=not self._stays(entry),
            )
            for entry in self._reservations()
            if not self.closed(entry.body["run"]) and (left := len(self._left(entry)))
        ]

    def _reservations(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.kind == "reserve"]

    def events(self, run: str | None = None) -> list[PrivacyEvent]:
        """Charged events, of one run or of all."""
        return [
            PrivacyEvent.from_dict(entry.body["event"])
            for entry in self.entries
            if entry.kind == "charge" and run in (None, entry.body["run"])
        ]

    def outstanding(self, run: str | None = None) -> Iterator[PrivacyEvent]:
        """Events that runs have reserved and not charged; of all runs but `run`.

        A closed run gives its rest back, unless it was granted for a schedule that is fixed in advance: stopping
        early because of what was seen is not in that schedule. Nothing was seen where nothing was charged.
        """
        for entry in self._reservations():
            if entry.body["run"] != run and self._is_outstanding(entry):
                yield from self._left(entry)

    def _is_outstanding(self, reservation: Entry) -> bool:
        return self._stays(reservation) or not self.closed(reservation.body["run"])

    def _stays(self, reservation: Entry) -> bool:
        """Whether what is left of a reservation never comes back."""
        return reservation.body["figure"] == "fixed" and self._began(reservation)

    def _began(self, reservation: Entry) -> bool:
        return len(self._left(reservation)) < len(reservation.body["events"])

    def _left(self, reservation: Entry) -> list[PrivacyEvent]:
        """What a run reserved and did not charge."""
        charged = {event.released for event in self.events(reservation.body["run"])}
        planned = map(PrivacyEvent.from_dict, reservation.body["events"])
        return [event for event in planned if event.released not in charged]

    def _may_have_stopped(self, reservation: Entry) -> bool:
        """Whether what a run has not charged may depend on a score, or on what the hospital saw when it gave it up.

        Every score is of a model that this site's updates are in: others' count where this site gave none.
        """
        run = reservation.body["run"]
        return reservation.body.get("may_stop", False) or self._looked(run) or self.given_up(run)

    def _looked(self, run: str) -> bool:
        """What says that a run may stop where its reservation, an older one, does not."""
        return any(charged.released.startswith(LOOK) for charged in self.events(run))

    def spent(self) -> float:
        """Epsilon of everything charged, exact for schedules fixed in advance but for noised counts.

        Infinite after an un-noised release. A run that may have ended early because of what was seen is part of its
        whole schedule: that is what it costs, or what the filter says of the part, if that is less.
        """
        stopped = filter(self._may_have_stopped, self._reservations())
        skipped = [event for entry in stopped for event in self._left(entry)]
        exact = self._exact(skipped)
        return min(exact, self.filtered()) if skipped else exact

    def planned(self) -> float:
        """The same once open runs have used all that they reserved."""
        counted = [
            entry for entry in self._reservations() if self._may_have_stopped(entry) or self._is_outstanding(entry)
        ]
        exact = self._exact([event for entry in counted for event in self._left(entry)])
        return min(exact, self.filtered([*self.outstanding()]))

    def _exact(self, more: Sequence[PrivacyEvent]) -> float:
        return self.assumed + fixed_epsilon([*self.events(), *more], self._share())

    def _share(self) -> float:
        """Delta for what the entries show: lost entries have had a part of the ledger's (basic composition)."""
        return self.delta / (1 + len(self._recoveries()))

    def filtered(self, more: Sequence[PrivacyEvent] = ()) -> float:
        """Epsilon of everything charged, and of `more`, by the Renyi filter: valid whoever chose what and when.

        Its order is fixed by the ledger's delta and the cap that held before it saw any result (Feldman and Zrnic
        2021, arXiv 2008.11193).
        """
        return self.assumed + renyi_epsilon([*self.events(), *more], self._share(), self.order)

    @property
    def order(self) -> int:
        """Renyi order of the filter, by the cap that held when the first result left; lost entries may be one."""
        kinds = [entry.kind for entry in self.entries]
        seen = min((kinds.index(kind) for kind in ("charge", "recover") if kind in kinds), default=len(kinds))
        caps = [entry.body["cap"] for entry in self.entries[:seen] if entry.kind == "open"]
        return renyi_order(self.delta, caps[-1])

    def alone(self, study: str) -> bool:
        """Whether the ledger has seen no other study: its schedule is then fixed in advance, but for n_hat."""
        charged = (entry.body for entry in self.entries if entry.kind == "charge")
        return not self.recovered and all(body["study"] == study for body in [*charged, *self.binding])

    @property
    def binding(self) -> list[dict[str, Any]]:
        """Reservations but for those of runs that ended before anything was charged: nothing was seen of them."""
        return [
            entry.body for entry in self._reservations() if self._began(entry) or not self.closed(entry.body["run"])
        ]

    @property
    def granted(self) -> bool:
        """Whether the exact figure keeps the cap: granted to the first study, and no other came since."""
        reserved = self.binding
        return len(reserved) == 1 and reserved[0]["figure"] == "fixed" and self.alone(reserved[0]["study"])

    def bound(self, more: Sequence[PrivacyEvent] = ()) -> float:
        """The figure that the cap binds (docs/decisions/0005), of everything charged and of `more` that is reserved."""
        if self.granted:
            # The whole schedule, also where it was not used: to stop early because of a result is not in it.
            schedule = [*self.events(), *self.outstanding()]
            return min(self.filtered(more), fixed_epsilon(schedule, self.delta))
        return self.filtered(more)

    def summary(self) -> dict[str, Any]:
        """What `gapweave privacy verify --json` prints."""
        opening, spent, bound = self.opening, self.spent(), self.bound()
        return {
            "site": opening.get("site"),
            "cohort": opening.get("cohort"),
            "unit": opening.get("unit"),
            "epsilon": spent if math.isfinite(spent) else None,
            "epsilon_filter": bound if math.isfinite(bound) else None,
            "delta": self.delta,
            "cap": opening.get("cap"),
            "releases": folded(self.events()),
            "intact": self.standing(),
            "figure": "fixed" if self.granted else "renyi",
        }

    def standing(self) -> bool | Literal["unanchored"]:
        """True when an anchor vouches for the ledger, False when chain or anchor deny it.

        Without an anchor, a restored old copy cannot be told from the real ledger.
        """
        if not self.intact:
            return False
        place = self.opening.get("anchor")
        anchor = read_anchor(Path(place)) if place else None
        if anchor is None:
            # Gone, where its folder is on this machine; elsewhere the ledger is a copy that somebody looks at.
            return False if place and Path(place).parent.is_dir() else "unanchored"
        return self.continues(anchor)


def folded(events: list[PrivacyEvent]) -> list[dict[str, Any]]:
    """Equal mechanisms counted together: what a report lists and anyone can recompute from."""
    counts = Counter((event.kind, event.noise_multiplier, event.sample_rate, event.max_grad_norm) for event in events)
    steps = Counter[tuple[str, float, float, float]]()
    for event in events:
        steps[(event.kind, event.noise_multiplier, event.sample_rate, event.max_grad_norm)] += event.steps
    return [
        {
            "kind": kind,
            "noise_multiplier": noise,
            "sample_rate": rate,
            "max_grad_norm": bound,
            "releases": count,
            "steps": steps[(kind, noise, rate, bound)],
        }
        for (kind, noise, rate, bound), count in counts.items()
    ]


def read_ledger(path: Path) -> LedgerView:
    """Read and check a ledger.

    Args:
        path: a site's state folder, or the ledger file in it.

    Raises:
        UsageError: when there is no ledger.
        RefusedError: when the file is no ledger that can be read.
        GapweaveError: when it cannot be read now, whatever it holds.
    """
    file = path / LEDGER_FILE if path.is_dir() else path
    if not file.exists():
        remedy = "Give a site's state folder; its ledger begins with the site's first run"
        raise UsageError("there is no ledger", where=str(path), remedy=remedy)
    try:
        with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as connection:
            return view(connection)
    except sqlite3.DatabaseError as error:
        if from_outside(error):
            raise GapweaveError(
                f"the ledger cannot be read now ({error})",
                where=str(file),
                remedy="Try again; look at the disk, at permissions, and at what else has the file open",
            ) from None
        raise RefusedError(
            "the ledger cannot be read", where=str(file), remedy="Restore it from the newest backup"
        ) from None


def from_outside(error: sqlite3.DatabaseError) -> bool:
    """Whether an error tells of the disk or of other processes, and nothing of the ledger."""
    return getattr(error, "sqlite_errorname", "").removeprefix("SQLITE_").startswith(OUTSIDE)


COLUMNS = "sequence, time, kind, body, previous, hash"


def view(connection: sqlite3.Connection, checked: LedgerView | None = None) -> LedgerView:
    """All entries, with their chain checked.

    Args:
        connection: to the ledger.
        checked: what the caller has checked before; of that only the last entry is looked at again. None checks all.
    """
    previous, broken = GENESIS, None
    entries = [] if checked is None else list(checked.entries)
    if entries:
        last = entries[-1]
        stored_hash = connection.execute("SELECT hash FROM entries WHERE sequence = ?", (last.sequence,)).fetchone()
        if stored_hash != (last.hash,):
            return view(connection)
        previous = last.hash
    begin = len(entries)
    rows = connection.execute(f"SELECT {COLUMNS} FROM entries WHERE sequence > ? ORDER BY sequence", (begin,))
    for expected, (sequence, time, kind, body, before, stored) in enumerate(rows, start=begin + 1):
        right = entry_hash(sequence, time, kind, body, before)
        if broken is None and not (sequence == expected and before == previous and stored == right):
            broken = expected
        previous = stored
        content = _body(body)
        entries.append(Entry(sequence=sequence, time=time, kind=kind, body=content, previous=before, hash=stored))
    return LedgerView(entries=tuple(entries), intact=broken is None, broken_at=broken)


def _body(text: str) -> dict[str, Any]:
    """What an entry holds; empty where a change left no JSON, which the hashes tell."""
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
