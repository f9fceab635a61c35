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
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gapweave.shared.errors import RefusedError, UsageError
from gapweave.shared.privacy.accountant import epsilon, renyi_epsilon, renyi_order
from gapweave.shared.privacy.events import PrivacyEvent

LEDGER_FILE = "ledger.sqlite"
GENESIS = "0" * 64


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of a ledger.

    Attributes:
        sequence: 1, 2, 3, ...
        time: UTC, ISO 8601.
        kind: open, approve, reserve, charge, released, recompute or close.
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
    def delta(self) -> float:
        """Delta of the ledger, fixed when it was first opened."""
        return float(next(entry.body["delta"] for entry in self.entries if entry.kind == "open"))

    def events(self, run: str | None = None) -> list[PrivacyEvent]:
        """Charged events, of one run or of all."""
        return [
            PrivacyEvent.from_dict(entry.body["event"])
            for entry in self.entries
            if entry.kind == "charge" and run in (None, entry.body["run"])
        ]

    def outstanding(self, run: str | None = None) -> Iterator[PrivacyEvent]:
        """Events reserved by runs that are not closed, less those charged; all runs but `run`."""
        closed = {entry.body["run"] for entry in self.entries if entry.kind == "close"}
        for entry in self.entries:
            if entry.kind != "reserve" or entry.body["run"] in closed | {run}:
                continue
            charged = Counter(
                item.body["event"]["released"]
                for item in self.entries
                if item.kind == "charge" and item.body["run"] == entry.body["run"]
            )
            for planned in entry.body["events"]:
                if charged[planned["released"]] == 0:
                    yield PrivacyEvent.from_dict(planned)

    def spent(self) -> float:
        """Epsilon of everything charged; infinite after a release without noise."""
        return epsilon(self.events(), self.delta)

    def spent_renyi(self) -> float:
        """The same by Renyi composition, at the order that the ledger's delta and its first cap fix."""
        first = next(entry.body for entry in self.entries if entry.kind == "open")
        return renyi_epsilon(self.events(), self.delta, renyi_order(self.delta, first["cap"]))

    def summary(self) -> dict[str, Any]:
        """What `gapweave privacy verify --json` prints."""
        opening, spent, renyi = self.opening, self.spent(), self.spent_renyi()
        return {
            "site": opening.get("site"),
            "cohort": opening.get("cohort"),
            "unit": opening.get("unit"),
            "epsilon": spent if math.isfinite(spent) else None,
            "epsilon_filter": renyi if math.isfinite(renyi) else None,
            "delta": self.delta,
            "cap": opening.get("cap"),
            "releases": folded(self.events()),
            # Without an anchor outside the state folder, a restored old copy cannot be told from the real one.
            "intact": "unanchored" if self.intact else False,
        }


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
    """
    file = path / LEDGER_FILE if path.is_dir() else path
    if not file.exists():
        raise UsageError("there is no ledger", where=str(path), remedy="Give a site's state folder")
    try:
        with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as connection:
            return view(connection)
    except sqlite3.DatabaseError:
        raise RefusedError(
            "the ledger cannot be read", where=str(file), remedy="Restore it from the newest backup"
        ) from None


def view(connection: sqlite3.Connection) -> LedgerView:
    """All entries, with their chain checked."""
    previous, broken, entries = GENESIS, None, []
    rows = connection.execute("SELECT sequence, time, kind, body, previous, hash FROM entries ORDER BY sequence")
    for expected, (sequence, time, kind, body, before, stored) in enumerate(rows, start=1):
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
