"""After a loss: what the ledger no longer shows is declared as spent, and the site can go on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gapweave.client.anchor import REMEMBERED_FILE, Anchor
from gapweave.client.journal import PUT_ASIDE, held
from gapweave.client.ledger import Ledger
from gapweave.client.state import kept_heads
from gapweave.shared.config.site import Site
from gapweave.shared.errors import GapweaveError, RefusedError, UsageError
from gapweave.shared.privacy.accountant import renyi_epsilon, renyi_order
from gapweave.shared.privacy.events import PrivacyEvent
from gapweave.shared.privacy.head import Head, read_anchor
from gapweave.shared.privacy.ledger import LEDGER_FILE, LedgerView, read_ledger

ANY_DELTA = 1e-5
"""To see whether an event can be accounted for at all."""
LARGEST = 1e6
"""An epsilon beyond which an entry says nothing that can be believed."""


def recover(state: Path, site: Site, anchor: Path | None, assume_spent: float) -> LedgerView:
    """Declare that entries of a site's ledger were lost, and what they may have cost.

    Guarantee: it only ever raises what counts as spent. A ledger that was changed is put aside, not deleted; what its
    entries still say was spent counts at least, whatever is assumed.

    Args:
        state: the site's state folder.
        site: its site file.
        anchor: the file that keeps the ledger's head, if there is one.
        assume_spent: epsilon that everything may have cost that the remaining ledger does not show.

    Returns:
        The ledger afterwards.

    Raises:
        UsageError: for an epsilon that is no number of at least 0, or a place where no anchor can be.
        RefusedError: when a changed ledger says that something left without noise, which no epsilon covers.
        GapweaveError: when the ledger cannot be read now, which is no loss.
    """
    if not (math.isfinite(assume_spent) and assume_spent >= 0):
        raise UsageError(f"{assume_spent} is no epsilon", where="--assume-spent", remedy="Give a number of at least 0")
    if anchor is not None:
        Anchor(anchor, state, site.name)  # refuses what cannot be one, before anything is made or moved
    with held(state):  # nobody writes between the look and the new name
        changed = _changed(state)
        assume_spent = max(assume_spent, _still_said(_not_believed(state, changed), site))
        if math.isinf(assume_spent):
            raise RefusedError(
                "the changed ledger says that something left without noise: no epsilon covers that",
                where=str(state),
                remedy="Restore it from the newest backup; other patients need a state folder of their own",
            )
        if changed:
            _put_aside(state)
    remembered = state / REMEMBERED_FILE
    heads = [_head(path) for path in (anchor, remembered) if path is not None]
    with Ledger(state, site, anchor, lost=True) as ledger:
        heads += [head for head in kept_heads(state) if not ledger.view.continues(head)]
        ledger.recover(assume_spent, [head for head in heads if head is not None])
        remembered.unlink(missing_ok=True)
        return ledger.view


def _changed(state: Path) -> bool:
    """Whether there is a ledger that cannot be believed."""
    if not (state / LEDGER_FILE).exists():
        return False
    try:
        return not read_ledger(state).intact
    except RefusedError:
        return True


def _not_believed(state: Path, changed: bool) -> list[Path]:
    """Changed ledgers whose cost the ledger does not declare, oldest first: those put aside before, and itself.

    A recovery that was killed has put one aside and declared nothing.
    """
    ledger = state / LEDGER_FILE
    if not changed and ledger.exists() and read_ledger(ledger).recovered:
        return []
    return [*sorted(state.glob(f"{PUT_ASIDE}*-{LEDGER_FILE}")), *([ledger] if changed else [])]


def _still_said(ledgers: Sequence[Path], site: Site) -> float:
    """What entries of changed ledgers that can be read say was spent, at least.

    Each declared what those before it cost; where that cannot be read any more, it is added.
    """
    total = 0.0
    for ledger in ledgers:
        declared, shown = _one_said(ledger, site, len(ledgers))
        total = max(total, (declared or total) + shown)
    return total


def _one_said(ledger: Path, site: Site, ledgers: int) -> tuple[float, float]:
    """What a changed ledger declared of earlier losses, and what its own entries cost.

    By the filter, at the share of delta that a ledger leaves to what it lost (`LedgerView._share`): half of a new
    one's, divided again where this one had lost entries itself. What it declared then keeps the share that it had.
    """
    try:
        entries = read_ledger(ledger).entries
    except RefusedError:
        return 0.0, 0.0
    declared = [_number(entry.body.get("assume_spent")) for entry in entries if entry.kind == "recover"]
    events = [event for entry in entries if entry.kind == "charge" for event in _accounted(entry.body)]
    caps = [_number(entry.body.get("cap")) for entry in entries if entry.kind == "open"]
    delta = site.delta / (2 * ledgers * (1 + len(declared)))
    orders = {renyi_order(delta, cap) for cap in [site.policy.epsilon, *caps] if cap > 0}
    return math.fsum(declared), max(renyi_epsilon(events, delta, order) if events else 0.0 for order in orders)


def _accounted(body: dict[str, Any]) -> list[PrivacyEvent]:
    """The event of a charge, if it can be read and accounted for."""
    try:
        event = PrivacyEvent.from_dict(body["event"])
        renyi_epsilon([event], ANY_DELTA)
    except (GapweaveError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
        return []
    return [event]


def _number(value: object) -> float:
    """A number of at least 0; else 0."""
    return float(value) if isinstance(value, int | float) and 0 < value < LARGEST else 0.0


def _put_aside(state: Path) -> None:
    """Rename the ledger with SQLite's own files beside it."""
    mark = f"{datetime.now(UTC):%Y%m%d-%H%M%S}"
    for file in sorted(state.glob(f"{LEDGER_FILE}*")):
        file.rename(file.with_name(f"{PUT_ASIDE}{mark}-{file.name}"))


def _head(path: Path) -> Head | None:
    try:
        return read_anchor(path)
    except RefusedError:
        return None  # what it held is lost too, and assumed
