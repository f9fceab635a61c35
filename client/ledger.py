"""The only writer of a site's ledger.

Guarantee: an event is durable before any work on data that it covers; a crash, a restart, a repeated request or
a second study can over-state what was spent, never under-state it. The site's cap is checked before.

A study's whole schedule, or its longest prefix that the cap allows, is reserved before its first round. The cap
binds a Renyi filter, which holds whoever chose which study after seeing what; a site's first study, whose schedule
is fixed in advance, may use the exact figure instead (docs/decisions/0005). One process at a time holds the ledger,
and its head is kept outside the folder where the site file names an anchor.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gapweave.client.anchor import RECOVER, REMEMBERED_FILE, Anchor, check_head
from gapweave.client.budget import Budget
from gapweave.shared.config.site import Site
from gapweave.shared.errors import BudgetExhausted, GapweaveError, LedgerBusy, NotIntact, RefusedError
from gapweave.shared.files import private_folder, sync_folder
from gapweave.shared.privacy.events import PrivacyEvent
from gapweave.shared.privacy.head import Head, read_anchor, write_anchor
from gapweave.shared.privacy.ledger import (
    GENESIS,
    LEDGER_FILE,
    Entry,
    LedgerView,
    entry_hash,
    view,
)

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

DISK = ("SQLITE_IOERR", "SQLITE_FULL", "SQLITE_CANTOPEN", "SQLITE_READONLY")
"""How the names of SQLite's errors begin that come from the disk: they say nothing of what the ledger holds."""
PUT_ASIDE = "changed-"
"""How the name of a ledger begins that `site recover` put aside."""
PATIENCE_S = 60.0
"""How long a process waits for another one that holds the ledger: a training step of another study, as a rule."""


class Ledger:
    """One site's ledger, held exclusively while open; use it as a context manager.

    Args:
        state: the site's state folder.
        site: its name, cohort and policy are recorded when they are new.
        anchor: file outside the state folder that keeps the ledger's head; None for none.
        lost: open a ledger of which entries were lost, to declare that; see `client/recovery.py`.
        durable: False for a simulation without noise: its entries survive a crash of the process, not of the machine.
            Where the ledger holds a noised release, entries are durable all the same.
        checked: the ledger as this process left it, whose chain need not be checked again.

    Raises:
        RefusedError: when the chain of hashes does not hold, or entries are missing that the anchor has seen.
        LedgerBusy: when another process holds the ledger.
        UsageError: when the anchor cannot be written.
    """

    def __init__(
        self,
        state: Path,
        site: Site,
        anchor: Path | None = None,
        *,
        lost: bool = False,
        durable: bool = True,
        checked: LedgerView | None = None,
    ) -> None:
        self._checked = checked
        self._durable = durable
        self._state, self._where = state, str(state / LEDGER_FILE)
        self._anchor = None if anchor is None else Anchor(anchor, state, site.name)
        # What is lost must stay visible until it is declared: the anchor then keeps what it has seen.
        self._keeper = None if lost else self._anchor
        with ExitStack() as opened:
            try:
                self._connection = self._connected(opened)
                self._open(site, lost)
            except OSError as error:
                raise self._unwritable(error.strerror) from None
            except sqlite3.DatabaseError as error:
                if getattr(error, "sqlite_errorname", "").startswith(DISK):
                    raise self._unwritable(error) from None
                raise NotIntact(
                    "the ledger cannot be read", where=self._where, remedy="Restore it from the newest backup"
                ) from None
            self._opened = opened.pop_all()

    def _connected(self, opened: ExitStack) -> sqlite3.Connection:
        """The file, which is there after a power cut too, and which no other process holds."""
        private_folder(self._state)
        os.close(os.open(self._where, os.O_RDWR | os.O_CREAT, 0o600))
        if self._durable:
            sync_folder(self._state)
        opened.callback(os.close, _locked(self._state / "ledger.lock", self._where))
        connection = sqlite3.connect(self._where, isolation_level=None)
        opened.callback(connection.close)
        return connection

    def _unwritable(self, why: object) -> GapweaveError:
        return GapweaveError(
            f"the ledger cannot be written ({why})", where=self._where, remedy="Check the disk; nothing was released"
        )

    def _open(self, site: Site, lost: bool) -> None:
        # What follows writes at most empty tables; what is in a ledger is known once they are there.
        self._connection.execute(f"PRAGMA synchronous={'FULL' if self._durable else 'OFF'}")
        self._connection.execute("PRAGMA journal_mode=WAL")
        if self._checked is None:
            self._connection.executescript(SCHEMA)
        self.view: LedgerView = view(self._connection, self._checked)
        if not self._durable and any(event.kind != "unnoised" for event in self.view.events()):
            self._connection.execute("PRAGMA synchronous=FULL")
        if not self.view.intact:
            raise NotIntact(
                "the ledger was changed: its hashes do not follow from its entries",
                where=self._where,
                remedy=f"Restore the newest backup, or {RECOVER}; nothing is released until then",
            )
        if self.view.entries and self.view.opening["site"] != site.name:
            raise RefusedError(
                f"this ledger belongs to site {self.view.opening['site']!r}, not {site.name!r}",
                where=self._where,
                remedy="Give each site its own state folder",
            )
        if not lost:
            self._check_declared()
        delta = self.view.delta if self.view.entries else min(site.policy.delta, 0.1 / site.patients.upper)
        opening = {
            "site": site.name,
            "cohort": site.cohort,
            "unit": "patient",
            "delta": delta,
            "cap": site.policy.epsilon,
            "anchor": None if self._anchor is None else str(self._anchor.path),
        }
        if self._keeper is not None:
            # Before an entry names the anchor: a crash between the two would look like an anchor that is gone.
            self._keeper.write(replace(self.view.head, site=site.name))
        if self.view.opening != opening:
            self._append("open", opening)

    def _check_declared(self) -> None:
        """Refuse a ledger that lost entries, unless their cost was declared."""
        if self._anchor is not None:
            self._anchor.check(self.view)
        remembered = read_anchor(self._state / REMEMBERED_FILE)
        if remembered is not None and remembered.site == self.view.head.site:
            check_head(self.view, remembered, "the server", self._where)
        if not self.view.recovered and any(self._state.glob(f"{PUT_ASIDE}*{LEDGER_FILE}")):
            raise NotIntact(
                "a changed ledger was put aside, and nobody declared what it had spent",
                where=self._where,
                remedy="Declare it with `gapweave site recover`",
            )

    def check_echo(self, head: Head | None) -> None:
        """Compare with what the server remembers; it can stop the site, never change what counts as spent.

        Raises:
            RefusedError: when entries that the server has seen are missing.
        """
        if head is None or head.site != self.view.head.site:
            return
        try:
            check_head(self.view, head, "the server", self._where)
        except RefusedError:
            write_anchor(self._state / REMEMBERED_FILE, head)
            raise

    def close(self) -> None:
        """Let another process have the ledger."""
        self._opened.close()

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
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        text = json.dumps(body, sort_keys=True)
        digest = entry_hash(sequence, now, kind, text, previous)
        self._insert(sequence, now, kind, text, previous, digest)
        entry = Entry(sequence=sequence, time=now, kind=kind, body=json.loads(text), previous=previous, hash=digest)
        self.view = LedgerView(entries=(*entries, entry), intact=True)
        if self._keeper is not None:
            self._keeper.write(self.view.head)

    def _insert(self, *values: int | str) -> None:
        try:
            self._connection.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?)", values)
        except sqlite3.IntegrityError:
            raise RefusedError(
                "another process wrote to the ledger meanwhile",
                where=self._where,
                remedy="Run one process a state folder, on a file system with locks",
            ) from None
        except sqlite3.DatabaseError as error:
            raise self._unwritable(error) from None

    def _has(self, kind: str, **match: str) -> bool:
        return any(
            entry.kind == kind and all(entry.body.get(key) == value for key, value in match.items())
            for entry in self.view.entries
        )

    def approve(self, study: str, name: str, by: str) -> None:
        """Record that a study was approved, once."""
        if not self._has("approve", study=study):
            self._append("approve", {"study": study, "name": name, "by": by})

    def affords(self, run: str, study: str, events: Sequence[PrivacyEvent]) -> bool:
        """Whether the cap leaves a run room for further events, beside what is spent and reserved."""
        return Budget(self.view).affords(run, study, events)

    def reserve(
        self, run: str, study: str, events: Sequence[PrivacyEvent], setting: Mapping[str, Any] | None = None
    ) -> int:
        """Set aside the longest prefix of a run's events that the cap allows.

        Repeating it for the same run changes nothing.

        Args:
            run: our own id of the run.
            study: hash of the study.
            events: that the run plans.
            setting: what a report says of the run beside its events (`setting.run_setting`).

        Returns:
            Number of events reserved.

        Raises:
            BudgetExhausted: when not even the first fits.
        """
        known = self.view.reservation(run)
        if known is not None:
            return len(known["events"])
        budget = Budget(self.view)
        count, figure = budget.prefix(run, study, events)
        if count == 0:
            raise self.no_room(run, events)
        planned = [event.to_dict() for event in events[:count]]
        body = {"run": run, "study": study, "figure": figure, "events": planned}
        self._append("reserve", body if setting is None else {**body, "setting": dict(setting)})
        return count

    def no_room(self, run: str, events: Sequence[PrivacyEvent]) -> BudgetExhausted:
        """The refusal of a run of whose events not even one round's fit."""
        budget = Budget(self.view)
        return BudgetExhausted(
            f"not one round fits: epsilon {self.view.bound():.2f} is spent, {budget.with_more(events, run):.2f} "
            f"would be after the study, the cap is {budget.cap:g}",
            where=self._where,
            remedy="Lower the study's epsilon or its rounds, or raise policy.epsilon",
        )

    def charge(self, run: str, study: str, request: str, event: PrivacyEvent) -> None:
        """Write an event before the work that it covers.

        A request that was charged but never answered (a crash in between) may be recomputed once under the
        same event; every further time, and where an answer may have left, it is charged again.

        Args:
            run: our own id of the run.
            study: hash of the study.
            request: hash of the whole request.
            event: what will be released.

        Raises:
            RefusedError: when the same release of the run was charged for another request.
            BudgetExhausted: when the event is outside the run's reservation and beyond the cap.
        """
        again = self.view.charged(request)
        if again and self._never_left(request, event):
            self._append("recompute", {"request": request})
            return
        if not again:
            self._refuse_another(run, request, event)
        budget = Budget(self.view)
        if not (budget.affords(run, study, [event]) if again else budget.covers(run, study, event)):
            raise BudgetExhausted(
                f"the site's cap leaves no room for this release: {event.released}",
                where=self._where,
                remedy="`gapweave privacy report` shows what was spent",
            )
        self._append("charge", {"run": run, "study": study, "request": request, "event": event.to_dict()})

    def _never_left(self, request: str, event: PrivacyEvent) -> bool:
        """Whether a charge was for just this event, and no result of it can have left."""
        charges = [entry.body for entry in self.view.entries if entry.kind == "charge"]
        same = any(body["request"] == request and body["event"] == event.to_dict() for body in charges)
        return same and not any(self._has(kind, request=request) for kind in ("recompute", "released"))

    def _refuse_another(self, run: str, request: str, event: PrivacyEvent) -> None:
        """Refuse a second request for one release: its answer could differ from what may have left."""
        for entry in self.view.entries:
            if entry.kind != "charge" or entry.body["run"] != run or entry.body["request"] == request:
                continue
            if entry.body["event"]["released"] == event.released:
                raise RefusedError(
                    f"{event.released!r} was charged for another request",
                    where=self._where,
                    remedy="Resume the run from its newest checkpoint",
                )

    def require_charged(self, request: str) -> None:
        """Refuse to go on when the site holds an answer that the ledger knows nothing of.

        Raises:
            RefusedError: when entries were lost.
        """
        if request and not self.view.charged(request) and not self.view.recovered:
            raise NotIntact(
                "the site holds a reply that its ledger has no charge for: entries were lost",
                where=self._where,
                remedy=f"Restore the newest copy, or {RECOVER}",
            )

    def once(self, run: str, study: str, event: PrivacyEvent, compute: Callable[[], list[float]]) -> list[float]:
        """What a study released here before, or a new value: charged, computed, and kept.

        Args:
            run: that asks first.
            study: hash of the study; another run of it uses the value again, at no cost.
            event: the release.
            compute: gives the noised value; called after the charge only.

        Raises:
            BudgetExhausted: when the cap leaves no room.
        """
        value = self.released_once(study, event)
        if value is None:
            request = _request_once(study, event)
            self.charge(run, study, request, event)
            value = compute()
            self.keep(request, value)
        return value

    def released_once(self, study: str, event: PrivacyEvent) -> list[float] | None:
        """What `once` gave for a study before."""
        return self.kept(_request_once(study, event))

    def unpaid(self, study: str, events: Iterable[PrivacyEvent]) -> list[PrivacyEvent]:
        """Those of a study's releases of `once` that were not charged yet."""
        return [event for event in events if not self.view.charged(_request_once(study, event))]

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
        if self.view.reservation(run) is not None and not self.view.closed(run):
            self._append("close", {"run": run})

    def recover(self, assume_spent: float, lost: Sequence[Head]) -> None:
        """Declare entries lost, and what they may have cost: it counts as spent from now on."""
        heads = [{"length": head.length, "hash": head.hash} for head in lost]
        self._keeper = self._anchor
        self._append("recover", {"assume_spent": assume_spent, "lost": heads})


def _request_once(study: str, event: PrivacyEvent) -> str:
    return hashlib.sha256(f"{study}/{event.released}".encode()).hexdigest()


def _locked(path: Path, where: str) -> int:
    """Descriptor of a file that no other process has locked."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(0.02)
                continue
            os.close(descriptor)
            raise LedgerBusy(
                "another process holds the ledger", where=where, remedy="Wait for it, or stop it; one at a time writes"
            ) from None
        return descriptor
