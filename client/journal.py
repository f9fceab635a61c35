"""The file of a site's ledger: append-only, chained by hashes, held by one process at a time.

Its head is kept outside the state folder where the site file names an anchor, and by the server; a file that lost
entries is refused until somebody declares what they may have cost. What entries mean: `client/ledger.py`.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gapweave.client.anchor import RECOVER, REMEMBERED_FILE, Anchor, check_former, check_head, check_remembered
from gapweave.client.state import kept_heads
from gapweave.shared.config.site import Site
from gapweave.shared.errors import GapweaveError, LedgerBusy, NotIntact, RefusedError
from gapweave.shared.files import private_folder, sync_folder, try_lock
from gapweave.shared.privacy.head import Head, write_anchor
from gapweave.shared.privacy.ledger import (
    GENESIS,
    LEDGER_FILE,
    Entry,
    LedgerView,
    entry_hash,
    from_outside,
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

PUT_ASIDE = "changed-"
"""How the name of a ledger begins that `site recover` put aside."""
PATIENCE_S = 60.0
"""How long a process waits for another one that holds the ledger: a training step of another study, as a rule."""


class Journal:
    """The entries of one site's ledger, held exclusively while open; use it as a context manager.

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
                if from_outside(error):
                    raise self._unwritable(error) from None
                raise NotIntact(
                    "the ledger cannot be read", where=self._where, remedy="Restore it from the newest backup"
                ) from None
            self._opened = opened.pop_all()

    def _connected(self, opened: ExitStack) -> sqlite3.Connection:
        """The file, which is there after a power cut too, and which no other process holds."""
        opened.enter_context(held(self._state))
        os.close(os.open(self._where, os.O_RDWR | os.O_CREAT, 0o600))
        if self._durable:
            sync_folder(self._state)
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
        delta = self.view.delta if self.view.entries else site.delta
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
        check_former(self.view, self._anchor, self._where)
        check_remembered(self._state, self.view)
        if self._durable and self._checked is None:
            for head in kept_heads(self._state):
                check_head(self.view, head, "a run in this state folder", self._where)
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


@contextmanager
def held(state: Path) -> Iterator[None]:
    """No other process opens the ledger of a state folder, which is created.

    Raises:
        LedgerBusy: when one has it, and keeps it.
    """
    private_folder(state)
    descriptor = os.open(state / "ledger.lock", os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + PATIENCE_S
    try:
        while not try_lock(descriptor, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                raise LedgerBusy(
                    "another process holds the ledger",
                    where=str(state / LEDGER_FILE),
                    remedy="Wait for it, or stop it; one at a time writes",
                )
            time.sleep(0.02)
        yield
    finally:
        os.close(descriptor)
