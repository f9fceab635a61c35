"""The only writer of a site's ledger.

Guarantee: an event is durable before any work on data that it covers; a crash, a restart, a repeated request or
a second study can over-state what was spent, never under-state it. The site's cap is checked before.

A study's whole schedule, or its longest prefix that the cap allows, is reserved before its first round. The cap
binds a Renyi filter, which holds whoever chose which study after seeing what; a site's first study, whose schedule
is fixed in advance, may use the exact figure instead (docs/decisions/0005). The file itself: `client/journal.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from gapweave.client.anchor import RECOVER
from gapweave.client.budget import Budget
from gapweave.client.journal import Journal
from gapweave.shared.errors import BudgetExhausted, NotIntact, RefusedError, UsageError
from gapweave.shared.privacy.events import PrivacyEvent
from gapweave.shared.privacy.head import Head
from gapweave.shared.privacy.ledger import HOSPITAL
from gapweave.shared.report.wording import budget


class Ledger(Journal):
    """One site's ledger: what was approved, reserved, charged, released and declared."""

    def approve(self, study: str, name: str, by: str) -> None:
        """Record that a study was approved, once."""
        if not self._has("approve", study=study):
            self._append("approve", {"study": study, "name": name, "by": by})

    def affords(self, run: str, study: str, events: Sequence[PrivacyEvent]) -> bool:
        """Whether the cap leaves a run room for further events, beside what is spent and reserved."""
        return Budget(self.view).affords(run, study, events)

    def reserve(
        self,
        run: str,
        study: str,
        events: Sequence[PrivacyEvent],
        setting: Mapping[str, Any] | None = None,
        *,
        may_stop: bool = False,
    ) -> int:
        """Set aside the longest prefix of a run's events that the cap allows.

        Repeating it for the same run changes nothing.

        Args:
            run: our own id of the run.
            study: hash of the study.
            events: that the run plans.
            setting: what a report says of the run beside its events (`setting.run_setting`).
            may_stop: whether the run may end because of scores, this site's or others'.

        Returns:
            Number of events reserved.

        Raises:
            BudgetExhausted: when not even the first fits.
        """
        known = self.view.reservation(run)
        if known is not None:
            return len(known["events"])
        count, figure = Budget(self.view).prefix(run, study, events)
        if count == 0:
            raise self.no_room(run, events)
        planned = [event.to_dict() for event in events[:count]]
        body: dict[str, Any] = {"run": run, "study": study, "figure": figure, "events": planned}
        if setting is not None:
            body["setting"] = dict(setting)
        if may_stop:
            body["may_stop"] = True
        self._append("reserve", body)
        return count

    def no_room(self, run: str, events: Sequence[PrivacyEvent]) -> BudgetExhausted:
        """The refusal of a run of whose events not even one round's fit."""
        room = Budget(self.view)
        held = ", or give up runs that will not go on (gapweave site budget)" if self.view.open_runs else ""
        return BudgetExhausted(
            f"not one round fits: epsilon {budget(self.view.bound())} is spent, as this ledger counts "
            f"{budget(room.with_more(events, run))} would be after the study, the cap is {room.cap:g}",
            where=self._where,
            remedy=f"Lower the study's epsilon or its rounds, or raise policy.epsilon{held}",
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
        self._refuse_another(run, request, event)
        again = self.view.charged(request)
        if again and self._never_left(request, event):
            self._append("recompute", {"request": request})
            return
        room = Budget(self.view)
        if not (room.affords(run, study, [event]) if again else room.covers(run, study, event)):
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
        """Refuse a second request for one release, and a second release for one request.

        The answer of the one could differ from what may have left; the other is in no schedule.
        """
        for entry in self.view.entries:
            if entry.kind != "charge":
                continue
            released = entry.body["event"]["released"]
            same = entry.body["request"] == request
            if same and released != event.released:
                raise RefusedError(f"the request for {released!r} was charged already", where=self._where)
            if not same and entry.body["run"] == run and released == event.released:
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

    def give_up(self, run: str) -> None:
        """End the site's part in a run that will not go on, and give back what it reserved and did not use.

        Raises:
            UsageError: when no such run is open.
        """
        if run not in (known := [entry.run for entry in self.view.open_runs]):
            raise UsageError(
                f"no run {run!r} holds a part of the budget",
                where="--close",
                remedy=f"Runs that do: {', '.join(known) or 'none'}",
            )
        self._append("close", {"run": run, "by": HOSPITAL})

    def recover(self, assume_spent: float, lost: Sequence[Head]) -> None:
        """Declare entries lost, and what they may have cost: it counts as spent from now on."""
        heads = [{"length": head.length, "hash": head.hash} for head in lost]
        self._keeper = self._anchor
        self._append("recover", {"assume_spent": assume_spent, "lost": heads})


def _request_once(study: str, event: PrivacyEvent) -> str:
    return hashlib.sha256(f"{study}/{event.released}".encode()).hexdigest()
