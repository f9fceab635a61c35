"""What a site's cap has room for, from its ledger alone: no data, nothing that a server says.

Two figures may keep the cap (docs/decisions/0005). The Renyi filter adds costs at one order that was fixed with
the ledger: it holds whoever chose which study after seeing what. The exact figure of a schedule that is fixed in
advance is smaller, and valid as long as the ledger has seen nothing else: a site's first study may be granted it,
and then never gives its rest back, since to stop early because of a result is not in that schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from gapweave.shared.privacy.accountant import fixed_epsilon
from gapweave.shared.privacy.events import PrivacyEvent
from gapweave.shared.privacy.ledger import LedgerView
from gapweave.shared.privacy.plan import longest_prefix

Figure = Literal["renyi", "fixed"]


class Budget:
    """Room under the cap.

    Args:
        view: the ledger as it stands.
    """

    def __init__(self, view: LedgerView) -> None:
        self._view = view
        self.cap = float(view.opening["cap"])

    def with_more(self, events: Sequence[PrivacyEvent], run: str | None = None) -> float:
        """Epsilon by the filter of what is spent, reserved by other runs, and asked."""
        return self._view.filtered([*self._view.outstanding(run), *events])

    def allows(self, events: Sequence[PrivacyEvent], run: str | None = None) -> bool:
        """Whether the filter has room for further events, beside what is spent and reserved by other runs."""
        return all(event.kind == "unnoised" for event in events) or self.with_more(events, run) <= self.cap

    def _allows_fixed(self, run: str, study: str, events: Sequence[PrivacyEvent]) -> bool:
        """Whether the exact figure has room, for a run that may use it."""
        mine = all(body["run"] == run and body["figure"] == "fixed" for body in self._view.binding)
        if not (mine and self._view.alone(study)):
            return False
        return fixed_epsilon([*self._view.events(), *events], self._view.delta) <= self.cap

    def prefix(self, run: str, study: str, events: Sequence[PrivacyEvent]) -> tuple[int, Figure]:
        """Length of the longest prefix of a run's events that the cap allows, and the figure that allows it."""
        count = longest_prefix(events, lambda part: self.allows(part, run))
        if count == len(events):
            return count, "renyi"
        exact = longest_prefix(events, lambda part: self._allows_fixed(run, study, part))
        return (exact, "fixed") if exact > count else (count, "renyi")

    def affords(self, run: str, study: str, events: Sequence[PrivacyEvent]) -> bool:
        """Whether the cap has room for events that nobody reserved.

        Once a run has its reservation, the exact figure pays for nothing beyond that schedule.
        """
        if self.allows(events):
            return True
        early = self._view.reservation(run) is None
        return early and self._allows_fixed(run, study, [*self._view.outstanding(), *events])

    def covers(self, run: str, study: str, event: PrivacyEvent) -> bool:
        """Whether the run's reservation pays for an event, or the cap has room for it."""
        if not self._reserved(run, event):
            return self.affords(run, study, [event])
        if not self._less_room(run):
            return True
        return self.allows([event], run) or self._allows_fixed(run, study, [event])

    def _reserved(self, run: str, event: PrivacyEvent) -> bool:
        """Whether the event is planned in a reservation that is still open, and not charged yet."""
        reservation = self._view.reservation(run)
        if reservation is None or self._view.closed(run):
            return False
        asked, charges = event.to_dict(), [entry.body for entry in self._view.entries if entry.kind == "charge"]
        charged = any(body["run"] == run and body["event"] == asked for body in charges)
        return asked in reservation["events"] and not charged

    def _less_room(self, run: str) -> bool:
        """Whether, since the run's reservation, the hospital lowered its cap or declared lost entries."""
        entries = self._view.entries
        at = next(n for n, entry in enumerate(entries) if entry.kind == "reserve" and entry.body["run"] == run)
        before = next(entry.body["cap"] for entry in reversed(entries[:at]) if entry.kind == "open")
        return self.cap < before or any(entry.kind == "recover" for entry in entries[at:])
