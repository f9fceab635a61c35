"""The only writer of a site's ledger.

Guarantee: an event is durable before any work on data that it covers; a crash, a restart, a repeated request or
a second study can over-state what was spent, never under-state it. The site's cap is checked before.

A study's whole schedule, or its longest prefix that the cap allows, is reserved before its first round; inside
the reservation the accountant is exact (docs/decisions/0005). One process at a time holds the ledger.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gapweave.shared.config.site import Site
from gapweave.shared.errors import BudgetExhausted, RefusedError
from gapweave.shared.files import private_folder
from gapweave.shared.privacy.accountant import epsilon
from gapweave.shared.privacy.events import PrivacyEvent
from gapweave.shared.privacy.ledger import GENESIS, LEDGER_FILE, Entry, LedgerView, entry_hash, view

SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (
    sequence INTEGER PRIMARY KEY, time TEXT NOT NULL, kind TEXT NOT NULL, body TEXT NOT NULL,
    previous TEXT NOT NULL, hash TEXT NOT NULL UNIQUE
);
CREATE TRIGGER IF NOT EXISTS entries_stay BEFORE UPDATE ON entries
    BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER IF NOT EXISTS entries_remain BEFORE DELETE ON entries
    BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
"""


class Ledger:
    """One site's ledger, held exclusively while open; use it as a context manager.

    Args:
        state: the site's state folder.
        site: its name, cohort and policy are recorded when they are new.

    Raises:
        RefusedError: when the chain of hashes does not hold.
    """

    def __init__(self, state: Path, site: Site) -> None:
        private_folder(state)
        self._where = str(state / LEDGER_FILE)
        self._lock = os.open(state / "ledger.lock", os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        os.close(os.open(state / LEDGER_FILE, os.O_RDWR | os.O_CREAT, 0o600))
        self._connection = sqlite3.connect(state / LEDGER_FILE, isolation_level=None)
        try:
            self._open(site)
        except sqlite3.DatabaseError:
            self.close()
            raise RefusedError(
                "the ledger cannot be read", where=self._where, remedy="Restore it from the newest backup"
            ) from None
        except BaseException:
            self.close()
            raise

    def _open(self, site: Site) -> None:
        self._connection.execute("PRAGMA journal_mode=WAL")
        self._connection.execute("PRAGMA synchronous=FULL")
        self._connection.executescript(SCHEMA)
        self.view: LedgerView = view(self._connection)
        if not self.view.intact:
            raise RefusedError(
                "the ledger was changed: its hashes do not follow from its entries",
                where=self._where,
                remedy="Restore the newest backup; nothing is released until then",
            )
        if self.view.entries and self.view.opening["site"] != site.name:
            raise RefusedError(
                f"this ledger belongs to site {self.view.opening['site']!r}, not {site.name!r}",
                where=self._where,
                remedy="Give each site its own state folder",
            )
        delta = self.view.delta if self.view.entries else min(site.policy.delta, 0.1 / site.patients.upper)
        opening = {
            "site": site.name,
            "cohort": site.cohort,
            "unit": "patient",
            "delta": delta,
            "cap": site.policy.epsilon,
        }
        if self.view.opening != opening:
            self._append("open", opening)

    def close(self) -> None:
        """Let another process have the ledger."""
        self._connection.close()
        os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, kind: str, body: dict[str, Any]) -> None:
        """Write one entry durably (synchronous=FULL syncs on commit)."""
        entries = self.view.entries
        sequence = len(entries) + 1
        previous = entries[-1].hash if entries else GENESIS
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        text = json.dumps(body, sort_keys=True)
        digest = entry_hash(sequence, time, kind, text, previous)
        self._connection.execute(
            "INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?)", (sequence, time, kind, text, previous, digest)
        )
        entry = Entry(sequence=sequence, time=time, kind=kind, body=json.loads(text), previous=previous, hash=digest)
        self.view = LedgerView(entries=(*entries, entry), intact=True)

    def _has(self, kind: str, **match: str) -> bool:
        return any(
            entry.kind == kind and all(entry.body.get(key) == value for key, value in match.items())
            for entry in self.view.entries
        )

    def approve(self, study: str, name: str, by: str) -> None:
        """Record that a study was approved, once."""
        if not self._has("approve", study=study):
            self._append("approve", {"study": study, "name": name, "by": by})

    def allows(self, events: Sequence[PrivacyEvent], run: str | None = None) -> bool:
        """Whether the cap leaves room for further events, beside what is spent and reserved by other runs."""
        if all(event.kind == "unnoised" for event in events):
            return True
        return self._with(events, run) <= float(self.view.opening["cap"])

    def _with(self, events: Sequence[PrivacyEvent], run: str | None = None) -> float:
        """Epsilon of what is spent, reserved by other runs, and asked."""
        return epsilon([*self.view.events(), *self.view.outstanding(run), *events], self.view.delta)

    def reserve(self, run: str, study: str, events: Sequence[PrivacyEvent]) -> int:
        """Set aside the longest prefix of a run's events that the cap allows.

        Repeating it for the same run changes nothing.

        Returns:
            Number of events reserved.

        Raises:
            BudgetExhausted: when not even the first fits.
        """
        for entry in self.view.entries:
            if entry.kind == "reserve" and entry.body["run"] == run:
                return len(entry.body["events"])
        low, high, middle = 0, len(events), len(events)
        while low < high:
            low, high = (middle, high) if self.allows(events[:middle], run) else (low, middle - 1)
            middle = (low + high + 1) // 2
        if low == 0:
            spent, asked, cap = self.view.spent(), self._with(events, run), self.view.opening["cap"]
            raise BudgetExhausted(
                f"not one round fits: epsilon {spent:.2f} is spent, {asked:.2f} would be after the study, "
                f"the cap is {cap:g}",
                where=self._where,
                remedy="Lower the study's epsilon or its rounds, or raise policy.epsilon",
            )
        planned = [event.to_dict() for event in events[:low]]
        self._append("reserve", {"run": run, "study": study, "events": planned})
        return low

    def charge(self, run: str, study: str, request: str, event: PrivacyEvent, value: int | None = None) -> None:
        """Write an event before the work that it covers.

        A request that was charged but never answered (a crash in between) may be recomputed once under the
        same event; every further time it is charged again.

        Args:
            run: our own id of the run.
            study: hash of the study.
            request: hash of the whole request.
            event: what will be released.
            value: the released number itself, for a noisy count.

        Raises:
            BudgetExhausted: when the event is outside the run's reservation and beyond the cap.
        """
        again = self._has("charge", request=request)
        if again and not self._has("recompute", request=request):
            self._append("recompute", {"request": request})
            return
        if not (self.allows([event]) if again else self._covered(run, event)):
            raise BudgetExhausted(
                "the site's cap leaves no room for this release",
                where=self._where,
                remedy="`gapweave privacy report` shows what was spent",
            )
        body = {"run": run, "study": study, "request": request, "event": event.to_dict()}
        self._append("charge", body if value is None else {**body, "value": value})

    def _covered(self, run: str, event: PrivacyEvent) -> bool:
        """Whether the run's reservation pays for an event, or the cap has room for it."""
        if not self._reserved(run, event):
            return self.allows([event])
        return not self._cap_lowered(run) or self.allows([event], run)

    def _cap_lowered(self, run: str) -> bool:
        """Whether the hospital lowered its cap after the run's reservation."""
        cap = before = self.view.opening["cap"]
        for entry in self.view.entries:
            if entry.kind == "open":
                before = entry.body["cap"]
            elif entry.kind == "reserve" and entry.body["run"] == run:
                return bool(cap < before)
        return False

    def _reserved(self, run: str, event: PrivacyEvent) -> bool:
        """Whether the event is planned in a reservation that is still open, and not charged yet."""
        if self._has("close", run=run):
            return False
        return any(
            event.to_dict() in entry.body["events"]
            for entry in self.view.entries
            if entry.kind == "reserve" and entry.body["run"] == run
        ) and not any(
            entry.kind == "charge" and entry.body["run"] == run and entry.body["event"] == event.to_dict()
            for entry in self.view.entries
        )

    def value(self, study: str, kind: str) -> int | None:
        """A number released earlier for the same study; using it again costs nothing."""
        for entry in self.view.entries:
            if entry.kind == "charge" and entry.body["study"] == study and entry.body["event"]["kind"] == kind:
                return int(entry.body["value"])
        return None

    def keep(self, request: str, value: list[float]) -> None:
        """Keep what a charged request released, so that it can be given again at no cost."""
        self._append("value", {"request": request, "value": value})

    def kept(self, request: str) -> list[float] | None:
        """What a request released earlier, if it did."""
        found = (entry.body for entry in self.view.entries if entry.kind == "value")
        return next((body["value"] for body in found if body["request"] == request), None)

    def released(self, request: str) -> None:
        """Mark a reply as handed over, before the transport gets it."""
        if not self._has("released", request=request):
            self._append("released", {"request": request})

    def finish(self, run: str) -> None:
        """Give back what a run reserved and did not use."""
        if self._has("reserve", run=run) and not self._has("close", run=run):
            self._append("close", {"run": run})
